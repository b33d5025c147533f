"""Kills of real processes, online against a stand-in of the server and offline with `wandb sync`:
the server's history has each step once, as metrics.csv has it."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fourstage.files import read_jsonl
from fourstage.runs.records import read_record
from tests.stand_in_wandb import StandIn, Stored, cores, stand_in

REPO = Path(__file__).parents[2]
X_AXIS = "trainer/global_step"


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


class Home:
    """A user's machine: its outputs, and commands in its environment."""

    def __init__(self, tmp_path: Path, server: StandIn) -> None:
        self.outputs = tmp_path / "outputs"
        kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        self.env = kept | {
            "OMP_NUM_THREADS": "1",
            "WANDB_BASE_URL": server.url,
            "WANDB_API_KEY": "x" * 40,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_CONFIG_DIR": str(tmp_path / "config"),
            "WANDB_CACHE_DIR": str(tmp_path / "cache"),
            "WANDB_DATA_DIR": str(tmp_path / "data"),
        }

    def train(self, *words: str, steps: int = 40, **env: str) -> subprocess.Popen[str]:
        every = [f"stages.pretrain.{k}" for k in ("checkpoint_every=3", "log_every=1")]
        every += ["stages.pretrain.sample_every=4", "stages.pretrain.val_every=5"]
        command = [
            *(sys.executable, "train.py", "stage=pretrain", "model=moe_nano", "debug=fast"),
            *("trainer=cpu", f"outputs={self.outputs}", f"stages.pretrain.max_steps={steps}"),
            *(*every, *words),
        ]
        return subprocess.Popen(
            command,
            cwd=REPO,
            env=self.env | env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def finish(self, *words: str, steps: int = 40, **env: str) -> str:
        process = self.train(*words, steps=steps, **env)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        return said

    def stop_at(self, row: int, signum: int, *, all_of_it: bool = False, **options) -> str:
        """Train until metrics.csv has so many rows, then end it; `all_of_it`: wandb-core too."""
        process = self.train(**options)
        while self.rows() < row:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)
        for core in cores(process.pid) if all_of_it else []:
            os.kill(core, signum)
        os.kill(process.pid, signum)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == (128 + signum if signum == signal.SIGTERM else -signum), said
        return said

    def rows(self) -> int:
        return sum(len(path.read_text().splitlines()) for path in self.runs("metrics.csv"))

    def runs(self, name: str) -> list[Path]:
        return list(self.outputs.glob(f"runs/*/{name}"))

    def logged(self, run_id: str = "*") -> list[int]:
        """The steps in the offline folders of a W&B run, one after the other."""
        seen = []
        for folder in sorted(self.outputs.glob(f"wandb/offline-run-*-{run_id}")):
            command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
            records = map(json.loads, subprocess.check_output(command, text=True).splitlines())
            seen += [r["history"]["item"]["_step"] for r in records if r["type"] == "history"]
        return seen

    def sync(self) -> str:
        folders = map(str, self.outputs.glob("wandb/offline-run-*"))
        command = [sys.executable, "-m", "wandb", "sync", *folders]
        place = self.outputs.parent  # where it logs
        found = subprocess.run(
            command, cwd=place, env=self.env, capture_output=True, text=True, timeout=120
        )
        assert found.returncode == 0, found.stderr
        return found.stderr

    def check(self, server: StandIn) -> Stored:
        """The one W&B run that the server has, whose history is metrics.csv, each step once."""
        [run] = {i: r for i, r in server.runs.items() if r.history or r.states}.values()
        [folder] = [path.parent for path in self.runs("run.json")]
        assert server.runs[read_record(folder)["wandb"]] is run
        with open(folder / "metrics.csv", newline="") as file:
            rows = {int(row.pop("step")): row for row in csv.DictReader(file)}
        last = max(rows)
        steps = [row["_step"] for row in run.history]
        assert steps == [0, *rows, last + 1]  # the first answers, each step, the last tables
        for row in run.history[1:-1]:
            assert row[X_AXIS] == row["_step"]
            cells = {name: float(text) for name, text in rows[row["_step"]].items() if text}
            found = {name: row[name] for name in cells}
            assert found == pytest.approx(cells, rel=1e-6)
        answered = dict.fromkeys(row["step"] for row in read_jsonl(folder / "samples.jsonl"))
        assert [row["_step"] for row in run.history[:-1] if "samples" in row] == list(answered)
        assert {"ladder", "samples_by_stage", "samples"} <= set(run.history[-1])
        assert run.summary["eval/bits_per_char"] > 0 and "train/loss" in run.summary
        assert run.states[-1]["exitcode"] == 0
        return run


