"""A ladder of run folders written out by hand, for tests of the report."""

from __future__ import annotations

import json
from pathlib import Path

from fourstage.report import main

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
