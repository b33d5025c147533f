"""One answer judged at a time."""

from __future__ import annotations

from types import SimpleNamespace

from fourstage.data.verify import FROM_FILE, MARK, Verifiable, verify_all


def verify(problem: Verifiable, answer: str) -> float:
    return verify_all([problem], [answer])[0]


def same_value(given: str, expected: str) -> bool:
    """Whether a final answer to a problem from a file counts as the expected one."""
    problem = SimpleNamespace(task=FROM_FILE, entry={"answer": expected})
    return verify(problem, f"{MARK}{given}") == 1.0