@pytest.fixture
def home(tmp_path, server) -> Home:
    return Home(tmp_path, server)


def test_online(home, server) -> None:
    home.stop_at(12, signal.SIGKILL, all_of_it=True)
    home.finish()
    run = home.check(server)
    console = "".join(line for _, line in sorted(run.lines["output.log"].items()))
    assert "pretrain: evaluated in" in console


def test_offline(home, server) -> None:
    home.stop_at(12, signal.SIGKILL, all_of_it=True, WANDB_MODE="offline")
    home.finish(WANDB_MODE="offline")
    assert "ERROR" not in home.sync()
    home.check(server)


@pytest.mark.slow
def test_offline_for_a_while_and_online_again(home, server) -> None:
    home.stop_at(12, signal.SIGKILL, WANDB_MODE="offline")
    home.stop_at(20, signal.SIGTERM, WANDB_MODE="online")
    home.finish(WANDB_MODE="online")
    home.check(server)
    home.sync()  # nothing: the server has got it
    home.check(server)


@pytest.mark.slow
def test_a_sweep_run_that_is_preempted_goes_on_in_its_run(home, server) -> None:
    """As W&B's agent starts it: with an id, which it gives again when the run is queued again."""
    agent = {"WANDB_SWEEP_ID": "swp", "WANDB_RUN_ID": "trial7", "WANDB_DIR": str(home.outputs)}
    home.stop_at(12, signal.SIGTERM, **agent)
    [(name, run)] = server.runs.items()
    assert name == "trial7" and run.variables["sweep"] == "swp"
    assert run.states == [{"preempting": True}, {"complete": True, "exitcode": 143}]
    home.finish(**agent)
    assert home.check(server) is run


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "kills"), [("online", 8), ("offline", 20)])
def test_many_kills(home, server, mode, kills) -> None:
    draw, steps = random.Random(20), 1200
    for kill in range(kills):
        row, signum = home.rows() + draw.randint(4, 30), signal.SIGKILL
        if kill % 5 == 4:
            signum = signal.SIGTERM
        all_of_it = signum == signal.SIGKILL and draw.random() < 0.5
        home.stop_at(row, signum, all_of_it=all_of_it, steps=steps, WANDB_MODE=mode)
    home.finish(steps=steps, WANDB_MODE=mode)
    if mode == "offline":
        assert home.logged() == list(range(steps + 2))  # 0 repeated steps, none missing
        assert "ERROR" not in home.sync()
    home.check(server)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_no_row(home, server) -> None:
    """W&B's debug.log is on it too."""
    process = home.train(WANDB_MODE="offline")
    while home.rows() < 12:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    limits = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, limits[1]))
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "Logging error" not in said, said
    assert re.match(r"pretrain-\w+, after step \d+: disk full", said.splitlines()[-1])
    home.finish(WANDB_MODE="offline")
    assert "ERROR" not in home.sync()
    home.check(server)


@pytest.mark.slow
def test_a_training_whose_wandb_core_is_killed_says_so(home) -> None:
    """In a multirun the next job has another one."""
    words = ["hydra.mode=MULTIRUN", "stages.pretrain.lr=1e-3,2e-3"]
    process = home.train(*words, steps=60, WANDB_MODE="offline")
    while home.rows() < 12:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    [core] = cores(process.pid)
    os.kill(core, signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in said, said
    line = r"pretrain-\w+: W&B's process wandb-core has ended: run the same command again"
    assert re.search(f"^job 0 failed: {line}", said, re.M) and "job 1 failed" not in said
    assert sorted(read_record(path.parent)["status"] for path in home.runs("run.json")) == [
        "failed",
        "finished",
    ]
    home.finish(*words, steps=60, WANDB_MODE="offline")
    for folder in (path.parent for path in home.runs("run.json")):
        seen = home.logged(read_record(folder)["wandb"])
        assert seen == list(range(62)), folder
