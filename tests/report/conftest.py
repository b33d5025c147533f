"""Reports on the ladder written by hand; a module may have others of these names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fourstage.evaluation import suite
from fourstage.report.charts import Drawing
from tests.report.by_hand import LADDER, report, write_run


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    for stage in LADDER:
        write_run(tmp_path / "outputs", stage)
    return tmp_path / "outputs"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole ladder with curves, and its report; for tests that change nothing."""
    outputs = tmp_path_factory.mktemp("full") / "outputs"
    for stage in LADDER:
        write_run(outputs, stage, curves=True)
    report(outputs)
    return outputs


@pytest.fixture
def copied(ladder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the module's `ladder`; fast, since neither intervals nor drawings matter there."""
    monkeypatch.setattr(suite, "BOOTSTRAPS", 10)
    monkeypatch.setattr(
        "fourstage.report.figures.intervals", lambda *_: Drawing("<svg></svg>", None)
    )
    monkeypatch.setattr(Drawing, "files", lambda *_: {})
    shutil.copytree(ladder / "runs", tmp_path / "runs")
    return tmp_path
