"""Logs and samples around training steps, on a module of one parameter."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from fourstage.tracking.callbacks import (
    PlanProgress,
    Sample,
    SampleLog,
    step_seed,
    telling,
    time_left,
)
from tests.one_weight import N_STEPS, Tiny, fit, read


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Tiny]:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(folder)


def test_metrics_of_a_run(whole) -> None:
    rows = read(whole[0])
    assert [int(row["step"]) for row in rows] == list(range(1, N_STEPS + 1))
    assert list(rows[0])[0] == "step" and "epoch" not in rows[0]
    assert [row["step"] for row in rows if row["val/loss"]] == ["4", "8", "12"]
    assert rows[-1]["val/loss"] == f"{whole[1].weight.item():.9g}" == rows[-1]["train/loss"]


def test_samples_of_a_run(whole) -> None:
    rows = [json.loads(line) for line in (whole[0] / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 5, 10, 12]
    assert list(rows[0]) == ["step", "prompt_id", "prompt", "answer", "stopped", "right"]
    assert rows[-1]["answer"] == f"{whole[1].weight.item():.4f}"


def test_all_ranks_sample_at_the_end_or_none(tmp_path) -> None:
    """After a resume the first rank has the rows; the others must not wait for it in a gather."""
    for is_there, asked in ((True, []), (False, ["asked"])):
        calls: list[str] = []
        log = SampleLog(
            tmp_path / "samples.jsonl", lambda c=calls: c.append("asked") or [], every=0
        )
        progress = SimpleNamespace(total=SimpleNamespace(processed=8))
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
        first_says = SimpleNamespace(broadcast=lambda mine, found=is_there: found)
        trainer = SimpleNamespace(fit_loop=loop, strategy=first_says, is_global_zero=False)
        log.on_train_end(trainer, None)
        assert calls == asked


def test_samples_of_a_resumed_run_hold_any_character(tmp_path) -> None:
    """A user's own problem may hold line separators, which are no ends of a record."""
    asked = Sample("problem-1", "one\u2028two\x85three", "4", True, False)
    log = SampleLog(tmp_path / "samples.jsonl", lambda: [asked], every=1)
    progress = SimpleNamespace(total=SimpleNamespace(processed=2))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    trainer = SimpleNamespace(fit_loop=loop, loggers=[], is_global_zero=True)
    log.take(trainer)
    resumed = SampleLog(log.path, lambda: [], every=1)
    resumed.on_train_start(trainer, None)
    assert resumed.rows == log.rows and resumed.rows[0]["prompt"] == asked.prompt
    # as an earlier version wrote it
    log.path.write_text(
        '{"step": 1, "prompt_id": "p", "prompt": "a", "answer": "b", "stopped": true}'
    )
    resumed.on_train_start(trainer, None)
    assert [list(row.items())[3:] for row in resumed.rows] == [
        [("answer", "b"), ("stopped", True), ("right", None)]
    ]


def test_step_seed_depends_on_everything() -> None:
    seeds = {
        step_seed(s, g, r, i)
        for s in (0, 1)
        for g in ("sft", "ppo")
        for r in (0, 1)
        for i in (0, 1)
    }
    assert len(seeds) == 16
    assert step_seed(0, "sft", 0, 0) == step_seed(0, "sft", 0, 0)
    torch.manual_seed(max(seeds))  # torch takes them


def test_time_left() -> None:
    assert time_left(130.2, []) == "0:02:10 left before the evaluation"
    text = time_left(60, [("reward", 60.0), ("ppo", None), ("grpo", 3600.0)])
    assert text == "0:01:00 left before the evaluation, 1:02:00 with reward, grpo, then ppo"


def test_an_evaluation_says_what_it_is_at(monkeypatch) -> None:
    for terminal in (False, True):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=80)
        with telling("sft", console) as tell:
            tell("held-out text")
            tell("too soon for another line")
            monkeypatch.setattr("fourstage.tracking.callbacks.LINE_EVERY", -1.0)
            tell("greedy chat answers")
        monkeypatch.undo()
        lines = out.getvalue().splitlines()
        if terminal:
            assert "sft: evaluating: greedy chat answers" in out.getvalue()
            assert lines[-1].endswith("sft: evaluated in 0:00:00")
        else:
            assert lines == [
                "sft: evaluating: held-out text",
                "sft: evaluating: greedy chat answers",
                "sft: evaluated in 0:00:00",
            ]


def test_progress_in_a_log_file_and_in_a_terminal(tmp_path) -> None:
    for terminal in (False, True):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=200)
        bar = PlanProgress("sft", [("reward", None)], console)
        bar.line_every = 0.0
        fit(tmp_path / str(terminal), bar)
        assert "step 12 · loss" in out.getvalue()
        assert "0:00:00 left before the evaluation, then reward" in out.getvalue()
        assert ("\x1b[" in out.getvalue()) == terminal
