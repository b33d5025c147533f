"""The stages of the ladder, as data."""

from __future__ import annotations

STAGES = ("pretrain", "sft", "reward", "ppo", "grpo")
