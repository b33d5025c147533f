"""Is an answer right, and does it have the form that sft teaches: steps, then `#### ANSWER`.

The form is gsm8k's (Cobbe et al. 2021, arXiv 2110.14168). The task's own verifier in reasoning-gym
decides right or wrong; for problems from files, final answers are compared. Verifiers may evaluate
what they are given, so text first passes a filter and is then judged in a sandbox.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

from fourstage.data.final_answer import same_expression, same_plainly
from fourstage.data.sandbox import Sandbox
from fourstage.data.verifiers import is_plausible, verifier_of

MARK = "#### "
FROM_FILE = "file"  # the task of a problem that came from a user's file
SANDBOX = Sandbox(__name__)


class Verifiable(Protocol):
    """What the verifiers need of a problem."""

    @property
    def task(self) -> str: ...
    @property
    def entry(self) -> dict[str, Any]: ...


def extract(answer: str) -> str | None:
    """The text after the last mark, stripped; None without a mark."""
    _, mark, final = answer.rpartition(MARK)
    return final.strip() if mark else None


def has_form(answer: str, problem: Verifiable) -> bool:
    """True if the mark occurs once, begins a line, and is followed by some text that ends the
    answer and has no more lines than the expected answer."""
    before, mark, final = answer.partition(MARK)
    starts_a_line = mark and (not before or before.endswith("\n"))
    lines = str(problem.entry["answer"]).strip().count("\n") + 1
    is_once = "####" not in before + final
    return bool(starts_a_line and final.strip()) and is_once and final.count("\n") < lines


def verify_all(problems: Sequence[Verifiable], answers: Sequence[str]) -> list[float]:
    """The score of each answer to its problem, in [0, 1]: 1.0 is right, and no mark is 0.0. Some
    tasks of reasoning-gym score a part of the answer: only 1.0 counts as right."""
    scores: dict[int, float] = {}
    unclear: dict[int, list[Any]] = {}
    for i, (problem, answer) in enumerate(zip(problems, answers, strict=True)):
        final = extract(answer)
        if not final or not is_plausible(final, problem.task, problem.entry):
            scores[i] = 0.0
        elif problem.task != FROM_FILE:
            unclear[i] = [problem.task, problem.entry, final]
        elif (equal := same_plainly(final, problem.entry["answer"])) is not None:
            scores[i] = float(equal)
        else:
            unclear[i] = [FROM_FILE, problem.entry, final]
    if unclear:
        judged = SANDBOX.map(list(unclear.values()))
        scores |= {i: min(1.0, max(0.0, s or 0.0)) for i, s in zip(unclear, judged, strict=True)}
    return [scores[i] for i in range(len(answers))]


# --- in the sandbox


def prepare(item: list[Any]) -> None:
    """Import what judges an item."""
    _verifier(item[0])


def judge(item: list[Any]) -> float:
    """The score of [task, entry, final answer]."""
    task, entry, final = item
    return float(_verifier(task)(final, entry))


@cache
def _verifier(task: str) -> Callable[[str, dict[str, Any]], float]:
    if task == FROM_FILE:
        import math_verify  # noqa: F401

        return same_expression
    return verifier_of(task)
