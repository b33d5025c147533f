"""The report's tables: what each stage did, on its own goal and on the others, and what it cost."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from fourstage.evaluation import suite
from fourstage.ladder import LADDER
from fourstage.report.files import Metric
from fourstage.report.html import Cell, Paragraph, Table, plain
from fourstage.report.ladder import HEADLINES, Row, leaves_policy, other_items
from fourstage.runs.benchmarks import Benchmark

NONE = "–"
COLUMNS = (
    *(HEADLINES[0], "bits_per_byte", HEADLINES[1]),
    *("knowledge_completed", "knowledge_answered", *HEADLINES[2:]),
)
COIN = {"value": 0.5, "low": 0.5, "high": 0.5}
SHORT = {  # of the stages' own goals
    "bits_per_char": "bits a character",
    "well_formed": "well-formed",
    "knowledge_answered": "facts answered",
    "pair_accuracy": "pairs right",
    "true_score": "true score",
    "reward_model_score": "learned score",
    "reasoning_accuracy": "problems right",
}


# --- how a key is shown


def about(name: str) -> suite.Definition:
    """The suite's definition of a key; a neutral one for a key of another suite."""
    if name.split("/")[0] in suite.DEFINITIONS:
        return suite.definition(name)
    return suite.Definition(title=name, sets=(), read=lambda item: None, statistic=suite.ratio)


def title(name: str) -> str:
    """The name of a key for readers, with its unit and which way is better."""
    defined = about(name)
    unit = f", {defined.unit}" if defined.unit and defined.unit not in defined.title else ""
    return f"{defined.title}{unit}{' (lower is better)' if defined.better == 'lower' else ''}"


def short(name: str) -> str:
    """A goal's name where there is little room."""
    return SHORT.get(name, about(name).title)


def number(name: str, value: float, sign: str = "") -> str:
    """A value of the key, in percent for shares; sign "+" shows a plus too."""
    if abs(value) >= 1e6:  # a perplexity of random weights
        return f"{value:{sign}.4g}"
    scale, digits = (100, 1) if about(name).is_share else (1, 3)
    # + 0.0 makes -0.0 a plain zero
    return f"{round(scale * value, digits) + 0.0:{sign}.{digits}f}"


def shown(name: str, value: float | None) -> str:
    """A value of the key with the percent sign of a share."""
    return NONE if value is None else number(name, value) + " %" * about(name).is_share


def gained(name: str, value: float) -> str:
    """A difference of the key with its sign, in percentage points for shares."""
    return number(name, value, "+") + " points" * about(name).is_share


def interval(name: str, cell: Metric, sign: str = "") -> str:
    """[low, high]"""
    return f"[{number(name, cell['low'], sign)}, {number(name, cell['high'], sign)}]"


def measured(name: str, cell: Metric | None) -> str:
    """value [low, high], or a dash."""
    return plain(measured_cell(name, cell))


def measured_cell(
    name: str, cell: Metric | None, note: str = "", more: Iterable[tuple[str, str]] = ()
) -> str | Cell:
    """The same as a table cell, with a note after the interval and more parts below."""
    if cell is None or cell["value"] is None:
        return NONE
    small = interval(name, cell) + note
    return Cell([(shown(name, cell["value"]), ""), (small, "small"), *more])


def verdict(name: str, difference: Metric) -> str:
    """better or worse, if the paired interval excludes 0 and the key has a better side. An interval
    of no width (one item, or several that are all equal) is no evidence."""
    better, low, high = about(name).better, difference["low"], difference["high"]
    if better is None or low <= 0 <= high or low == high:
        return "unclear"
    return "better" if (low > 0) == (better == "higher") else "worse"


def change(name: str, difference: Metric | None) -> list[tuple[str, str]]:
    """The parts of a cell that say how a key differs from the parent's."""
    if difference is None or difference["value"] is None:
        return []
    found = verdict(name, difference)
    word = "" if found == "unclear" else f" {found}"
    return [
        (f"{gained(name, difference['value'])}{word}", found),
        (interval(name, difference, "+"), "small"),
    ]


