"""SIGTERM and SIGUSR1 to one or all of two processes: both save, end in order and go on. Slow."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from benchmarks.kills import Attempt, command, weights

ONE_STAGE = [
    "stage=pretrain",
    "stages.pretrain.max_steps=40",
    "stages.pretrain.checkpoint_every=30",
]


def start(trainer: str, outputs: Path) -> Attempt:
    program, overrides = command(trainer)
    return Attempt(outputs, program, [*overrides, *ONE_STAGE])


@pytest.fixture(scope="module", params=["ddp", "zero2", "zero3"])
def calm(request, tmp_path_factory) -> tuple[str, dict[str, bytes]]:
    """A trainer and the weights of a run that nobody disturbed."""
    outputs = tmp_path_factory.mktemp("calm") / "outputs"
    assert start(request.param, outputs).process.wait(300) == 0
    return request.param, weights(outputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "signum"),
    [("first", signal.SIGTERM), ("second", signal.SIGUSR1), ("all", signal.SIGUSR1)],
)
def test_processes_save_and_end_together(calm, tmp_path: Path, who: str, signum: int) -> None:
    trainer, expected = calm
    outputs = tmp_path / "outputs"
    attempt = start(trainer, outputs)
    # a row means that both have taken a step: before, each of them ends at once
    while not any("\n" in p.read_text().strip() for p in outputs.glob("runs/*/metrics.csv")):
        assert attempt.process.poll() is None, attempt.log.read_text()
        time.sleep(0.01)
    while len(ranks := attempt.alive()) != 2:  # a command that a library runs is a third
        assert attempt.process.poll() is None, attempt.log.read_text()
    first, second = ranks
    for pid in {"first": [first], "second": [second], "all": [first, second]}[who]:
        os.kill(pid, signum)
    assert attempt.wait(60), "a process stays"
    assert attempt.process.wait() == 128 + signum
    (run,) = (path.name for path in outputs.glob("runs/*"))
    line = f"{run}, step "
    said = attempt.log.read_text()
    assert line in said and f": stopped by {signal.Signals(signum).name}: run the same" in said
    assert "Traceback" not in said

    attempt = start(trainer, outputs)
    assert attempt.process.wait(300) == 0
    assert f"resuming {run}" in attempt.log.read_text()
    assert weights(outputs) == expected
