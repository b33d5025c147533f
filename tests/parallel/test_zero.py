"""train.py under ZeRO on two CPU processes: what it leaves is plain, and it resumes to the bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fourstage.lineage.resume import LOOPS
from fourstage.parallel.strategies import ZERO
from fourstage.runs.records import read_record
from fourstage.runs.store import RunStore
from tests.test_interruptions import Executed

REPO = Path(__file__).parents[2]
SMALL = ["model=moe_nano", "debug=fast", "logger=none"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPO / 'src'}:{REPO}"}


def start(*words: str) -> subprocess.Popen:
    """train.py where ZeRO takes CPU processes for GPUs; its own process group."""
    command = [sys.executable, "-m", "tests.train_on_cpus", *SMALL, *words]
    return subprocess.Popen(command, cwd=REPO, env=ENV, start_new_session=True)


def train(*words: str) -> None:
    assert start(*words).wait(timeout=500) == 0


def kill_after_a_checkpoint(run: Path, *words: str) -> None:
    process = start(*words)
    while not (run / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "model.safetensors").exists(), "too late: it was finished"


def check_equal(run: Path, expected: Path) -> None:
    for name in ("model.safetensors", "eval.json", "samples.jsonl"):
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.fixture(scope="module", params=ZERO)
def ladder(request, tmp_path_factory) -> tuple[str, Path]:
    """A trainer's name and the outputs of a whole ladder that it trained."""
    outputs = tmp_path_factory.mktemp(request.param) / "outputs"
    train("stage=grpo", f"outputs={outputs}", f"trainer={request.param}", "trainer.devices=2")
    return request.param, outputs


@pytest.mark.slow
def test_one_process_evaluates_the_weights_to_the_same_bytes(ladder):
    _, outputs = ladder
    store = RunStore(outputs)
    for stage in ("pretrain", "sft", "reward", "ppo", "grpo"):
        run = store.find(stage)
        before = (run / "eval.json").read_bytes()
        command = [sys.executable, "-m", "fourstage", "evaluation", f"run={stage}"]
        subprocess.run([*command, f"outputs={outputs}"], cwd=REPO, env=ENV, check=True)
        assert (run / "eval.json").read_bytes() == before
        assert read_record(run)["cost"]["flops"] > 0
        assert not list(run.glob("checkpoints"))


@pytest.mark.slow
def test_one_process_goes_on_where_zero_ended(ladder, tmp_path):
    _, outputs = ladder
    store = RunStore(outputs)
    for stage in ("pretrain", "sft", "reward"):
        run = store.find(stage)
        shutil.copytree(run, tmp_path / "runs" / run.name)
    train("stage=ppo", f"outputs={tmp_path}", "trainer=cpu", "ancestors=require")


@pytest.mark.slow
def test_a_killed_stage_resumes_to_the_same_bits(ladder, tmp_path):
    trainer, outputs = ladder
    words = ["stage=ppo", f"trainer={trainer}", "trainer.devices=2", "stages.ppo.max_steps=8"]
    words += ["stages.ppo.checkpoint_every=3", "stages.ppo.kl_target=1.0"]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    for place in (calm, killed):
        for stage in ("pretrain", "sft", "reward"):
            run = RunStore(outputs).find(stage)
            shutil.copytree(run, place / "runs" / run.name)
    train(*words, f"outputs={calm}")
    expected = RunStore(calm).find("ppo")

    found = killed / "runs" / expected.name
    kill_after_a_checkpoint(found, *words, f"outputs={killed}")
    evil = Path(shutil.copytree(killed, tmp_path / "evil"))
    (path,) = evil.glob(f"runs/*/checkpoints/last.ckpt/{LOOPS}")
    torch.save({"epoch": Executed(tmp_path / "executed")}, path)
    assert start(*words, f"outputs={evil}").wait(500) == 1
    assert not (tmp_path / "executed").exists()
    train(*words, f"outputs={killed}")
    check_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ZERO)
def test_a_killed_pretraining_resumes_to_the_same_bits(trainer, tmp_path):
    """With Muon's momentum."""
    words = ["stage=pretrain", f"trainer={trainer}", "trainer.devices=2"]
    words += ["stages.pretrain.max_steps=60", "stages.pretrain.checkpoint_every=20"]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    train(*words, f"outputs={calm}")
    expected = RunStore(calm).find("pretrain")
    assert read_record(expected)["config"]["stages"]["pretrain"]["optimizer"] == "muon"
    found = killed / "runs" / expected.name
    kill_after_a_checkpoint(found, *words, f"outputs={killed}")
    train(*words, f"outputs={killed}")
    check_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ZERO)
def test_a_stage_leaves_no_network_in_memory(trainer, tmp_path):
    command = [sys.executable, "-m", "tests.zero_memory", trainer, str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, env=ENV, capture_output=True, text=True, check=True)
    left = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("left:")]
    assert len(left) == 2
    for parameters, size in left:
        assert int(parameters) == 0 and int(size) < 30_000  # caches; the model has 350,000
