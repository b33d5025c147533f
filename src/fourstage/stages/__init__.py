"""The stages of ladder.py: one file, one formula set, one LightningModule each."""

from fourstage.stages.base import StageModule, StageSettings
from fourstage.stages.grpo import GRPOModule, GRPOSettings
from fourstage.stages.ppo import PPOModule, PPOSettings
from fourstage.stages.pretrain import PretrainModule, PretrainSettings
from fourstage.stages.reward import RewardModule, RewardSettings
from fourstage.stages.sft import SFTModule, SFTSettings

__all__ = [
    "GRPOModule",
    "GRPOSettings",
    "PPOModule",
    "PPOSettings",
    "PretrainModule",
    "PretrainSettings",
    "RewardModule",
    "RewardSettings",
    "SFTModule",
    "SFTSettings",
    "StageModule",
    "StageSettings",
]
