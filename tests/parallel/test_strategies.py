"""Two ranks of four rows take the steps of one rank of eight, under every trainer and stage.

Real processes over gloo, one thread each; DeepSpeed's are CPU processes (tests/cpu_as_cuda.py).
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stages.matrix import LARGE, MUON, STAGES, tied_policy, train
from tests.stages.tiny import distance, make_policy, weights

ROOT = Path(__file__).parents[2]
TRAINERS = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
SKIPPED = ("skipped", "skipped_muon")


def trained(trainer: str, ranks: int, steps: int, folder: Path, *stages: str) -> Path:
    """The folder with what each process saw (see matrix.py)."""
    folder.mkdir()
    numbers = (str(ranks), str(steps))
    command = [sys.executable, "-m", "tests.stages.matrix", trainer, *numbers, folder, *stages]
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def seen(folder: Path, stage: str, rank: int) -> dict[str, Any]:
    return torch.load(folder / f"{stage}-{rank}.pt")


def check(alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    """The same losses to 2e-4, the same metrics, and equal weights on the ranks."""
    for rank in ranks:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=2e-4, abs=1e-5)
        assert len(rank["metrics"]) == len(alone["metrics"])
        for one, two in zip(alone["metrics"], rank["metrics"], strict=True):
            assert two == pytest.approx(one, rel=2e-3, abs=1e-4)
    assert distance(ranks[0]["weights"], ranks[1]["weights"]) == 0
    # Adam divides by a gradient's size: the rounding of one near 0 moves a weight further
    assert distance(alone["weights"], ranks[0]["weights"]) < 3e-4


def test_a_few_steps_under_zero2(tmp_path):
    (tmp_path / "alone").mkdir()
    policies = {"sft": make_policy(), "tied_muon": tied_policy()}
    two = trained("zero2", 2, 2, tmp_path / "two", *policies, "ppo_bf16")
    for stage, policy in policies.items():
        train("auto", 1, 2, tmp_path / "alone", stage)
        found = seen(tmp_path / "alone", stage, 0)
        check(found, [seen(two, stage, rank) for rank in (0, 1)])
        start = {f"policy.{name}": w for name, w in weights(policy).items()}
        assert distance(start, found["weights"]) > 1e-3
    train("auto", 1, 2, tmp_path / "alone", "ppo_bf16")
    want, found = (seen(where, "ppo_bf16", 0)["losses"] for where in (tmp_path / "alone", two))
    assert len(found) > 2  # a step has several updates, and each sees the weights of the one before
    assert found == pytest.approx(want, abs=0.04)


WAITS = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from fourstage.parallel.strategies import others_wait

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", "file://" + store, timedelta(seconds=10), world_size=2, rank=rank)
with others_wait():
    time.sleep(13 * (rank == 0))
dist.barrier()
"""


@pytest.mark.slow
def test_the_others_wait_longer_than_a_collective_would(tmp_path):
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WAITS]
    ranks = [subprocess.Popen([*command, str(r), tmp_path / "store"], env=env) for r in (0, 1)]
    assert [rank.wait(200) for rank in ranks] == [0, 0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "1"
    return trained("auto", 1, 10, folder, *STAGES, *MUON, *SKIPPED, "sampled")


@pytest.fixture(scope="module", params=TRAINERS)
def two_ranks(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two") / request.param
    return trained(request.param, 2, 10, folder, *STAGES, *MUON, *LARGE, *SKIPPED, "sampled")


@pytest.mark.slow
@pytest.mark.parametrize("stage", (*STAGES, *MUON, "sampled"))
def test_two_ranks_take_the_steps_of_one(stage, alone, two_ranks):
    check(seen(alone, stage, 0), [seen(two_ranks, stage, rank) for rank in (0, 1)])


@pytest.mark.slow
@pytest.mark.parametrize("stage", LARGE)
def test_two_ranks_take_the_same_steps_with_a_few_logits_at_a_time(stage, alone, two_ranks):
    """The ranks' rows are not equally long: ZeRO-3 would wait for ever for one more piece."""
    whole = seen(alone, stage.removesuffix("_large"), 0)
    check(whole, [seen(two_ranks, stage, rank) for rank in (0, 1)])


@pytest.mark.slow
@pytest.mark.parametrize("stage", SKIPPED)
def test_steps_that_are_not_finite_on_one_rank_are_skipped_on_all(stage, alone, two_ranks):
    one = seen(alone, stage, 0)
    for rank in (0, 1):
        two = seen(two_ranks, stage, rank)
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert distance(one["weights"], two["weights"]) < 1e-4
        counts = [metrics["train/skipped_steps"] for metrics in two["metrics"]]
        assert counts == [0, 0, 1, 1, 2, 2, 2, 2, 2, 2]
    assert one["losses"].count(math.inf) == 1


@pytest.mark.slow
def test_ranks_whose_answers_end_at_different_lengths_stay_in_step(two_ranks):
    """And that answer tied groups once more, which the other rank may not have."""
    first, second = (seen(two_ranks, "sampled", rank) for rank in (0, 1))
    assert distance(first["weights"], second["weights"]) == 0
    assert first["losses"] == second["losses"] and len(first["losses"]) == 40
