"""The questions in sweeps/: a file's commands make plans, and it compares what it trains."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from fourstage.lineage.plan import make_plan
from tests.fakes import config
from tests.test_readme import combinations

ROOT = Path(__file__).parent.parent
FILES = sorted(path.stem for path in (ROOT / "sweeps").glob("*.sh") if path.stem != "lib")


def commands(name: str, folder: Path, *more: str) -> list[list[str]]:
    """What a file would run, in order; in place of Python is a program that notes its words."""
    said, python = folder / "said", folder / "python"
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {said}\n')
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "OUTPUTS": str(folder / "out"), "SEEDS": "5"}
    subprocess.run(["sh", f"sweeps/{name}.sh", *more], cwd=ROOT, env=env, check=True)
    return [shlex.split(line) for line in said.read_text().splitlines()]


@pytest.mark.parametrize("name", FILES)
def test_a_question_trains_arms_that_differ_and_compares_them(name: str, tmp_path: Path) -> None:
    *trained, compared = commands(name, tmp_path, "logger=none", "trainer=cpu")
    out, runs, stages = f"outputs={tmp_path}/out", [], set()
    for words in trained:
        assert words[:5] == ["train.py", "-m", out, "seed=5", f"tag={name}"]
        assert words[-2:] == ["logger=none", "trainer=cpu"]
        for job in combinations(words[2:]):
            plan = make_plan(config(*job))
            runs.append(plan.runs[-1].id)
            stages.add(plan.runs[-1].stage)
    assert len(set(runs)) == len(runs) >= 2
    (stage,) = stages
    assert compared == [
        "-m",
        "fourstage",
        "report",
        "compare",
        out,
        f"tag={name}",
        f"stage={stage}",
    ]


def test_every_question_has_its_answer() -> None:
    text = (ROOT / "docs" / "questions.md").read_text("utf-8")
    assert FILES == ["base", "experts", "frozen_router", "over_optimisation", "preferences"]
    for name in FILES:
        assert f"sh sweeps/{name}.sh" in text
