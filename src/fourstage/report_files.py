"""Reads run folders for the report: which runs make a ladder, what was measured, sampled, logged.

Only the files' own formats are known here, so that a report can be made wherever the files are. A
file that is missing or broken costs a line in `Files.problems`, and no more than what it held.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STAGES = ("pretrain", "sft", "reward", "ppo", "grpo")
POLICY_METRICS = (
    "bits_per_char",
    "well_formed",
    "reasoning_accuracy",
    "preference_score",
    "reward_model_score",
)

Metric = dict[str, Any]  # {"value", "n", "low", "high"}, or {"value": None, "why"}
Points = list[tuple[float, float]]


class ReportError(Exception):
    """What keeps a report from being made: one line for the user."""


@dataclass(frozen=True)
class Run:
    """One readable run.json."""

    folder: Path
    stage: str
    id: str
    parents: dict[str, str]  # "policy", "reward" -> id
    record: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.id}"

    @property
    def is_finished(self) -> bool:
        return self.record["status"] == "finished"

    @property
    def is_debug(self) -> bool:
        return self.record.get("debug") is not None

    def facts(self) -> dict[str, str]:
        """What was trained, for the report's first line."""
        config = self.record.get("config")
        config = config if isinstance(config, dict) else {}
        parts = {key: config[key] for key in ("model", "data", "tokenizer") if key in config}
        found = {k: str(v["name"]) for k, v in parts.items() if isinstance(v, dict) and "name" in v}
        if "seed" in config:
            found["seed"] = str(config["seed"])
        if isinstance(self.record.get("device"), str):
            found["on"] = self.record["device"]
        return found

    def costs(self) -> dict[str, float]:
        """The numbers under "cost" in run.json: seconds, tokens, ..."""
        cost = self.record.get("cost")
        return {k: v for k, v in cost.items() if _is_number(v)} if isinstance(cost, dict) else {}

    def data_notes(self) -> dict[str, float]:
        """How many items of the data were used, truncated, dropped."""
        costs = self.costs()
        return {k.removeprefix("data_"): n for k, n in costs.items() if k.startswith("data_")}

    @property
    def rank(self) -> tuple[str, int, str]:
        """Largest for the latest finished (ISO times in UTC), then the furthest up the ladder."""
        return str(self.record.get("finished") or ""), STAGES.index(self.stage), self.id


@dataclass(frozen=True)
class Row:
    """A line of the stage table; run is None for the random weights."""

    stage: str
    run: Run | None
    metrics: dict[str, Metric]
    answers: dict[str, tuple[str, bool]]  # prompt -> answer, whether it stopped

    @property
    def id(self) -> str | None:
        return self.run.id if self.run else None

    @property
    def parents(self) -> list[str]:
        """Ids, the policy's first."""
        return [self.run.parents[role] for role in sorted(self.run.parents)] if self.run else []


