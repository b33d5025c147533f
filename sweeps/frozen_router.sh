#!/bin/sh
# Does it matter whether the router learns in RL? ppo and grpo with and without frozen routers.
. "$(dirname "$0")/lib.sh"
train stage=grpo "$@"
train stage=grpo stages.ppo.freeze_router=true stages.grpo.freeze_router=true "$@"
compare stage=grpo
