"""One plan per job: the first process decides and holds the locks, the others follow it."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fourstage.errors import UserError
from fourstage.job import write_atomic

PATIENCE = 600.0  # seconds in which the first process must show itself


class Ranks:
    """Whether this is the first process of its job, and how the others learn what it decides.

    They talk through a file under outputs/locks/, because they do so before they have met in
    torch.distributed: Lightning starts the others in the middle of the first stage that trains.
    What the file says counts while the first process holds a lock beside it, which ends with the
    process: so nobody follows, or waits for, a process that was killed.
    """

    _jobs = itertools.count()  # a multirun climbs several times in one process
    _key: str | None = None

    def __init__(self, outputs: Path) -> None:
        env = os.environ
        ranks = [int(env[key]) for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if key in env]
        self.is_first = int(env.get("NODE_RANK", 0)) == 0 and (ranks or [0])[0] == 0
        if Ranks._key is None:
            Ranks._key = self._name_of_launch()
        self.path = outputs / "locks" / f"{Ranks._key}.{next(self._jobs)}.decisions"
        self.lock = FileLock(self.path.with_suffix(".lock"))
        self.decisions: dict[str, str] = {}

    def _name_of_launch(self) -> str:
        """The same in every process of a launch by torchrun, by srun or by Lightning."""
        env = os.environ
        for names in (
            # a restart by torchrun is another launch; its usual run id is "none", everywhere
            ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"),
            ("SLURM_JOB_ID", "SLURM_STEP_ID"),
        ):
            if all(name in env for name in names):
                return "-".join(env[name] for name in names)
        if self.is_first:
            env["FOURSTAGE_JOB"] = str(os.getpid())  # Lightning's children inherit it
        return env["FOURSTAGE_JOB"]

    @contextmanager
    def job(self) -> Iterator[None]:
        """The others are told when the first one ends, in whatever way."""
        if not self.is_first:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)  # of an earlier launch of this name
        try:
            self.lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise UserError(
                f"{self.lock.lock_file}: held by another job of this name: end it, or give "
                "torchrun another --rdzv-id"
            ) from None
        try:
            write_atomic(self.path, "{}")
            yield
        except BaseException:
            with suppress(OSError):
                self.tell("end", "failed")
            raise
        else:
            self.path.unlink(missing_ok=True)
            Path(self.lock.lock_file).unlink(missing_ok=True)
        finally:
            self.lock.release()

    def tell(self, run_id: str, decision: str) -> None:
        self.decisions[run_id] = decision
        write_atomic(self.path, json.dumps(self.decisions))

    def wait_for(self, run_id: str) -> Any:
        """The first process' decision on a run. Raises UserError when that process has failed."""
        parent, start, met = os.getppid(), time.monotonic(), False
        while os.getppid() == parent:
            is_there = self._first_is_there()
            met = met or is_there
            if met:
                try:
                    decisions = json.loads(self.path.read_text(encoding="utf-8"))
                except FileNotFoundError:
                    if not is_there:
                        return "found"  # it has ended well
                    decisions = {}  # about to be written
                if run_id in decisions:
                    return decisions[run_id]
                if not is_there:
                    break
            elif time.monotonic() - start > PATIENCE:
                raise UserError(
                    f"{self.path}: no word from the first process of this job in {PATIENCE:.0f} s: "
                    "do all nodes see one outputs folder?"
                )
            time.sleep(0.2)
        raise UserError("the first process of this job has ended: its own output says why")

    def _first_is_there(self) -> bool:
        try:
            with self.lock.acquire(timeout=0):
                return False
        except Timeout:
            return True
