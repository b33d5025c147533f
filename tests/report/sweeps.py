"""Runs of a sweep, written by hand, and what a comparison says of them."""

from __future__ import annotations

import json
from pathlib import Path

from fourstage.evaluation import suite
from fourstage.report import main
from tests.ladders import write_json, write_lines

LETTERS = "abcdefghij"


def ident(stage: str, number: int) -> str:
    digits = "".join(LETTERS[int(digit)] for digit in f"{number:03}")
    return f"{stage[:4]}{digits}xxxxxxxxxx"[:10]


def write_run(
    outputs: Path,
    stage: str,
    n: int,
    *,
    seed: int = 0,
    parents: dict[str, str] | None = None,
    right: int | None = None,
    suite_: str = suite.SUITE,
    ids: str = "p",
    **settings: object,
) -> str:
    """A run whose goals are all `right` of ten items; its id. A setting with a dot is of the whole
    config (model.name), one without of the stage."""
    run_id = ident(stage, n)
    folder = outputs / "runs" / f"{stage}-{run_id}"
    config: dict = {
        "seed": seed,
        "model": {"name": "moe_nano"},
        "data": {"name": "embedded"},
        "evaluation": {"max_new_tokens": 64},
        "trainer": {"devices": 1, "precision": "32-true"},
        "stages": {stage: {"lr": 1e-4, "parent": "x", "log_every": 5}},
    }
    for key, value in settings.items():
        section, _, name = key.rpartition("__")
        (config[section] if section else config["stages"][stage])[name] = value
    record = {
        "id": run_id,
        "stage": stage,
        "parents": parents or {},
        "group": run_id,
        "status": "finished",
        "started": f"2026-01-01T{n:02}:00:00",
        "finished": f"2026-01-02T{n:02}:00:00",
        "debug": None,
        "git": {"commit": "abc"},
        "cost": {"seconds": 1.0},
        "config": config,
    }
    write_json(folder / "run.json", record)
    items = [
        {
            "set": "reasoning",
            "id": f"{ids}{at}",
            "task": "sums",
            "difficulty": "easy",
            "correct": at < (right or 0),
            "well_formed": True,
        }
        for at in range(10)
    ]
    metrics = suite.metrics(items, {}, 0) if right is not None else {}
    write_json(folder / "eval.json", {"suite": suite_, "seed": 0, "metrics": metrics})
    write_lines(folder / "eval_items.jsonl", items)
    (folder / "metrics.csv").write_text("step\n")
    write_lines(folder / "samples.jsonl", [])
    if stage == "pretrain":
        write_json(folder / "eval_random.json", {"suite": suite_, "seed": 0, "metrics": {}})
        write_lines(folder / "eval_items_random.jsonl", [])
    return run_id


def write_sweep(outputs: Path, figures: dict[tuple[float, str, int], int], **more: object) -> None:
    """grpo on one pretrain run a seed, {(lr, loss, seed): right of ten}."""
    for at, ((lr, loss, seed), right) in enumerate(figures.items()):
        pretrain = write_run(outputs, "pretrain", seed, seed=seed)
        parents = {"policy": pretrain}
        options = {"seed": seed, "parents": parents, "right": right, "lr": lr, "loss": loss}
        write_run(outputs, "grpo", at, **options, **more)


def read(outputs: Path, *words: str) -> dict:
    main(["compare", *words, f"outputs={outputs}"])
    return json.loads((outputs / "report" / "compare.json").read_text())


def text(outputs: Path) -> str:
    return (outputs / "report" / "compare.md").read_text()


def of_grpo(found: dict) -> dict[str, dict]:
    rows = found["comparisons"]
    return {
        row["group"]: row
        for row in rows
        if (row["stage"], row["key"]) == ("grpo", "reasoning_accuracy")
    }
