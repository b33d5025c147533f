"""What groups of runs differ by in one figure, and how sure that is.

Over seeds where there are two or more, else over the items of the two runs. Differences are paired
wherever both groups have the same seeds and were asked the same items.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from fourstage.errors import UserError
from fourstage.evaluation.suite import SUITE
from fourstage.report.files import Item, Metric
from fourstage.report.goals import NOT_MEASURED, OTHER_ITEMS, OTHER_SUITES
from fourstage.report.groups import ABSENT, ROUTE, Factor, Settings, factors, is_of
from fourstage.report.keys import about
from fourstage.report.ladder import ANSWERED, Row
from fourstage.report.statistics import Mean, holm, paired, t_mean, welch

SAME_RUNS = "the same runs"
ONE_SEED = "one seed on a side, without a partner"
OTHER_SEEDS = "one run each, of other seeds"
LISTED = 12  # groups that a message names
CLEAR = 0.05  # the largest adjusted p value of a clear difference
Items = Mapping[str, Hashable]  # item set -> what was asked, and how


@dataclass(frozen=True)
class Unit:
    """A run under comparison; `seeds` are those of its ancestors and its own."""

    row: Row
    settings: Settings
    seeds: str
    asked: Items

    @property
    def started(self) -> str:
        """When its training started, in ISO format."""
        return self.row.run.record["started"] if self.row.run else ""

    def cell(self, key: str) -> Metric | None:
        found = self.row.metrics.get(key)
        return None if found is None or found["value"] is None else found

    def value(self, key: str) -> float:
        """Of a key that it has."""
        return self.row.metrics[key]["value"]


# two units' paired differences over their items, by key
OverItems = Callable[[Unit, Unit], Mapping[str, Metric]]


@dataclass(frozen=True)
class Group:
    """Runs with the same values of all factors."""

    label: str
    values: tuple[tuple[object, ...], ...]  # by factor
    blocks: Mapping[str, Unit]  # by seed, and by what else differs within the group

    def cells(self, key: str) -> dict[str, Metric]:
        """The key's cells by block, of the runs that have it; of runs that were evaluated by
        several suites, which can't be averaged, only those of this version's."""
        found = {
            block: cell
            for block, unit in self.blocks.items()
            if (cell := unit.cell(key)) is not None
        }
        if len({self.blocks[block].row.suite for block in found} - {""}) > 1:
            found = {b: cell for b, cell in found.items() if self.blocks[b].row.suite == SUITE}
        return found

    def of_other_suites(self, key: str) -> int:
        """How many runs have the key by another suite, for which `cells` leaves them out."""
        return sum(unit.cell(key) is not None for unit in self.blocks.values()) - len(
            self.cells(key)
        )

    def values_of(self, key: str) -> dict[str, float]:
        return {block: cell["value"] for block, cell in self.cells(key).items()}

    def by_seed(self, values: Mapping[str, float]) -> dict[str, float]:
        """Values by block as the means of each seed's runs, which aren't independent."""
        found: dict[str, list[float]] = {}
        for block, value in values.items():
            found.setdefault(self.blocks[block].seeds, []).append(value)
        return {seed: fmean(each) for seed, each in found.items()}


@dataclass(frozen=True)
class Difference:
    """One group minus another, or why there is none. `how`: what the interval is over."""

    mean: Mean | None
    how: str
    adjusted: float | None = None  # the p value after Holm

    def verdict(self, key: str) -> str:
        """better or worse, if that is clear; else unclear. Without a p value by the interval."""
        better, mean = about(key).better, self.mean
        if better is None or mean is None or mean.low is None or mean.high is None:
            return "unclear"
        is_clear = not mean.low <= 0 <= mean.high
        if mean.p is not None:
            is_clear = self.adjusted is not None and self.adjusted <= CLEAR
        if not is_clear:
            return "unclear"
        return "better" if (mean.value > 0) == (better == "higher") else "worse"


@dataclass(frozen=True)
class Effect:
    """What one setting changes, all else equal."""

    setting: str
    start: str
    end: str
    difference: Difference


@dataclass(frozen=True)
class Compared:
    """One key of one stage: the groups, the difference of each but the first to it, and what each
    setting changes if there are several."""

    stage: str
    key: str
    groups: Sequence[Group]
    differences: Sequence[Difference]
    effects: Sequence[Effect]


def asked(row: Row, items: Sequence[Item]) -> Items:
    """What has to be the same for two runs' figures of an item set to be comparable: the items, and
    for answers the settings of the evaluation."""
    config = (row.run.config.get("evaluation") or {}) if row.run else {}
    how = tuple(
        (key, value)
        for key, value in sorted(config.items())
        if key == "max_new_tokens" or not key.startswith("max_")
    )
    ids: dict[str, set[str]] = {}
    for item in items:
        ids.setdefault(item["set"], set()).add(str(item["id"]))
    return {
        name: (hash(frozenset(each)), how if name in ANSWERED else ()) for name, each in ids.items()
    }


def grouped(
    units: Sequence[Unit],
    by: Sequence[str] | None,
    beside: Sequence[str] = (),
) -> tuple[list[Factor], list[Group]]:
    """The factors that the units differ in (see groups.factors), and the groups in order, the
    reference first: numbers by size, texts by when they were first trained with."""
    units = sorted(units, key=lambda unit: (unit.started, unit.row.folder.name))
    each = [unit.settings for unit in units]
    found = factors(each, by, beside)
    rest = [] if by is None else [f for f in factors(each) if not {*f.keys} & {*by}]
    members: dict[tuple[tuple[object, ...], ...], dict[str, Unit]] = {}
    labels = {}
    for at, unit in enumerate(units):
        values = tuple(factor.values[at] for factor in found)
        labels[values] = ", ".join(filter(None, (factor.said(at) for factor in found)))
        others = [factor.said(at) for factor in rest]
        block = ", ".join([unit.seeds, *filter(None, others)])
        same = members.setdefault(values, {})
        while block in same:  # settings that no factor tells apart
            block += "'"
        same[block] = unit
    places = [{values: at for at, values in enumerate(factor.order)} for factor in found]
    order = sorted(members, key=lambda v: [at[value] for at, value in zip(places, v, strict=True)])
    alone = "all" if len(order) == 1 else "the rest"
    by_seed = {v: dict(sorted(members[v].items(), key=lambda x: (len(x[0]), x[0]))) for v in order}
    return found, [Group(labels[v] or alone, v, by_seed[v]) for v in order]


def based(
    found: list[Factor], groups: list[Group], base: Mapping[str, str], must: bool = False
) -> tuple[list[Factor], list[Group]]:
    """The same with the group first that has most of the base's values. Raises UserError if it
    `must` have all."""

    def lacks(group: Group) -> list[str]:
        units = [unit.settings for unit in group.blocks.values()]
        return [b[0] for b in base.items() if not all(is_of(b, unit) for unit in units)]

    if not base:
        return found, groups
    first = min(groups, key=lambda group: len(lacks(group)))
    if must and lacks(first):
        typed = ",".join(text if key == ROUTE else f"{key}={text}" for key, text in base.items())
        more = f"; and {len(groups) - LISTED} more" * (len(groups) > LISTED)
        there = "; ".join(group.label for group in groups[:LISTED]) + more
        raise UserError(f"base={typed}: no group has it: there are {there}")
    found = [replace(f, first=values) for f, values in zip(found, first.values, strict=True)]
    return found, [first, *(group for group in groups if group is not first)]


def mean_of(group: Group, key: str) -> tuple[Mean, str] | None:
    """A group's mean with its interval over seeds, n of them, or over items for one run; None
    without one."""
    cells = list(group.cells(key).values())
    if not cells:
        return None
    if len(cells) > 1:
        return bounded(t_mean([*group.by_seed(group.values_of(key)).values()]), key, 0.0), "seeds"
    [cell] = cells
    return Mean(cell["value"], 1, cell["low"], cell["high"]), "items"


def bounded(mean: Mean, key: str, least: float = -1.0) -> Mean:
    """A share's interval ends at 0 and 1, that of a difference between shares at -1 and 1."""
    if not about(key).is_share or mean.low is None or mean.high is None:
        return mean
    return replace(mean, low=max(least, mean.low), high=min(1.0, mean.high))


