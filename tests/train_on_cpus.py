"""train.py where ZeRO trains on CPU processes: `python -m tests.train_on_cpus trainer=zero2 ...`

With STOP_AT=N in the environment every process gets SIGTERM in step N. With REWARDS=text answers
to problems are rewarded by their text: those of a model that has learned nothing are all wrong.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import torch

from fourstage.job import TrainerConfig
from fourstage.lineage.resume import Checkpointer
from fourstage.parallel import strategies
from fourstage.stages import grpo
from tests.cpu_as_cuda import let_deepspeed_use_cpus, on_cpus

trainer_options = strategies.trainer_options
on_train_batch_start = Checkpointer.on_train_batch_start


def cpu_options(where: TrainerConfig, clip_norm: float) -> dict[str, Any]:
    options = trainer_options(where, clip_norm)
    if where.strategy in strategies.ZERO:
        on_cpus(options)
    return options


def resolved(self: TrainerConfig) -> TrainerConfig:
    return replace(self, accelerator="cpu", precision="32-true")


def stopping(self: Checkpointer, *args: Any) -> None:
    on_train_batch_start(self, *args)
    if args[-1] + 1 == int(os.environ["STOP_AT"]):
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    torch.set_num_threads(1)
    let_deepspeed_use_cpus()
    strategies.trainer_options = cpu_options
    TrainerConfig.resolved = resolved
    if os.environ.get("REWARDS") == "text":
        from tests.fakes import one_by_one
        from tests.stages.test_grpo import reward_by_text

        grpo.reasoning_rewards = one_by_one(reward_by_text)
    if "STOP_AT" in os.environ:
        Checkpointer.on_train_batch_start = stopping

    import train

    train.COMMAND[1:] = ["-m", __spec__.name]  # of the jobs of a multirun
    train.run()
