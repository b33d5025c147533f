"""Several ladders in one table: each key of each stage with its mean and spread over them.

`python -m fourstage report compare A B ...` names ladders by their last runs, as run= does; `all`
is every finished ladder. It writes outputs/report/{compare.md, compare.html, compare.json}.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fourstage.ladder import place, stages
from fourstage.report.files import Files, ReportError
from fourstage.report.html import Block, Bullets, Cell, Heading, Paragraph, Table, markdown, page
from fourstage.report.ladder import Row, Run, choose, ladder, read_rows, read_runs, tips
from fourstage.report.tables import COSTS, NONE, Goal, goals, is_share, keys, number, title

Shown = tuple[str, Callable[[float], str]]  # a figure's title, and how its values are written
# what of a run's config may change its figures
SETTINGS = ("seed", "model", "tokenizer", "data", "stages", "trainer", "evaluation")


@dataclass(frozen=True)
class Ladder:
    """One ladder under comparison, by its last run."""

    tip: Run
    rows: list[Row]

    @property
    def by_stage(self) -> dict[str, Row]:
        return {row.stage: row for row in self.rows}


@dataclass(frozen=True)
class Line:
    """A figure of every ladder: `values` by ladder, None where it has none."""

    stage: str
    key: str
    values: list[float | None]
    distinct: list[float]  # of different runs: ladders that share one count once

    def summary(self) -> dict[str, Any]:
        """n, mean, sample standard deviation (None below two runs), min and max."""
        n = len(self.distinct)
        return {
            "n": n,
            "mean": round(statistics.fmean(self.distinct), 6),
            "sd": round(statistics.stdev(self.distinct), 6) if n > 1 else None,
            "min": min(self.distinct),
            "max": max(self.distinct),
        }


def write_comparison(outputs: Path, names: Sequence[str]) -> Path:
    """Write the comparison into outputs/report and return that folder.

    Raises ReportError where the names do not mean two different finished runs or more.
    """
    files = Files()
    runs = read_runs(outputs, files)
    found = named(runs, names, outputs)
    ladders = [Ladder(tip, read_rows(ladder(tip, runs, files), files)) for tip in found]
    labels = ladder_labels(ladders)
    blocks = document(ladders, labels, files)
    folder = outputs / "report"
    folder.mkdir(parents=True, exist_ok=True)
    text = comparison_json(ladders, labels, files.suite)
    (folder / "compare.json").write_text(text, encoding="utf-8")
    (folder / "compare.md").write_text(markdown(blocks), encoding="utf-8")
    html = page(f"fourstage: {len(ladders)} ladders", blocks)
    (folder / "compare.html").write_text(html, encoding="utf-8")
    return folder


def named(runs: dict[str, Run], names: Sequence[str], outputs: Path) -> list[Run]:
    """The last runs of the ladders that are meant. Raises ReportError for a mistake."""
    if list(names) == ["all"]:
        finished = [run for run in runs.values() if run.is_finished]
        real = [run for run in finished if not run.is_debug]
        found = sorted(tips(real or finished), key=_order)
    else:
        found = [choose(runs, name, outputs) for name in names]
        for at, run in enumerate(found):
            if run in found[:at]:
                first = names[found.index(run)]
                both = names[at] if first == names[at] else f"{first} and {names[at]}"
                raise ReportError(f"compare: {both} is {run.name} twice: name each ladder once")
    if len(found) < 2:
        there = f"{len(found)} found" if list(names) == ["all"] else f"{len(found)} named"
        raise ReportError(f"compare needs two finished ladders or more: {there}")
    return found


def _order(run: Run) -> tuple[int, str, str]:
    return place(run.stage), str(run.config.get("seed")).rjust(9), run.id


# --- what they share


def settings(rows: Sequence[Row]) -> dict[str, str]:
    """The settings of a ladder's runs, "stages.sft.lr" -> "0.001", with the code's commit and the
    versions; runs that differ in one give "0, 1"."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.run is not None:
            config = {key: row.run.config[key] for key in SETTINGS if key in row.run.config}
            record = row.run.record
            config |= {key: record[key] for key in ("git", "versions") if key in record}
            for key, value in _flat(config).items():
                found.setdefault(key, {})[value] = None
    return {key: ", ".join(values) for key, values in found.items()}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, dict) and inner:
            found |= _flat(inner, f"{name}.")
        else:
            found[name] = str(inner)
    return found


