#!/bin/sh
# Does grpo work straight from the base model? pretrain -> grpo beside sft -> grpo.
. "$(dirname "$0")/lib.sh"
train stage=grpo stages.grpo.parent=sft,pretrain "$@"
compare stage=grpo
