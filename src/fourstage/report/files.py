"""Reads a run's files for the report.

A file that is missing or broken adds a line to `Files.problems` and costs nothing but its content.
"""

import csv
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from fourstage.evaluation import suite
from fourstage.runs.benchmarks import Benchmark, parse_benchmarks
from fourstage.settings import build

Metric = dict[str, Any]  # {"value", "n", "low", "high"}, or {"value": None, "why"}
Item = dict[str, Any]  # {"set", "id", ...}
Points = list[tuple[float, float]]
T = TypeVar("T")
# what reading or computing raises on broken content
FAULTS = (ValueError, KeyError, TypeError, ArithmeticError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An eval.json; suite is "" if it can't be read."""

    suite: str
    seed: int
    metrics: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A row of samples.jsonl."""

    step: int
    prompt_id: str
    prompt: str
    answer: str
    stopped: bool
    right: bool | None = None  # nothing says what is right, or the file is older than the field


@dataclass
class Files:
    """Reads what a report needs and notes whatever can't be read."""

    problems: list[str] = field(default_factory=list)
    suites: list[str] = field(default_factory=list)  # of the evaluations read

    @property
    def suite(self) -> str:
        """The latest evaluation's suite."""
        return self.suites[-1] if self.suites else "1"

    def suite_notes(self, run: str) -> list[str]:
        """A warning if an evaluation used another suite than this version's, and how to fix it."""
        used = sorted(set(self.suites))
        if used in ([], [suite.SUITE]):
            return []
        plural = "s" * (len(used) > 1)
        return [
            f"Evaluated by suite{plural} {' and '.join(used)}; this version has suite "
            f"{suite.SUITE}, and figures of different suites are not comparable. To evaluate "
            f"again, without training: python -m fourstage evaluation run={run} ladder=true"
        ]

    def evaluation(self, path: Path) -> Evaluation:
        """An eval.json with its valid metrics."""
        nothing = Evaluation(suite="", seed=0, metrics={})
        found = self._read(path, lambda text: build(Evaluation, _object(text), ""), nothing)
        self.suites += [found.suite] if found.suite else []
        return replace(found, metrics=self.valid_metrics(path, found.metrics))

    def ladder_evaluation(self, path: Path) -> dict[str, dict[str, Metric]]:
        """A ladder_eval.json: each row's valid metrics."""
        rows = self._read(path, _object, {})
        return {row: self.valid_metrics(path, metrics) for row, metrics in rows.items()}

    def valid_metrics(self, path: Path, metrics: Any) -> dict[str, Metric]:
        """The metrics that a table can show; the names of the others go to the problems."""
        if not isinstance(metrics, dict):
            self.lost(path, "holds no metrics")
            return {}
        valid = {name: cell for name, cell in metrics.items() if _is_metric(cell)}
        if invalid := sorted(metrics.keys() - valid.keys()):
            self.lost(path, f"has no value, n, low and high for {', '.join(invalid)}")
        return valid

    def items(self, path: Path) -> list[Item]:
        """The rows of an eval_items.jsonl or ladder_eval_items.jsonl."""
        return self._rows(path, _item)

    def item_heads(self, path: Path) -> list[Item]:
        """The same with nothing but set and id, without reading the rest where they come first."""
        return self._rows(path, _item, _head)

    def samples(self, path: Path) -> list[Sample]:
        """The valid rows of a samples.jsonl."""
        return self._rows(path, lambda row: build(Sample, row, ""))

    def benchmarks(self, path: Path) -> list[Benchmark]:
        """The results in a benchmark.json; none if nobody has measured any."""
        if not path.exists():
            return []
        return self._read(path, lambda text: parse_benchmarks(_object(text)).tasks, [])

    def curves(self, path: Path) -> dict[str, Points]:
        """The columns of a metrics.csv against its steps, without empty and non-finite cells."""
        whole, _, rest = self._read(path, str, "step\n").rpartition("\n")
        if rest:
            self.lost(path, "ends within a line")
        lines = csv.DictReader(whole.splitlines(), restkey="", restval="")
        if "step" not in (lines.fieldnames or ()):
            self.lost(path, "has no column step")
            return {}
        curves: dict[str, Points] = {}
        broken = []
        for line in lines:
            line.pop("", None)
            try:
                numbers = {name: float(text) for name, text in line.items() if text}
                step = numbers.pop("step")
            except (ValueError, KeyError):
                broken.append(lines.line_num)
                continue
            for name, value in numbers.items():
                if math.isfinite(value) and math.isfinite(step):
                    curves.setdefault(name, []).append((step, value))
        self._broken(path, broken)
        return curves

    def lost(self, path: Path, why: str) -> None:
        """Note what couldn't be used of a file."""
        self.problems.append(f"{path.parent.name}/{path.name} {why}")

    def _read(self, path: Path, parse: Callable[[str], T], otherwise: T) -> T:
        """What `parse` makes of the file's text; `otherwise` if there is none or parsing fails."""
        try:
            text = path.read_text(encoding="utf-8")
            if text:
                return parse(text)
            self.lost(path, "is empty")
        except FileNotFoundError:
            self.lost(path, "is missing")
        except (OSError, *FAULTS) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            self.lost(path, f"cannot be read ({reason})")
        return otherwise

    def _rows(
        self,
        path: Path,
        parse: Callable[[Any], T],
        decode: Callable[[str], Any] | None = None,
    ) -> list[T]:
        """What `parse` makes of each line's JSON; the lines that it can't parse are noted."""
        rows: list[T] = []
        broken = []
        # not splitlines(), which also splits at line separators inside a text
        lines = self._read(path, lambda text: text.rstrip("\n").split("\n"), [])
        for number, line in enumerate(lines, 1):
            try:
                rows.append(parse((decode or DECODER.decode)(line)))
            except FAULTS:
                broken.append(number)
        self._broken(path, broken)
        return rows

    def _broken(self, path: Path, lines: list[int]) -> None:
        if lines:
            first = ", ".join(map(str, lines[:3])) + ", …" * (len(lines) > 3)
            self.lost(path, f"has {len(lines)} broken line{'s' * (len(lines) > 1)} ({first})")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a table can show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict) or not value:
        raise ValueError("no JSON object, or an empty one")
    return value


def _is_metric(cell: Any) -> bool:
    """Whether a cell has its four numbers, or says why it has none."""
    if not isinstance(cell, dict) or "value" not in cell:
        return False
    if cell["value"] is None:
        return isinstance(cell.get("why"), str)
    return all(is_number(cell.get(key)) for key in ("value", "n", "low", "high"))


def _item(row: Any) -> Item:
    if not isinstance(row["set"], str) or not isinstance(row["id"], str | int):
        raise TypeError("set or id")
    return row


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse)  # json.loads would make one for each line
HEAD = re.compile(r'\{"set": "(\w+)", "id": (?:"([^"\\]*)"|(\d+))[,}]')


def _head(line: str) -> Any:
    """Set and id of an item, as its first two keys in json.dumps' spacing; else all of it."""
    found = HEAD.match(line)
    if not found:
        return DECODER.decode(line)
    return {"set": found[1], "id": found[2] if found[3] is None else int(found[3])}
