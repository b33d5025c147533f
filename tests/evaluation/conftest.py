"""A ladder that was measured by lm-eval, once for all tests of a process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from fourstage.evaluation import suite
from fourstage.report.charts import Drawing
from tests.evaluation.benchmarked import (
    ANSWER,
    TEXTS,
    benchmark,
    greedy,
    run_of,
    write_choice,
    write_talk,
    write_task,
)


@pytest.fixture(scope="session")
def tasks(ladder, indexed_once, tmp_path_factory) -> Path:
    """One multiple choice, one generative, one perplexity; the generative one's answers are those
    of sft for a third of its items, and those of pretrain for another."""
    folder = tmp_path_factory.mktemp("tasks")
    write_choice(folder)
    questions = [f"{i} + {2 * i} = ?" for i in range(9)]
    sft, pretrain = run_of(ladder, "sft"), run_of(ladder, "pretrain")
    known = [greedy(sft, questions[i], True) for i in range(3)]
    known += [greedy(pretrain, questions[i], False) for i in range(3, 6)]
    write_talk(
        folder, list(zip(questions, [*known, *["?!"] * 3], strict=True)), max_gen_toks=ANSWER
    )
    write_task(
        folder,
        "own_text",
        [{"text": text} for text in TEXTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
        metric_list=[{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    )
    return folder


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without intervals and drawings, which take seconds."""
    monkeypatch.setattr(suite, "BOOTSTRAPS", 10)
    empty = Drawing("<svg></svg>", None)
    monkeypatch.setattr("fourstage.report.figures.intervals", lambda *_: empty)
    monkeypatch.setattr(Drawing, "files", lambda *_: {})


@pytest.fixture(scope="session")
def indexed_once() -> Iterator[None]:
    """Finding all of lm-eval's tasks takes seconds."""
    from fourstage.evaluation import harness

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "TaskManager", cache(harness.TaskManager))
        yield


@pytest.fixture(scope="session")
def measured(ladder, tasks, tmp_path_factory) -> Path:
    """A copy of the ladder after `benchmark ladder=true`."""
    outputs = shutil.copytree(ladder, tmp_path_factory.mktemp("measured") / "outputs")
    names = "tasks=own_choice,own_talk,own_text"
    benchmark(outputs, "run=grpo", "ladder=true", names, f"include_path={tasks}")
    return outputs


@pytest.fixture
def own(measured, tmp_path) -> Path:
    return shutil.copytree(measured, tmp_path / "outputs")