def gain_of(
    group: Group, key: str, before: Callable[[Row], float | None]
) -> tuple[Mean, int] | None:
    """What the stage gained over the policy that it started from, over seeds, and of how many
    runs."""
    starts = {block: before(group.blocks[block].row) for block in group.cells(key)}
    values = group.values_of(key)
    gains = {block: values[block] - start for block, start in starts.items() if start is not None}
    return (bounded(t_mean([*group.by_seed(gains).values()]), key), len(gains)) if gains else None


def difference(group: Group, reference: Group, key: str, over_items: OverItems) -> Difference:
    """group - reference in a key."""
    after, before = group.values_of(key), reference.values_of(key)
    if not after or not before:
        is_left_out = group.of_other_suites(key) or reference.of_other_suites(key)
        return Difference(None, OTHER_SUITES if is_left_out else NOT_MEASURED)
    mine, its = [group.blocks[b] for b in after], [reference.blocks[b] for b in before]
    if {unit.row.folder for unit in mine} == {unit.row.folder for unit in its}:
        return Difference(None, SAME_RUNS)
    if why := not_comparable([*mine, *its], key):
        return Difference(None, why)
    common = sorted(after.keys() & before.keys())
    fewest = min(len(after), len(before))
    if len(common) == fewest > 1:
        gains = group.by_seed({block: after[block] - before[block] for block in common})
        how = f"paired over {_seeds(len(gains))}"
        how += f" ({len(common)} pairs)" * (len(common) > len(gains))
        left = len(after) + len(before) - 2 * len(common)
        return Difference(t_mean([*gains.values()]), how + _alone(left))
    mine_by_seed, its_by_seed = group.by_seed(after), reference.by_seed(before)
    shared = len(mine_by_seed.keys() & its_by_seed.keys())
    if shared == min(len(mine_by_seed), len(its_by_seed)) > 1:
        left = len(mine_by_seed) + len(its_by_seed) - 2 * shared
        how = f"paired over the means of {_seeds(shared)}{_alone(left)}"
        return Difference(paired(mine_by_seed, its_by_seed), how)
    if min(len(mine_by_seed), len(its_by_seed)) > 1:
        each = list(mine_by_seed.values()), list(its_by_seed.values())
        return Difference(welch(*each), "Welch's t")
    which = "one run each" if len(after) == len(before) else f"only seed {', '.join(common)}"
    if common and fewest == 1:
        mine, its = [group.blocks[common[0]]], [reference.blocks[common[0]]]
    is_one_each = len(mine) == len(its) == 1
    if not is_one_each or mine[0].seeds != its[0].seeds:
        value = fmean(mine_by_seed.values()) - fmean(its_by_seed.values())
        return Difference(Mean(value, 0), OTHER_SEEDS if is_one_each else ONE_SEED)
    found = over_items(mine[0], its[0]).get(key)
    if found is None:
        value = mine[0].value(key) - its[0].value(key)
        return Difference(Mean(value, 0), f"{which}, no items")
    mean = Mean(found["value"], found["n"], found["low"], found["high"])
    return Difference(mean, f"{which}, paired over {found['n']} items")


