#!/bin/sh
# Does the preference stage help or hurt reasoning?
# sft -> ppo -> grpo beside sft -> grpo, at equal steps of grpo, and at equal FLOPs after sft: at
# moe_tiny, reward and ppo take as many as 120 steps of grpo.
. "$(dirname "$0")/lib.sh"
train stage=grpo stages.grpo.parent=ppo,sft "$@"
train stage=grpo stages.grpo.parent=sft stages.grpo.max_steps=160 "$@"
compare stage=grpo
