"""The report's tables: each stage on the whole suite, its public benchmarks, and what it cost."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from fourstage.evaluation import suite
from fourstage.report.goals import taxes
from fourstage.report.html import Cell, Paragraph, Table
from fourstage.report.keys import NONE, change, keys, measured_cell, title
from fourstage.report.ladder import HEADLINES, Row, leaves_policy
from fourstage.runs.benchmarks import Benchmark

COLUMNS = (
    *(HEADLINES[0], "bits_per_byte", HEADLINES[1]),
    *("knowledge_completed", "knowledge_answered", *HEADLINES[2:]),
)


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
