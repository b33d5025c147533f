"""The tables of the report: what each stage did, its own goal, what it cost others, and costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fourstage.evaluation import suite
from fourstage.ladder import LADDER
from fourstage.report.files import Metric
from fourstage.report.html import Cell, Paragraph, Table
from fourstage.report.ladder import Row, leaves_policy, other_items

NONE = "–"
# the columns of the stage table; the rest of the suite has a table of its own
HEADLINES = (
    "bits_per_char",
    "well_formed",
    "reasoning_accuracy",
    "true_score",
    "reward_model_score",
    "pair_accuracy",
)
# ppo's goal; where no hidden rule gives it (a user's own data), the learned score, which it raises
TRUE, LEARNED = "true_score", "reward_model_score"
COIN = {"value": 0.5, "low": 0.5, "high": 0.5}


# --- how a key is shown


def about(name: str) -> suite.Definition | None:
    """The suite's definition of a key; None for one that this version's suite does not have."""
    return suite.definition(name) if name.split("/")[0] in suite.DEFINITIONS else None


def title(name: str) -> str:
    """The name of a key for readers, with its unit and which way is better."""
    defined = about(name)
    if defined is None:
        return name
    unit = f", {defined.unit}" if defined.unit and defined.unit not in defined.title else ""
    return f"{defined.title}{unit}{' (lower is better)' if defined.better == 'lower' else ''}"


def is_share(name: str) -> bool:
    """Whether the key is shown in percent."""
    defined = about(name)
    return defined is not None and defined.is_share


def number(name: str, value: float, sign: str = "") -> str:
    """A value of the key, in percent for shares; sign "+" shows a plus too."""
    scale, digits = (100, 1) if is_share(name) else (1, 3)
    # + 0.0 makes -0.0 a plain zero
    return f"{round(scale * value, digits) + 0.0:{sign}.{digits}f}"


def interval(name: str, cell: Metric, sign: str = "") -> str:
    """[low, high]"""
    return f"[{number(name, cell['low'], sign)}, {number(name, cell['high'], sign)}]"


def measured(name: str, cell: Metric | None) -> str:
    """value [low, high], shares in percent; a mark where there is none."""
    if cell is None or cell["value"] is None:
        return NONE
    return f"{number(name, cell['value'])}{' %' * is_share(name)} {interval(name, cell)}"


def measured_cell(name: str, cell: Metric | None, remark: str = "") -> str | Cell:
    """The same as a table cell, with a remark below it."""
    if cell is None or cell["value"] is None:
        return NONE
    value = f"{number(name, cell['value'])}{' %' * is_share(name)}"
    parts = [(value, ""), (interval(name, cell), "small"), (remark, "small")]
    return Cell([(text, tone) for text, tone in parts if text])


def verdict(name: str, difference: Metric) -> str:
    """better or worse, where the paired interval excludes 0 and the key has a better side.

    An interval without width tells nothing: one item, or several that are all equal.
    """
    defined, low, high = about(name), difference["low"], difference["high"]
    if defined is None or defined.better is None or low <= 0 <= high or low == high:
        return "unclear"
    return "better" if (difference["low"] > 0) == (defined.better == "higher") else "worse"


def change(name: str, difference: Metric | None) -> list[tuple[str, str]]:
    """The parts of a cell that say how a key differs from the parent's."""
    if difference is None or difference["value"] is None:
        return []
    found = verdict(name, difference)
    points = " points" if is_share(name) else ""
    word = "" if found == "unclear" else f" {found}"
    return [
        (f"{number(name, difference['value'], '+')}{points}{word}", found),
        (interval(name, difference, "+"), "small"),
    ]


# --- tables


def stage_table(rows: list[Row], names: Sequence[str] = HEADLINES) -> Table:
    """One line a stage, one column for each of the metrics that any row has."""
    names = [name for name in names if any(name in row.metrics for row in rows)]
    return Table(
        ["stage", *map(title, names)],
        [[row.stage, *(_stage_cell(row, name) for name in names)] for row in rows],
    )


def suite_table(rows: list[Row], names: Iterable[str]) -> Table:
    """One line a key, one column a stage."""
    return Table(
        ["key", *(row.stage for row in rows)],
        [[title(n), *(measured_cell(n, row.metrics.get(n)) for row in rows)] for n in names],
    )


def _stage_cell(row: Row, name: str) -> str | Cell:
    cell = row.metrics.get(name)
    if cell is None or cell["value"] is None:
        return NONE
    value = f"{number(name, cell['value'])}{' %' * is_share(name)}"
    small = f"{interval(name, cell)}, n {cell['n']}"
    return Cell([(value, ""), (small, "small"), *change(name, row.differences.get(name))])


