"""train.py where ZeRO trains on CPU processes: `python -m tests.train_on_cpus trainer=zero2 ...`

With STOP_AT=N in the environment every process gets SIGTERM in step N. With REWARDS=text answers
to problems are rewarded by their text: those of a model that has learned nothing are all wrong.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import train
from fourstage.interruptions import one_line


def patch() -> None:
    from fourstage.lineage.resume import Checkpointer
    from tests.cpu_as_cuda import let_zero_use_cpus

    let_zero_use_cpus()
    if os.environ.get("REWARDS") == "text":
        from fourstage.stages import grpo
        from tests.fakes import one_by_one
        from tests.stages.test_grpo import reward_by_text

        grpo.reasoning_rewards = one_by_one(reward_by_text)
    if "STOP_AT" in os.environ:
        on_train_batch_start = Checkpointer.on_train_batch_start

        def stopping(self: Checkpointer, *args: Any) -> None:
            on_train_batch_start(self, *args)
            if args[-1] + 1 == int(os.environ["STOP_AT"]):
                os.kill(os.getpid(), signal.SIGTERM)

        Checkpointer.on_train_batch_start = stopping


if __name__ == "__main__":
    try:
        patch()
    except OSError as error:  # PyTorch's import needs room for a temporary file
        sys.exit(one_line(error) or repr(error))
    train.COMMAND[1:] = ["-m", __spec__.name]  # of the jobs of a multirun
    train.run()
