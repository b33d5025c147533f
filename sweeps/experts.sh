#!/bin/sh
# What do experts buy, at equal active FLOPs? A token goes to 2 of 4, 8 or 16 experts of width 32, or
# through one of width 64; per token (as many steps), and per second (as long).
. "$(dirname "$0")/lib.sh"
dense="model.num_experts=1 model.top_k=1 model.d_expert=64 model.balance=none"
for budget in max_steps=2500 max_time=00:00:01:00; do
  train stage=pretrain model=moe_nano "stages.pretrain.$budget" $dense "$@"
  train stage=pretrain model=moe_nano "stages.pretrain.$budget" model.num_experts=4,8,16 "$@"
done
compare stage=pretrain
