"""The verifiers of reasoning-gym's tasks, with what those of 0.1.25 leave open closed.

Most of them compare with the one right answer. Some evaluate what they are given; some find the
right answer anywhere in it ("not 57", "57 or 58" for 57) or at its beginning; some take what is
near. A test changes the right answers of every task: it finds the tasks that are named here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

Entry = dict[str, Any]
Verifier = Callable[[str, Entry], float]

# --- shapes: what no right answer looks like is wrong, and nobody has to parse it

MOST_CHARACTERS = 4000  # or twice as many as the right answer has
NO_NUMBER = re.compile(r"(?<![a-z])(?:nan|inf(?:inity)?)j?(?![a-z])", re.IGNORECASE)
LISTS = re.compile(r"[\w\s,'\"\[\]-]*")  # no parentheses, so no call
NAME = r"(?:a?(?:sin|cos|tan)h?|exp|log|ln|sqrt|pi|[a-zA-Z])(?![a-zA-Z])"
FORMULA = re.compile(rf"(?:{NAME}|[0-9]{{1,30}}(?![0-9])|\.[0-9]|[\s+*/^()-])*")
ARITHMETIC = re.compile(r"(?:[0-9]{1,30}(?![0-9])|[+-]|[*/](?![*/])|[\s()])*")  # whole numbers
EVALUATED = {  # by the task's verifier
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), LISTS),
    **dict.fromkeys(("countdown", "puzzle24"), ARITHMETIC),
    **dict.fromkeys(("polynomial_multiplication", "simple_integration"), FORMULA),
    "intermediate_integration": FORMULA,
}
REAL = r"[+-]?[0-9]{1,30}(?:\.[0-9]{1,30})?"
MOVE = r"Move disk \d+ from Peg \d+ to Peg \d+\s*"
READ_PAST = {  # the task's verifier reads past other characters
    "advanced_geometry": re.compile(rf"\(?{REAL}\s*,\s*{REAL}\)?|{REAL}\s*°?"),
    "fraction_simplification": re.compile(
        r"\$?\s*(?:\\d?frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\}|-?\d+\s*/\s*-?\d+)\s*\$?"
    ),
    "kakurasu": re.compile(r"[01\s]*"),
    "polynomial_equations": re.compile(rf'""|{REAL}(?:\s*,\s*{REAL})*'),
    "quantum_lock": re.compile(r"[A-Ca-c](?:\s*(?:→|->|,|\s)\s*[A-Ca-c])*"),
    "sokoban": re.compile(r"[UDLR]*"),
    "tower_of_hanoi": re.compile(rf"{MOVE}(?:\n\s*{MOVE})*"),
}
SHAPES = EVALUATED | READ_PAST


def is_plausible(final: str, task: str, entry: Entry) -> bool:
    """Whether a final answer is of the length and characters that a right one may have."""
    right = str(entry.get("answer"))
    if len(final) > max(MOST_CHARACTERS, 2 * len(right)) or "\0" in final:
        return False
    if NO_NUMBER.search(final) and not NO_NUMBER.search(right):
        return False
    return task not in SHAPES or bool(SHAPES[task].fullmatch(final))


# --- conditions: a full score needs them too


def _tokens(text: str) -> list[str | float]:
    """Words in lower case, and numbers."""
    found = re.findall(r"-?\d+(?:\.\d+)?|[^\W\d]+", text.lower())
    return [float(token) if token[-1].isdigit() else token for token in found]


def _no_other_words(final: str, entry: Entry) -> bool:
    return Counter(_tokens(final)) <= Counter(_tokens(entry["answer"]))


def _the_same_words(final: str, entry: Entry) -> bool:
    return _tokens(final) == _tokens(entry["answer"])


def _to_four_digits(final: str, entry: Entry) -> bool:
    """A probability, 1e-4 of itself apart (its verifier: 1e-4, or a beginning of it)."""
    return math.isclose(Fraction(final), Fraction(entry["answer"]), rel_tol=1e-4)


def _to_the_last_digit(final: str, entry: Entry) -> bool:
    """At most one unit of the expected answer's last digit apart."""
    _, _, decimals = entry["answer"].partition(".")
    apart = abs(Fraction(final) - Fraction(entry["answer"]))
    return apart <= Fraction(1, 10 ** len(decimals))


CONDITIONS: dict[str, Callable[[str, Entry], bool]] = {
    **dict.fromkeys(("calendar_arithmetic", "game_of_life", "gsm_symbolic"), _the_same_words),
    **dict.fromkeys(("letter_jumble", "number_sorting", "survo"), _the_same_words),
    **dict.fromkeys(("time_intervals", "word_sorting"), _the_same_words),
    "coin_flip": _to_four_digits,
    "decimal_arithmetic": _to_the_last_digit,
    "knights_knaves": _no_other_words,  # in any order
}


# --- verifiers of our own


def _says_whether(final: str, entry: Entry) -> float:
    """True or False. (reasoning-gym takes any text for True.)"""
    return float(final.lower() == str(entry["answer"]).lower())


def _is_board(final: str, entry: Entry) -> float:
    """reasoning-gym compares with tuples, which JSON has stored as lists."""
    from reasoning_gym.arc.board_format import BoardFormattingOptions, parse_board

    board = parse_board(final, BoardFormattingOptions())
    return float([list(row) for row in board] == entry["metadata"]["output"])


def _reaches(final: str, entry: Entry) -> float:
    """An expression of each given number once. (reasoning-gym takes other numbers in puzzle24, and
    what is nearly the target.)"""
    from sympy.parsing.sympy_parser import parse_expr

    metadata = entry["metadata"]
    used = sorted(int(number) for number in re.findall(r"\d+", final))
    if used != sorted(metadata["numbers"]):
        return 0.0
    return float(parse_expr(final) == metadata.get("target", 24))


OWN: dict[str, Verifier] = {
    "arc_agi": _is_board,
    "countdown": _reaches,
    "game_of_life_halting": _says_whether,
    "puzzle24": _reaches,
    "rearc": _is_board,
}


def verifier_of(task: str) -> Verifier:
    """(final answer, entry) -> its score; whoever calls it should be in a sandbox."""
    import reasoning_gym

    score = OWN.get(task) or reasoning_gym.get_score_answer_fn(task)
    if (holds := CONDITIONS.get(task)) is None:
        return score

    def strict(final: str, entry: Entry) -> float:
        given = float(score(final, entry))
        return given if given < 1.0 or holds(final, entry) else 0.0

    return strict