def change_cell(name: str, difference: Metric | None) -> str | Cell:
    """The same as a table cell."""
    return Cell(parts) if (parts := change(name, difference)) else NONE


def stage_table(rows: list[Row]) -> Table:
    """A row for each stage, a column for each of COLUMNS that any row has."""
    names = [name for name in COLUMNS if any(name in row.metrics for row in rows)]
    return Table(
        ["stage", *map(title, names)],
        [[row.stage, *(_stage_cell(row, name) for name in names)] for row in rows],
    )


def _stage_cell(row: Row, name: str) -> str | Cell:
    cell = row.metrics.get(name, {"value": None})
    note = f", n {cell.get('n')}"
    return measured_cell(name, cell, note, change(name, row.differences.get(name)))


def suite_table(rows: list[Row], names: Iterable[str]) -> Table:
    """A row for each key, a column for each stage."""
    return Table(
        ["key", *(row.stage for row in rows)],
        [[title(n), *(measured_cell(n, row.metrics.get(n)) for row in rows)] for n in names],
    )


def change_table(rows: list[Row], names: Iterable[str]) -> Table:
    """A row for each key, a column for each stage: the paired difference to the policy's parent."""
    changed = [row for row in rows if row.parent is not None]
    taxed = {(row.stage, name) for row, name in taxes(rows)}

    def cell(row: Row, name: str) -> str | Cell:
        parts = change(name, row.differences.get(name))
        return (
            Cell([*parts, *[("a tax", "worse")] * ((row.stage, name) in taxed)]) if parts else NONE
        )

    lines = [
        [title(name), *(cell(row, name) for row in changed)]
        for name in names
        if any(name in row.differences for row in changed)
    ]
    return Table(["key", *(f"{r.stage} − {r.parent.stage}" for r in changed if r.parent)], lines)


def taxes(rows: list[Row]) -> list[tuple[Row, str]]:
    """The alignment tax: the keys that are another stage's goal and that a stage made worse. Random
    weights have nothing to lose."""
    own = {goal.stage: goal.name for goal in goals(rows)}
    return [
        (row, name)
        for row in rows
        if row.parent is not None and not row.parent.is_random
        for name in dict.fromkeys(own.values())
        if name != own[row.stage] and name in row.differences
        if verdict(name, row.differences[name]) == "worse"
    ]


def keys(rows: Iterable[Row]) -> tuple[list[str], list[str]]:
    """All keys that the rows have, in the suite's order: the whole ones, and those of parts."""
    found = dict.fromkeys(name for row in rows for name in (*row.metrics, *row.differences))
    order = {name: at for at, name in enumerate(suite.DEFINITIONS)}
    names = sorted(found, key=lambda name: order.get(name.split("/")[0], len(order)))
    return [n for n in names if "/" not in n], [n for n in names if "/" in n]


# --- each stage on its own goal


NOT_MEASURED, OTHER_SUITES = "not measured", "different suites"
OTHER_ITEMS, NO_WIDTH = "other held-out items", "an interval without width"
NO_COMPARISON = (OTHER_SUITES, OTHER_ITEMS, NO_WIDTH)  # the two values can't be compared


@dataclass(frozen=True)
class Goal:
    """A stage's own key, before it (in its parent; a coin for reward models) and after it."""

    stage: str
    name: str
    start: str  # the parent's stage
    before: Metric
    after: Metric
    verdict: str  # whether the two intervals are apart
    difference: Metric | None  # after - before: paired, if both were measured on the same items

    @property
    def is_compared(self) -> bool:
        return self.verdict not in (NOT_MEASURED, *NO_COMPARISON)

    @property
    def tone(self) -> str:
        """better, worse or unclear: by the paired difference, or else by the two intervals."""
        if self.difference and self.is_compared:
            return verdict(self.name, self.difference)
        word = self.verdict.removeprefix("apart: ")
        return word if word in ("better", "worse") else "unclear"

    @property
    def parts(self) -> list[tuple[str, str]]:
        """Of a cell that says what was gained, and how sure that is."""
        parts = change(self.name, self.difference)
        why = [] if parts and self.is_compared else [(self.verdict, self.tone)]
        return [*(parts or [(self.gain, "")]), *why]

    @property
    def step(self) -> str:
        """before → after, in short; only the value after if the one before wasn't measured."""
        if self.before["value"] is None or self.after["value"] is None:
            return shown(self.name, self.after["value"])
        return (
            f"{number(self.name, self.before['value'])} → {shown(self.name, self.after['value'])}"
        )

    @property
    def gain(self) -> str:
        """after - before, for readers."""
        if self.before["value"] is None or self.after["value"] is None:
            return NONE
        return gained(self.name, self.after["value"] - self.before["value"])


