"""The first screen, and what the command prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fourstage.report import main
from tests.report.by_hand import (
    ADD,
    LADDER,
    cell,
    null,
    report,
    report_md,
    write_json,
    write_run,
)


def test_the_first_screen_says_what_happened(full: Path) -> None:
    first = report_md(full).split("\n## ")[0]
    assert first.splitlines()[2].startswith("Evaluated by suite 1; this version has suite ")
    assert first.splitlines()[4:] == [
        "- On data that no stage trained on, pretrain (bits a character 6.700 → 2.500), sft "
        "(well-formed 2.0 → "
        "90.0 %), reward (pairs right 50.0 → 78.0 %), ppo (true score 0.800 → 1.900) and grpo "
        "(problems right 48.0 → 70.0 %) clearly improved their own goals.",
        '- Asked "What is an LLM?", grpo answers: "I hope you are well."',
        "- What it cost the goals of other stages was not measured.",
        "",
        "![Goals before and after](figures/goals-before-and-after.png)",
        "",
        "On held-out data, with 95 % intervals; each goal has a scale of its own.",
    ]
    sections = re.findall("^## (.*)$", report_md(full), re.M)
    assert sections[0] == "The same prompts, answered by every stage"


def test_a_goal_that_is_not_reached_is_said(outputs: Path) -> None:
    def measure(stage: str, **cells: dict) -> None:
        path = outputs / "runs" / f"{stage}-{LADDER[stage][0]}" / "eval.json"
        write_json(path, {"suite": "1", "seed": 0, "metrics": LADDER[stage][3] | cells})

    measure("sft", well_formed=cell(0.03, 0.02, 0.05))
    measure("reward", pair_accuracy=cell(0.4, 0.35, 0.45, 300))
    measure("grpo", reasoning_accuracy=null("no problems"))
    for stage in LADDER:
        path = outputs / "runs" / f"{stage}-{LADDER[stage][0]}" / "samples.jsonl"
        path.write_text(path.read_text().replace('"I hope you are well."', '""'))
    report(outputs)
    assert report_md(outputs).splitlines()[4:6] == [
        "- On data that no stage trained on, pretrain (bits a character 6.700 → 2.500) and ppo "
        "(true score 0.800 → "
        "1.900) clearly improved their own goals; sft (well-formed 2.0 → 3.0 %) did not clearly "
        "change its own goal; reward (pairs right 50.0 → 40.0 %) clearly worsened its own goal; "
        "grpo (problems right –) could not be judged on its own goal.",
        '- Asked "What is an LLM?", grpo answers: ""',
    ]


def said(
    outputs: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, width: int
) -> list[str]:
    """The lines that the command prints."""
    monkeypatch.setenv("COLUMNS", str(width))
    capsys.readouterr()
    main([f"outputs={outputs}"])
    return capsys.readouterr().out.splitlines()


def test_the_command_ends_with_answers_and_goals(
    full: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before suite 4 there are no paired differences: the two intervals are compared instead."""
    assert said(full, capsys, monkeypatch, 72) == [
        "What is an LLM?",
        "  random    x~9…",
        "  pretrain  <script>alert('x')</script> | `a` **b** &amp; ``` # no head…",
        "  sft       A model of words.",
        "  ppo       I am glad to help you.",
        "  grpo      I hope you are well.",
        "",
        "Each stage's goal, before → after, with the difference's 95 % interval",
        "  pretrain  bits a character  6.700 → 2.500  -4.200 apart: better",
        "  sft       well-formed       2.0 → 90.0 %   +88.0 points apart: better",
        "  reward    pairs right       50.0 → 78.0 %  +28.0 points better [+23.0…",
        "  ppo       true score        0.800 → 1.900  +1.100 apart: better",
        "  grpo      problems right    48.0 → 70.0 %  +22.0 points apart: better",
        "",
        f"report: {full}/report/report.html (the same as {full}/report/report.md)",
    ]


def test_the_ending_marks_what_is_right(
    outputs: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one prompt is asked; control characters, as in escape sequences, are not printed."""
    for folder in (outputs / "runs").iterdir():
        path = folder / "samples.jsonl"
        lines = [line for line in path.read_text().splitlines() if ADD in line]
        path.write_text(
            "".join(f"{line}\n".replace("26 26 26", "\\u001b[2J 日本") for line in lines)
        )
    assert said(outputs, capsys, monkeypatch, 29)[:7] == [
        "26 + 4 = ?",
        "  random    ✗ wrong  qZ)…",
        "  pretrain  ✗ wrong  \ufffd[2J 日…",
        "  sft       ✓ right  6 + 4 =…",
        "  ppo       ✓ right  #### 30",
        "  grpo      ✓ right  26 + 4…",
        "",
    ]


def test_the_ending_of_a_reward_model_without_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ancestors and its evaluation are lost."""
    folder = write_run(tmp_path, "reward")
    (folder / "eval.json").unlink()
    assert said(tmp_path, capsys, monkeypatch, 80)[:3] == [
        "Each stage's goal, before → after, with the difference's 95 % interval",
        "  reward  pairs right  –  – not measured",
        "",
    ]
    assert report_md(tmp_path).splitlines()[2] == (
        "- On data that no stage trained on, reward (pairs right –) could not be judged on its "
        "own goal."
    )


def test_an_output_that_cannot_show_a_character_gets_a_question_mark(full: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "src")
    command = [sys.executable, "-m", "fourstage", "report", f"outputs={full}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "  sft       well-formed       2.0 ? 90.0 %   +88.0 points apart: better" in done.stdout
