"""Which ladders are compared, in which groups, and every figure of them; compare.py shows it.

Ladders are named by their last runs, as run= does, or are those that fulfil conditions
(stage=grpo seed=0,1), which also hold for settings of ancestors.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from fourstage.errors import UserError
from fourstage.evaluation import suite
from fourstage.ladder import LADDER, place, stages
from fourstage.report.contrasts import (
    Compared,
    Group,
    OverItems,
    Unit,
    adjusted,
    asked,
    based,
    compared,
    grouped,
)
from fourstage.report.files import FAULTS, Files, Item, Metric
from fourstage.report.groups import ancestry, base_of, chosen, seeds, settings
from fourstage.report.keys import NONE, about, keys
from fourstage.report.ladder import (
    Row,
    Run,
    choose,
    ladder,
    late_items,
    leaves_policy,
    read_rows,
    read_runs,
    tips,
)
from fourstage.report.tables import COSTS
from fourstage.runs.benchmarks import Benchmark
from fourstage.runs.select import matching, not_chosen, without

# what of a run's config may change its figures
SETTINGS = ("seed", "model", "tokenizer", "data", "stages", "trainer", "evaluation")
DIGITS = 6  # of figures in compare.json


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


@dataclass(frozen=True)
class Comparison:
    """All that the page and compare.json show.

    groups: of the ladders. by_stage: the groups of a stage's runs, of which ladders may share some.
    goals: each stage's own goal by group; others: the other stages' goals after the last stages.
    """

    ladders: list[Ladder]
    groups: list[Group]
    by_stage: dict[str, list[Group]]
    goals: list[Compared]
    others: list[Compared]
    figures: list[Line]
    public: list[Line]
    asked: dict[str, Benchmark]
    costs: list[Line]
    differs: dict[str, list[str]]
    by: list[str] | None
    files: Files


def compare(outputs: Path, words: Sequence[str]) -> Comparison:
    """Read the ladders and compare them."""
    files = Files()
    runs = read_runs(outputs, files)
    tips_ = picked(runs, words, outputs, files)
    by_words = [w for word in words if word.startswith("by=") for w in word[3:].split(",")]
    lines_ = [ladder(tip, runs, files) for tip in tips_]
    rows = [{row.stage: row for row in read_rows(line, files, details=False)} for line in lines_]
    units = _units(lines_, rows, files)
    last = [units[tip.stage][tip.folder] for tip in tips_]
    by = chosen([unit.settings for unit in last], by_words) if by_words else None
    factors, groups = grouped(last, by)
    base = base_of([word for word in words if word.startswith("base=")], factors)
    factors, groups = based(factors, groups, base, must=True)
    beside = [key for factor in factors for key in factor.keys]
    of_stage = {
        stage: based(*grouped(list(each.values()), by, beside), base)
        for stage, each in units.items()
    }
    goals = {stage: _goal(stage, list(each.values())) for stage, each in units.items()}
    over_items = _over_items(lines_, list(goals.values()))
    own = [compared(stage, goals[stage], *of_stage[stage], over_items) for stage in units]
    others = [
        compared(stage, key, *of_stage[stage], over_items)
        for stage in dict.fromkeys(tip.stage for tip in tips_)
        for key in dict.fromkeys(goals.values())
        if key != goals[stage] and leaves_policy(stage)
        if any(unit.cell(key) for unit in units[stage].values())
    ]
    ladders = [Ladder(*one) for one in zip(_labels(tips_, last, groups), tips_, rows, strict=True)]
    whole_keys, parts = keys(row for by_stage in rows for row in by_stage.values())
    public = {key: one for by in rows for row in by.values() for key, one in row.benchmarks.items()}
    return Comparison(
        ladders,
        groups,
        {stage: groups for stage, (_, groups) in of_stage.items()},
        adjusted([one for one in own if any(g.cells(one.key) for g in one.groups)]),
        adjusted(others),
        lines(ladders, [*whole_keys, *parts], Row.value),
        lines(ladders, sorted(public), Row.benchmark),
        public,
        lines(ladders, [cost.key for cost in COSTS], Row.cost),
        differing([_configs(by_stage) for by_stage in rows]),
        by,
        files,
    )


def picked(runs: Mapping[str, Run], words: Sequence[str], outputs: Path, files: Files) -> list[Run]:
    """The last runs of the ladders that are meant, all without names and conditions; what runs of
    earlier versions can't be asked is a problem of `files`. Raises UserError for a mistake."""
    names = [word for word in words if "=" not in word]
    conditions = [word for word in words if "=" in word and not word.startswith(("by=", "base="))]
    notes: list[str] = []
    if "all" in names and names != ["all"]:
        raise UserError(f"compare: `all` stands alone: leave it out of {' '.join(names)}")
    if names and names != ["all"]:
        found = [choose(dict(runs), name, outputs) for name in names]
        ids = [run.id for run in found]
        if twice := [run.name for run in found if ids.count(run.id) > 1]:
            raise UserError(f"compare: {twice[0]} is named twice ({' '.join(names)})")
        if conditions:
            found, notes = _fulfilling(
                runs, conditions, lambda each: [r for r in found if r in each]
            )
    elif conditions:
        with_debug = any(condition.startswith("debug") for condition in conditions)
        found, notes = _fulfilling(runs, conditions, lambda each: _last(runs, each, with_debug))
    else:
        found = tips(dict(runs))
    if len(found) < 2:
        where = f" for {' '.join(conditions)}" if conditions else ""
        where += f" ({'; '.join(notes)})" if notes else ""
        raise UserError(
            f"compare needs two finished ladders or more, got {len(found)}{where}: train "
            f"{'another' if found else 'some'}, for example with `python train.py "
            f"{'stage=grpo seed=1' if found else '-m stage=grpo seed=0,1'}`"
        )
    files.problems += notes
    return found if names and names != ["all"] else sorted(found, key=_by_seed)


