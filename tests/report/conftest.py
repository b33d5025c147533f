"""Reports on the ladder written by hand; a module may have others of these names."""

from __future__ import annotations

from pathlib import Path

import pytest

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
