"""The report, from a ladder of run folders written out by hand."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from fourstage.errors import UserError
from fourstage.report import main
from fourstage.report.goals import COIN, apart
from tests.report.by_hand import (
    GRPO,
    LADDER,
    LATE,
    NASTY,
    PPO,
    PRETRAIN,
    RANDOM,
    REWARD,
    SFT,
    cell,
    null,
    report,
    report_md,
    section,
    write_json,
    write_run,
)

# --- stages.json


def test_stages_json_joins_what_later_models_said(outputs: Path) -> None:
    rows = report(outputs)
    assert list(rows) == ["random", "pretrain", "sft", "reward", "ppo", "grpo"]
    assert [row["run"] for row in rows.values()] == [None, PRETRAIN, SFT, REWARD, PPO, GRPO]
    assert [row["parents"] for row in rows.values()] == [
        [],
        [],
        [PRETRAIN],
        [SFT],
        [SFT, REWARD],
        [PPO],
    ]
    late = LATE["sft"]["random"] | LATE["reward"]["random"]
    assert rows["random"]["metrics"] == RANDOM | late
    assert rows["pretrain"]["metrics"] == LADDER["pretrain"][3] | {
        "kl_to_sft": cell(80, 75, 85),
        "reward_model_score": cell(-2.0, -2.1, -1.9),
    }
    assert rows["sft"]["metrics"]["reward_model_score"] == cell(0.1, 0.0, 0.2)
    assert rows["sft"]["metrics"]["kl_to_sft"] == cell(0.0, 0.0, 0.0)
    for stage in ("reward", "ppo", "grpo"):
        assert rows[stage]["metrics"] == LADDER[stage][3]


def test_a_shorter_ladder_has_fewer_rows_and_says_what_it_cannot_know(tmp_path: Path) -> None:
    for stage in ("pretrain", "sft"):
        write_run(tmp_path, stage)
    rows = report(tmp_path)
    assert list(rows) == ["random", "pretrain", "sft"]
    assert rows["sft"]["metrics"]["reward_model_score"]["value"] is None
    text = section(report_md(tmp_path), "What is missing")
    assert "- sft: reward-model score: no reward model on this ladder yet" in text


def test_one_stage_alone_says_nothing_of_others(tmp_path: Path) -> None:
    write_run(tmp_path, "pretrain")
    report(tmp_path)
    text = report_md(tmp_path)
    for word in ("reward model gives", "train/true_score", "better or worse"):
        assert word not in text


def test_grpo_on_sft_has_no_preference_rows(tmp_path: Path) -> None:
    for stage in ("pretrain", "sft", "reward"):
        write_run(tmp_path, stage)
    write_run(tmp_path, "grpo", parents={"policy": SFT})
    assert list(report(tmp_path)) == ["random", "pretrain", "sft", "grpo"]
    text = report_md(tmp_path)
    goals = section(text, "Each stage on its own goal")
    assert (
        "| 50.0 % [45.0, 55.0] (sft) | 70.0 % [65.0, 74.0] | +20.0 points; apart: better |" in goals
    )
    assert f"Other ladders found (run=NAME reports on one): reward-{REWARD}." in text


# --- which ladder


def test_the_latest_finished_tip_is_chosen(outputs: Path) -> None:
    other = "f" * 10
    write_run(outputs, "sft", id=other, finished="2026-01-01T15:00:00+00:00")
    assert report(outputs)["sft"]["run"] == other  # a tip, and the latest
    unfinished = write_run(outputs, "ppo", id="g" * 10, status="running", finished=None)
    assert "ppo" not in report(outputs)
    shutil.rmtree(unfinished)
    write_run(outputs, "grpo", finished="2026-01-01T16:00:00+00:00")
    assert list(report(outputs))[-1] == "grpo"


@pytest.mark.parametrize("name", [REWARD, f"reward-{REWARD}", "reward", "folder"])
def test_run_chooses_another(outputs: Path, name: str) -> None:
    name = str(outputs / "runs" / f"reward-{REWARD}") if name == "folder" else name
    assert list(report(outputs, f"run={name}")) == ["random", "pretrain", "sft", "reward"]


def test_debug_runs_count_only_where_nothing_else_is(outputs: Path, tmp_path: Path) -> None:
    write_run(outputs, "pretrain", id="h" * 10, debug="fast", finished="2027-01-01T00:00:00+00:00")
    assert report(outputs)["grpo"]["run"] == GRPO
    assert report(outputs, "run=pretrain")["pretrain"]["run"] == PRETRAIN
    assert "debug" not in report_md(outputs)
    write_run(tmp_path / "debug", "pretrain", debug="fast")
    assert report(tmp_path / "debug")["pretrain"]["run"] == PRETRAIN
    assert "These are debug runs" in report_md(tmp_path / "debug")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["outputs={}/none"], "no finished run under {}/none/runs: train one first"),
        (["outputs={}/outputs", "run=zzz"], "unknown run 'zzz': {}/outputs/runs has "),
        (["outputs={}/outputs", "run={}/other/runs/sft-a"], "unknown run '{}/other/runs/sft-a'"),
        (["ouputs=x"], "unknown argument 'ouputs=x' (see --help)"),
        (["run"], "unknown argument 'run' (see --help)"),
    ],
)
def test_mistakes_are_one_line(
    outputs: Path, tmp_path: Path, arguments: list[str], line: str
) -> None:
    with pytest.raises(UserError) as error:
        main([argument.format(tmp_path) for argument in arguments])
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(line.format(tmp_path))


def test_a_run_of_another_folder_is_not_reported_on(outputs: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", "sft", id="o" * 10)
    with pytest.raises(UserError, match="not a run under .*: give its own outputs="):
        main([f"outputs={outputs}", f"run={other}"])


# --- report.md


def test_stage_table(full: Path) -> None:
    text = report_md(full)
    assert text.startswith("# From random weights to grpo\n")
    assert (
        f"Run grpo-{GRPO}, model moe_nano, data embedded, seed 3, on cpu; evaluation suite 1."
        in text
    )
    lines = section(text, "What each stage did").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table[0].split(" | ")[1:3] == [
        "bits per character (lower is better)",
        "well-formed answers",
    ]
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {s}" for s in ("random", *LADDER)]
    assert "| pretrain | 2.500 [2.400, 2.600], n 50 | 2.0 % [1.0, 4.0], n 400 |" in table[3]
    assert table[5] == "| reward | – | – | – | – | – | 78.0 % [73.0, 82.0], n 300 |"
    assert "| – | 0.0 % [0.0, 2.0] | 60.0 % [53.0, 67.0] |" in section(
        text, "By task and by difficulty"
    )


def test_each_stage_on_its_own_goal(full: Path) -> None:
    text = section(report_md(full), "Each stage on its own goal")
    expected = [
        "| pretrain | bits per character (lower is better) | 6.700 [6.600, 6.800] (random) "
        "| 2.500 [2.400, 2.600] | -4.200; apart: better |",
        "| sft | well-formed answers | 2.0 % [1.0, 4.0] (pretrain) | 90.0 % [87.0, 93.0] "
        "| +88.0 points; apart: better |",
        "| reward | held-out pairs ordered right | 50.0 % (a coin) | 78.0 % [73.0, 82.0] "
        "| +28.0 points better [+23.0, +32.0] |",
        "| ppo | true score | 0.800 [0.700, 0.900] (sft) | 1.900 [1.800, 2.000] "
        "| +1.100; apart: better |",
        "| grpo | reasoning accuracy | 48.0 % [43.0, 53.0] (ppo) | 70.0 % [65.0, 74.0] "
        "| +22.0 points; apart: better |",
    ]
    for line in expected:
        assert line in text
    assert "KL from the sft policy, nats an answer: ppo 9.500 [9.000, 10.000]." in text


@pytest.mark.parametrize(
    ("name", "before", "after", "verdict"),
    [
        ("well_formed", cell(0.5, 0.4, 0.6), cell(0.7, 0.61, 0.8), "apart: better"),
        ("well_formed", cell(0.5, 0.4, 0.6), cell(0.7, 0.6, 0.8), "overlap"),
        ("well_formed", cell(0.5, 0.4, 0.6), cell(0.2, 0.1, 0.3), "apart: worse"),
        ("bits_per_char", cell(5, 4, 6), cell(2, 1, 3), "apart: better"),
        ("bits_per_char", cell(2, 1, 3), cell(5, 4, 6), "apart: worse"),
        ("bits_per_char", null("no text"), cell(5, 4, 6), "not measured"),
        ("bits_per_char", cell(5, 5, 5, n=1), cell(2, 2, 2, n=1), "an interval without width"),
        ("pair_accuracy", COIN, cell(0.8, 0.7, 0.9), "apart: better"),
    ],
)
def test_intervals_apart(name: str, before: dict, after: dict, verdict: str) -> None:
    assert apart(name, before, after) == verdict


def test_answers_stand_side_by_side(full: Path) -> None:
    text = section(report_md(full), "The same prompts, answered by every stage")
    assert re.findall("^### (.*)$", text, re.M) == ["What is an LLM?", "26 + 4 = ?"]
    llm = text.split("### ")[1]
    assert re.findall(r"^\*\*(\w+)\*\*", llm, re.M) == ["random", "pretrain", "sft", "ppo", "grpo"]
    assert "**random** (cut off)\n\n```text\nx~9\n```" in llm  # nothing says what is right
    add = text.split("\n### ")[2]
    assert "**random** (✗ wrong, cut off)\n\n```text\nqZ)\n```" in add
    assert "**pretrain** (✗ wrong)\n\n```text\n26 26 26\n```" in add
    assert "**sft** (✓ right)\n\n```text\n6 + 4 = 10\n#### 30\n```" in add
    html = (full / "report" / "report.html").read_text(encoding="utf-8")
    assert '<strong>sft</strong> <span class="better">✓ right</span>' in html
    wrong = '<span class="worse">✗ wrong</span><span class="small">cut off</span>'
    assert f"<strong>random</strong> {wrong}" in html
    assert f"**pretrain** (cut off)\n\n````text\n{NASTY}\n````" in llm
    assert "**grpo**\n\n```text\nI hope you are well.\n```" in llm
    assert "an early answer" not in text


def test_a_stage_that_was_not_asked_says_so(outputs: Path) -> None:
    row = {"step": 1, "prompt_id": "p", "prompt": "Only here?", "answer": "Yes.", "stopped": True}
    with open(outputs / "runs" / f"grpo-{GRPO}" / "samples.jsonl", "w", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    report(outputs)
    only = report_md(outputs).split("### Only here?")[1]
    assert "**sft** (not asked)" in only and "**grpo**\n\n```text\nYes.\n```" in only


def test_tiny_values_are_not_minus_zero(outputs: Path) -> None:
    path = outputs / "runs" / f"grpo-{GRPO}" / "eval.json"
    metrics = LADDER["grpo"][3] | {
        "well_formed": cell(0.0, -1e-17, 0.1),
        "kl_to_sft": cell(-1e-5, -2e-4, 2.0),
    }
    write_json(path, {"suite": "1", "seed": 0, "metrics": metrics})
    report(outputs)
    assert "0.0 % [0.0, 10.0], n 400" in report_md(outputs)
    assert "0.000 [0.000, 2.000]" in report_md(outputs) and "-0.0" not in report_md(outputs)


def test_costs(full: Path) -> None:
    text = report_md(full)
    costs = section(text, "What it cost")
    assert f"| pretrain | pretrain-{PRETRAIN} | 1 min 01 s | 12,345 | 900 |" in costs
    assert "Not recorded for every stage: of it training; of it evaluation; steps;" in costs
    assert "| together |  | 5 min 06 s | 61,725 | 900 |" in costs
    assert "- sft: dropped 7" in section(text, "What went into training")


# --- broken files


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("eval.json", None, "eval.json is missing"),
        ("eval.json", '{"suite": "1", "metr', "eval.json cannot be read"),
        ("eval.json", "[]", "eval.json cannot be read (no JSON object, or an empty one)"),
        ("eval.json", '{"suite": "1"}', "eval.json cannot be read (seed: missing"),
        ("eval.json", '{"suite": "1", "seed": 0, "metrics": 7}', "eval.json cannot be read (met"),
        ("samples.jsonl", None, "samples.jsonl is missing"),
        ("metrics.csv", None, "metrics.csv is missing"),
        ("metrics.csv", "step,train/loss\n1,2.0\nx,y\n", "metrics.csv has 1 broken line (3)"),
        ("metrics.csv", "", "metrics.csv is empty"),
        ("metrics.csv", "train/loss\n1\n", "metrics.csv has no column step"),
        ("metrics.csv", "\xff\x00", "metrics.csv cannot be read"),
        ("ladder_eval.json", "{", "ladder_eval.json cannot be read"),
        ("ladder_eval.json", "{}", "ladder_eval.json cannot be read (no JSON object, or an"),
    ],
)
def test_a_broken_file_is_named_and_costs_only_its_own(
    outputs: Path, file: str, content: str | None, named: str
) -> None:
    path = outputs / "runs" / f"sft-{SFT}" / file
    path.unlink()
    if content is not None:
        path.write_text(content, encoding="latin-1")
    rows = report(outputs)
    text = report_md(outputs)
    assert f"- sft-{SFT}/{named}" in section(text, "What is missing")
    assert list(rows) == ["random", *LADDER]
    assert rows["ppo"]["metrics"] == LADDER["ppo"][3]
    if file == "eval.json":
        assert rows["sft"]["metrics"]["well_formed"] == null(f"not in sft-{SFT}/eval.json")
        assert rows["sft"]["metrics"]["reward_model_score"] == cell(0.1, 0.0, 0.2)
        assert "–; not measured |" in section(text, "Each stage on its own goal")
    else:
        assert rows["sft"]["metrics"]["well_formed"] == LADDER["sft"][3]["well_formed"]


def test_one_broken_metric_or_sample_leaves_the_others(outputs: Path) -> None:
    folder = outputs / "runs" / f"sft-{SFT}"
    metrics = LADDER["sft"][3] | {
        "bits_per_char": {"value": float("nan"), "n": 1, "low": 0, "high": 1}
    }
    write_json(folder / "eval.json", {"suite": "1", "seed": 0, "metrics": metrics})
    with open(folder / "samples.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 9, "pro')
    rows = report(outputs)
    assert rows["sft"]["metrics"]["bits_per_char"]["value"] is None
    assert rows["sft"]["metrics"]["well_formed"] == LADDER["sft"][3]["well_formed"]
    missing = section(report_md(outputs), "What is missing")
    assert f"- sft-{SFT}/eval.json has no value, n, low and high for bits_per_char" in missing
    assert f"- sft-{SFT}/samples.jsonl has 1 broken line (4)" in missing
    assert "A model of words." in report_md(outputs)


@pytest.mark.parametrize("content", [None, "{", "{}", '{"stage": "sft", "id": "b", "parents": {}}'])
def test_a_broken_record_ends_the_line_there(outputs: Path, content: str | None) -> None:
    path = outputs / "runs" / f"sft-{SFT}" / "run.json"
    path.unlink()
    if content is not None:
        path.write_text(content, encoding="utf-8")
    rows = report(outputs)
    assert list(rows) == ["reward", "ppo", "grpo"]
    missing = section(report_md(outputs), "What is missing")
    assert f"- sft-{SFT}{': not a run' if content is None else '/run.json: broken'}" in missing
    assert f"- ppo-{PPO}: its policy parent {SFT} cannot be read" in missing


def test_a_broken_tip_leaves_the_ladder_below_it(outputs: Path) -> None:
    (outputs / "runs" / f"grpo-{GRPO}" / "run.json").write_text("")
    assert list(report(outputs))[-1] == "ppo"


def test_another_suite_is_named(outputs: Path) -> None:
    path = outputs / "runs" / f"grpo-{GRPO}" / "eval.json"
    path.write_text(path.read_text().replace('"suite": "1"', '"suite": "0"'))
    main([f"outputs={outputs}"])
    text = report_md(outputs)
    assert "Evaluated by suites 0 and 1; this version has suite 6" in text
    assert "- grpo: no differences to ppo: grpo was evaluated by suite 0" in text
