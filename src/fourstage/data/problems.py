"""Reads problems, of reasoning-gym or from a file in gsm8k's schema, and splits them in two."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from difflib import get_close_matches
from itertools import chain
from typing import Any

from fourstage.data.config import DataConfig, cached
from fourstage.data.files import read_records
from fourstage.data.keys import keys_of, plain
from fourstage.data.records import Problem
from fourstage.data.schemas import added, problem_from, usable
from fourstage.data.split import is_heldout, short_hash
from fourstage.data.tasks import short_question, worked_solution
from fourstage.errors import UserError

DRAWS = 20  # give up on a task's share after so many draws for each problem wanted
PATIENCE = 10  # seconds of a task's drawing before a line says so
STALE = 3  # or after so many in a row for each problem found, none of which was new


@cached("reasoning")
def split_problems(config: DataConfig) -> tuple[list[Problem], list[Problem], dict[str, int]]:
    """Train problems, held-out ones, and notes; nothing where the config names no problems.

    No train problem of reasoning-gym holds the expression of a held-out one.

    Raises:
        UserError: a bad file, an unknown task or a bad argument of one.
    """
    if config.reasoning.path is not None:
        return _from_file(config)
    return _from_gym(config) if config.reasoning.chosen else ([], [], {})


def _from_file(config: DataConfig) -> tuple[list[Problem], list[Problem], dict[str, int]]:
    reasoning = config.reasoning
    assert reasoning.path is not None
    problems, notes = usable(read_records(reasoning.path, reasoning.columns), problem_from)
    if reasoning.heldout_path is None:
        heldout = [p for p in problems if is_heldout(p.question, config.heldout)]
    else:
        records = read_records(reasoning.heldout_path, reasoning.columns)
        heldout, more = usable(records, problem_from)
        notes = added(notes, more)
    keys = {plain(p.question) for p in heldout}
    train = [p for p in problems if plain(p.question) not in keys]
    if reasoning.heldout_path is not None:
        notes["dropped_from_train_as_heldout"] = len(problems) - len(train)
    return train, heldout, notes


def _from_gym(config: DataConfig) -> tuple[list[Problem], list[Problem], dict[str, int]]:
    reasoning = config.reasoning
    weights = {
        task: _weight(f"{reasoning.where}.{task}", settings)
        for task, settings in reasoning.chosen.items()
    }
    total = sum(weights.values())
    heldout: list[Problem] = []
    drawn: dict[str, tuple[list[Problem], Iterator[Problem]]] = {}
    for task, settings in reasoning.chosen.items():
        size, heldout_size = (
            round(n * weights[task] / total) for n in (reasoning.size, reasoning.heldout_size)
        )
        arguments = {k: v for k, v in settings.items() if k != "weight"}
        where = f"{reasoning.where}.{task}"
        problems = _draw(
            where, task, arguments, DRAWS * (size + int(heldout_size / config.heldout))
        )
        before: list[Problem] = []
        held = 0
        while held < heldout_size and (problem := next(problems, None)):
            if is_heldout(problem.question, config.heldout):
                heldout.append(problem)
                held += 1
            else:
                before.append(problem)
        drawn[task] = (before, problems)

    forbidden = keys_of(heldout)
    train: list[Problem] = []
    spelt_out = 0
    for task, (before, problems) in drawn.items():
        size = round(reasoning.size * weights[task] / total)
        taken = 0
        for problem in chain(before, problems):
            if taken == size:
                break
            if is_heldout(problem.question, config.heldout):
                continue
            if forbidden.in_text(f"{problem.question}\n{problem.worked}"):
                spelt_out += 1
                continue
            train.append(problem)
            taken += 1
    notes = {"dropped_with_a_heldout_expression": spelt_out}
    shuffled = (sorted(side, key=lambda p: short_hash("order" + p.id)) for side in (train, heldout))
    return *shuffled, notes  # type: ignore[return-value]


def _weight(where: str, settings: Any) -> float:
    if not isinstance(settings, dict):
        raise UserError(f"{where}: expected the task's arguments, e.g. {{}}, got {settings!r}")
    weight = settings.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0:
        raise UserError(f"{where}.weight: expected a number above 0, got {weight!r}")
    return weight


def check_task(where: str, task: str, arguments: dict[str, Any]) -> None:
    """Raise UserError for a task or an argument that reasoning-gym doesn't have, and name those
    that it has."""
    import reasoning_gym.factory

    known = reasoning_gym.factory.DATASETS
    if task not in known:
        near = get_close_matches(task, known, n=3) or sorted(known)
        raise UserError(f"{where}: no such task of reasoning-gym: {_or(near)}")
    names = [field.name for field in fields(known[task][1])]
    names = [name for name in names if name not in ("seed", "size")]
    for name in arguments:
        if name not in names:
            raise UserError(f"{where}.{name}: no such argument: it has {', '.join(names)}, weight")


def _or(names: list[str]) -> str:
    return f"did you mean {' or '.join(names)}?" if len(names) < 4 else f"it has {', '.join(names)}"


def _draw(where: str, task: str, arguments: dict[str, Any], most: int) -> Iterator[Problem]:
    """Distinct problems of a task, from at most `most` draws; a small range ends sooner.

    (Were there one problem more, as likely as the others, it would be missed once in 20.)
    """
    import reasoning_gym

    check_task(where, task, arguments)
    try:
        dataset = reasoning_gym.create_dataset(task, size=most, seed=0, **arguments)
    except TypeError as error:
        raise UserError(f"{where}: reasoning-gym can't draw with {arguments}: {error}") from None
    except (ValueError, ArithmeticError, AssertionError) as error:
        raise UserError(f"{where}: {error}") from None
    seen: set[str] = set()
    last_new = 0
    patience = time.monotonic() + PATIENCE
    for i in range(most):
        if time.monotonic() > patience:
            patience = math.inf
            print(f"drawing problems of {task}, which takes a while", file=sys.stderr, flush=True)
        if i - last_new > max(100, STALE * len(seen)):
            return
        try:
            entry = dataset[i]
        except Exception as error:  # of a task's own, on arguments that it did not check
            raise UserError(
                f"{where}: reasoning-gym can't draw with {arguments}: {error!r}"
            ) from None
        question = short_question(task, entry)
        if question in seen:
            continue
        seen.add(question)
        last_new = i
        plain = json.loads(json.dumps(entry, default=str))
        yield Problem(question, entry["answer"], task, worked_solution(task, entry), plain)
