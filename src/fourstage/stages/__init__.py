"""The stages of ladder.py: one file, one formula set, one LightningModule each."""

from fourstage.stages.base import StageModule, StageSettings
from fourstage.stages.grpo import GRPOModule
from fourstage.stages.ppo import PPOModule
from fourstage.stages.pretrain import PretrainModule
from fourstage.stages.reward import RewardModule
from fourstage.stages.sft import SFTModule

__all__ = ["GRPOModule", "PPOModule", "PretrainModule", "RewardModule", "SFTModule"]
__all__ += ["StageModule", "StageSettings"]
