"""Runs as a list of plain values, and which of them to keep."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fourstage.errors import UserError, did_you_mean
from fourstage.files import read_json
from fourstage.ladder import LADDER
from fourstage.runs.disk import bytes_on_disk
from fourstage.runs.records import Record
from fourstage.runs.select import matching
from fourstage.runs.store import RunStore

ROW_BYTES = 1 << 16  # more than the last two rows of a metrics.csv
Better = Literal["higher", "lower"] | None
Runs = dict[Path, Record]


def selected(store: RunStore, conditions: Sequence[str]) -> Runs:
    """The runs for which all conditions hold, with the status that the store finds. Raises
    UserError as `matching` does, and if there are no runs."""
    runs = {f: record | {"status": store.status(record)} for f, record in store.records().items()}
    if conditions and not runs:
        raise UserError(f"{' '.join(conditions)}: {store.root} has no runs (outputs=FOLDER)")
    return matching(runs, conditions)


def metric(folder: Path, name: str) -> float | None:
    """A value of eval.json; None if there is none."""
    try:
        value = read_json(folder / "eval.json")["metrics"][name]["value"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return value if isinstance(value, int | float) else None


def goal_of(folder: Path, stage: str) -> dict[str, Any]:
    """{"name", "value"} of the stage's own goal, or of the one in its place where the data doesn't
    define it."""
    row = LADDER[stage]
    name, value = row.goal, metric(folder, row.goal)
    if value is None and row.instead and (other := metric(folder, row.instead)) is not None:
        name, value = row.instead, other
    return {"name": name, "value": value}


def last_step(folder: Path) -> int | None:
    """The step of the last whole row of metrics.csv; None if there is none."""
    try:
        with open(folder / "metrics.csv", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - ROW_BYTES))
            return int(file.read().rpartition(b"\n")[0].rpartition(b"\n")[2].partition(b",")[0])
    except (OSError, ValueError):
        return None


def step_budget(record: Record) -> int | None:
    """How many steps the run takes; None if it ends by the clock."""
    own = record["config"]["stages"].get(record["stage"]) or {}
    steps = None if own.get("max_time") else own.get("max_steps")
    return steps if isinstance(steps, int) else None


def entry(folder: Path, record: Record) -> dict[str, Any]:
    """A run for `runs --json`: keys are only ever added."""
    config = record["config"]
    return {
        "id": record["id"],
        "name": folder.name,
        "stage": record["stage"],
        "status": record["status"],
        "parents": record["parents"],
        "tags": record.get("tags", []),
        "group": record["group"],
        "model": config["model"]["name"],
        "seed": config["seed"],
        "debug": record["debug"],
        "started": record["started"],
        "finished": record.get("finished"),
        "seconds": record["cost"]["seconds"],
        "step": last_step(folder),
        "max_steps": step_budget(record),
        "bytes": bytes_on_disk(folder),
        "heartbeat": record.get("heartbeat"),
        "goal": goal_of(folder, record["stage"]),
    }


SORTS = (
    *("name", "status", "model", "seed", "started", "finished", "seconds", "step", "bytes"),
    "goal",
)


def ordered(entries: Sequence[dict[str, Any]], sort: str) -> list[dict[str, Any]]:
    """By a key, or by -key from the largest down; those without a value come last. Raises UserError
    for any other key."""
    key = sort.removeprefix("-")
    if key not in SORTS:
        raise UserError(f"sort={sort}: {did_you_mean(key, SORTS)}, and -{SORTS[0]} and so on")
    value = (lambda e: e["goal"]["value"]) if key == "goal" else (lambda e: e[key])
    known = [entry for entry in entries if value(entry) is not None]
    rest = [entry for entry in entries if value(entry) is None]
    return sorted(known, key=value, reverse=sort != key) + rest


def all_but_best(
    runs: Runs, keep: int, by: str | None, better: Mapping[str, Better]
) -> tuple[Runs, list[str]]:
    """Without the best `keep` runs of each stage: by a metric of eval.json, or by the stage's goal;
    and a line for each stage that is left alone, as none of its runs has the metric.

    `better`: which side of each metric is. Runs that were not measured are the worst. Raises
    UserError for a metric that has no better side, or that no run has, and for a goal that no run
    of a stage has.
    """
    if by is not None and better.get(by) is None:
        sided = [name for name, side in better.items() if side]
        raise UserError(f"by={by}: no side of it is better: {did_you_mean(by, sided)}")
    left: Runs = {}
    without: list[str] = []
    stages = list(dict.fromkeys(record["stage"] for record in runs.values()))
    for stage in stages:
        own = {folder: record for folder, record in runs.items() if record["stage"] == stage}
        names = [by] if by is not None else [LADDER[stage].goal, LADDER[stage].instead]
        found = ({f: v for f in own if (v := metric(f, name)) is not None} for name in names)
        name, values = next(((n, v) for n, v in zip(names, found, strict=True) if v), ("", {}))
        if not values and by is None:
            raise UserError(f"keep_best: no {stage} run has {LADDER[stage].goal}")
        if not values:
            without.append(stage)
            continue
        ranked = sorted(values, key=lambda f: values[f], reverse=better[name] == "higher")
        best = [*ranked, *(folder for folder in own if folder not in values)][:keep]
        left |= {folder: record for folder, record in own.items() if folder not in best}
    if stages and without == stages:
        raise UserError(f"keep_best: no {' or '.join(stages)} run has {by}")
    return left, [f"kept all {stage} runs: none has {by}" for stage in without]


def heirs_first(heirs: Mapping[Path, Collection[Path]]) -> list[Path]:
    """The folders, each after all its heirs; without those of which an heir isn't there."""
    order: list[Path] = []
    waiting = list(heirs)
    while free := [folder for folder in waiting if set(heirs[folder]) <= set(order)]:
        order += free
        waiting = [folder for folder in waiting if folder not in free]
    return order


def removable(runs: Runs, all_runs: Runs) -> tuple[list[Path], list[str]]:
    """Which of the runs can go, each after those that descend from it, and a line for each that has
    to stay: a process has it, or another run that stays descends from it."""
    heirs = {
        folder: [f for f, other in all_runs.items() if record["id"] in other["parents"].values()]
        for folder, record in runs.items()
    }
    in_use = ("running", "silent")
    kept = {f: f"it is {r['status']}" for f, r in runs.items() if r["status"] in in_use}
    order = heirs_first({folder: heirs[folder] for folder in runs if folder not in kept})
    for folder in (f for f in runs if f not in kept and f not in order):
        names = [heir.name for heir in heirs[folder] if heir not in order]
        kept[folder] = f"{', '.join(names)} descend{'s' * (len(names) == 1)} from it"
    return order, [f"kept {folder.name}: {why}" for folder, why in kept.items()]
