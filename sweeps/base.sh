#!/bin/sh
# Does grpo work straight from the base model?
# pretrain -> grpo beside sft -> grpo, at equal steps of grpo, and at equal FLOPs after pretrain: at
# moe_tiny, sft takes as many as 80 steps of grpo.
. "$(dirname "$0")/lib.sh"
train stage=grpo stages.grpo.parent=sft,pretrain "$@"
train stage=grpo stages.grpo.parent=pretrain stages.grpo.max_steps=120 "$@"
compare stage=grpo
