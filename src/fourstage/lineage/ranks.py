"""One plan per job: the first process decides and holds the locks, the others follow it."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fourstage.errors import UserError
from fourstage.files import write_atomic

PATIENCE = 600.0  # seconds in which the first process must show itself
GRACE = 20.0  # seconds in which a process must notice by itself that the first one has ended
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system without flock
ENDED = "the first process of this job has ended: its own output says why"
STALE = 86_400.0  # seconds after which a lock that nobody holds is left over from a killed job
OF_TORCHRUN = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
OF_SRUN = ("SLURM_JOB_ID", "SLURM_STEP_ID")
OF_A_TASK = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS")
OF_A_RANK = ("RANK", "LOCAL_RANK")
NUMBERS = (*OF_A_RANK, *OF_A_TASK, "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")


def check_environment() -> None:
    """Make the environment say only what holds of this process; Lightning and PyTorch believe it.

    Notebooks set LOCAL_RANK and RANK for one process, and an allocation of SLURM has variables of
    tasks though no srun started any: these go. Raises UserError for what cannot be meant.
    """
    env = os.environ
    for name in NUMBERS:
        if name in env and not env[name].strip():
            del env[name]
        elif name in env and not env[name].isdecimal():
            raise UserError(f"{name}={env[name]} in the environment: expected a number: unset it")
    if not _has(OF_SRUN):
        for name in OF_A_TASK:
            env.pop(name, None)
    is_child = "LOCAL_RANK" in env and "FOURSTAGE_JOB" in env
    if _has(OF_TORCHRUN) or _has(OF_SRUN) or is_child:
        return
    for name in OF_A_RANK:
        if int(env.pop(name, 0)):
            raise UserError(
                f"{name} in the environment, but this process was started by neither torchrun nor "
                f"srun: start it with one of them, or unset {name}"
            )


def _has(names: Sequence[str]) -> bool:
    return all(name in os.environ for name in names)


class Ranks:
    """Whether this is the first process of its job, and how the others learn what it decides.

    They talk through a file under outputs/locks/, because they do so before they have met in
    torch.distributed: Lightning starts the others in the middle of the first stage that trains.
    What the file says counts while the first process holds a lock beside it (flock), which ends
    with the process: so nobody follows, or waits for, a process that was killed.
    """

    _jobs = itertools.count()  # a multirun climbs several times in one process
    _key: str | None = None
    _parent: int  # the process that started this one, which may be gone already

    def __init__(self, outputs: Path) -> None:
        env = os.environ
        check_environment()
        ranks = [int(env[key]) for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if key in env]
        self.is_first = int(env.get("NODE_RANK", 0)) == 0 and (ranks or [0])[0] == 0
        if Ranks._key is None:
            Ranks._key = self._name_of_launch()
            is_child = Ranks._key == env.get("FOURSTAGE_JOB") and "LOCAL_RANK" in env
            is_child = is_child and "FOURSTAGE_PARENT" in env
            Ranks._parent = int(env["FOURSTAGE_PARENT"]) if is_child else os.getppid()
            env["FOURSTAGE_PARENT"] = str(os.getpid())  # Lightning's children inherit it
        self.path = outputs / "locks" / f"{Ranks._key}.{next(self._jobs)}.decisions"
        self.lock = self.path.with_suffix(".lock")
        self.decisions: dict[str, str] = {}

    def _name_of_launch(self) -> str:
        """The same in every process of a launch by torchrun, by srun or by Lightning."""
        env = os.environ
        # a restart by torchrun is another launch; its usual run id is "none", everywhere
        for names in (OF_TORCHRUN, OF_SRUN):
            if _has(names):
                return "-".join(re.sub(r"[^\w.:-]", "_", env[name]) for name in names)
        if self.is_first and not ("NODE_RANK" in env and "FOURSTAGE_JOB" in env):
            # no process id: in two containers both are 1
            env["FOURSTAGE_JOB"] = secrets.token_hex(8)  # Lightning's children inherit it
        if "FOURSTAGE_JOB" not in env:
            raise UserError(
                f"NODE_RANK={env.get('NODE_RANK')}: give all nodes of a job the same FOURSTAGE_JOB "
                "(any word), or start them with torchrun or srun"
            )
        return env["FOURSTAGE_JOB"]

    @contextmanager
    def job(self) -> Iterator[None]:
        """The first process decides inside, and the others do not outlive it."""
        with self._first() if self.is_first else self._follower():
            yield

    @contextmanager
    def _first(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(self.path.parent)
        self.path.unlink(missing_ok=True)  # of an earlier launch of this name
        with open(self.lock, "a") as file:
            self._hold(file)
            write_atomic(self.path, "{}")
            try:
                yield
            except BaseException:
                with suppress(OSError):
                    self.tell("end", "failed")
                raise
            self.path.unlink(missing_ok=True)
            self.lock.unlink(missing_ok=True)

    def _hold(self, file: IO[str]) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise UserError(
                        f"{self.lock}: held by another job of this name: end it, or give torchrun "
                        "another --rdzv-id"
                    ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                return
            time.sleep(0.05)

    @contextmanager
    def _follower(self) -> Iterator[None]:
        ended = threading.Event()
        threading.Thread(target=self._watch, args=(ended,), daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _watch(self, ended: threading.Event) -> None:
        """Ends this process where it waits, inside PyTorch, for a first process that is gone."""
        met = False
        while not ended.wait(1.0):
            is_there = self._first_is_there()
            is_gone = os.getppid() != self._parent or (met and not is_there)
            if is_gone and not ended.wait(GRACE):
                print(ENDED, file=sys.stderr, flush=True)
                os._exit(1)
            met = met or is_there

    def tell(self, run_id: str, decision: str) -> None:
        self.decisions[run_id] = decision
        write_atomic(self.path, json.dumps(self.decisions))

    def wait_for(self, run_id: str) -> Any:
        """The first process' decision on a run. Raises UserError when that process has failed."""
        start, met = time.monotonic(), False
        while os.getppid() == self._parent:
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
        raise UserError(ENDED)

    def _first_is_there(self) -> bool:
        try:
            with open(self.lock) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # which the others may do at once
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return True  # for all that can be known
        return False


def remove_stale(folder: Path) -> None:
    """Remove the locks and decisions of jobs that were killed: old, and held by nobody."""
    for lock in folder.glob("*.lock"):
        with suppress(OSError), open(lock) as file:
            if time.time() - os.fstat(file.fileno()).st_mtime > STALE:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock.with_suffix(".decisions").unlink(missing_ok=True)
                lock.unlink()