@dataclass
class Files:
    """Reads what a report needs, and keeps one line for everything that could not be read."""

    problems: list[str] = field(default_factory=list)
    suites: list[str] = field(default_factory=list)  # of the evaluations read

    @property
    def suite(self) -> str:
        """The latest evaluation's suite."""
        return self.suites[-1] if self.suites else "1"

    def json(self, path: Path) -> dict[str, Any] | None:
        """The object that a JSON file holds."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            self._lost(path, _reason(error))
            return None
        if not isinstance(value, dict):
            self._lost(path, "holds no JSON object")
            return None
        return value

    def metrics(self, path: Path) -> dict[str, Metric]:
        """The valid cells of an eval.json."""
        content = self.json(path)
        if content is None:
            return {}
        suite = str(content.get("suite"))
        if self.suites and suite != self.suites[-1]:
            self._lost(path, f"is of suite {suite}, not {self.suites[-1]}: not comparable")
        self.suites.append(suite)
        return self.cells(path, content.get("metrics"))

    def cells(self, path: Path, cells: Any) -> dict[str, Metric]:
        """The valid ones of some metrics that `path` holds."""
        if not isinstance(cells, dict):
            self._lost(path, "holds no metrics")
            return {}
        good = {name: cell for name, cell in cells.items() if _is_metric(cell)}
        if bad := sorted(cells.keys() - good.keys()):
            self._lost(path, f"has no value, n, low and high for {', '.join(bad)}")
        return good

    def samples(self, path: Path) -> list[dict[str, Any]]:
        """The valid rows of a samples.jsonl."""
        rows: list[dict[str, Any]] = []
        try:
            lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        except (ValueError, OSError) as error:
            self._lost(path, _reason(error))
            return rows
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                rows.append(
                    {
                        "step": int(row["step"]),
                        "prompt": str(row["prompt"]),
                        "answer": str(row["answer"]),
                        "stopped": bool(row["stopped"]),
                    }
                )
            except (ValueError, KeyError, TypeError):
                self._lost(path, f"line {number} is broken")
        return rows

    def curves(self, path: Path) -> dict[str, Points]:
        """The columns of a metrics.csv against its steps; empty and non-finite cells left out."""
        curves: dict[str, Points] = {}
        try:
            with open(path, encoding="utf-8", newline="") as file:
                for line in csv.DictReader(file, restkey="", restval=""):
                    line.pop("", None)
                    step = float(line.pop("step"))
                    for name, text in line.items():
                        if text and math.isfinite(value := float(text)):
                            curves.setdefault(name, []).append((step, value))
        except (ValueError, OSError, KeyError, csv.Error) as error:
            self._lost(path, _reason(error))
        return curves

    def _lost(self, path: Path, why: str) -> None:
        self.problems.append(f"{_short(path)} {why}")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return f"cannot be read ({error.strerror if isinstance(error, OSError) else error})"


def _is_metric(cell: Any) -> bool:
    """A measured cell has four finite numbers; one that the data cannot define says why."""
    if not isinstance(cell, dict) or "value" not in cell:
        return False
    if cell["value"] is None:
        return isinstance(cell.get("why"), str)
    return all(_is_number(cell.get(key)) for key in ("value", "n", "low", "high"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# --- which runs


def read_runs(outputs: Path, files: Files) -> dict[str, Run]:
    """All runs with a readable record, by id."""
    runs = {}
    folders = sorted(p for p in (outputs / "runs").glob("*") if p.is_dir())
    for folder in folders:
        record = files.json(folder / "run.json")
        if record is None:
            continue
        parents = record.get("parents")
        if (
            record.get("stage") not in STAGES
            or not isinstance(record.get("id"), str)
            or not isinstance(record.get("status"), str)
            or not isinstance(parents, dict)
        ):
            files.problems.append(f"{folder.name}/run.json lacks stage, id, status or parents")
            continue
        parents = {role: str(parent) for role, parent in parents.items()}
        runs[record["id"]] = Run(folder, record["stage"], record["id"], parents, record)
    return runs


def choose(runs: dict[str, Run], name: str | None, outputs: Path) -> Run:
    """The run named, else the latest finished tip. Raises ReportError where there is none."""
    finished = [run for run in runs.values() if run.is_finished]
    real = [run for run in finished if not run.is_debug]
    if name is None:
        if not finished:
            raise ReportError(
                f"no finished run under {outputs / 'runs'}: train one first, for example with "
                "`make demo` or `python train.py stage=sft`"
            )
        return max(tips(real or finished), key=lambda run: run.rank)
    folder = Path(name).resolve()
    named = [r for r in finished if name in (r.id, r.name) or folder == r.folder.resolve()]
    named = named or [r for r in real or finished if r.stage == name]
    named = named or [r for r in finished if r.stage == name]
    if not named:
        known = ", ".join(sorted(run.name for run in finished)) or "none"
        raise ReportError(f"run={name}: no such finished run under {outputs / 'runs'} ({known})")
    return max(named, key=lambda run: run.rank)


def tips(runs: list[Run]) -> list[Run]:
    """The runs that none of the others started from."""
    parents = {parent for run in runs for parent in run.parents.values()}
    return [run for run in runs if run.id not in parents]


def other_tips(runs: dict[str, Run], line: dict[str, Run]) -> list[Run]:
    """The finished real ladders that end elsewhere than in this line."""
    real = [run for run in runs.values() if run.is_finished and not run.is_debug]
    return [run for run in tips(real) if run not in line.values()]


def ladder(tip: Run, runs: dict[str, Run], files: Files) -> dict[str, Run]:
    """The tip and its ancestors, one a stage: the policy's line first, then the reward model's."""
    found: dict[str, Run] = {}
    waiting, seen = [tip], {tip.id}
    while waiting:
        run = waiting.pop(0)
        if found.setdefault(run.stage, run) is not run:
            files.problems.append(f"{run.name} is a second {run.stage} ancestor: not shown")
        for role, parent in sorted(run.parents.items()):  # "policy" before "reward"
            if parent not in runs:
                files.problems.append(
                    f"{run.name}: its {role} parent {parent} cannot be read, so that row and "
                    "those before it are not shown"
                )
            elif parent not in seen:
                seen.add(parent)
                waiting.insert(0 if role == "policy" else len(waiting), runs[parent])
    return {stage: found[stage] for stage in STAGES if stage in found}


# --- rows


def read_rows(line: dict[str, Run], files: Files) -> list[Row]:
    """The random weights' row and one for each run; later models' judgements are joined in."""
    late = [
        (path, files.json(path) or {})
        for stage, run in line.items()
        if stage in ("sft", "reward")
        for path in [run.folder / "ladder_eval.json"]
    ]

    def metrics(stage: str, key: str, path: Path) -> dict[str, Metric]:
        found = files.metrics(path)
        for late_path, judged in late:
            for name, cell in files.cells(late_path, judged.get(key, {})).items():
                if cell["value"] is not None or name not in found:
                    found[name] = cell
        for name in ("pair_accuracy",) if stage == "reward" else POLICY_METRICS:
            found.setdefault(name, {"value": None, "why": f"not in {_short(path)}"})
        return found

    rows = []
    for stage, run in line.items():
        samples = [] if stage == "reward" else files.samples(run.folder / "samples.jsonl")
        if stage == "pretrain":
            path = run.folder / "eval_random.json"
            before = [row for row in samples if row["step"] == 0]
            rows.append(Row("random", None, metrics("random", "random", path), _answers(before)))
            samples = [row for row in samples if row["step"] > 0]
        found = metrics(stage, run.id, run.folder / "eval.json")
        rows.append(Row(stage, run, found, _answers(samples)))
    return rows


def _answers(samples: list[dict[str, Any]]) -> dict[str, tuple[str, bool]]:
    """The answers of the last step that was sampled."""
    last = max((row["step"] for row in samples), default=0)
    return {
        row["prompt"]: (row["answer"], row["stopped"]) for row in samples if row["step"] == last
    }


def _short(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
