"""Everything that a GPU is asked, in a quarter of an hour: does it run, is it right, how fast.

    python -m benchmarks.gpu [steps=versions,facts,...] [minutes=15] [out=outputs/gpu]
                             [device=cuda|cpu]

| step | what |
| --- | --- |
| versions | of PyTorch and its libraries, the card, which packages import |
| facts | ms of each attention backend for new and repeated shapes; grouped_mm against a loop |
| ladders | the debug ladder of moe_nano under each trainer and precision, some at once |
| checks | GPU against CPU, one way of computing against another, equal runs, Muon |
| train | steps of moe_small and moe_medium: tokens/s, MFU, memory, the longest kernels |
| generate | rollouts of moe_small: tokens/s, by rows, recorded and not |
| rl | a grpo and a ppo step |
| clock | the moe_small ladder with what is left of the time |

Each task is a process of its own, since a CUDA error poisons its process, with a time limit. A line
is printed and one of JSON is written to OUT/results.jsonl as soon as it ends, its output to
OUT/<task>.log; one that fails is followed by the next, and none outlives a benchmark that is
stopped or killed. Needs no network, no W&B and, from a clone with PYTHONPATH=src, no installation.
device=cpu runs the same tasks on moe_nano, as their test. Exits with 1 where a task failed.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).parent.parent
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
KILL_AFTER = 5.0  # seconds that a task has for ending in good order
AT_ONCE = 4  # ladders: they hardly load a GPU, and start slowly
TAIL = 2**20  # bytes of a log that are read, whatever a task has written
LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Task:
    """A process: `name` is its step and what is special about it."""

    name: str
    words: Sequence[str]  # after the interpreter
    seconds: float  # that it may take


def measure(name: str, seconds: float, *words: str) -> Task:
    """A task of benchmarks.gpu_tasks."""
    return Task(name, ["-m", "benchmarks.gpu_tasks", *words], seconds)


def train(name: str, seconds: float, out: Path, *overrides: str) -> Task:
    """A ladder; its figures are read from its records."""
    folder = f"outputs={out / 'ladders' / name}"
    model = [] if any(o.startswith("model=") for o in overrides) else ["model=moe_nano"]
    words = ["train.py", "stage=grpo", "logger=none", folder, *model, *overrides]
    return Task(name, words, seconds)


# what is special about a debug ladder -> overrides; on a GPU, and on a CPU
ON_GPU = {
    "gpu": ["trainer=gpu"],
    "gpu-compiled": ["trainer=gpu", "trainer.compile=true"],
    "gpu-compiled-checkpointed": [
        "trainer=gpu",
        "trainer.compile=true",
        "trainer.checkpoint_activations=true",
    ],
    "gpu-float32": ["trainer=gpu", "trainer.precision=32-true"],
    "gpu-float16": ["trainer=gpu", "trainer.precision=16-mixed"],
    "ddp": ["trainer=ddp", "trainer.devices=1"],
    "zero1": ["trainer=zero1", "trainer.devices=1"],
    "zero2": ["trainer=zero2", "trainer.devices=1"],
    "zero3": ["trainer=zero3", "trainer.devices=1"],
    "zero3_offload": ["trainer=zero3_offload", "trainer.devices=1"],
    "gpu-compiled-dense": ["trainer=gpu", "trainer.compile=true", "model=dense_tiny"],
}
ON_CPU = {
    "cpu": ["trainer=cpu"],
    "cpu-checkpointed": ["trainer=cpu", "trainer.checkpoint_activations=true"],
    "cpu-bfloat16": ["trainer=cpu", "trainer.precision=bf16-mixed"],
    "cpu-dense": ["trainer=cpu", "model=dense_tiny"],
}


def versions(device: str, out: Path) -> list[list[Task]]:
    return [[measure("versions", 60, "versions", f"device={device}")]]


def facts(device: str, out: Path) -> list[list[Task]]:
    return [[measure("facts", 90, "facts", f"device={device}")]]


def ladders(device: str, out: Path) -> list[list[Task]]:
    kinds = ON_GPU if device == "cuda" else ON_CPU
    tasks = [
        train(f"ladders-{name}", 240, out, "debug=fast", *words) for name, words in kinds.items()
    ]
    at_once = AT_ONCE if device == "cuda" else 1
    return [tasks[i : i + at_once] for i in range(0, len(tasks), at_once)]


def checks(device: str, out: Path) -> list[list[Task]]:
    return [[measure("checks", 150, "checks", f"device={device}")]]


def training(device: str, out: Path) -> list[list[Task]]:
    words = {
        "moe_small": [],
        "moe_small-compiled": ["compile=true"],
        "moe_medium": ["model=moe_medium", "rows=8", "tokens=2048"],
        "moe_medium-compiled": ["model=moe_medium", "rows=8", "tokens=2048", "compile=true"],
        "moe_medium-muon": ["model=moe_medium", "rows=8", "tokens=2048", "optimizer=muon"],
        "dense_small-compiled": ["model=dense_small", "compile=true"],
    }
    if device == "cpu":
        words = {"moe_nano": [], "moe_nano-muon": ["optimizer=muon"]}
    return [
        [measure(f"train-{name}", 120, "train", f"device={device}", *more)]
        for name, more in words.items()
    ]


def generating(device: str, out: Path) -> list[list[Task]]:
    return [[measure("generate", 120, "generate", f"device={device}")]]


def rl(device: str, out: Path) -> list[list[Task]]:
    return [
        [measure(f"rl-{stage}", 120, "rl", f"device={device}", f"stage={stage}")]
        for stage in ("grpo", "ppo")
    ]


def clock(device: str, out: Path) -> list[list[Task]]:
    if device == "cpu":
        times = [f"stages.{s}.max_time=00:00:00:02" for s in ("pretrain", "sft", "reward")]
        words = ["trainer=cpu", "debug=fast", *times]
    else:
        times = [f"stages.{s}.max_time=00:00:00:20" for s in ("pretrain", "sft", "reward")]
        words = ["trainer=gpu", "model=moe_small", *times]
        words += ["stages.ppo.max_steps=2", "stages.grpo.max_steps=5"]
        words += ["evaluation.max_problems=100", "evaluation.max_prompts=100"]
    return [[train("clock", 300, out, *words)]]


STEPS = {
    "versions": versions,
    "facts": facts,
    "ladders": ladders,
    "checks": checks,
    "train": training,
    "generate": generating,
    "rl": rl,
    "clock": clock,
}


@dataclass
class Running:
    task: Task
    process: subprocess.Popen
    log: Path
    begun: float


def die_with_parent() -> None:
    """On Linux a task ends even where the benchmark cannot end it, as after a SIGKILL."""
    if sys.platform == "linux":
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def start(task: Task, out: Path) -> Running:
    shutil.rmtree(out / "ladders" / task.name, ignore_errors=True)  # else it would go on from there
    log = out / f"{task.name}.log"
    if log.is_dir():
        shutil.rmtree(log)
    paths = [str(REPO), str(REPO / "src"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *task.words],
            cwd=REPO,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    return Running(task, process, log, time.monotonic())


def end(some: Sequence[Running]) -> None:
    """The whole groups of tasks' processes, whether they listen or not."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        for one in some:
            with suppress(ProcessLookupError):
                os.killpg(one.process.pid, signum)
        last = time.monotonic() + KILL_AFTER
        for one in some:
            with suppress(subprocess.TimeoutExpired):
                one.process.wait(max(0.0, last - time.monotonic()))


