"""Is an answer right, and does it have the form that sft teaches: steps, then `#### ANSWER`.

The form is gsm8k's (Cobbe et al. 2021, arXiv 2110.14168). Right or wrong is decided by the task's
own verifier in reasoning-gym, or for problems from files by comparing final answers. Verifiers may
evaluate what they are given, so text first passes a filter and then is judged in a sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any, Protocol

from fourstage.sandbox import Sandbox
from fourstage.tokenizer import LOOK_ALIKES

MARK = "#### "
FROM_FILE = "file"  # the task of a problem that came from a user's file
SANDBOX = Sandbox(__name__)


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


def has_form(answer: str, problem: Verifiable) -> bool:
    """True if one line begins with the mark, and what follows it ends the answer: some text, of no
    more lines than the expected answer has."""
    before, mark, final = answer.partition(MARK)
    starts_a_line = mark and (not before or before.endswith("\n"))
    lines = str(problem.entry["answer"]).strip().count("\n") + 1
    is_long = final.count("\n") >= lines
    return bool(starts_a_line and final.strip()) and "####" not in before + final and not is_long


def verify(problem: Verifiable, answer: str) -> float:
    """As `verify_all`, for one answer."""
    return verify_all([problem], [answer])[0]


def verify_all(problems: Sequence[Verifiable], answers: Sequence[str]) -> list[float]:
    """The score of each answer to its problem, in [0, 1]; 1.0 is right, and no mark is 0.0.

    Some tasks of reasoning-gym give part of the score for a part of the answer: a share of right
    answers counts those with 1.0.
    """
    scores: dict[int, float] = {}
    unclear: dict[int, list[Any]] = {}
    for i, (problem, answer) in enumerate(zip(problems, answers, strict=True)):
        final = extract(answer)
        if not final or not is_plausible(final, problem):
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


# --- the filter: what no right answer looks like is wrong, and nobody has to parse it

MOST_CHARACTERS = 4000
NO_NUMBER = re.compile(r"(?<![a-z])(?:nan|inf(?:inity)?)j?(?![a-z])", re.IGNORECASE)
LISTS = re.compile(r"[\w\s,'\"\[\]-]*")  # no parentheses, so no call
NAME = r"(?:a?(?:sin|cos|tan)h?|exp|log|ln|sqrt|pi|[a-zA-Z])(?![a-zA-Z])"
FORMULA = re.compile(rf"(?:{NAME}|[0-9]{{1,30}}(?![0-9])|\.[0-9]|[\s+*/^()-])*")
# tasks of reasoning-gym 0.1.25 whose verifier evaluates the answer (a test looks for others)
EVALUATED = {
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), LISTS),
    **dict.fromkeys(("countdown", "puzzle24", "polynomial_multiplication"), FORMULA),
    **dict.fromkeys(("simple_integration", "intermediate_integration"), FORMULA),
}


def is_plausible(final: str, problem: Verifiable) -> bool:
    """Whether a final answer is of the length and characters that a right one may have."""
    if len(final) > MOST_CHARACTERS or "\0" in final:
        return False
    if NO_NUMBER.search(final) and not NO_NUMBER.search(str(problem.entry.get("answer"))):
        return False
    return problem.task not in EVALUATED or bool(EVALUATED[problem.task].fullmatch(final))


# --- in the sandbox


def prepare(item: list[Any]) -> None:
    """Imports what judges an item."""
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
    import reasoning_gym

    return STRICTER.get(task) or reasoning_gym.get_score_answer_fn(task)


def _says_whether(final: str, entry: dict[str, Any]) -> float:
    """game_of_life_halting: True or False. (reasoning-gym takes any text for True.)"""
    return float(final.lower() == str(entry["answer"]).lower())


def _is_board(final: str, entry: dict[str, Any]) -> float:
    """arc_agi, rearc. (reasoning-gym compares with tuples, which JSON has stored as lists.)"""
    from reasoning_gym.arc.board_format import BoardFormattingOptions, parse_board

    board = parse_board(final, BoardFormattingOptions())
    return float([list(row) for row in board] == entry["metadata"]["output"])


STRICTER: dict[str, Callable[[str, dict[str, Any]], float]] = {
    "game_of_life_halting": _says_whether,
    "arc_agi": _is_board,
    "rearc": _is_board,
}


# --- problems from files: one number, or one expression of the same kind as the expected one

NUMBER = re.compile(
    r"([+-]?)[$£€]?(-?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,50})?(\.[0-9]{1,50})?(?:e([+-]?[0-9]{1,2}))?%?",
    re.IGNORECASE,
)
FRACTION = re.compile(r"(-?)\(?(-?[0-9]{1,50})\)?/\(?(-?[0-9]{1,50})\)?")
WRAPPED = re.compile(r"\\boxed\s*\{(.*)\}|\\\((.*)\\\)|\$([^$]*)\$", re.DOTALL)
SEPARATORS = re.compile(r"[,;:=<>|%]|\\(?:leq?|geq?|neq?|cup|cap|pm|in)\b")
WORDS = re.compile(r"(?<![\\a-z])(?!sqrt|pi|sin|cos|tan|log|ln|exp)[a-z]{2,}")
ARITHMETIC = re.compile(r"(?<!^)[+-]|[0-9](?:\*\*|\\times|\\cdot|\\div|[*/^])(?=[0-9])")
TEXT = re.compile(
    r"^[0-9]+(?:[-:][0-9]+)+$|^[^\\]*[a-z][0-9]|_|^[^\\]*(?!sqrt|sin|cos|tan|log|exp)\b[a-z]{3}"
)
LOOKS = str.maketrans(LOOK_ALIKES)  # a tokenizer may be able to write only the plain ones


def same_value(given: str, expected: str) -> bool:
    """Whether a final answer is the expected one (docs/evaluation.md has the rule)."""
    problem = _Problem(FROM_FILE, {"answer": expected})
    return verify(problem, f"{MARK}{given}") == 1.0


@dataclass(frozen=True)
class _Problem:
    task: str
    entry: dict[str, Any]


def same_plainly(given: str, expected: str) -> bool | None:
    """As `same_value`; None where only a computer algebra system can tell."""
    given, expected = _plain(given), _plain(expected)
    wanted = _number(expected)
    if wanted is not None and wanted.denominator == 1:  # arithmetic has to be carried out
        return _number(given) == wanted
    if (wanted := wanted or _fraction(expected)) is not None:
        return wanted in (_number(given), _fraction(given))
    if given.replace(" ", "") == expected.replace(" ", ""):
        return True
    if TEXT.search(expected):  # words, names, dates, scores: no formula
        return False
    if not re.search(r"[0-9\\+*/^]", expected) or not _same_kind(given, expected):
        return False
    return None


def _plain(text: str) -> str:
    r"""Plain characters in lower case, spaces between words only, no $...$ or \boxed{...}."""
    text = " ".join(text.translate(LOOKS).split()).removesuffix(".").strip()
    while wrapped := WRAPPED.fullmatch(text):
        text = next(part for part in wrapped.groups() if part is not None)
        text = text.strip().removesuffix(".")
    text = text.replace("{,}", ",").replace("\\%", "%").replace("\\$", "$")
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac([0-9])([0-9])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\(?:text|textbf|mathrm)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right|,|!|;)|(?<![a-zA-Z0-9,]) | (?![a-zA-Z0-9])", "", text)
    return text.lower() if "\\" not in text else text


def _number(text: str) -> Fraction | None:
    """The value of one number; "$1,000", "-7." and "40%" are one, "4,2", "12+30" and "1/2" none.

    A currency or percent sign is read as a unit: 40% is 40.
    """
    match = NUMBER.fullmatch(text)
    if match is None or (match[3] is None and match[4] is None) or (match[1] and match[2]):
        return None
    digits = (match[3] or "0").replace(",", "")
    return Fraction(f"{match[1] or match[2]}{digits}{match[4] or ''}e{match[5] or 0}")


def _fraction(text: str) -> Fraction | None:
    """The value of one fraction of whole numbers, -1/2 or -\\frac{1}{2}."""
    text = re.sub(r"\\frac\{(-?[0-9]+)\}\{(-?[0-9]+)\}", r"\1/\2", text)
    match = FRACTION.fullmatch(text)
    if match is None or int(match[3]) == 0:
        return None
    return (-1 if match[1] else 1) * Fraction(int(match[2]), int(match[3]))


def _same_kind(given: str, expected: str) -> bool:
    """The same separators and words, and no more arithmetic than the expected answer leaves."""
    given, expected = _linear(given), _linear(expected)
    return (
        SEPARATORS.findall(given) == SEPARATORS.findall(expected)
        and sorted(WORDS.findall(given.lower())) == sorted(WORDS.findall(expected.lower()))
        and len(ARITHMETIC.findall(given)) <= len(ARITHMETIC.findall(expected))
    )


def _linear(text: str) -> str:
    r"""\frac{a}{b} as a/b, without brackets."""
    text = re.sub(r"\\sqrt\{([^{}]*)\}", r"sqrt(\1)", text)
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text)
    return re.sub(r"[(){}\s]", "", text) if not WORDS.search(text.lower()) else text


def same_expression(given: str, entry: dict[str, Any]) -> bool:
    """Equal to math-verify; called in the sandbox, since it evaluates what it reads."""
    from math_verify import parse
    from math_verify import verify as equal

    left, right = (
        parse(f"${_plain(text)}$", parsing_timeout=None) for text in (entry["answer"], given)
    )
    return bool(equal(left, right, timeout_seconds=None))
