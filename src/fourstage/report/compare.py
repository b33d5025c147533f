"""Several ladders in one table: each key of each stage with its mean and spread over them.

`python -m fourstage report compare A B ...` names ladders by their last runs, as run= does; `all`
is every finished ladder. It writes outputs/report/{compare.md, compare.html, compare.json}.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fourstage.errors import UserError
from fourstage.ladder import place, stages
from fourstage.report.files import Files
from fourstage.report.html import Block, Bullets, Cell, Heading, Paragraph, Table, write
from fourstage.report.ladder import Row, Run, choose, ladder, read_rows, read_runs, tips
from fourstage.report.tables import (
    COSTS,
    NONE,
    Goal,
    benchmark_title,
    goals,
    keys,
    missing,
    shown,
    title,
)
from fourstage.runs.benchmarks import Benchmark

# what of a run's config may change its figures
SETTINGS = ("seed", "model", "tokenizer", "data", "stages", "trainer", "evaluation")


@dataclass(frozen=True)
class Ladder:
    """One ladder under comparison, by its last run."""

    label: str
    tip: Run
    by_stage: dict[str, Row]


@dataclass(frozen=True)
class Line:
    """A figure of every ladder, and its spread over the n different runs that have it."""

    stage: str
    key: str
    n: int
    mean: float
    sd: float | None  # of the sample; None for one run
    min: float
    max: float
    values: list[float | None]  # by ladder, None if it has none


def write_comparison(outputs: Path, names: Sequence[str]) -> Path:
    """Write the comparison into outputs/report and return that folder. Raises UserError unless the
    names mean two different finished runs or more."""
    files = Files()
    runs = read_runs(outputs, files)
    found = named(runs, names, outputs)
    rows = [{row.stage: row for row in read_rows(ladder(t, runs, files), files)} for t in found]
    differs = differing([_configs(by_stage) for by_stage in rows])
    labels = ladder_labels(found, differs)
    ladders = [Ladder(*one) for one in zip(labels, found, rows, strict=True)]
    whole, parts = keys(row for by_stage in rows for row in by_stage.values())
    figures = lines(ladders, [*whole, *parts], Row.value)
    asked = {key: one for by in rows for row in by.values() for key, one in row.benchmarks.items()}
    public = lines(ladders, sorted(asked), Row.benchmark)
    costs = lines(ladders, [cost.key for cost in COSTS], Row.cost)
    content = {
        "suite": files.suite,
        "ladders": [
            {
                "label": ladder.label,
                "run": ladder.tip.name,
                "runs": {stage: row.id for stage, row in ladder.by_stage.items()},
            }
            for ladder in ladders
        ],
        "differs": differs,
        "metrics": [asdict(line) for line in (*figures, *public)],
        "costs": [asdict(line) for line in costs],
    }
    folder = outputs / "report"
    blocks = document(ladders, figures, public, asked, costs, differs, files)
    write(folder, "compare", f"fourstage: {len(ladders)} ladders", blocks)
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    (folder / "compare.json").write_text(text, encoding="utf-8")
    return folder


def named(runs: dict[str, Run], names: Sequence[str], outputs: Path) -> list[Run]:
    """The last runs of the ladders that are meant. Raises UserError for a mistake."""

    def by_seed(run: Run) -> tuple[int, str, str]:
        return place(run.stage), str(run.config["seed"]).rjust(9), run.id

    if list(names) == ["all"]:
        found = sorted(tips(runs), key=by_seed)
    else:
        found = [choose(runs, name, outputs) for name in names]
    ids = [run.id for run in found]
    if twice := [run.name for run in found if ids.count(run.id) > 1]:
        raise UserError(f"compare: {twice[0]} is named twice ({' '.join(names)})")
    if len(found) < 2:
        raise UserError(
            f"compare needs two finished ladders or more, got {len(found)}: train another, for "
            "example with `python train.py stage=grpo seed=1`"
        )
    return found


def _configs(by_stage: Mapping[str, Row]) -> list[dict[str, Any]]:
    """What may change the figures of a ladder's runs: settings, the commit and the versions."""
    runs = [row.run for row in by_stage.values() if row.run]
    return [
        {key: run.config[key] for key in SETTINGS if key in run.config}
        | {key: run.record[key] for key in ("git", "versions") if key in run.record}
        for run in runs
    ]