def run_together(tasks: Sequence[Task], out: Path, left: float) -> Iterator[dict[str, Any]]:
    """What came of each, as soon as it has ended."""
    running: list[Running] = []
    try:
        for task in tasks:
            running.append(start(task, out))
        while running:
            for one in list(running):
                seconds = time.monotonic() - one.begun
                limit = min(one.task.seconds, left)
                if one.process.poll() is None and seconds < limit:
                    continue
                is_late = one.process.poll() is None
                end([one])
                running.remove(one)
                why = f"took more than {limit:.0f} s" if is_late else ""
                yield outcome(one, seconds, why)
            time.sleep(0.05)
    finally:
        end(running)


def outcome(one: Running, seconds: float, why: str) -> dict[str, Any]:
    """The line of a task: what it printed last, or what a ladder's records hold."""
    lines = last_lines(one.log)
    figures: dict[str, Any] = {}
    if not why and one.process.returncode != 0:
        said = [line for line in lines if line.strip() and not line.startswith(" ")]
        why = said[-1][:300] if said else f"exit code {one.process.returncode}"
    if not why:
        try:
            is_ladder = one.task.words[0] != "-m"
            figures = {} | (ladder(one.task) if is_ladder else json.loads(lines[-1]))
        except Exception as error:  # whatever a task has written
            why = f"no figures: {error!r}"
    failed = why or figures.pop("failed", "")
    result = {"task": one.task.name, "ok": not failed, "seconds": round(seconds, 1)}
    return result | ({"error": failed} if failed else {}) | {"figures": figures}


