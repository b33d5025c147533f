"""Two workers that train a sweep in one outputs folder, and an adversary who doesn't let them.

Each worker is a terminal in which the same commands are typed until they succeed. What the
adversary does, and when, is drawn from a seed: `Blow`. A full disk is the limit on the size of a
file (RLIMIT_FSIZE) that running processes get and lose again: the write that meets it fails in the
middle, as on a full disk, and with an error that the product takes for one.
"""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fourstage.files import part_of
from fourstage.ladder import LADDER

REPO = Path(__file__).parents[1]
SETTINGS = ["stage=grpo", "model=moe_nano", "debug=fast", "trainer=cpu"]
SETTINGS += [
    f"stages.{stage}.{setting}"
    for stage in LADDER
    for setting in ("max_steps=8", "checkpoint_every=2", "log_every=1")
]
# random weights solve no problem: what moves the policy is how soon it stops; with a KL term, Adam
# would make steps of the rounding where no answer does
SETTINGS += ["stages.grpo.overlong_window=8", "stages.grpo.kl_coef=0", "stages.grpo.group_size=4"]
SETTINGS += ["stages.grpo.batch_size=4", "stages.pretrain.max_steps=20"]
LRS = "stages.grpo.lr=1e-4,3e-4"
# elastic: the processes change. Not seed 3: a gradient of its reward model is nothing but rounding,
# of which Adam makes a step
SEEDS = {"steady": "seed=0,1,3", "elastic": "seed=2"}
TRAINERS = [("ddp", 2), ("auto", 1), ("zero2", 2), ("ddp", 2), ("auto", 1), ("zero3", 2)]
BLOWS = [("all", "save")] * 3 + [("all", "steps"), ("all", "seconds"), ("one", "seconds")]
BLOWS += [(kind, "steps") for kind in ("one", "one", "worker", "worker", "term", "disk", "disk")]
BLOWS += [("worker", "seconds"), ("term", "seconds"), ("term", "save")]
LIMITS = (0, 3_000, 100_000, 700_000)  # bytes: not even run.json fits; ... ; no state
ENDS = (0, 1, 143, -signal.SIGTERM, -signal.SIGKILL)  # -SIGTERM: it was still importing
STARTS, PATIENCE, HANGS = 200, 600.0, 7200.0  # starts of a worker; seconds to stop, in all


@dataclass(frozen=True)
class Blow:
    """What happens to a worker, and when.

    kind: kill -9 of `all` its processes, of `one` of those that it started, or of the `worker`
    itself; SIGTERM; a full disk, on which files have at most `limit` bytes for `lasts` seconds.
    when: so many seconds after its start, so many steps after the beginning of its nth stage, or
    in a save from there on. After a blow that it may survive: after that instead of the start.
    """

    kind: Literal["all", "one", "worker", "term", "disk"]
    when: Literal["seconds", "steps", "save"]
    seconds: float
    stage: int
    steps: int
    limit: int
    lasts: float


def draw(rng: random.Random) -> list[Blow]:
    """The blows that a worker gets, one after the other."""
    return [
        Blow(
            kind,
            when,
            seconds=round(rng.uniform(1, 15), 1),
            stage=rng.randint(1, 2),
            steps=rng.randint(1, 6),
            limit=rng.choice(LIMITS),
            lasts=round(rng.uniform(2, 12), 1),
        )
        for kind, when in rng.sample(BLOWS, len(BLOWS))
    ]


class Disk:
    """Full for all workers from `fill` on, until some time later."""

    def __init__(self) -> None:
        self.limit, self.until = 0, 0.0

    def fill(self, limit: int, seconds: float) -> None:
        self.limit, self.until = limit, time.monotonic() + seconds

    @property
    def is_full(self) -> bool:
        return time.monotonic() < self.until

    def limit_all(self, pids: list[int]) -> None:
        """Not wandb-core: Go ends at SIGXFSZ, which no full disk sends."""
        for pid in pids:
            with suppress(ProcessLookupError, PermissionError):
                most = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
                is_limited = self.is_full and "wandb-core" not in words_of(pid)[0]
                soft = self.limit if is_limited else most
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, most))


