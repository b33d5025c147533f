"""Reads problems, of reasoning-gym or from a file in gsm8k's schema, and splits them in two."""

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from itertools import chain, islice
from typing import Any, NoReturn

from fourstage.data.config import DataConfig, ReasoningConfig, cached
from fourstage.data.keys import keys_of
from fourstage.data.records import Problem, Problems, Split
from fourstage.data.schemas import problem_from
from fourstage.data.split import is_heldout, short_hash
from fourstage.data.tasks import short_question, worked_solution
from fourstage.data.userfiles import split_file
from fourstage.errors import UserError, did_you_mean

DRAWS = 20  # give up on a task's share after so many draws for each problem wanted
STALE = 3  # or after so many in a row for each problem found, none of which was new
PATIENCE = 10  # seconds of drawing before a line says so
SLOWEST = 30  # seconds without a new problem
LONGEST = 10**5  # characters of a question
LARGEST = 10**5  # of a weight; of an argument as a multiple of its default


@cached("reasoning")
def split_problems(config: DataConfig) -> Problems:
    """Problems on two sides; none where the config names none.

    No train problem of reasoning-gym holds the expression of a held-out one. Raises UserError for a
    bad file, an unknown task or a bad argument of one.
    """
    if config.reasoning.path is not None:
        return split_file(config, "reasoning", problem_from, ())
    return _from_gym(config.reasoning, config.heldout) if config.reasoning.chosen else Split([], [])


def _from_gym(reasoning: ReasoningConfig, share: float) -> Problems:
    weights = {
        name: _weight(f"{reasoning.where}.{name}", settings)
        for name, settings in reasoning.chosen.items()
    }
    total = sum(weights.values())
    sizes = {name: round(reasoning.size * weight / total) for name, weight in weights.items()}
    drawn: dict[str, Iterator[Problem]] = {}  # task -> problems, for the train side
    heldout: list[Problem] = []
    for name, settings in reasoning.chosen.items():
        left = round(reasoning.heldout_size * weights[name] / total)
        arguments = {key: value for key, value in settings.items() if key != "weight"}
        most = DRAWS * (sizes[name] + int(left / share))
        problems = _draw(f"{reasoning.where}.{name}", name, arguments, most)
        before: list[Problem] = []
        while left and (problem := next(problems, None)):
            is_held = is_heldout(problem.question, share)
            (heldout if is_held else before).append(problem)
            left -= is_held
        rest = (p for p in problems if not is_heldout(p.question, share))
        drawn[name] = chain(before, rest)

    forbidden = keys_of(heldout)
    train: list[Problem] = []
    spelt_out = 0
    for name, problems in drawn.items():
        most = len(train) + sizes[name]
        while len(train) < most and (problem := next(problems, None)):
            if forbidden.in_text(f"{problem.question}\n{problem.worked}"):
                spelt_out += 1
            else:
                train.append(problem)
    shuffled = (sorted(side, key=lambda p: short_hash("order" + p.id)) for side in (train, heldout))
    return Split(*shuffled, notes={"dropped_with_a_heldout_expression": spelt_out})


def _weight(where: str, settings: Any) -> float:
    if not isinstance(settings, dict):
        raise UserError(f"{where}: expected the task's arguments, e.g. {{}}, got {settings!r}")
    weight = settings.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= LARGEST:
        raise UserError(
            f"{where}.weight: expected a number above 0, at most {LARGEST:,}, got {weight!r}"
        )
    return weight


def check_task(where: str, task: str, arguments: dict[str, Any]) -> None:
    """Raise UserError for an unknown task, an unknown argument, and a number of absurd size."""
    import reasoning_gym.factory

    known = reasoning_gym.factory.DATASETS
    if task not in known:
        hint = did_you_mean(task, sorted(known))
        raise UserError(f"{where}: no such task of reasoning-gym: {hint}")
    defaults = {f.name: f.default for f in fields(known[task][1]) if f.name not in ("seed", "size")}
    for name, value in arguments.items():
        if name not in defaults:
            raise UserError(
                f"{where}.{name}: no such argument: it has {', '.join(defaults)}, weight"
            )
        usual = defaults[name] if isinstance(defaults[name], int | float) else 1
        most = LARGEST * max(1, abs(usual))
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not abs(number) <= most:  # NaN neither
                raise UserError(f"{where}.{name}: expected at most {most:,}, got {number}")


def _draw(where: str, task: str, arguments: dict[str, Any], most: int) -> Iterator[Problem]:
    """Distinct problems of a task, from at most `most` draws; a small range ends sooner. (Were
    there one problem more, as likely as the others, it would be missed once in 20.)"""
    import reasoning_gym

    check_task(where, task, arguments)
    with _in_time(where, arguments):
        dataset = reasoning_gym.create_dataset(task, size=most, seed=0, **arguments)
    seen: set[str] = set()
    draws = iter(range(most))
    patience = time.monotonic() + PATIENCE
    while True:
        if time.monotonic() > patience:
            patience = math.inf
            line = f"drawing problems of {task}, which takes a while"
            print(f"{line} ({where} and data.reasoning.size decide)", file=sys.stderr, flush=True)
        with _in_time(where, arguments):
            entries = (dataset[i] for i in islice(draws, max(100, STALE * len(seen))))
            asked = ((short_question(task, entry), entry) for entry in entries)
            question, entry = next((new for new in asked if new[0] not in seen), ("", {}))
            if len(question) > LONGEST:
                raise ValueError(f"a question of {len(question):,} characters")
        if not entry:
            return
        seen.add(question)
        plain = json.loads(json.dumps(entry, default=str))
        yield Problem(question, entry["answer"], task, worked_solution(task, entry), plain)


class _TooSlow(BaseException):
    """Not an Exception: tasks try again after those."""


@contextmanager
def _in_time(where: str, arguments: dict[str, Any]) -> Iterator[None]:
    """Makes a UserError of whatever fails inside, or takes longer than SLOWEST. The time is limited
    in the main thread only, as signals reach no other."""

    def stop(*_: object) -> NoReturn:
        raise _TooSlow

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, stop) if is_main else None
    try:
        try:
            if is_main:
                signal.setitimer(signal.ITIMER_REAL, SLOWEST, SLOWEST)  # again if it is caught
            yield
        finally:
            if is_main:
                signal.setitimer(signal.ITIMER_REAL, 0)
    except _TooSlow:
        raise UserError(
            f"{where}: reasoning-gym found no new problem with {arguments} in {SLOWEST} s: give "
            "smaller numbers"
        ) from None
    except Exception as error:  # a task checks only some of its arguments
        reason = " ".join(str(error).split()) or repr(error)
        raise UserError(f"{where}: reasoning-gym can't draw with {arguments}: {reason}") from None
    finally:
        if is_main:
            signal.signal(signal.SIGALRM, before)
