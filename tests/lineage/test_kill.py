"""Kill -9 in the middle of a stage, the same command again: the weights are those of a calm run."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fourstage.ladder import LADDER
from fourstage.runs.records import read_record
from fourstage.runs.store import RunStore

REPO = Path(__file__).parents[2]
STEPS = 8
SMALL = ["model=moe_nano", "debug=fast", "logger=none", "trainer=cpu"] + [
    f"stages.{stage}.{key}"
    for stage in LADDER
    for key in (f"max_steps={STEPS}", "checkpoint_every=3", "log_every=1")
]


def start(stage: str, outputs: Path) -> subprocess.Popen:
    command = [sys.executable, "train.py", f"stage={stage}", f"outputs={outputs}", *SMALL]
    return subprocess.Popen(command, cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Path:
    """The outputs of a ladder that nobody disturbed."""
    outputs = tmp_path_factory.mktemp("calm") / "outputs"
    assert start("grpo", outputs).wait() == 0
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("stage", LADDER)
def test_a_killed_stage_resumes_to_the_same_bits(stage: str, calm: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    store = RunStore(calm)
    expected = store.find(stage)
    for ancestor in store.ancestors(expected).values():
        shutil.copytree(ancestor, outputs / "runs" / ancestor.name)

    process = start(stage, outputs)
    checkpoint = outputs / "runs" / expected.name / "checkpoints" / "last.ckpt"
    while not checkpoint.exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = outputs / "runs" / expected.name
    assert not (found / "model.safetensors").exists(), "too late: it was finished"

    assert start(stage, outputs).wait() == 0
    assert (found / "model.safetensors").read_bytes() == (
        expected / "model.safetensors"
    ).read_bytes()
    for name in ("eval.json", "eval_items.jsonl", "samples.jsonl"):
        if (expected / name).exists():
            assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    # no step is missing, none is there twice, and all but the clock's columns say the same
    assert rows_without_speed(found) == rows_without_speed(expected)
    costs = [read_record(place)["cost"] for place in (found, expected)]
    for name in ("steps", "tokens", "tokens_generated", "flops"):
        assert costs[0].get(name) == costs[1].get(name), name


def rows_without_speed(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in rows]