@dataclass
class Worker:
    """A terminal: its sweeps, one after another, each typed again until it succeeds."""

    name: str
    outputs: Path
    sweeps: list[str]
    rng: random.Random
    disk: Disk
    say: Callable[[str], None]
    counts: Counter[str]
    blows: list[Blow] = field(init=False)
    process: subprocess.Popen[str] | None = None
    starts: int = 0
    said: list[str] = field(default_factory=list)  # since the last start
    blow: Blow | None = None
    began: float = 0.0  # to wait for the blow
    must_end: float = 0.0  # 0: it need not
    over: int = 0  # its stages that were over then
    rows_before: int | None = None  # in the stage that the blow is for

    def __post_init__(self) -> None:
        self.blows = draw(self.rng)
        if self.sweeps[0] == "elastic":  # whatever is drawn, the first stage changes its processes
            stop = Blow("term", "steps", seconds=0, stage=1, steps=4, limit=0, lasts=0)
            self.blows += [stop, stop]

    @property
    def mark(self) -> str:
        """In the environment of all processes of a start: wandb-core leaves session and parent."""
        return f"{self.outputs}:{self.name}:{self.starts}"

    def start(self) -> None:
        """Type the command: the same words again, but for who trains, in an elastic sweep."""
        self.starts += 1
        assert self.starts < STARTS, "it never ends"
        sweep = self.sweeps[0]
        program, where = ["train.py"], []
        if sweep == "elastic":
            strategy, processes = TRAINERS[self.starts % len(TRAINERS)]
            program = ["-m", "tests.train_on_cpus"]
            where = [f"trainer.strategy={strategy}", f"trainer.devices={processes}"]
        words = ["-m", *SETTINGS, *where, SEEDS[sweep], LRS, f"outputs={self.outputs}"]
        self.said = []
        self.process = subprocess.Popen(
            [sys.executable, *program, *words],
            cwd=REPO,
            env=environment(self.outputs) | {"CHAOS": self.mark},
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        threading.Thread(target=self.listen, args=(self.process, self.said), daemon=True).start()
        self.must_end = 0.0
        self.say(f"{self.name} starts {sweep} {' '.join(where)}")
        self.arm()

    def arm(self) -> None:
        """Get the next blow, or the one that hasn't hit."""
        self.began, self.over, self.rows_before = time.monotonic(), len(self.begun()[:-1]), None
        if self.blow is None and self.blows:
            self.blow = self.blows.pop()

    def listen(self, process: subprocess.Popen[str], said: list[str]) -> None:
        """Not a file: a full disk is full for its own files only."""
        assert process.stdout is not None
        with open(self.outputs.with_name(f"{self.name}.log"), "a") as log:
            for line in process.stdout:
                said.append(line)
                log.write(line)
                log.flush()

    def turn(self) -> None:
        """Start what has ended, strike if it is time to."""
        if self.process is None:
            if self.sweeps:
                self.start()
            return
        code = self.process.poll()
        if code is not None:
            assert code in ENDS, (code, self.said)
            self.say(f"{self.name} ended with {code}: {''.join(self.said[-1:]).strip()[:150]}")
            if code == 0:
                self.sweeps.pop(0)
            self.process = None
            return
        assert not self.must_end or time.monotonic() < self.must_end, ("it hangs", self.said)
        if self.blow is not None and not self.must_end and self.is_time(self.blow):
            self.strike(self.blow)
            self.blow = None
            if not self.must_end:
                self.arm()

    def begun(self) -> list[Path]:
        """The runs that it has trained since its start, the one that it trains now last."""
        names = re.findall(r"^(?:training|resuming) (\S+) in ", "".join(self.said), re.M)
        return [self.outputs / "runs" / name for name in names]

    def is_time(self, blow: Blow) -> bool:
        if blow.when == "seconds":
            return time.monotonic() - self.began > blow.seconds
        begun = self.begun()[self.over :]
        if len(begun) < blow.stage:
            return False
        if blow.when == "save":
            return self.sees(part_of(begun[-1] / "checkpoints" / "last.ckpt"))
        run = begun[blow.stage - 1]
        if self.rows_before is None:
            self.rows_before = rows(run)
        return rows(run) >= self.rows_before + blow.steps or len(begun) > blow.stage

    def sees(self, part: Path) -> bool:
        """Look for a save without a pause, for it is short; not for long, as it may have been the
        last one."""
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            if part.exists():
                return True
        return False

    def strike(self, blow: Blow) -> None:
        assert self.process is not None
        leader, pids = self.process.pid, alive(f"{self.mark}\0")
        victims = {"all": pids, "worker": [leader], "term": [leader], "disk": []}
        if blow.kind == "one":
            victims["one"] = [self.rng.choice([pid for pid in pids if pid != leader] or [leader])]
        who = ", ".join(f"{Path(words_of(pid)[0]).name} {pid}" for pid in victims[blow.kind])
        for pid in victims[blow.kind]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if blow.kind == "term" else signal.SIGKILL)
        if blow.kind == "disk":
            self.disk.fill(blow.limit, blow.lasts)
        elif blow.kind != "one" or leader in victims["one"]:  # what has lost one may go on
            self.must_end = time.monotonic() + PATIENCE
        self.counts[blow.kind] += 1
        if blow.kind == "all" and (begun := self.begun()):
            self.process.wait()
            self.counts["in a save"] += any(begun[-1].glob("checkpoints/.part.ckpt*"))
        self.say(f"{self.name}: {blow} hits {who}")


