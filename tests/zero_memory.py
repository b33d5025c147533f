"""Trains two stages under ZeRO in one process: `python -m tests.zero_memory TRAINER OUTPUTS`.

Prints after each stage how many parameters of networks are left, and bytes of tensors.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch

from fourstage.job import StageJob
from fourstage.lineage.climb import climb
from fourstage.lineage.runner import train_stage
from tests.cpu_as_cuda import let_zero_use_cpus
from tests.fakes import config


def train(job: StageJob) -> dict[str, Any]:
    cost = train_stage(job)
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    parameters = sum(type(tensor) is torch.nn.Parameter for tensor in tensors)
    print("left:", parameters, sum(tensor.nbytes for tensor in tensors), flush=True)
    return cost


if __name__ == "__main__":
    let_zero_use_cpus()
    trainer, outputs = sys.argv[1:]
    words = ["model=moe_nano", "debug=fast", "logger=none", "stage=sft", f"trainer={trainer}"]
    climb(config(*words, "trainer.devices=1", f"outputs={outputs}"), train=train)
