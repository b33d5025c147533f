"""Is an answer right, and does it have the form that sft teaches: steps, then `#### ANSWER`.

The form is gsm8k's (Cobbe et al. 2021, arXiv 2110.14168). Right or wrong is decided by the task's
own verifier in reasoning-gym, or for problems from files by comparing numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any, Protocol

MARK = "#### "
FROM_FILE = "file"  # the task of a problem that came from a user's file


class Verifiable(Protocol):
    """What of a problem the verifiers need."""

    @property
    def task(self) -> str: ...
    @property
    def entry(self) -> dict[str, Any]: ...


def extract(answer: str) -> str | None:
    """The text after the last mark, without spaces around it; None without a mark."""
    _, mark, final = answer.rpartition(MARK)
    return final.strip() if mark else None


def has_form(answer: str) -> bool:
    """True if there is exactly one `#### ANSWER`, and it is the whole last line."""
    last = answer.rsplit("\n", 1)[-1]
    return answer.count("####") == 1 and last.startswith(MARK) and extract(last) != ""


def verify(problem: Verifiable, answer: str) -> float:
    """The score of an answer in [0, 1]; 1.0 is right, and no mark is 0.0.

    Some tasks of reasoning-gym give part of the score for a part of the answer: a share of right
    answers counts those with 1.0.
    """
    final = extract(answer)
    if not final:
        return 0.0
    score = _verifier(problem.task)
    try:
        return min(1.0, max(0.0, float(score(final, problem.entry))))
    except Exception:  # verifiers of other projects, on any text a model comes up with
        return 0.0


@cache
def _verifier(task: str) -> Callable[[str, dict[str, Any]], float]:
    if task == FROM_FILE:
        return lambda final, entry: float(same_value(final, entry["answer"]))
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(task)


def same_value(given: str, expected: str) -> bool:
    """Equal as numbers ("$1,000." is 1000), as text, or to math-verify (fractions, LaTeX)."""
    a, b = _number(given), _number(expected)
    if a is not None and b is not None:
        return a == b
    if given.strip().lower() == expected.strip().lower():
        return True
    if len(given) > 100 or (b is not None and not any(c.isdigit() for c in given)):
        return False
    from math_verify import parse
    from math_verify import verify as equal

    # its timeouts are signals, which only the main thread can set
    seconds = 2 if threading.current_thread() is threading.main_thread() else None
    left = parse(expected, parsing_timeout=seconds)
    right = parse(given, parsing_timeout=seconds)
    return bool(equal(left, right, timeout_seconds=seconds))


def _number(text: str) -> Decimal | None:
    plain = text.strip().removesuffix(".").replace(",", "").replace("$", "").replace("_", "x")
    try:
        value = Decimal(plain.strip())
    except InvalidOperation:
        return None
    return value if value.is_finite() else None