def tax_table(rows: list[Row], names: Iterable[str]) -> Table:
    """One line a key, one column a stage: the paired difference to the policy's parent."""
    changed = [row for row in rows if row.parent is not None]
    lines = [
        [title(name), *(Cell(parts) if parts else NONE for parts in cells)]
        for name in names
        if any(cells := [change(name, row.differences.get(name)) for row in changed])
    ]
    return Table(["key", *(f"{r.stage} − {r.parent.stage}" for r in changed if r.parent)], lines)


def keys(rows: list[Row]) -> tuple[list[str], list[str]]:
    """All keys that the rows have, in the suite's order: the whole ones, and those of parts."""
    found = dict.fromkeys(name for row in rows for name in (*row.metrics, *row.differences))
    order = {name: at for at, name in enumerate(suite.DEFINITIONS)}
    names = sorted(found, key=lambda name: order.get(name.split("/")[0], len(order)))
    return [n for n in names if "/" not in n], [n for n in names if "/" in n]


# --- each stage on its own goal


NOT_MEASURED, OTHER_SUITES = "not measured", "different suites"
OTHER_ITEMS, NO_WIDTH = "other held-out items", "an interval without width"
NO_COMPARISON = (OTHER_SUITES, OTHER_ITEMS, NO_WIDTH)  # the two values say little together


@dataclass(frozen=True)
class Goal:
    """A stage's own key, before it (in its parent; a coin for reward models) and after it."""

    stage: str
    name: str
    start: str  # what it is held against: the parent's stage
    before: Metric
    after: Metric
    verdict: str  # whether the two intervals are apart

    @property
    def tone(self) -> str:
        """Of the cell that shows the verdict."""
        word = self.verdict.removeprefix("apart: ")
        return word if word in ("better", "worse") else "unclear"

    @property
    def step(self) -> str:
        """before → after, in short; of what was not measured a mark, or only the value after."""
        if self.after["value"] is None:
            return NONE
        cells = [cell for cell in (self.before, self.after) if cell["value"] is not None]
        values = [number(self.name, cell["value"]) for cell in cells]
        return " → ".join(values) + " %" * is_share(self.name)

    @property
    def gain(self) -> str:
        """after - before, for readers."""
        if self.before["value"] is None or self.after["value"] is None:
            return NONE
        points = " points" if is_share(self.name) else ""
        return f"{number(self.name, self.after['value'] - self.before['value'], '+')}{points}"


def goals(rows: list[Row]) -> list[Goal]:
    """One for each trained stage."""
    found = []
    for row in rows:
        if row.run is None:
            continue
        name = LADDER[row.stage].goal
        if name == TRUE and row.metrics[name]["value"] is None:
            name = LEARNED if row.metrics[LEARNED]["value"] is not None else name
        unknown = suite.missing(f"this suite has no {name}")
        if not leaves_policy(row.stage):
            start, before = "a coin", COIN
        elif row.parent is not None:
            start, before = row.parent.stage, row.parent.metrics.get(name, unknown)
        else:
            start, before = "", suite.missing("its parent is not there")
        after = row.metrics.get(name, unknown)
        suites = {row.suite, row.parent.suite} - {""} if row.parent else set()
        defined = about(name)
        asked_others = defined and other_items(row).keys() & set(defined.sets)
        said = apart(name, before, after)
        if said != NOT_MEASURED and len(suites) > 1:
            said = OTHER_SUITES
        elif said != NOT_MEASURED and asked_others:
            said = OTHER_ITEMS
        found.append(Goal(row.stage, name, start, before, after, said))
    return found


def goal_table(rows: list[Row]) -> Table:
    """What each stage gained on its own goal over the row that it started from."""
    lines = []
    for goal in goals(rows):
        name = goal.name
        if goal.before is COIN:
            before: str | Cell = Cell([("50.0 %", ""), ("(a coin)", "small")])
        else:
            before = measured_cell(name, goal.before, f"({goal.start})")
        after = measured_cell(name, goal.after)
        shown = Cell([(goal.gain, ""), (goal.verdict, goal.tone)])
        lines.append([goal.stage, title(name), before, after, shown])
    return Table(["stage", "goal", "before", "after", "gain, and the 95 % intervals"], lines)