def differing(each: Sequence[Sequence[Any]], name: str = "") -> dict[str, list[str]]:
    """The settings that are not the same in all ladders, "stages.sft.lr" -> the value in each.

    `each` has a setting (or a dict of them) of every run of every ladder. A ladder whose runs
    differ shows all their values; one that lacks the setting (it doesn't reach that stage) shows a
    dash, which makes no difference.
    """
    known = [value for values in each for value in values]
    if known and all(isinstance(value, dict) and value for value in known):
        found = {}
        for key in dict.fromkeys(key for value in known for key in value):
            inner = [[value[key] for value in values if key in value] for values in each]
            found |= differing(inner, f"{name}.{key}" if name else key)
        return found
    texts = [", ".join(dict.fromkeys(map(str, values))) or NONE for values in each]
    return {name: texts} if len(set(texts) - {NONE}) > 1 else {}


def ladder_labels(tips: Sequence[Run], differs: Mapping[str, list[str]]) -> list[str]:
    """The models' names if all are different, "seed 0" if only the seeds among the settings tell
    the ladders apart, else the names of their last runs."""
    models, seeds = differs.get("model.name", []), differs.get("seed", [])
    if len(set(models)) == len(tips):
        return models
    others = {name for name in differs if not name.startswith(("git.", "versions."))}
    if others == {"seed"} and len(set(seeds)) == len(tips):
        return [f"seed {seed}" for seed in seeds]
    return [tip.name for tip in tips]


def lines(
    ladders: Sequence[Ladder], names: Sequence[str], figure: Callable[[Row, str], float | None]
) -> list[Line]:
    """Every figure of every stage that any ladder has."""
    found = []
    starts = [row.stage for one in ladders for row in one.by_stage.values() if row.run is None]
    for stage in (*dict.fromkeys(starts), *stages()):
        rows = [ladder.by_stage.get(stage) for ladder in ladders]
        for name in names:
            values = [figure(row, name) if row else None for row in rows]
            by_run = {
                row.folder: value
                for row, value in zip(rows, values, strict=True)
                if row and value is not None
            }
            if x := list(by_run.values()):
                mean = round(statistics.fmean(x), 6)
                sd = round(statistics.stdev(x), 6) if len(x) > 1 else None
                found.append(Line(stage, name, len(x), mean, sd, min(x), max(x), values))
    return found


def document(
    ladders: Sequence[Ladder],
    figures: Sequence[Line],
    public: Sequence[Line],
    asked: Mapping[str, Benchmark],
    costs: Sequence[Line],
    differs: Mapping[str, list[str]],
    files: Files,
) -> list[Block]:
    """The comparison, from what the ladders are to every figure."""
    labels = [ladder.label for ladder in ladders]
    by_part = [line for line in figures if "/" in line.key]
    return [
        Heading(f"{len(ladders)} ladders compared", 1),
        *_introduction(ladders, differs, files),
        Heading("Each stage on its own goal"),
        _goal_table(ladders),
        Heading("Mean and spread"),
        Paragraph(
            "sd is the sample standard deviation over n different runs (ladders that share a run "
            f"count it once). {NONE}: not measured there, or one run only, which has no spread; "
            "shares are in percent."
        ),
        _table([line for line in figures if "/" not in line.key], labels),
        *([Heading("By task and by difficulty"), _table(by_part, labels)] if by_part else []),
        *([Heading("Public benchmarks"), _table(public, labels, asked)] if public else []),
        Heading("What it cost"),
        _table(costs, labels),
        Heading("What is missing"),
        Bullets([*dict.fromkeys(files.problems), *_missing(ladders)] or ["nothing"]),
    ]


