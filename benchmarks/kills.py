"""Kill -9 at random moments over small ladders: the final weights are those of a calm ladder.

    python -m benchmarks.kills [seed=0] [kills=20] [trainer=cpu] [outputs=outputs/kills]

Each attempt is the same command; it is killed at a moment drawn from the seed, in the first to
third stage that it trains, a quarter of them in the next save of a state; and started again until
the ladder is finished, which is then compared with the calm one and removed.
trainer=ddp, zero1, zero2, zero3 or zero3_offload: two processes on the CPU, over gloo; either both
are killed or one of the two, and the other must then end by itself. ZeRO, which refuses CPUs, is
started as in the tests (tests/train_on_cpus.py). The last line is one JSON object with the figures;
exit code 1 where a weight differs or a process stays. Ten minutes to an hour.
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common import start
from fourstage.ladder import LADDER

REPO = Path(__file__).parent.parent
SMALL = ["stage=grpo", "model=moe_nano", "debug=fast", "logger=none"]
SMALL += [
    f"stages.{stage}.{setting}"
    for stage in LADDER
    for setting in ("max_steps=8", "checkpoint_every=2", "log_every=1")
]
# random weights solve no problem: what moves the policy is how soon it stops
SMALL += ["stages.grpo.overlong_window=8", "stages.grpo.group_size=4", "stages.grpo.batch_size=4"]
CPU = ["trainer=cpu"]
DDP = [*CPU, "trainer.devices=2", "trainer.strategy=ddp"]
ZERO = ("zero1", "zero2", "zero3", "zero3_offload")
BOUND = 60.0  # seconds in which a process that lost the other one must end
HANGS = 900.0  # seconds in which a stage begins or the command ends


@dataclass
class Attempt:
    """One run of the command in a process group of its own, with what it prints in a file."""

    outputs: Path
    program: list[str]
    overrides: list[str]
    log: Path = field(init=False)
    process: subprocess.Popen = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.outputs.with_suffix(".log")
        command = [sys.executable, *self.program, *self.overrides, f"outputs={self.outputs}"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, cwd=REPO, env=env, stdout=log, stderr=log, start_new_session=True
            )

    def stages(self) -> list[str]:
        """The runs that it has begun to train or resume, in order."""
        return re.findall(r"^(?:training|resuming) (\S+) in ", self.log.read_text(), re.M)

    def begun(self, stages: int = 1) -> bool:
        """Wait for so many stages to begin; False where the command ends before."""
        end = time.monotonic() + HANGS
        while self.process.poll() is None and len(self.stages()) < stages:
            assert time.monotonic() < end, f"it hangs: {self.log.read_text()}"
            time.sleep(0.005)
        return len(self.stages()) >= stages

    def alive(self) -> list[int]:
        return processes(self.process.pid)

    def wait(self, seconds: float) -> bool:
        """Whether all its processes end within the time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.process.poll()
            if not self.alive():
                return True
            time.sleep(0.05)
        return False

    def kill(self, pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


def processes(session: int) -> list[int]:
    """The living processes of a session, those that lost their parent included (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rsplit(")", 1)[1].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of) == session and state != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def weights(outputs: Path) -> dict[str, bytes]:
    """The final weights of each run."""
    return {path.parent.name: path.read_bytes() for path in outputs.glob("runs/*/*.safetensors")}


def command(trainer: str) -> tuple[list[str], list[str]]:
    """The program and its overrides."""
    if trainer in ZERO:
        where = [f"trainer={trainer}", "trainer.devices=2"]
        return ["-m", "tests.train_on_cpus"], [*SMALL, *where]
    return ["train.py"], [*SMALL, *(DDP if trainer == "ddp" else CPU)]


def calm_ladder(outputs: Path, program: list[str], overrides: list[str]) -> float:
    """Train one that nobody disturbs; the seconds from its first stage to its end."""
    attempt = Attempt(outputs, program, overrides)
    assert attempt.begun(), attempt.log.read_text()
    start = time.monotonic()
    assert attempt.process.wait() == 0, attempt.log.read_text()
    return time.monotonic() - start


def saving(outputs: Path) -> list[Path]:
    """The states that are being written or swapped in, or were when the process was killed."""
    return list(outputs.glob("runs/*/checkpoints/.part.ckpt*"))


def where(outputs: Path, attempt: Attempt) -> tuple[str, str]:
    """The stage that was killed and its last logged step."""
    name = attempt.stages()[-1]
    folder = outputs / "runs" / name
    step = "-"
    if (folder / "metrics.csv").exists():
        with open(folder / "metrics.csv", newline="") as file:
            step = ([row["step"] for row in csv.DictReader(file)] or ["-"])[-1]
    return name.split("-")[0], step


def main(arguments: list[str]) -> None:
    values = dict(argument.partition("=")[::2] for argument in arguments)
    rng = random.Random(int(values.get("seed", 0)))
    trainer = values.get("trainer", "cpu")
    program, overrides = command(trainer)
    root = Path(values.get("outputs", "outputs/kills")).resolve()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    longest = calm_ladder(root / "calm", program, overrides) / len(LADDER)
    expected = weights(root / "calm")
    assert len(expected) == len(LADDER)
    print("| kill | ladder | who | s in the stage | stage | step | saving | others end after |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    kills = ladders = identical = saves = stuck = 0
    slowest, wanted = 0.0, int(values.get("kills", 20))
    outputs = root / "killed"
    while kills < wanted or outputs.exists():
        attempt = Attempt(outputs, program, overrides)
        nth, moment = rng.randint(1, 3), rng.uniform(0, longest)
        who = rng.choice(["all", "all", "first", "second"]) if trainer != "cpu" else "all"
        aims = rng.random() < 0.25
        if kills < wanted and attempt.begun(nth):
            try:
                attempt.process.wait(moment)
            except subprocess.TimeoutExpired:
                while aims and attempt.process.poll() is None and not saving(outputs):
                    pass
                pids = attempt.alive()
                if who != "all" and len(pids) > 1:
                    pids = pids[:1] if who == "first" else pids[1:]
                else:
                    who = "all"
                attempt.kill(pids)
                start = time.monotonic()
                ended = attempt.wait(BOUND)
                seconds = time.monotonic() - start
                attempt.kill(attempt.alive())
                stage, step = where(outputs, attempt)
                in_a_save = bool(saving(outputs))
                kills, saves, stuck = kills + 1, saves + in_a_save, stuck + (not ended)
                slowest = max(slowest, seconds)
                cells = [kills, ladders + 1, who, f"{moment:.2f}", stage, step]
                cells += ["yes" if in_a_save else "", f"{seconds:.1f} s" if ended else "never"]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
                continue
        code = attempt.process.wait(HANGS)
        assert code == 0, attempt.log.read_text()
        ladders += 1
        identical += weights(outputs) == expected
        shutil.rmtree(outputs)
    figures = {
        "kills": kills,
        "in_a_save": saves,
        "ladders": ladders,
        "identical": identical,
        "slowest_end_s": round(slowest, 1),
        "stuck": stuck,
    }
    line = {"benchmark": "kills", "device": "cpu", "ratios": {}, "figures": figures}
    print(json.dumps({**line, "trainer": trainer}))
    if identical < ladders or stuck:
        sys.exit(1)


if __name__ == "__main__":
    start(main)