def goals(rows: Iterable[Row]) -> list[Goal]:
    """One for each trained stage."""
    return [_goal(row) for row in rows if row.run is not None]


def _goal(row: Row) -> Goal:
    stage = LADDER[row.stage]
    name = stage.goal
    if stage.instead and row.value(name) is None and row.value(stage.instead) is not None:
        name = stage.instead
    unknown = suite.missing(f"this suite has no {name}")
    if not leaves_policy(row.stage):
        start, before = "a coin", COIN
    elif row.parent is not None:
        start, before = row.parent.stage, row.parent.metrics.get(name, unknown)
    else:
        start, before = "", suite.missing("its parent is not there")
    after = row.metrics.get(name, unknown)
    said = apart(name, before, after)
    if said != NOT_MEASURED:
        if row.parent and len({row.suite, row.parent.suite} - {""}) > 1:
            said = OTHER_SUITES
        elif other_items(row).keys() & set(about(name).sets):
            said = OTHER_ITEMS
    difference = row.differences.get(name)
    if before is COIN and after["value"] is not None:
        difference = {key: after[key] - COIN[key] for key in COIN}
    return Goal(row.stage, name, start, before, after, said, difference)


def goal_table(rows: list[Row]) -> Table:
    """What each stage gained on its own goal over the row that it started from."""
    lines: list[list[str | Cell]] = []
    for goal in goals(rows):
        if goal.before is COIN:
            before: str | Cell = Cell([("50.0 %", ""), ("(a coin)", "small")])
        else:
            before = measured_cell(goal.name, goal.before, f" ({goal.start})")
        after = measured_cell(goal.name, goal.after)
        lines.append([goal.stage, title(goal.name), before, after, Cell(goal.parts)])
    return Table(["stage", "goal", "before", "after", "gain"], lines)


def apart(name: str, before: Metric, after: Metric) -> str:
    """Whether the intervals of two cells overlap, and if not, which is better."""
    if before["value"] is None or after["value"] is None:
        return NOT_MEASURED
    if any(cell["low"] == cell["high"] for cell in (before, after) if cell is not COIN):
        return NO_WIDTH
    above, below = after["low"] > before["high"], after["high"] < before["low"]
    if about(name).better == "lower":
        above, below = below, above
    return "apart: better" if above else "apart: worse" if below else "overlap"


# --- public benchmarks


def benchmark_table(rows: list[Row]) -> Table:
    """A row for each stage that was measured, a column for each metric of each task."""
    shown = [row for row in rows if row.benchmarks]
    known = {key: one for row in shown for key, one in row.benchmarks.items()}
    return Table(
        ["stage", *(benchmark_title(known[key]) for key in sorted(known))],
        [
            [r.stage, *(_benchmark_cell(r.benchmarks.get(key)) for key in sorted(known))]
            for r in shown
        ],
    )


def benchmark_title(one: Benchmark) -> str:
    """The task and the metric, with what was special about the call."""
    parts = [f"{one.task}: {one.shown_metric}"]
    parts += [f"mean of {one.subtasks} tasks"] * (one.subtasks is not None)
    parts += [f"{one.few_shot}-shot"] * bool(one.few_shot)
    parts += [f"the first {one.limit} items"] * (one.limit is not None)
    return ", ".join(parts) + " (lower is better)" * (one.better == "lower")