def _introduction(
    ladders: Sequence[Ladder], differs: Mapping[str, list[str]], files: Files
) -> list[Block]:
    count = "1 setting" if len(differs) == 1 else f"{len(differs)} settings"
    said = f"They differ in {count}, listed below; all others are the same."
    if not differs:
        said = "They share all settings, versions and the commit that their records hold."
    elif set(differs) == {"seed"}:
        said = f"{len(set(differs['seed']))} seeds: they share all else that their records hold."
    debug = [ladder.tip.name for ladder in ladders if ladder.tip.is_debug]
    warning = Paragraph(f"Debug runs, whose figures say nothing: {', '.join(debug)}.")
    names = [[ladder.label, ladder.tip.name, ", ".join(ladder.by_stage)] for ladder in ladders]
    blocks: list[Block] = [
        *[warning] * bool(debug),
        Paragraph(f"{said} Evaluation suite {files.suite}."),
        *map(Paragraph, files.suite_notes("NAME")),
        Table(["ladder", "its last run", "stages"], names),
    ]
    if set(differs) - {"seed"}:
        settings = [[name, *values] for name, values in differs.items()]
        blocks.append(Table(["setting", *(ladder.label for ladder in ladders)], settings))
    return blocks


def _goal_table(ladders: Sequence[Ladder]) -> Table:
    """Gains on the stages' own goals, and in how many ladders the intervals are apart."""
    each = [{(g.stage, g.name): g for g in goals(one.by_stage.values())} for one in ladders]
    rows: list[list[str | Cell]] = []
    for stage, name in sorted(
        {key for found in each for key in found}, key=lambda key: (place(key[0]), key[1])
    ):
        gains = [found.get((stage, name)) for found in each]
        known = [goal for goal in gains if goal]
        better = sum(goal.verdict == "apart: better" for goal in known)
        cells = [_gain(goal) if goal else NONE for goal in gains]
        rows.append([stage, title(name), *cells, f"{better} of {len(known)}"])
    labels = (ladder.label for ladder in ladders)
    return Table(["stage", "goal", *labels, "apart: better"], rows)


def _gain(goal: Goal) -> Cell:
    return Cell([(goal.gain, ""), (goal.step, "small"), (goal.verdict, goal.tone)])


def _table(
    found: Sequence[Line], labels: Sequence[str], public: Mapping[str, Benchmark] | None = None
) -> Table:
    known: dict[str, tuple[str, Callable[[float], str]]] = {
        **{cost.key: (cost.title, cost.show) for cost in COSTS},
        **{key: (benchmark_title(one), one.shown) for key, one in (public or {}).items()},
    }
    rows: list[list[str | Cell]] = []
    for line in found:
        name, show = known.get(line.key) or (title(line.key), partial(shown, line.key))
        cells = [
            show(line.mean),
            NONE if line.sd is None else show(line.sd),
            f"{show(line.min)} to {show(line.max)}",
            str(line.n),
            *(NONE if value is None else show(value) for value in line.values),
        ]
        rows.append([f"{line.stage}: {name}", *(Cell([(text, "")]) for text in cells)])
    return Table(["stage: key", "mean", "sd", "min to max", "n", *labels], rows)


def _missing(ladders: Sequence[Ladder]) -> list[str]:
    """Keys without a value and the reason, with the ladders that it is true of."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for one in ladders:
        for (stage, why), titles in missing(one.by_stage.values()).items():
            found.setdefault((stage, ", ".join(titles), why), []).append(one.label)
    return [
        f"{stage} ({'all' if len(labels) == len(ladders) else ', '.join(labels)}): {titles}: {why}"
        for (stage, titles, why), labels in found.items()
    ]