def chaos(outputs: Path, seed: int, say: Callable[[str], None]) -> tuple[Counter[str], str]:
    """Train the sweep under blows; how often each has happened, and what the workers have said.
    Raises AssertionError for a hang, an unknown exit code or a process that stays."""
    outputs.mkdir(parents=True)
    disk, counts = Disk(), Counter[str]()
    shared = {"outputs": outputs, "disk": disk, "say": say, "counts": counts}
    workers = [
        Worker("first", sweeps=["steady", "elastic"], rng=random.Random(2 * seed), **shared),
        Worker("second", sweeps=["elastic", "steady"], rng=random.Random(2 * seed + 1), **shared),
    ]
    end, was_full, looked = time.monotonic() + HANGS, False, 0.0
    try:
        while any(worker.process or worker.sweeps for worker in workers):
            assert time.monotonic() < end, [worker.said[-5:] for worker in workers]
            for worker in workers:
                worker.turn()
            if (disk.is_full or was_full) and time.monotonic() > looked + 0.1:
                was_full, looked = disk.is_full, time.monotonic()
                disk.limit_all(alive(f"{outputs}:"))
            time.sleep(0.01)
        end = time.monotonic() + PATIENCE
        while pids := alive(f"{outputs}:"):
            assert time.monotonic() < end, [words_of(pid) for pid in pids]
            time.sleep(0.1)
    finally:
        for pid in alive(f"{outputs}:"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    said = "".join(path.read_text() for path in outputs.parent.glob("*.log"))
    counts["starts"] = sum(worker.starts for worker in workers)
    counts["full disks met"] = said.count("disk full")
    counts["changes of processes"] = len(re.findall("begun by .*, goes on with ", said))
    return counts, said


def calm(outputs: Path) -> None:
    """Train the same sweep undisturbed, all by one process."""
    words = ["-m", *SETTINGS, "seed=0,1,2,3", LRS, "logger=none", f"outputs={outputs}"]
    done = subprocess.run(
        [sys.executable, "train.py", *words],
        cwd=REPO,
        env=environment(outputs),
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr


def environment(outputs: Path) -> dict[str, str]:
    kept = {name: x for name, x in os.environ.items() if not name.startswith("WANDB_")}
    places = {f"WANDB_{x}_DIR": str(outputs.parent / x.lower()) for x in ("CONFIG", "CACHE")}
    kept |= {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", **places}
    path = f"{REPO / 'src'}:{REPO}"
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}


def alive(mark: str) -> list[int]:
    """The living processes whose variable CHAOS begins so."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is another user's
            if f"\0CHAOS={mark}".encode() in b"\0" + environ.read_bytes():
                found.append(int(environ.parent.name))
    return sorted(found)


def words_of(pid: int) -> list[str]:
    """Its command line."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    return [""]


def rows(run: Path) -> int:
    with suppress(FileNotFoundError):
        return len((run / "metrics.csv").read_text().splitlines())
    return 0
