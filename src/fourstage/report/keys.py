"""How a key of the evaluation is shown: its name, its values, its difference to the parent's."""

from collections.abc import Iterable

from fourstage.evaluation import suite
from fourstage.report.files import Metric
from fourstage.report.html import Cell, plain
from fourstage.report.ladder import Row

NONE = "–"
SHORT = {  # of the stages' own goals
    "bits_per_char": "bits a character",
    "well_formed": "well-formed",
    "knowledge_answered": "facts answered",
    "pair_accuracy": "pairs right",
    "true_score": "true score",
    "reward_model_score": "learned score",
    "reasoning_accuracy": "problems right",
}


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


def keys(rows: Iterable[Row]) -> tuple[list[str], list[str]]:
    """All keys that the rows have, in the suite's order: the whole ones, and those of parts."""
    found = dict.fromkeys(name for row in rows for name in (*row.metrics, *row.differences))
    order = {name: at for at, name in enumerate(suite.DEFINITIONS)}
    names = sorted(found, key=lambda name: order.get(name.split("/")[0], len(order)))
    return [n for n in names if "/" not in n], [n for n in names if "/" in n]
