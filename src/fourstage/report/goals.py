"""Each stage on its own goal: the key before and after it, and what it cost other stages' goals."""

from collections.abc import Iterable
from dataclasses import dataclass

from fourstage.evaluation import suite
from fourstage.ladder import LADDER
from fourstage.report.files import Metric
from fourstage.report.html import Cell, Table
from fourstage.report.keys import (
    NONE,
    about,
    change,
    gained,
    measured_cell,
    number,
    shown,
    title,
    verdict,
)
from fourstage.report.ladder import Row, leaves_policy, other_items

COIN = {"value": 0.5, "low": 0.5, "high": 0.5}
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