def apart(name: str, before: Metric, after: Metric) -> str:
    """Whether the intervals of two cells overlap, and if not, which is better.

    One item, or several that are all equal, have no interval to speak of.
    """
    if before["value"] is None or after["value"] is None:
        return NOT_MEASURED
    if any(cell["low"] == cell["high"] for cell in (before, after) if cell is not COIN):
        return NO_WIDTH
    above, below = after["low"] > before["high"], after["high"] < before["low"]
    defined = about(name)
    if defined is not None and defined.better == "lower":
        above, below = below, above
    return "apart: better" if above else "apart: worse" if below else "overlap"


# --- costs

_whole: Callable[[float], str] = "{:,.0f}".format


def duration(seconds: float) -> str:
    """Seconds for readers."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


# column -> key of run.json's cost, how it is shown, how stages add up, why it may be missing
COSTS: dict[str, tuple[str, Callable[[float], str], Callable[..., float] | None, str]] = {
    "time": ("seconds", duration, sum, ""),
    "of it training": ("train_seconds", duration, sum, ""),
    "of it evaluation": ("eval_seconds", duration, sum, ""),
    "steps": ("steps", _whole, sum, ""),
    "tokens trained on": ("tokens", _whole, sum, ""),
    "tokens generated": ("tokens_generated", _whole, sum, "only ppo and grpo generate"),
    "FLOPs": ("flops", "{:.2e}".format, sum, ""),
    "tokens/s": ("tokens_per_s", _whole, None, ""),
    "MFU": ("mfu", "{:.1%}".format, None, "the device's peak FLOP/s is not known"),
    "peak memory, MiB": ("peak_memory_mib", _whole, max, ""),
    "peak GPU memory, MiB": ("peak_gpu_memory_mib", _whole, max, "no GPU was used"),
}

COST_TEXT = (
    "The time that is neither training nor evaluation went into reading the data, sampling (for "
    "reward, its pairs) and saving. Peak memory is that of the process: where one command trains "
    "several stages, a stage's peak includes those before it."
)


def cost_table(rows: list[Row]) -> list[Table | Paragraph]:
    """Time, work and memory of each stage, and all together; and what was not measured."""
    costs = [(row, row.run.costs()) for row in rows if row.run]
    there = {
        head: column
        for head, column in COSTS.items()
        if any(column[0] in cost for _, cost in costs)
    }

    def line(cost: dict[str, float]) -> list[Cell]:
        shown = [show(cost[k]) if k in cost else NONE for k, show, _, _ in there.values()]
        return [Cell([(text, "")]) for text in shown]

    total = {
        key: add(found)
        for key, _, add, _ in there.values()
        if add and (found := [cost[key] for _, cost in costs if key in cost])
    }
    lines = [[row.stage, row.run.name if row.run else "", *line(cost)] for row, cost in costs]
    table = Table(["stage", "run", *there], [*lines, ["together", "", *line(total)]])
    absent = [
        head + (f" ({why})" if why else "")
        for head, (_, _, _, why) in COSTS.items()
        if head not in there
    ]
    notes = [f"Not in these runs' records: {'; '.join(absent)}."] if absent else []
    some = [f"{head}: {why}" for head, (_, _, _, why) in there.items() if why]
    rates = [head for head, (_, _, add, _) in there.items() if add is None]
    if rates:
        some.append(f"{' and '.join(rates)} have no sum")
    if some:
        notes.append(f"Where a cell is empty, the record has no such figure ({'; '.join(some)}).")
    return [Paragraph(COST_TEXT), table, *([Paragraph(" ".join(notes))] if notes else [])]


# --- what is missing


def data_notes(rows: list[Row]) -> list[str]:
    """What the data lost on its way into training, a line a stage."""
    return [
        f"{row.stage}: "
        + ", ".join(f"{name.replace('_', ' ')} {count:,.0f}" for name, count in notes.items())
        for row in rows
        if row.run and (notes := row.run.data_notes())
    ]


def missing(rows: list[Row], problems: list[str]) -> list[str]:
    """Everything that could not be read, and every cell that has no value, with the reason."""
    policies = [row for row in rows if leaves_policy(row.stage)]
    asked, _ = keys(policies)
    whys: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        absent = [name for name in asked if row in policies and name not in row.metrics]
        cells = row.metrics | dict.fromkeys(absent, suite.missing("not in its evaluation"))
        for name, cell in cells.items():
            if cell["value"] is None:
                whys.setdefault((row.stage, cell["why"]), []).append(title(name))
    lines = [f"{stage}: {'; '.join(names)}: {why}" for (stage, why), names in whys.items()]
    return [*problems, *lines] or ["nothing"]
