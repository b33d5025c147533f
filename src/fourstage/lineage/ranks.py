"""One plan per job: the first process decides and holds the locks, the others follow it."""

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

PATIENCE = 600.0  # seconds in which the first process must show up
GRACE = 20.0  # seconds in which a process should notice by itself that the first one has ended
STALE = 86_400.0  # seconds after which a lock that nobody holds was left by a killed job
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP)  # the file system has no flock
ENDED = "the first process of this job has ended: its own output says why"
OF_TORCHRUN = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
OF_SRUN = ("SLURM_JOB_ID", "SLURM_STEP_ID")
OF_A_TASK = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS")
OF_A_RANK = ("RANK", "LOCAL_RANK")
NUMBERS = (*OF_A_RANK, *OF_A_TASK, "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")


def check_environment() -> None:
    """Remove variables that don't apply to this process; Lightning and PyTorch would believe them.

    Notebooks set LOCAL_RANK and RANK for a single process, and a SLURM allocation has variables of
    tasks even if srun started none. Raises UserError for values that make no sense.
    """
    env = os.environ
    for name in NUMBERS:
        if not env.get(name, "").strip():
            env.pop(name, None)
        elif not env[name].isdecimal():
            raise UserError(f"{name}={env[name]} in the environment: expected a number: unset it")
    if not _has(OF_SRUN):
        for name in OF_A_TASK:
            env.pop(name, None)
    is_child = "LOCAL_RANK" in env and "FOURSTAGE_JOB" in env
    if others_are_there() or is_child:
        return
    for name in OF_A_RANK:
        if int(env.pop(name, 0)):
            raise UserError(
                f"{name} in the environment, but this process was started by neither torchrun nor "
                f"srun: start it with one of them, or unset {name}"
            )


def others_are_there() -> bool:
    """Whether torchrun or srun has started all processes of the job."""
    return _has(OF_TORCHRUN) or _has(OF_SRUN)


def _has(names: Sequence[str]) -> bool:
    return all(name in os.environ for name in names)


def try_lock(file: IO[str], kind: int) -> bool | None:
    """Whether the lock was taken, or None if the file system has no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None


class Ranks:
    """Whether this is the first process of its job, and how the others learn what it decides.

    They talk through a file under outputs/locks/, because torch.distributed isn't up yet: Lightning
    starts the other processes in the middle of the first stage that trains. The file counts only
    while the first process holds a lock beside it (flock), which ends with the process, so nobody
    follows or waits for a process that was killed.
    """

    _jobs = itertools.count()  # a multirun climbs several times in one process
    _key: str | None = None
    _parent: int  # the process that started this one, which may already be gone

    def __init__(self, outputs: Path) -> None:
        env = os.environ
        check_environment()
        ranks = [int(env[key]) for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if key in env]
        self.is_first = int(env.get("NODE_RANK", 0)) == 0 and (ranks or [0])[0] == 0
        if Ranks._key is None:
            Ranks._key = self._name_of_launch()
            is_child = Ranks._key == env.get("FOURSTAGE_JOB") and "LOCAL_RANK" in env
            parent = env.get("FOURSTAGE_PARENT") if is_child else None
            Ranks._parent = int(parent or os.getppid())
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
        if self.is_first and not _has(("NODE_RANK", "FOURSTAGE_JOB")):
            # not the process id: in two containers both are 1
            env["FOURSTAGE_JOB"] = secrets.token_hex(8)  # Lightning's children inherit it
        if "FOURSTAGE_JOB" not in env:
            raise UserError(
                f"NODE_RANK={env.get('NODE_RANK')}: give all nodes of a job the same FOURSTAGE_JOB "
                "(any word), or start them with torchrun or srun"
            )
        return env["FOURSTAGE_JOB"]

    @contextmanager
    def job(self) -> Iterator[None]:
        """Inside, the first process decides, and the others don't outlive it."""
        if self.is_first:
            with self._leading():
                yield
            return
        finished = threading.Event()
        threading.Thread(target=self._watch, args=(finished,), daemon=True).start()
        try:
            yield
        finally:
            finished.set()

    @contextmanager
    def _leading(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(self.path.parent)
        self.path.unlink(missing_ok=True)  # of an earlier launch of this name
        with open(self.lock, "a") as file:
            end = time.monotonic() + PATIENCE
            while try_lock(file, fcntl.LOCK_EX) is False:
                if time.monotonic() > end:
                    raise UserError(
                        f"{self.lock}: held by another job of this name: end it, or give torchrun "
                        "another --rdzv-id"
                    )
                time.sleep(0.05)
            write_atomic(self.path, "{}")
            try:
                yield
            except BaseException:
                with suppress(OSError):
                    self.tell("end", "failed")
                raise
            self.path.unlink(missing_ok=True)
            self.lock.unlink(missing_ok=True)

    def _watch(self, finished: threading.Event) -> None:
        """End this process if the first one is gone while this one waits for it inside PyTorch."""
        met = False
        while not finished.wait(1.0):
            is_there = self._first_is_there()
            is_gone = os.getppid() != self._parent or (met and not is_there)
            if is_gone and not finished.wait(GRACE):
                print(ENDED, file=sys.stderr, flush=True)
                os._exit(1)
            met = met or is_there

    def tell(self, run_id: str, decision: str) -> None:
        self.decisions[run_id] = decision
        write_atomic(self.path, json.dumps(self.decisions))

    def wait_for(self, run_id: str) -> Any:
        """The first process's decision on a run. Raises UserError if that process has failed."""
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
        """Whether it holds its lock, as far as the file system can tell."""
        try:
            with open(self.lock) as file:
                return try_lock(file, fcntl.LOCK_SH) is not True  # shared: all followers may ask
        except FileNotFoundError:
            return False


def remove_stale(folder: Path) -> None:
    """Remove the locks and decisions of killed jobs: old, and held by nobody."""
    for lock in folder.glob("*.lock"):
        with suppress(OSError), open(lock) as file:
            is_old = time.time() - os.fstat(file.fileno()).st_mtime > STALE
            if is_old and try_lock(file, fcntl.LOCK_EX):
                lock.with_suffix(".decisions").unlink(missing_ok=True)
                lock.unlink()