def _benchmark_cell(one: Benchmark | None) -> str | Cell:
    if one is None:
        return NONE
    parts = [(one.measured, ""), (f"n {one.n}, chance {one.guessed}", "small")]
    parts += [(f"{one.truncated} prompts truncated", "small")] * bool(one.truncated)
    return Cell(parts)


# --- costs


def duration(seconds: float) -> str:
    """Seconds for readers."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


_whole: Callable[[float], str] = "{:,.0f}".format


@dataclass(frozen=True)
class Cost:
    """A column of the cost table, from a key of run.json's cost."""

    key: str
    title: str
    show: Callable[[float], str] = _whole
    total: Callable[..., float] | None = sum  # over the stages; None: it has none
    why: str = ""  # why a stage may not have it


COSTS = (
    Cost("seconds", "time", duration),
    Cost("train_seconds", "of it training", duration),
    Cost("eval_seconds", "of it evaluation", duration),
    Cost("steps", "steps"),
    Cost("tokens", "tokens trained on"),
    Cost("tokens_generated", "tokens generated", why="only ppo and grpo generate"),
    Cost("flops", "FLOPs", "{:.2e}".format),
    Cost("tokens_per_s", "tokens/s", total=None),
    Cost("mfu", "MFU", "{:.1%}".format, None, "the device's peak FLOP/s is not known"),
    Cost("peak_memory_mib", "peak memory, MiB", total=max),
    Cost("peak_gpu_memory_mib", "peak GPU memory, MiB", total=max, why="no GPU was used"),
)
COST_TEXT = (
    "The time that is neither training nor evaluation went into reading the data, sampling (for "
    "reward, its pairs) and saving. Peak memory is that of the process: if one command trains "
    "several stages, a stage's peak includes those before it. Rates have no total."
)


def cost_table(rows: list[Row]) -> list[Table | Paragraph]:
    """Time, work and memory of each stage and in total; and what was not recorded."""
    runs = [row.run for row in rows if row.run]
    costs = [run.costs() for run in runs]
    shown = [cost for cost in COSTS if any(cost.key in found for found in costs)]
    lines = [
        [run.stage, run.name, *(_cost(cost, [found]) for cost in shown)]
        for run, found in zip(runs, costs, strict=True)
    ]
    lines.append(["together", "", *(_cost(c, costs if c.total else []) for c in shown)])
    table = Table(["stage", "run", *(cost.title for cost in shown)], lines)
    partly = [cost for cost in COSTS if any(cost.key not in found for found in costs)]
    missing = [cost.title + f" ({cost.why})" * bool(cost.why) for cost in partly]
    note = Paragraph(f"Not recorded for every stage: {'; '.join(missing)}.")
    return [Paragraph(COST_TEXT), table, *[note] * bool(missing)]


def _cost(cost: Cost, found: list[dict[str, float]]) -> Cell:
    values = [costs[cost.key] for costs in found if cost.key in costs]
    total = cost.total or sum
    return Cell([(cost.show(total(values)) if values else NONE, "")])


def data_notes(rows: list[Row]) -> list[str]:
    """What the data lost on its way into training, a line for each stage."""
    return [
        f"{row.stage}: "
        + ", ".join(f"{name.replace('_', ' ')} {count:,.0f}" for name, count in notes.items())
        for row in rows
        if row.run and (notes := row.run.data_notes())
    ]


def missing(rows: Collection[Row]) -> dict[tuple[str, str], list[str]]:
    """The titles of the keys that have no value, by stage and reason."""
    asked, _ = keys(row for row in rows if leaves_policy(row.stage))
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        absent = [n for n in asked if leaves_policy(row.stage) and n not in row.metrics]
        cells = row.metrics | dict.fromkeys(absent, suite.missing("not in its evaluation"))
        for name, cell in cells.items():
            if cell["value"] is None:
                found.setdefault((row.stage, cell["why"]), []).append(title(name))
    return found
