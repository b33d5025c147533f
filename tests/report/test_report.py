"""The report, from a ladder of run folders written out by hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fourstage.errors import UserError
from fourstage.report import main
from fourstage.report.charts import thinned
from fourstage.report.figures import MOST_POINTS, panels
from fourstage.report.html import Answers, Bullets, Paragraph, Table, markdown, page
from fourstage.report.tables import COIN, apart

PRETRAIN, SFT, REWARD, PPO, GRPO = "aaaaaaaaaa", "bbbbbbbbbb", "cccccccccc", "dddddddddd", "e" * 10
LLM, ADD = "What is an LLM?", "26 + 4 = ?"
NASTY = "<script>alert('x')</script> | `a` **b** &amp; ```\n# no heading"


def cell(value: float, low: float, high: float, n: int = 400) -> dict:
    return {"value": value, "n": n, "low": low, "high": high}


def null(why: str) -> dict:
    return {"value": None, "why": why}


# stage -> (id, parents, finished, eval.json's metrics, answers to LLM and ADD)
LADDER = {
    "pretrain": (
        PRETRAIN,
        {},
        "2026-01-01T10:00:00+00:00",
        {
            "bits_per_char": cell(2.5, 2.4, 2.6, 50),
            "well_formed": cell(0.02, 0.01, 0.04),
            "reasoning_accuracy": cell(0.0, 0.0, 0.01),
            "reasoning_accuracy/chain_sum": cell(0.0, 0.0, 0.02, 200),
            "true_score": cell(-1.5, -1.6, -1.4),
            "reward_model_score": null("no reward model on this ladder yet"),
            "kl_to_sft": null("no sft policy on this ladder yet"),
        },
        (NASTY, "26 26 26"),
    ),
    "sft": (
        SFT,
        {"policy": PRETRAIN},
        "2026-01-01T11:00:00+00:00",
        {
            "bits_per_char": cell(2.7, 2.6, 2.8, 50),
            "well_formed": cell(0.9, 0.87, 0.93),
            "reasoning_accuracy": cell(0.5, 0.45, 0.55),
            "reasoning_accuracy/chain_sum": cell(0.6, 0.53, 0.67, 200),
            "true_score": cell(0.8, 0.7, 0.9),
            "reward_model_score": null("no reward model on this ladder yet"),
            "kl_to_sft": cell(0.0, 0.0, 0.0),
        },
        ("A model of words.", "6 + 4 = 10\n#### 30"),
    ),
    "reward": (
        REWARD,
        {"policy": SFT},
        "2026-01-01T12:00:00+00:00",
        {"pair_accuracy": cell(0.78, 0.73, 0.82, 300), "pair_margin": cell(0.9, 0.8, 1.0, 300)},
        None,
    ),
    "ppo": (
        PPO,
        {"policy": SFT, "reward": REWARD},
        "2026-01-01T13:00:00+00:00",
        {
            "bits_per_char": cell(2.9, 2.8, 3.0, 50),
            "well_formed": cell(0.95, 0.92, 0.97),
            "reasoning_accuracy": cell(0.48, 0.43, 0.53),
            "true_score": cell(1.9, 1.8, 2.0),
            "reward_model_score": cell(2.2, 2.1, 2.3),
            "kl_to_sft": cell(9.5, 9.0, 10.0),
        },
        ("I am glad to help you.", "#### 30"),
    ),
    "grpo": (
        GRPO,
        {"policy": PPO},
        "2026-01-01T14:00:00+00:00",
        {
            "bits_per_char": cell(3.0, 2.9, 3.1, 50),
            "well_formed": cell(0.97, 0.95, 0.98),
            "reasoning_accuracy": cell(0.7, 0.65, 0.74),
            "true_score": cell(1.7, 1.6, 1.8),
            "reward_model_score": cell(1.9, 1.8, 2.0),
        },
        ("I hope you are well.", "26 + 4 = 30\n#### 30"),
    ),
}
RANDOM = {
    "bits_per_char": cell(6.7, 6.6, 6.8, 50),
    "well_formed": cell(0.0, 0.0, 0.01),
    "reasoning_accuracy": cell(0.0, 0.0, 0.01),
    "true_score": cell(-2.0, -2.1, -1.9),
    "reward_model_score": null("no reward model on this ladder yet"),
}
LATE = {
    "sft": {
        "random": {"kl_to_sft": cell(400, 390, 410)},
        PRETRAIN: {"kl_to_sft": cell(80, 75, 85)},
    },
    "reward": {
        "random": {"reward_model_score": cell(-3.0, -3.1, -2.9)},
        PRETRAIN: {"reward_model_score": cell(-2.0, -2.1, -1.9)},
        SFT: {"reward_model_score": cell(0.1, 0.0, 0.2)},
    },
}
METRICS = {
    "pretrain": "step,train/loss,val/loss,val/bits_per_char\n1,4.6,,\n2,2.0,1.9,2.7\n",
    "sft": "step,train/loss,val/loss\n1,1.5,\n2,1.0,1.1\n",
    "reward": "step,train/loss,train/accuracy,val/accuracy\n1,0.7,0.5,\n2,0.5,0.8,0.78\n",
    "ppo": "step,train/score,train/true_score,train/kl\n1,0.1,0.8,0\n2,2.0,1.9,nan\n3,2.2,1.9,9\n",
    "grpo": "step,train/reward,train/pass_at_1,train/kl\n1,0.5,0.5,0\n2,0.8,0.7,0.1\n",
}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_run(outputs: Path, stage: str, curves: bool = False, **changes: object) -> Path:
    """One run folder of LADDER; `changes` go into its run.json. Without curves nothing is drawn."""
    run_id, parents, finished, metrics, answers = LADDER[stage]
    record = {
        "id": run_id,
        "stage": stage,
        "name": f"{stage}-{run_id}",
        "parents": parents,
        "group": run_id,
        "config": {
            "model": {"name": "moe_nano"},
            "data": {"name": "embedded"},
            "stages": {stage: {}},
            "seed": 3,
        },
        "device": "cpu",
        "started": "2026-01-01T09:00:00+00:00",
        "finished": finished,
        "status": "finished",
        "cost": {"seconds": 61.2, "tokens": 12345, "peak_memory_mib": 900, "data_dropped": 7},
        "debug": None,
        **changes,
    }
    folder = outputs / "runs" / f"{stage}-{record['id']}"
    write_json(folder / "run.json", record)
    write_json(folder / "eval.json", {"suite": "1", "seed": 0, "metrics": metrics})
    (folder / "metrics.csv").write_text(METRICS[stage] if curves else "step\n", encoding="utf-8")
    if stage in LATE:
        write_json(folder / "ladder_eval.json", LATE[stage])
    lines = []
    if stage == "pretrain":
        write_json(folder / "eval_random.json", {"suite": "1", "seed": 0, "metrics": RANDOM})
        lines = [(0, ADD, "qZ)", False), (0, LLM, "x~9", False)]
    if answers is not None:
        lines += [(5, LLM, "an early answer", True)]
        lines += [(9, ADD, answers[1], True), (9, LLM, answers[0], stage != "pretrain")]
    rows = [
        {"step": step, "prompt_id": prompt, "prompt": prompt, "answer": answer, "stopped": stopped}
        | ({"right": answer.endswith("#### 30")} if prompt == ADD else {})
        for step, prompt, answer, stopped in lines
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "samples.jsonl").write_text(text, encoding="utf-8")
    return folder


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


def report(outputs: Path, *arguments: str) -> dict[str, dict]:
    """Runs the command; stages.json by stage."""
    main([f"outputs={outputs}", *arguments])
    table = json.loads((outputs / "report" / "stages.json").read_text(encoding="utf-8"))
    assert list(table) == ["suite", "rows"] and table["suite"] == "1"
    for row in table["rows"]:
        assert list(row) == ["stage", "run", "parents", "metrics", "differences"]
        assert row["differences"] == {}  # the items of suite 1 are not read
        if "true_score" in row["metrics"]:  # its former name
            assert row["metrics"].pop("preference_score") == row["metrics"]["true_score"]
    return {row["stage"]: row for row in table["rows"]}


def report_md(outputs: Path) -> str:
    return (outputs / "report" / "report.md").read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


# --- the first screen, and what the terminal says


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
    assert "Evaluated by suites 0 and 1; this version has suite 5" in text
    assert "- grpo: no differences to ppo: grpo was evaluated by suite 0" in text


# --- report.html


class Page(HTMLParser):
    """Fails on an unclosed or crossed tag; keeps ids, attributes that load something, and text."""

    VOID = ("meta", "br", "link", "img", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loaded: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.loaded.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_well_formed_and_stands_alone(full: Path) -> None:
    text = (full / "report" / "report.html").read_text(encoding="utf-8")
    html = Page(text)
    assert len(html.ids) == len(set(html.ids))
    assert all(link.startswith("#") for link in html.loaded)
    assert all(link[1:] in html.ids for link in html.loaded)
    assert not html.tags & {"script", "link", "img", "iframe", "object", "embed"}
    assert not re.search(r"@import|url\((?!#)", text)
    for way in ("color-scheme: light dark", 'name="viewport"', "@media print"):
        assert way in text
    assert any(NASTY in part for part in html.texts)  # what a reader sees is what the model said
    titles = re.findall("<figcaption><strong>(.*?)</strong>", text)
    assert titles == [
        "Goals before and after",
        "The ladder",
        "The ladder downwards",  # for a phone
        "pretrain: loss",
        "sft: loss",
        "reward: loss",
        "reward: accuracy",
        "ppo: reward",
        "ppo: KL to the reference",
        "grpo: accuracy",
        "grpo: reward",
        "grpo: KL to the reference",
        "Learned reward and true score",
    ]
    assert len(re.findall("<svg ", text)) == len(titles)


def test_the_same_runs_give_the_same_bytes(full: Path, tmp_path: Path) -> None:
    """Another process, another hash seed, another folder, another order of writing."""
    for stage in reversed(LADDER):
        write_run(tmp_path / "again", stage, curves=True)
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-m", "fourstage", "report", f"outputs={tmp_path / 'again'}"]
    source = str(Path(__file__).parents[2] / "src")
    environment["PYTHONPATH"] = source
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert str(tmp_path / "again" / "report" / "report.html") in done.stdout
    found = (full / "report").rglob("*")
    names = sorted(str(path.relative_to(full / "report")) for path in found if path.is_file())
    assert [name for name in names if not name.startswith("figures/")] == [
        *("report.html", "report.md", "stages.json")
    ]
    assert len(names) == 3 + 2 * 13  # drawings, each as SVG and PNG
    for name in names:
        first = (full / "report" / name).read_bytes()
        assert first == (tmp_path / "again" / "report" / name).read_bytes()
        assert b"2026-01-01" not in first  # no times of day


def test_the_report_needs_no_heavy_import() -> None:
    """It reads files only, so torch and the rest stay out."""
    code = "import sys, fourstage.report; print(sorted(m for m in sys.modules if '.' not in m))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert not {"torch", "lightning", "hydra", "matplotlib"} & set(re.findall(r"\w+", done.stdout))


def test_the_page_has_one_menu_and_folds_what_is_long(full: Path) -> None:
    text = (full / "report" / "report.html").read_text(encoding="utf-8")
    assert text.count("<nav>") == 1
    menu = text.split("<nav>\n<details>\n<summary>On this page</summary>\n")[1].split("</nav>")[0]
    links = re.findall('<a href="#(.*?)">(.*?)</a>', menu)
    assert [title for _, title in links] == re.findall("<h2 id=.*?>(.*?)</h2>", text)
    assert ("what-each-stage-changed", "What each stage changed") in links
    assert "</h1>\n<nav>" in text  # before all else
    folded = re.findall("<details>\n<summary><h2 id=.*?>(.*?)</h2></summary>", text)
    assert folded == ["The whole suite", "By task and by difficulty"]
    assert text.count("<details>") == text.count("</details>") == 3


# --- the blocks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a *b* <i> | `c` & \x07", "a \\*b\\* \\<i\\> \\| \\`c\\` \\& \ufffd"),
        ("[c](d) [e] _f_ g_h", "\\[c\\](d) [e] \\_f\\_ g_h"),
        ("# no heading", "\\# no heading"),
        ("- no list", "\\- no list"),
        ("1. no list", "1\\. no list"),
        ("-1.5 [2, 3]\nnext", "-1.5 [2, 3] / next"),
    ],
)
def test_markdown_shows_text_as_it_is(text: str, expected: str) -> None:
    assert markdown([Paragraph(text)]) == expected + "\n"


def test_markdown_tables_and_lists() -> None:
    blocks = [Table(["x|y", "z"], [["1\n2", "-3"]]), Bullets(["a", "- b"])]
    expected = "| x\\|y | z |\n| --- | --- |\n| 1 / 2 | -3 |\n\n- a\n- \\- b\n"
    assert markdown(blocks) == expected


def test_html_escapes_everything() -> None:
    said = [("<i>", "</pre><script>", [("&", "small")]), ("s", "\nfirst line empty", [])]
    answers = Answers("<b>", said)
    text = page("<t>", [answers, Paragraph("<p>"), Table(["<th>"], [["<td>"]])])
    html = Page(text)
    assert {"<t>", "<b>", "<i>", "\n</pre><script>", "&", "<p>", "<th>", "<td>"} <= set(html.texts)
    assert "script" not in html.tags
    assert "<pre>\n\nfirst line empty</pre>" in text


def test_curves_are_thinned_by_means() -> None:
    points = [(float(x), float(x % 2)) for x in range(2 * MOST_POINTS)]
    few = thinned(points, MOST_POINTS)
    assert len(few) == MOST_POINTS
    assert few[:2] == [(0.5, 0.5), (2.5, 0.5)]
    assert thinned(points[:5], MOST_POINTS) == points[:5]


def test_charts_are_drawn_for_the_columns_that_are_there() -> None:
    points = [(1.0, 1.0)]
    names = ["train/loss", "val/loss", "train/policy_loss", "train/kl", "train/kl_coef"]
    charts = panels("sft", {name: points for name in names})
    assert [(title, list(series)) for title, _, series in charts] == [
        ("sft: loss", ["train/loss", "val/loss"]),
        ("sft: KL to the reference", ["train/kl"]),
    ]
    units = [panels(stage, {"train/kl": points})[0][1] for stage in ("ppo", "grpo")]
    assert units == ["nats an answer", "nats a token"]  # as stages/ppo.py and grpo.py log it