def _seeds(n: int) -> str:
    return f"{n} seed{'s' * (n != 1)}"


def _alone(left: int) -> str:
    return f", {left} without a partner" * bool(left)


def not_comparable(units: Sequence[Unit], key: str) -> str:
    """Why the units' figures of a key can't be compared; "" if they can."""
    if len({unit.row.suite for unit in units} - {""}) > 1:
        return OTHER_SUITES
    for name in about(key).sets:
        if len({unit.asked[name] for unit in units if name in unit.asked}) > 1:
            return OTHER_ITEMS
    return ""


def effects(found: Sequence[Factor], groups: Sequence[Group], key: str) -> list[Effect]:
    """The main effect of each value of each factor against its first one: the mean difference over
    the seeds, each with all settings of the other factors that have both; with one seed, over these
    settings."""
    effects_: list[Effect] = []
    for at, factor in enumerate(found):
        by_rest: dict[tuple[object, ...], dict[tuple[object, ...], Group]] = {}
        for group in groups:
            rest = group.values[:at] + group.values[at + 1 :]
            by_rest.setdefault(rest, {})[group.values[at]] = group
        start, *others = [values for values in factor.order if set(values) != {ABSENT}]
        for end in others:
            pairs = [(x[end], x[start]) for x in by_rest.values() if start in x and end in x]
            mean = _main_effect(pairs, key)
            if mean is not None:
                name, first = factor.name, factor.shown(start)
                effects_.append(Effect(name, first, factor.shown(end), mean))
    return effects_


def _main_effect(pairs: Sequence[tuple[Group, Group]], key: str) -> Difference | None:
    """The mean of group - other over pairs of groups, by the seeds that both have."""
    gains: dict[str, list[float]] = {}
    matched = 0
    for group, other in pairs:
        after, before = group.values_of(key), other.values_of(key)
        common = sorted(after.keys() & before.keys())
        units = [side.blocks[block] for side in (group, other) for block in common]
        if not common or not_comparable(units, key):
            continue
        matched += 1
        gain = group.by_seed({block: after[block] - before[block] for block in common})
        for seed, value in gain.items():
            gains.setdefault(seed, []).append(value)
    if not gains:
        return None
    settings = f"{matched} setting{'s' * (matched > 1)} of the others"
    if len(gains) > 1:
        mean = t_mean([fmean(each) for each in gains.values()])
        return Difference(mean, f"over {len(gains)} seeds, each with {settings}")
    return Difference(t_mean(next(iter(gains.values()))), f"one seed, over {settings}")


def compared(
    stage: str,
    key: str,
    found: Sequence[Factor],
    groups: Sequence[Group],
    over_items: OverItems,
) -> Compared:
    """Every group of a stage against the first in one key. With one factor, its effect is what the
    groups differ by, and isn't said twice."""
    each = [difference(group, groups[0], key, over_items) for group in groups[1:]]
    each = [replace(d, mean=bounded(d.mean, key)) if d.mean else d for d in each]
    return Compared(stage, key, groups, each, effects(found, groups, key) if found[1:] else [])


def adjusted(tables: Sequence[Compared]) -> list[Compared]:
    """The same with p values that are adjusted for the number of all differences, and of all
    effects."""
    of_groups = iter(_holm([d for table in tables for d in table.differences]))
    of_effects = iter(_holm([e.difference for table in tables for e in table.effects]))
    return [
        replace(
            table,
            differences=[next(of_groups) for _ in table.differences],
            effects=[replace(e, difference=next(of_effects)) for e in table.effects],
        )
        for table in tables
    ]


def _holm(found: Sequence[Difference]) -> list[Difference]:
    p_values = holm([d.mean.p if d.mean else None for d in found])
    return [replace(d, adjusted=p) for d, p in zip(found, p_values, strict=True)]