def last_lines(log: Path) -> list[str]:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        return file.read().decode(errors="replace").splitlines()


def ladder(task: Task) -> dict[str, Any]:
    """Seconds and last loss of each stage of a ladder; one that is not finite is a failure."""
    (outputs,) = (w.partition("=")[2] for w in task.words if w.startswith("outputs="))
    found: dict[str, Any] = {}
    for folder in sorted(Path(outputs, "runs").iterdir()):
        record = json.loads((folder / "run.json").read_text())
        rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
        columns = [i for i, name in enumerate(rows[0]) if name == "train/loss"]
        losses = [float(row[columns[0]]) for row in rows[1:] if columns and row[columns[0]]]
        stage = record["stage"]
        found[f"{stage}_s"] = record["cost"]["seconds"]
        if losses:
            found[f"{stage}_loss"] = losses[-1]
        if record["status"] != "finished" or any(loss != loss for loss in losses):
            found["failed"] = f"{stage}: {record['status']}, last loss {losses[-1:]}"
    return found


def read(arguments: Sequence[str]) -> tuple[str, list[str], float, Path]:
    """device, steps, minutes, out. Raises SystemExit, one line, for what is none."""
    values = {"device": "cuda", "steps": ",".join(STEPS), "minutes": "15", "out": "outputs/gpu"}
    for word in arguments:
        key, _, value = word.partition("=")
        if key not in values or not value:
            sys.exit(f"error: expected {', '.join(f'{k}=' for k in values)}, got {word!r}")
        values[key] = value
    steps = values["steps"].split(",")
    if unknown := [step for step in steps if step not in STEPS]:
        sys.exit(f"error: steps: no {unknown[0]!r}: there are {', '.join(STEPS)}")
    if values["device"] not in ("cuda", "cpu"):
        sys.exit(f"error: device: expected cuda or cpu, got {values['device']!r}")
    try:
        minutes = float(values["minutes"])
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        sys.exit(f"error: minutes: expected a number, got {values['minutes']!r}")
    out = Path(values["out"]).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        open(out / "results.jsonl", "w").close()
    except OSError as error:
        sys.exit(f"error: out={values['out']}: {error.strerror}: choose another folder")
    return values["device"], steps, minutes, out


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    device, steps, minutes, out = read(arguments)
    last = time.monotonic() + 60 * minutes
    oks: list[bool] = []
    code, stopped = 0, ""
    try:
        with (
            open(out / "results.jsonl", "w") as file,
            closing(run(device, steps, last, out)) as results,
        ):
            for result in results:
                file.write(in_json(result) + "\n")
                file.flush()
                os.fsync(file.fileno())
                oks.append(result["ok"])
                with suppress(OSError):  # who read it has gone, perhaps: the file has it
                    print(line_of(result, out), flush=True)
    except Stopped as stop:
        code, stopped = 128 + stop.signum, f"stopped by {signal.Signals(stop.signum).name}: "
    print(f"{stopped}{sum(oks)} of {len(oks)} tasks ok: {out / 'results.jsonl'}")
    return code or int(not oks or not all(oks))


class Stopped(BaseException):
    def __init__(self, signum: int) -> None:
        self.signum = signum


def stop(signum: int, _: Any) -> None:
    """The handler of signals that ask for an end: the tasks end first, so once is enough."""
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(signum)


def run(device: str, steps: Sequence[str], last: float, out: Path) -> Iterator[dict[str, Any]]:
    """What came of each task of these steps, until `last` on the clock."""
    for name in steps:
        for together in STEPS[name](device, out):
            left = last - time.monotonic()
            if left < 1:
                print(f"no time left for {', '.join(task.name for task in together)}")
                continue
            yield from run_together(together, out, left)


def in_json(result: dict[str, Any]) -> str:
    """With a number that is not finite as a word, which JSON has none for."""
    return json.dumps(json.loads(json.dumps(result), parse_constant=str))


def line_of(result: dict[str, Any], out: Path) -> str:
    if not result["ok"]:
        log = out / f"{result['task']}.log"
        return f"FAILED {result['task']} ({result['seconds']} s): {result['error']} (see {log})"
    shown = ", ".join(f"{key} {value}" for key, value in list(result["figures"].items())[:6])
    return f"ok     {result['task']} ({result['seconds']} s): {shown}"


if __name__ == "__main__":
    for signum in STOPS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup and a shell's `&` do
            signal.signal(signum, stop)
    sys.exit(main(sys.argv[1:]))
