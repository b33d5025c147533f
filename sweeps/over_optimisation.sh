#!/bin/sh
# How far does the true score follow the learned one as KL grows? Ppo for 40 rollouts, held back by
# the KL penalty as usual, or not at all.
. "$(dirname "$0")/lib.sh"
train stage=ppo stages.ppo.max_steps=40 stages.ppo.kl_coef=0.2,0 "$@"
compare stage=ppo
