"""benchmarks.gpu: its tasks on a CPU, and what it does when they fail, hang or are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import Task, main, read

REPO = Path(__file__).parent.parent


@pytest.fixture
def steps(monkeypatch):
    def be(**tasks: list[Task]) -> None:
        steps = {name: lambda device, out, some=some: [some] for name, some in tasks.items()}
        monkeypatch.setattr(gpu, "STEPS", steps)

    return be


def results(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def task(name: str, code: str, seconds: float = 20) -> Task:
    return Task(name, ["-c", code], seconds)


def test_a_task_that_fails_or_hangs_is_followed_by_the_next(steps, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "KILL_AFTER", 0.5)
    monkeypatch.setattr(gpu, "ladder", lambda task: {"seconds": 2.5})
    wait = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    steps(
        one=[task("fails", "raise ValueError('no such kernel')")],
        two=[task("hangs", wait, seconds=1), task("beside", "print('fine')")],
        three=[task("dies", "import os; os.abort()")],
        four=[task("good", "print('fine')")],
    )
    assert main([f"out={tmp_path}", "steps=one,two,three,four", "device=cpu"]) == 1
    found = {r["task"]: r for r in results(tmp_path)}
    assert {name: r["ok"] for name, r in found.items()} == {
        "fails": False,
        "hangs": False,
        "beside": True,
        "dies": False,
        "good": True,
    }
    assert found["fails"]["error"] == "ValueError: no such kernel"
    assert found["hangs"]["error"] == "took more than 1 s" and found["hangs"]["seconds"] < 10
    assert found["good"]["figures"] == {"seconds": 2.5}
    said = capsys.readouterr().out
    assert f"FAILED fails ({found['fails']['seconds']} s): ValueError: no such kernel (see" in said
    assert said.endswith(f"2 of 5 tasks ok: {tmp_path / 'results.jsonl'}\n")
    assert "Traceback" in (tmp_path / "fails.log").read_text()


def test_no_time_left(steps, tmp_path, capsys):
    steps(one=[task("late", "print(1)")])
    assert main([f"out={tmp_path}", "steps=one", "minutes=0.001", "device=cpu"]) == 1
    assert "no time left for late" in capsys.readouterr().out and results(tmp_path) == []


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("steps=facts,nothing", "error: steps: no 'nothing': there are versions, facts"),
        ("device=tpu", "error: device: expected cuda or cpu, got 'tpu'"),
        ("minutes=soon", "error: minutes: expected a number, got 'soon'"),
        ("minutes=nan", "error: minutes: expected a number, got 'nan'"),
        ("minutes=0", "error: minutes: expected a number, got '0'"),
        ("out=/dev/null/x", "error: out=/dev/null/x: Not a directory: choose another folder"),
        ("faster", "error: expected device=, steps=, minutes=, out=, got 'faster'"),
    ],
)
def test_mistakes_are_one_line(word, line):
    with pytest.raises(SystemExit) as caught:
        read([word])
    assert str(caught.value).startswith(line)


def test_without_a_gpu_every_task_says_so(tmp_path):
    words = [sys.executable, "-m", "benchmarks.gpu", f"out={tmp_path}", "steps=checks"]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, timeout=60)
    if "1 of 1 tasks ok" in done.stdout:
        pytest.skip("there is a GPU here")
    assert done.returncode == 1
    assert "error: device=cuda: PyTorch sees no GPU here" in done.stdout


GARBAGE = {
    "number": "print(3)",
    "list": "print([])",
    "nothing": "",
    "half": "print('{\"step_ms\": 1')",
    "bytes": "import os; os.write(1, bytes(range(256)) * 9999)",
    "deep": "print('[' * 10**6)",
}
FIGURES = "print('x' * 20_000); print('{\"loss\": NaN, \"step_ms\": 2}')"


def test_a_task_that_writes_garbage_is_followed_by_the_next(steps, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "TAIL", 10_000)
    for name, code in {**GARBAGE, "fine": FIGURES}.items():
        (tmp_path / f"prints_{name}.py").write_text(code)
    tasks = [Task(name, ["-m", f"prints_{name}"], 20) for name in (*GARBAGE, "fine")]
    steps(one=tasks[:-1], two=tasks[-1:])
    assert main([f"out={tmp_path}", "steps=one,two", "device=cpu"]) == 1
    *bad, good = results(tmp_path)
    assert {r["task"] for r in bad} == GARBAGE.keys()
    assert all(not r["ok"] and r["error"].startswith("no figures: ") for r in bad)
    assert good["ok"] and good["figures"] == {"loss": "NaN", "step_ms": 2}  # JSON has no NaN


def test_a_ladder_trains_again(steps, tmp_path):
    """One that has finished, or was killed, would say how fast it was then."""
    before = tmp_path / "ladders" / "again" / "runs"
    before.mkdir(parents=True)
    steps(one=[gpu.train("again", 20, tmp_path, "no.such.setting=1")])
    assert main([f"out={tmp_path}", "steps=one", "device=cpu"]) == 1
    assert not before.exists()


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
    pairs = [tuple(map(int, line.split())) for line in found.splitlines()]
    return [child for child, parent in pairs if parent == pid]


def is_alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip()[:1] not in ("", "Z")


@pytest.mark.parametrize(
    ("signum", "code", "line"),
    [
        (signal.SIGTERM, 143, "stopped by SIGTERM: 1 of 1 tasks ok: "),
        (signal.SIGINT, 130, "stopped by SIGINT: 1 of 1 tasks ok: "),
        pytest.param(
            *(signal.SIGKILL, -9, "ok     facts"),
            marks=pytest.mark.skipif(sys.platform != "linux", reason="it has no such signal"),
        ),
    ],
)
def test_what_is_done_is_there_after_an_end_and_nothing_else(tmp_path, signum, code, line):
    words = [sys.executable, "-m", "benchmarks.gpu", f"out={tmp_path}", "device=cpu"]
    process = subprocess.Popen(
        [*words, "steps=facts,checks"],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # heeded
    )
    while not (tmp_path / "checks.log").exists():
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.05)
    while not (task := children(process.pid)):
        time.sleep(0.05)
    process.send_signal(signum)
    said, _ = process.communicate(timeout=gpu.KILL_AFTER)
    assert process.returncode == code
    assert [(r["task"], r["ok"]) for r in results(tmp_path)] == [("facts", True)]
    assert said.splitlines()[-1].startswith(line) and "Traceback" not in said
    end = time.monotonic() + 5
    while is_alive(task[0]):
        assert time.monotonic() < end, "a task goes on"
        time.sleep(0.05)
    assert "{" not in (tmp_path / "checks.log").read_text(), "it went on to its figures"


@pytest.mark.slow
def test_every_task_on_a_cpu(tmp_path, monkeypatch):
    """With nothing of the packages that a GPU's machine may lack."""
    absent = tmp_path / "absent"
    absent.mkdir()
    for name in ("wandb", "wandb_workspaces", "datasets"):
        (absent / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}')")
    monkeypatch.setenv("PYTHONPATH", str(absent), prepend=os.pathsep)
    assert main([f"out={tmp_path}", "device=cpu"]) == 0
    found = results(tmp_path)
    begun = {r["task"].partition("-")[0] for r in found}
    assert begun == set(gpu.STEPS) and all(r["ok"] and r["figures"] for r in found)
