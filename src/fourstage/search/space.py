"""What a search may choose from: ranges in Hydra's own words, as they are typed after train.py.

stages.grpo.lr=interval(1e-5,1e-3)                 any number in between
stages.grpo.lr='tag(log,interval(1e-5,1e-3))'      the same, evenly by its logarithm
stages.sft.max_steps='int(interval(50,400))'       any whole number
stages.grpo.group_size=choice(4,8,16)              one of them; also 4,8,16
stages.grpo.epochs=range(1,5)                      1, 2, 3 or 4, in this order
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from fourstage.errors import UserError
from fourstage.settings import given_once

LOOKS_LIKE_ONE = re.compile(r"=\s*\w+\(")  # also with a mistyped word
INT = re.compile(r"\bint\(")
EXAMPLES = "interval(1e-5,1e-3), tag(log,interval(1e-5,1e-3)), choice(4,8,16) or range(1,5)"
NOT_SEARCHED = ("stage", "seed", "outputs", "force", "tag", "ancestors", "max_outputs_gb")


class Suggests(Protocol):
    """The part of an Optuna trial that is used here."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str: ...


@dataclass(frozen=True)
class Range:
    """The values of one setting: those of a list, or else all from `low` to `high`.

    word: as it was typed. is_ordered: the list is a scale, not a choice.
    """

    key: str
    word: str
    low: float = 0
    high: float = 0
    is_log: bool = False
    values: tuple[str, ...] = ()
    is_ordered: bool = False

    def suggest(self, trial: Suggests) -> str:
        """The override that a trial takes."""
        if self.is_ordered:
            value = self.values[trial.suggest_int(self.key, 0, len(self.values) - 1)]
        elif self.values:
            value = trial.suggest_categorical(self.key, self.values)
        elif isinstance(self.low, int) and isinstance(self.high, int):
            value = str(trial.suggest_int(self.key, self.low, self.high, log=self.is_log))
        else:
            found = trial.suggest_float(self.key, self.low, self.high, log=self.is_log)
            value = self.written(found)
        return f"{self.key}={value}"

    def written(self, value: float) -> str:
        """With the four digits that somebody would type."""
        return repr(min(max(float(f"{value:.4g}"), self.low), self.high))

    @property
    def ends(self) -> tuple[str, str]:
        """The overrides with the first and the last value."""
        first, last = (self.values[0], self.values[-1]) if self.values else (self.low, self.high)
        return f"{self.key}={first}", f"{self.key}={last}"


def split_words(words: Sequence[str]) -> tuple[list[str], list[Range]]:
    """The words that every trial has, and the ranges. Raises UserError for no range, and for one
    that can't be searched."""
    fixed, ranges = [], []
    for word in words:
        found = parsed(word)
        if found is None:
            fixed.append(word)
        else:
            ranges.append(found)
    if not ranges:
        raise UserError(
            "no range to search: for example 'stages.grpo.lr=tag(log,interval(1e-5,1e-3))' or "
            "'stages.grpo.group_size=choice(4,8,16)'"
        )
    given_once([word.lstrip("+") for word in (*fixed, *(r.key for r in ranges))])
    return fixed, ranges


def parsed(word: str) -> Range | None:
    """The range in a word; None if it is a plain one. Raises UserError."""
    if word.startswith(("-", "hydra")):
        raise UserError(f"{word}: a search takes train.py's settings, and none of Hydra's own")
    parser = OverridesParser.create()
    try:
        check_numbers(word, parser.parse_override(INT.sub("float(", word)))  # int() cuts and fails
        override = parser.parse_override(word)
    except HydraException:
        if LOOKS_LIKE_ONE.search(word):
            raise UserError(f"{word}: no range: expected one such as {EXAMPLES}") from None
        return None  # train.py says what is wrong
    if not override.is_sweep_override():
        return None
    key = override.get_key_element()
    if key in NOT_SEARCHED:
        raise UserError(f"{word}: {key} is no setting to search over")
    found = interval(key, word, override) if override.is_interval_sweep() else None
    if found is None and override.is_discrete_sweep() and not hasattr(override.value(), "include"):
        override.value().shuffle = False
        values = tuple(dict.fromkeys(override.sweep_string_iterator()))
        if len(values) < 2:
            raise UserError(f"{word}: one value is no choice: {key}={''.join(values) or 'VALUE'}")
        found = Range(key, word, values=values, is_ordered=override.is_range_sweep())
    if found is None:
        raise UserError(f"{word}: expected interval, choice or range")
    return found


def check_numbers(word: str, override: Override) -> None:
    """Raises UserError for the numbers of an interval or a range that has no values, or endless
    ones. `override`: the word without int()."""
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        numbers = [sweep.start, sweep.end]
    elif isinstance(sweep, RangeSweep):
        numbers = [sweep.start, sweep.stop, sweep.step]
    else:
        return
    if not all(isinstance(number, int | float) and isfinite(number) for number in numbers):
        raise UserError(f"{word}: expected finite numbers")
    if INT.search(word) and not all(float(number).is_integer() for number in numbers):
        raise UserError(f"{word}: int() takes whole numbers")
    if isinstance(sweep, RangeSweep) and not (sweep.stop - sweep.start) * sweep.step > 0:
        way = f"a step of {sweep.step:g} doesn't lead from {sweep.start:g} to {sweep.stop:g}"
        raise UserError(f"{word}: no values: {way}")


def interval(key: str, word: str, override: Override) -> Range:
    sweep = override.value()
    assert isinstance(sweep, IntervalSweep) and sweep.start is not None and sweep.end is not None
    low, high = sweep.start, sweep.end
    if not low < high:
        raise UserError(f"{word}: the first number has to be below the second")
    if others := sweep.tags - {"log"}:
        raise UserError(f"{word}: unknown tag {sorted(others)[0]}: the only one here is log")
    if "log" in sweep.tags and low <= 0:
        raise UserError(f"{word}: a logarithm needs numbers above 0")
    return Range(key, word, low, high, "log" in sweep.tags)