def differing(ladders: Sequence[Ladder]) -> dict[str, list[str]]:
    """The settings that are not the same in all ladders: their value in each, or a mark."""
    each = [settings(ladder.rows) for ladder in ladders]
    names = dict.fromkeys(name for found in each for name in found)
    # null in one config, keys and values in another
    inner = {name for name in names if any(other.startswith(f"{name}.") for other in names)}
    for found in each:
        for name in inner:
            parts = {k: found.pop(k) for k in list(found) if k.startswith(f"{name}.")}
            if parts:
                pairs = (f"{k.removeprefix(f'{name}.')}={v}" for k, v in parts.items())
                found[name] = ", ".join(pairs)
    values = {name: [found.get(name, NONE) for found in each] for name in names}
    # a stage that a ladder does not reach is no difference in settings
    return {n: v for n, v in values.items() if len({x for x in v if x != NONE}) > 1}


def ladder_labels(ladders: Sequence[Ladder]) -> list[str]:
    """The models' names where all are different, "seed 0" where of the settings only seeds tell the
    ladders apart, else the names of their last runs."""
    differs = differing(ladders)
    models = differs.get("model.name", [])
    if len(set(models)) == len(ladders):
        return models
    seeds = differs.get("seed", [])
    others = {name for name in differs if not name.startswith(("git.", "versions."))}
    if others == {"seed"} and len(set(seeds)) == len(ladders):
        return [f"seed {seed}" for seed in seeds]
    return [ladder.tip.name for ladder in ladders]


# --- figures


def lines(ladders: Sequence[Ladder], names: Sequence[str]) -> list[Line]:
    """Every key of every stage that any ladder has measured."""

    def value(row: Row, name: str) -> float | None:
        return row.metrics.get(name, {}).get("value")

    return [
        line
        for stage in ("random", *stages())
        for name in names
        if (line := _line(ladders, stage, name, value)).distinct
    ]


def cost_lines(ladders: Sequence[Ladder]) -> list[Line]:
    """Every cost of every stage."""

    def value(row: Row, name: str) -> float | None:
        return row.run.costs().get(name) if row.run else None

    return [
        line
        for stage in stages()
        for name, *_ in COSTS.values()
        if (line := _line(ladders, stage, name, value)).distinct
    ]


def _line(
    ladders: Sequence[Ladder], stage: str, name: str, value: Callable[[Row, str], float | None]
) -> Line:
    rows = [ladder.by_stage.get(stage) for ladder in ladders]
    values = [None if row is None else value(row, name) for row in rows]
    by_run: dict[str | None, float] = {}
    for ladder_, row, x in zip(ladders, rows, values, strict=True):
        if row is not None and x is not None:
            # the random weights are those of the first run
            run = row if row.run else ladder_.by_stage.get(stages()[0], row)
            by_run[run.id] = x
    return Line(stage, name, values, list(by_run.values()))


