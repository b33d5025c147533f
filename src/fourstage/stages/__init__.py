"""The five stages: one file, one formula set, one LightningModule each."""

from fourstage.stages.base import StageModule, StageSettings
from fourstage.stages.grpo import GRPOModule, GRPOSettings
from fourstage.stages.ppo import PPOModule, PPOSettings
from fourstage.stages.pretrain import PretrainModule, PretrainSettings
from fourstage.stages.reward import RewardModule, RewardSettings
from fourstage.stages.sft import SFTModule, SFTSettings

SETTINGS: dict[str, type[StageSettings]] = {
    "pretrain": PretrainSettings,
    "sft": SFTSettings,
    "reward": RewardSettings,
    "ppo": PPOSettings,
    "grpo": GRPOSettings,
}

__all__ = [
    "SETTINGS",
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
