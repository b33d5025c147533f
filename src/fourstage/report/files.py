"""Reads the files of a run for the report: records, evaluations, items, samples, curves.

Only the files' own formats are known here, so that a report can be made wherever the files are. A
file that is missing or broken costs a line in `Files.problems`, and no more than what it held.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fourstage.evaluation import suite

Metric = dict[str, Any]  # {"value", "n", "low", "high"}, or {"value": None, "why"}
Item = dict[str, Any]  # {"set", "id", ...}
Points = list[tuple[float, float]]


class ReportError(Exception):
    """What keeps a report from being made: one line for the user."""


@dataclass(frozen=True)
class Evaluation:
    """What an eval.json says; suite is "" where it cannot be read."""

    suite: str
    seed: int
    metrics: dict[str, Metric]


@dataclass
class Files:
    """Reads what a report needs, and keeps one line for everything that could not be read."""

    problems: list[str] = field(default_factory=list)
    suites: list[str] = field(default_factory=list)  # of the evaluations read

    @property
    def suite(self) -> str:
        """The latest evaluation's suite."""
        return self.suites[-1] if self.suites else "1"

    def suite_notes(self, run: str) -> list[str]:
        """A line where not all evaluations are by this version's suite, with the way to make them
        so; `run` is what the command should name."""
        used = sorted(set(self.suites))
        if used in ([], [suite.SUITE]):
            return []
        plural = "s" * (len(used) > 1)
        return [
            f"Evaluated by suite{plural} {' and '.join(used)}; this version has suite "
            f"{suite.SUITE}, and figures of different suites are not comparable. To evaluate "
            f"again, without training: python -m fourstage evaluation run={run} ladder=true"
        ]

    def json(self, path: Path) -> dict[str, Any] | None:
        """The object that a JSON file holds."""
        text = self._text(path)
        if text is None:
            return None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.lost(path, f"cannot be read ({error})")
            return None
        if not isinstance(value, dict):
            self.lost(path, "holds no JSON object")
            return None
        return value

    def evaluation(self, path: Path) -> Evaluation:
        """An eval.json with its valid cells."""
        content = self.json(path)
        if content is None:
            return Evaluation("", 0, {})
        used = content.get("suite")
        if not isinstance(used, str):
            self.lost(path, "names no suite")
            used = ""
        elif self.suites and used != self.suites[-1]:
            self.lost(path, f"is of suite {used}, not {self.suites[-1]}: not comparable")
        self.suites += [used] if used else []
        seed = content.get("seed")
        seed = seed if isinstance(seed, int) and seed >= 0 else 0
        return Evaluation(used, seed, self.cells(path, content.get("metrics")))

    def cells(self, path: Path, cells: Any) -> dict[str, Metric]:
        """The valid ones of some metrics that `path` holds."""
        if not isinstance(cells, dict):
            self.lost(path, "holds no metrics")
            return {}
        good = {name: cell for name, cell in cells.items() if _is_metric(cell)}
        if bad := sorted(cells.keys() - good.keys()):
            self.lost(path, f"has no value, n, low and high for {', '.join(bad)}")
        return good

    def items(self, path: Path) -> list[Item]:
        """The valid rows of an eval_items.jsonl: those that the suite can read."""
        items = self._rows(path, _item)
        shapes = [np.shape(item["load"]) for item in items if item["set"] == "router"]
        usual = max(shapes, key=shapes.count, default=None)
        good = [i for i in items if i["set"] != "router" or np.shape(i["load"]) == usual]
        if len(good) < len(items):
            self.lost(path, f"has {len(items) - len(good)} router items of another shape")
        return good

    def judgements(self, path: Path) -> list[Item]:
        """The valid rows of a ladder_eval_items.jsonl."""
        return self._rows(path, _judgement)

    def samples(self, path: Path) -> list[dict[str, Any]]:
        """The valid rows of a samples.jsonl."""
        return self._rows(path, _sample)

    def curves(self, path: Path) -> dict[str, Points]:
        """The columns of a metrics.csv against its steps; empty and non-finite cells left out."""
        curves: dict[str, Points] = {}
        text = self._text(path)
        if text is None:
            return curves
        whole, _, rest = text.rpartition("\n")
        if rest:
            self.lost(path, "ends within a line")
        lines = csv.DictReader(whole.splitlines(), restkey="", restval="")
        if "step" not in (lines.fieldnames or ()):
            self.lost(path, "has no column step")
            return curves
        broken = []
        for line in lines:
            line.pop("", None)
            try:
                step, *values = (float(line.pop("step")), *map(_number_or_nan, line.values()))
            except ValueError:
                broken.append(lines.line_num)
                continue
            for name, value in zip(line, values, strict=True):
                if math.isfinite(value) and math.isfinite(step):
                    curves.setdefault(name, []).append((step, value))
        self._broken(path, broken)
        return curves

    def lost(self, path: Path, why: str) -> None:
        """Remember what of a file could not be used."""
        self.problems.append(f"{path.parent.name}/{path.name} {why}")

    def _text(self, path: Path) -> str | None:
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            self.lost(path, "is missing")
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            self.lost(path, f"cannot be read ({reason})")
        return None

    def _rows(self, path: Path, read: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
        """What `read` makes of each line; lines that it cannot read are named together."""
        rows: list[dict[str, Any]] = []
        text = self._text(path)
        if text == "":
            self.lost(path, "is empty")
        broken = []
        # not splitlines(), which also splits at the line separators that text may hold
        for number, line in enumerate(text.rstrip("\n").split("\n") if text else (), 1):
            try:
                rows.append(read(json.loads(line, parse_constant=_refuse)))
            except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
                broken.append(number)
        self._broken(path, broken)
        return rows

    def _broken(self, path: Path, lines: list[int]) -> None:
        if lines:
            named = ", ".join(map(str, lines[:3]))
            more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
            plural = "s" * (len(lines) > 1)
            self.lost(path, f"line{plural} {named}{more} {'are' if plural else 'is'} broken")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a table can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_metric(cell: Any) -> bool:
    """A measured cell has four finite numbers; one that the data cannot define says why."""
    if not isinstance(cell, dict) or "value" not in cell:
        return False
    if cell["value"] is None:
        return isinstance(cell.get("why"), str)
    return all(is_number(cell.get(key)) for key in ("value", "n", "low", "high"))


def _item(row: Any) -> Item:
    """Raises ValueError, KeyError or TypeError where the suite could not use it."""
    if not isinstance(row["set"], str) or not isinstance(row["id"], str | int):
        raise TypeError("set or id")
    for defined in suite.DEFINITIONS.values():
        if row["set"] in defined.sets:
            if defined.by_problem and not (
                isinstance(row["task"], str) and isinstance(row["difficulty"], str)
            ):
                raise TypeError("task or difficulty")
            read = defined.read(row)
            if read is not None and not np.isfinite(np.asarray(read, dtype=float)).all():
                raise ValueError("not finite")
    return row


def _judgement(row: Any) -> Item:
    if not isinstance(row["row"], str) or not isinstance(row["set"], str) or "id" not in row:
        raise TypeError("row, set or id")
    said = [value for name, value in row.items() if name not in ("row", "set", "id")]
    if not all(value is None or is_number(value) for value in said):
        raise ValueError("not finite")
    return row


def _sample(row: Any) -> dict[str, Any]:
    return {
        "step": int(row["step"]),
        "prompt": str(row["prompt"]),
        "answer": str(row["answer"]),
        "stopped": bool(row["stopped"]),
    }


def _refuse(constant: str) -> float:
    raise ValueError(constant)  # NaN and Infinity, which are no JSON


def _number_or_nan(text: str) -> float:
    return float(text) if text else math.nan