def comparison_json(ladders: Sequence[Ladder], labels: Sequence[str], suite: str) -> str:
    """The comparison for programs."""
    whole, parts = keys([row for ladder in ladders for row in ladder.rows])

    def entries(found: Sequence[Line]) -> list[dict[str, Any]]:
        return [
            {"stage": line.stage, "key": line.key, **line.summary(), "values": line.values}
            for line in found
        ]

    content = {
        "suite": suite,
        "ladders": [
            {"label": label, "run": ladder.tip.name, "runs": {r.stage: r.id for r in ladder.rows}}
            for label, ladder in zip(labels, ladders, strict=True)
        ],
        "differs": differing(ladders),
        "metrics": entries(lines(ladders, [*whole, *parts])),
        "costs": entries(cost_lines(ladders)),
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


# --- the document


def document(ladders: Sequence[Ladder], labels: Sequence[str], files: Files) -> list[Block]:
    """The comparison, from what the ladders are to every figure."""
    whole, parts = keys([row for ladder in ladders for row in ladder.rows])
    blocks: list[Block] = [
        Heading(f"{len(ladders)} ladders compared", 1),
        *_introduction(ladders, labels, files),
        Heading("Each stage on its own goal"),
        _goal_table(ladders, labels),
        Heading("Mean and spread"),
        Paragraph(
            "sd is the sample standard deviation over n different runs (ladders that share a run "
            f"count it once). {NONE}: not measured there, or one run only, which has no spread; "
            "shares are in percent."
        ),
        _table(lines(ladders, whole), labels),
    ]
    if parts:
        blocks += [
            Heading("By task and by difficulty"),
            _table(lines(ladders, parts), labels),
        ]
    costs = {key: (head, show) for head, (key, show, _, _) in COSTS.items()}
    problems = list(dict.fromkeys(files.problems))
    return [
        *blocks,
        Heading("What it cost"),
        _table(cost_lines(ladders), labels, costs),
        Heading("What is missing"),
        Bullets([*problems, *_missing(ladders, labels)] or ["nothing"]),
    ]


def _introduction(ladders: Sequence[Ladder], labels: Sequence[str], files: Files) -> list[Block]:
    differs = differing(ladders)
    seeds = differs.get("seed", [])
    if not differs:
        said = "They share all settings, versions and the commit that their records hold."
    elif set(differs) == {"seed"}:
        said = f"{len(set(seeds))} seeds: they share all else that their records hold."
    else:
        count = "1 setting" if len(differs) == 1 else f"{len(differs)} settings"
        said = f"They differ in {count}, listed below; all others are the same."
    table = [
        [label, ladder.tip.name, ", ".join(ladder.by_stage)]
        for label, ladder in zip(labels, ladders, strict=True)
    ]
    debug = [ladder.tip.name for ladder in ladders if ladder.tip.is_debug]
    warning = f"Debug runs, whose figures say nothing: {', '.join(debug)}."
    warned = [Paragraph(warning)] * bool(debug)
    blocks: list[Block] = [
        *warned,
        Paragraph(f"{said} Evaluation suite {files.suite}."),
        *map(Paragraph, files.suite_notes("NAME")),
        Table(["ladder", "its last run", "stages"], table),
    ]
    if differs and set(differs) != {"seed"}:
        rows = [[name, *values] for name, values in differs.items()]
        blocks.append(Table(["setting", *labels], rows))
    return blocks


def _goal_table(ladders: Sequence[Ladder], labels: Sequence[str]) -> Table:
    """Gains on the stages' own goals, and in how many ladders the intervals are apart."""
    each = [{(goal.stage, goal.name): goal for goal in goals(ladder.rows)} for ladder in ladders]
    rows: list[list[str | Cell]] = []
    for stage, name in sorted({key for found in each for key in found}, key=_by_stage):
        known = [found[stage, name] for found in each if (stage, name) in found]
        better = sum(goal.verdict == "apart: better" for goal in known)
        cells = [_gain(f[stage, name]) if (stage, name) in f else NONE for f in each]
        rows.append([stage, title(name), *cells, f"{better} of {len(known)}"])
    return Table(["stage", "goal", *labels, "apart: better"], rows)


def _by_stage(key: tuple[str, str]) -> tuple[int, str]:
    return place(key[0]), key[1]


def _gain(goal: Goal) -> Cell:
    before, after = (
        NONE if cell["value"] is None else number(goal.name, cell["value"])
        for cell in (goal.before, goal.after)
    )
    return Cell([(goal.gain, ""), (f"{before} to {after}", "small"), (goal.verdict, goal.tone)])


def _table(
    found: Sequence[Line], labels: Sequence[str], costs: Mapping[str, Shown] | None = None
) -> Table:
    rows: list[list[str | Cell]] = []
    for line in found:
        name, show = costs[line.key] if costs else (title(line.key), partial(_value, line.key))
        all_ = line.summary()
        cells = [
            show(all_["mean"]),
            NONE if all_["sd"] is None else show(all_["sd"]),
            f"{show(all_['min'])} to {show(all_['max'])}",
            str(all_["n"]),
            *(NONE if value is None else show(value) for value in line.values),
        ]
        rows.append([f"{line.stage}: {name}", *(Cell([(text, "")]) for text in cells)])
    return Table(["stage: key", "mean", "sd", "min to max", "n", *labels], rows)


def _value(name: str, value: float) -> str:
    return f"{number(name, value)}{' %' * is_share(name)}"


def _missing(ladders: Sequence[Ladder], labels: Sequence[str]) -> list[str]:
    """Cells without a value and the reason, those of all ladders together."""
    whys: dict[tuple[str, str], dict[str, dict[str, None]]] = {}
    for label, ladder_ in zip(labels, ladders, strict=True):
        for row in ladder_.rows:
            for name, cell in row.metrics.items():
                if cell["value"] is None:
                    keys_ = whys.setdefault((row.stage, cell["why"]), {"keys": {}, "ladders": {}})
                    keys_["keys"][title(name)] = None
                    keys_["ladders"][label] = None
    return [
        f"{stage} ({'all' if len(x['ladders']) == len(ladders) else ', '.join(x['ladders'])}): "
        f"{', '.join(x['keys'])}: {why}"
        for (stage, why), x in whys.items()
    ]