def _by_seed(run: Run) -> tuple[int, str, str]:
    return place(run.stage), str(run.config["seed"]).rjust(9), run.id


def _fulfilling(
    runs: Mapping[str, Run],
    conditions: Sequence[str],
    of: Callable[[Sequence[Run]], list[Run]],
) -> tuple[list[Run], list[str]]:
    """The finished runs for which the conditions hold, those on a stage's settings also where an
    ancestor of that stage has them; and notes on those that lack a setting. `of` takes those that
    count among them."""
    records = {}
    for run in runs.values():
        line = ancestry(run, ladder(run, dict(runs), Files()))
        of_stages = {stage: one.config["stages"][stage] for stage, one in line.items()}
        config = {**run.config, "stages": of_stages}
        records[run.folder] = {**run.record, "config": config}
    by_folder = {run.folder: run for run in runs.values()}

    def count(folders: Iterable[Path]) -> list[Run]:
        return of([by_folder[f] for f in folders if by_folder[f].is_finished])

    found = count(matching(records, conditions))
    older = {condition: count(each) for condition, each in without(records, conditions).items()}
    return found, [f"{said}: {not_chosen(len(each))}" for said, each in older.items() if each]


def _last(runs: Mapping[str, Run], found: Sequence[Run], with_debug: bool) -> list[Run]:
    """Those that no other one descends from; debug runs only if asked for, or if all are."""
    if not with_debug:
        found = [run for run in found if not run.is_debug] or found
    above: set[str] = set()
    for run in found:
        above |= {one.id for one in ladder(run, dict(runs), Files()).values()} - {run.id}
    return [run for run in found if run.id not in above]


def _units(
    lines_: Sequence[dict[str, Run]], rows: Sequence[Mapping[str, Row]], files: Files
) -> dict[str, dict[Path, Unit]]:
    """stage -> folder -> run, in the ladders' order; one that ladders share is there once."""
    found: dict[str, dict[Path, Unit]] = {stage: {} for stage in stages()}
    for line, by_stage in zip(lines_, rows, strict=True):
        for stage, run in line.items():
            if run.folder not in found[stage]:
                above = ancestry(run, line)
                row = by_stage[stage]
                how = asked(row, files.item_heads(run.folder / "eval_items.jsonl"))
                found[stage][run.folder] = Unit(row, settings(above), seeds(above), how)
    return {stage: each for stage, each in found.items() if each}


def _goal(stage: str, units: Sequence[Unit]) -> str:
    """The stage's goal, or the other one if only that was measured."""
    goal, instead = LADDER[stage].goal, LADDER[stage].instead
    has_goal = any(unit.cell(goal) for unit in units)
    return goal if has_goal or not any(unit.cell(instead) for unit in units) else instead


def _over_items(lines_: Sequence[dict[str, Run]], names: Sequence[str]) -> OverItems:
    """Reads the items of two units and returns their differences in the keys."""
    line_of = {run.folder: line for line in lines_ for run in line.values()}
    sets = {name for key in names for name in about(key).sets}

    @lru_cache(maxsize=2)  # the reference stays; all would not fit into memory
    def items(folder: Path) -> list[Item]:
        line = line_of[folder]
        [run] = [run for run in line.values() if run.folder == folder]
        late = [item for item in late_items(line, Files()) if item.get("row") == run.id]
        found = suite.joined(Files().items(folder / "eval_items.jsonl"), late)
        return [item for item in found if item["set"] in sets]

    @cache
    def between(after: Path, before: Path, seed: int) -> dict[str, Metric]:
        start = items(before)
        try:
            return suite.differences(items(after), start, seed)
        except FAULTS:  # broken items
            return {}

    def over_items(after: Unit, before: Unit) -> dict[str, Metric]:
        if {after.row.suite, before.row.suite} != {suite.SUITE}:
            return {}  # the items have other fields
        return between(after.row.folder, before.row.folder, after.row.seed)

    return over_items


def _labels(tips_: Sequence[Run], units: Sequence[Unit], groups: Sequence[Group]) -> list[str]:
    """Each ladder's group and seed: lr=1e-3, seed 0; with the run's name if that isn't enough."""
    group_of = {u.row.folder: group.label for group in groups for u in group.blocks.values()}
    has_seeds = len({unit.seeds for unit in units}) > 1
    found = []
    for tip, unit in zip(tips_, units, strict=True):
        parts = [group_of[tip.folder]] * (len(groups) > 1)
        found.append(", ".join([*parts, *[f"seed {unit.seeds}"] * has_seeds]))
    return [
        label if found.count(label) == 1 else ", ".join(filter(None, [label, tip.name]))
        for label, tip in zip(found, tips_, strict=True)
    ]


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
