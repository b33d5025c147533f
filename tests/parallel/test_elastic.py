"""A run goes on with another number of processes and another ZeRO stage: the same steps to 1e-4.

Slow: real processes over gloo, one thread each; DeepSpeed's are CPU processes.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fourstage.runs.store import RunStore

REPO = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPO / 'src'}:{REPO}"}
ENV |= {"REWARDS": "text"}  # gradients of grpo that are 0 but for rounding would tell nothing
STAGES = ("pretrain", "sft", "reward", "ppo", "grpo")
SMALL = ["model=moe_nano", "debug=fast", "logger=none"]
for name in STAGES:
    own = {"batch_size": 12, "micro_batch_size": 4, "checkpoint_every": 100, "max_steps": 9}
    if name in ("ppo", "grpo"):
        own["minibatch_size"] = 12
    SMALL += [f"stages.{name}.{key}={value}" for key, value in own.items()]
# who trains the first three steps, the next three, and the rest
FEWER = (("ddp", 4), ("ddp", 2), ("ddp", 3))
ZERO = (("zero3", 2), ("zero1", 3), ("zero2", 1))
MIXED = (("zero2", 2), ("auto", 1), ("zero3", 3))
OFFLOAD = (("ddp", 2), ("zero3_offload", 2), ("zero3", 2))
CASES = [
    *((stage, "", FEWER) for stage in STAGES),
    ("pretrain", "adamw", FEWER),
    ("grpo", "muon", FEWER),
    *(("pretrain", "", route) for route in (ZERO, MIXED, OFFLOAD)),
    ("sft", "", ZERO),
    ("reward", "", MIXED),
    ("ppo", "", OFFLOAD),
    ("ppo", "muon", ZERO),
    ("grpo", "", MIXED),
]


def train(outputs: Path, stage: str, who: tuple[str, int], *more: str, stop_at: int = 0) -> str:
    strategy, processes = who
    words = [f"trainer.strategy={strategy}", f"trainer.devices={processes}", f"stage={stage}"]
    command = [sys.executable, "-m", "tests.train_on_cpus", *SMALL, *words, *more]
    env = ENV | ({"STOP_AT": str(stop_at)} if stop_at else {})
    done = subprocess.run(
        [*command, "trainer=cpu", f"outputs={outputs}"],
        cwd=REPO, env=env, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == (143 if stop_at else 0), done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def ladder(tmp_path_factory) -> Path:
    """The outputs of a ladder that one process trained."""
    outputs = tmp_path_factory.mktemp("calm")
    train(outputs, "grpo", ("auto", 1))
    return outputs


def check(found: Path, expected: Path) -> None:
    weights, wanted = (load_file(run / "model.safetensors") for run in (found, expected))
    assert set(weights) == set(wanted)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, wanted[name], rtol=0, atol=1e-4, msg=name)
    texts = ((run / "metrics.csv").read_text().splitlines() for run in (found, expected))
    rows, same = (list(csv.DictReader(lines)) for lines in texts)
    assert [row["step"] for row in rows] == [row["step"] for row in same]
    for row, other in zip(rows, same, strict=True):
        for name in other:
            if other[name] and not name.startswith("speed/"):
                value = float(other[name])
                assert float(row[name]) == pytest.approx(value, rel=1e-3, abs=1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "optimizer", "route"), CASES)
def test_other_processes_go_on(ladder, tmp_path, stage, optimizer, route):
    """Pre-training has Muon, the other stages AdamW, if `optimizer` doesn't say otherwise."""
    words = [f"stages.{stage}.optimizer={optimizer}"] if optimizer else []
    calm = train(ladder, stage, ("auto", 1), *words)  # finds what the ladder has
    expected = Path(re.search("^run: (.*)$", calm, re.MULTILINE)[1])
    for folder in RunStore(ladder).ancestors(expected).values():
        shutil.copytree(folder, tmp_path / "runs" / folder.name)
    for who, stop_at in zip(route, (3, 6, 0), strict=True):
        said = train(tmp_path, stage, who, *words, stop_at=stop_at)
    assert "the same steps but for rounding" in said
    check(tmp_path / "runs" / expected.name, expected)
