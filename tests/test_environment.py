"""What notebooks, containers, allocations and terminals leave in a process' environment."""

from __future__ import annotations

import fcntl
import gc
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fourstage import interruptions
from fourstage.errors import UserError
from fourstage.interruptions import STOPS, Stopped, handle_stops, one_line, stop_now
from fourstage.lineage import ranks
from fourstage.lineage.ranks import (
    NUMBERS,
    OF_SRUN,
    OF_TORCHRUN,
    Ranks,
    check_environment,
    remove_stale,
)
from fourstage.runs.records import read_record
from tests.fakes import QUICK

REPO = Path(__file__).parent.parent
TORCHRUN = dict.fromkeys(OF_TORCHRUN, "1")
SRUN = dict.fromkeys(OF_SRUN, "1")


@pytest.fixture
def env(monkeypatch):
    for name in (*NUMBERS, *OF_TORCHRUN, *OF_SRUN, "FOURSTAGE_JOB"):
        monkeypatch.delenv(name, raising=False)

    def given(**values: str) -> dict[str, str]:
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        check_environment()
        return {name: os.environ[name] for name in values if name in os.environ}

    return given


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"LOCAL_RANK": "0"}, []),  # notebooks
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, ["WORLD_SIZE"]),
        ({"RANK": "", "SLURM_PROCID": " "}, []),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "5"}, ["SLURM_JOB_ID"]),
        (
            {"SLURM_NTASKS": "4", "SLURM_PROCID": "1", **SRUN},
            ["SLURM_NTASKS", "SLURM_PROCID", *SRUN],
        ),
        ({"RANK": "3", "LOCAL_RANK": "1", **TORCHRUN}, ["RANK", "LOCAL_RANK", *TORCHRUN]),
        ({"LOCAL_RANK": "1", "FOURSTAGE_JOB": "a"}, ["LOCAL_RANK", "FOURSTAGE_JOB"]),
        ({"NODE_RANK": "1", "FOURSTAGE_JOB": "a"}, ["NODE_RANK", "FOURSTAGE_JOB"]),
    ],
)
def test_only_what_a_launcher_says_counts(env, values, kept) -> None:
    assert list(env(**values)) == kept


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"RANK": "abc"}, "RANK=abc in the environment: expected a number: unset it"),
        ({"SLURM_NTASKS": "-1"}, "SLURM_NTASKS=-1 in the environment"),
        (
            {"RANK": "1"},
            "RANK in the environment, but this process was started by neither torchrun",
        ),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK in the environment, but"),
    ],
)
def test_what_cannot_be_meant_is_one_line(env, values, line) -> None:
    with pytest.raises(UserError, match=line):
        env(**values)


def test_a_node_of_no_launch_says_what_to_do(env, monkeypatch, tmp_path) -> None:
    env(NODE_RANK="1")
    monkeypatch.setattr(Ranks, "_key", None)
    with pytest.raises(
        UserError, match="NODE_RANK=1: give all nodes of a job the same FOURSTAGE_JOB"
    ):
        Ranks(tmp_path)


def test_two_containers_are_two_jobs(env, monkeypatch, tmp_path) -> None:
    """Both are process 1."""
    env()
    keys = []
    monkeypatch.setattr(os, "getpid", lambda: 1)
    for _ in range(2):
        monkeypatch.setattr(Ranks, "_key", None)
        keys.append(Ranks(tmp_path).path.name.split(".")[0])
    assert keys[0] != keys[1] and "1" not in keys


def test_locks_of_killed_jobs_do_not_stay(tmp_path) -> None:
    for name in ("old", "new", "held"):
        (tmp_path / f"{name}.0.lock").touch()
        (tmp_path / f"{name}.0.decisions").touch()
        if name != "new":
            os.utime(tmp_path / f"{name}.0.lock", (0, 0))
    with open(tmp_path / "held.0.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_stale(tmp_path)
    assert sorted({path.name.split(".")[0] for path in tmp_path.iterdir()}) == ["held", "new"]
    assert ranks.STALE > 3600, "a job writes its lock once, at its start"


# --- signals


@pytest.fixture
def handlers():
    before = {signum: signal.getsignal(signum) for signum in (*STOPS, signal.SIGINT)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_the_end_of_a_terminal_is_a_stop(handlers) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    handle_stops(stop_now)
    with pytest.raises(Stopped) as caught:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(1)
    assert caught.value.code == 129 and "stopped by SIGHUP" in caught.value.line


def test_nohup_is_heeded(handlers) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    handle_stops(stop_now)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_command_in_the_background_ignores_ctrl_c(handlers) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell's script starts `command &`
    handle_stops(stop_now, and_ctrl_c=True)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_ctrl_c_asks_only_once_there_is_something_to_lose(handlers) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    interruptions.heed_ctrl_c()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    mine = lambda *_: None  # noqa: E731
    signal.signal(signal.SIGINT, mine)
    interruptions.heed_ctrl_c()
    assert signal.getsignal(signal.SIGINT) == mine


def test_a_signal_waits_while_garbage_is_collected(handlers) -> None:
    """An error raised within __del__ is printed and forgotten."""

    waiting = threading.Event()

    class Late:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(sum(range(1000)))

    done: list[int] = []
    handle_stops(stop_now)
    idle = threading.Thread(target=waiting.wait, daemon=True)  # it takes signals too
    idle.start()
    late = Late()
    late.itself = late
    del late
    with pytest.raises(Stopped, match="143"), interruptions.held_back():
        gc.collect()
    waiting.set()
    idle.join()
    assert done


def test_no_memory_for_a_plan_is_one_line() -> None:
    assert one_line(MemoryError()).startswith("out of memory: take a smaller model")


def start(outputs: Path, *more: str, **options) -> subprocess.Popen:
    command = [sys.executable, "train.py", "stage=pretrain", f"outputs={outputs}", *QUICK, *more]
    return subprocess.Popen(command, cwd=REPO, **options)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.2, 0.5, 0.8, 1.2, 1.6, 2.0])
def test_ctrl_c_while_it_starts(seconds, tmp_path) -> None:
    with open(tmp_path / "log", "w") as log:
        process = start(tmp_path / "outputs", "seed=3", stdout=log, stderr=log)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
    assert code in (-signal.SIGINT, 130, 0)
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_closed_terminal_loses_no_step(tmp_path) -> None:
    """The state is saved, though nothing can be printed any more."""
    ours, terminal = pty.openpty()
    outputs = tmp_path / "outputs"
    steps = ("stages.pretrain.max_steps=4000", "stages.pretrain.log_every=1")
    process = start(
        outputs, *steps, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
    )
    os.close(terminal)
    while not list(outputs.glob("runs/*/metrics.csv")):
        os.read(ours, 10_000)
    time.sleep(1)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 129
    (folder,) = outputs.glob("runs/*")
    assert (folder / "checkpoints" / "last.ckpt").exists()
    assert read_record(folder)["status"] == "running"
