"""The verifiers of reasoning-gym's tasks, without the loopholes of version 0.1.25.

Most compare with the one right answer. Some evaluate what they are given; some accept the right
answer anywhere in it ("not 57", "57 or 58" for 57) or at its beginning; some accept what is close.
A test finds the tasks that are named here: it changes the right answers of every task.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from fourstage.data.final_answer import same_plainly

Entry = dict[str, Any]
Verifier = Callable[[str, Entry], float]

# --- shapes: an answer that no right one looks like is wrong, and is never parsed

MOST_CHARACTERS = 4000  # or twice as many as the right answer has
NO_NUMBER = re.compile(r"(?<![a-z])(?:nan|inf(?:inity)?)j?(?![a-z])", re.IGNORECASE)
LISTS = re.compile(r"[\w\s,'\"\[\]-]*")  # no parentheses, so no call
NAME = r"(?:a?(?:sin|cos|tan)h?|exp|log|ln|sqrt|pi|[a-zA-Z])(?![a-zA-Z])"
FORMULA = re.compile(rf"(?:{NAME}|[0-9]{{1,100}}(?![0-9])|\.[0-9]|[\s+*/^()-])*")
ARITHMETIC = re.compile(r"(?:[0-9]{1,30}(?![0-9])|[+-]|[*/](?![*/])|[\s()])*")  # whole numbers
EVALUATED = {  # by the task's verifier
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), LISTS),
    **dict.fromkeys(("countdown", "puzzle24"), ARITHMETIC),
    **dict.fromkeys(("polynomial_multiplication", "simple_integration"), FORMULA),
    "intermediate_integration": FORMULA,
}
REAL = r"[+-]?[0-9]{1,30}(?:\.[0-9]{1,30})?"
MOVE = r"Move disk \d+ from Peg \d+ to Peg \d+"
POUR = r'"(?:(?:fill|empty) [A-Z]|pour [A-Z]->[A-Z])"'
READ_PAST = {  # the task's verifier skips other characters
    "advanced_geometry": re.compile(rf"\(?{REAL}\s*,\s*{REAL}\)?|{REAL}\s*°?"),
    "fraction_simplification": re.compile(
        r"\$?\s*(?:\\d?frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\}|-?\d+\s*/\s*-?\d+)\s*\$?"
    ),
    "jugs": re.compile(rf"\[\s*{POUR}(?:\s*,\s*{POUR})*\s*\]"),
    "kakurasu": re.compile(r"[01\s]*"),
    "polynomial_equations": re.compile(rf'""|{REAL}(?:\s*,\s*{REAL})*'),
    "pool_matrix": re.compile(r"[0-9.\s-]*"),
    "quantum_lock": re.compile(r"[A-Ca-c](?:[\s→,>-]+[A-Ca-c])*"),
    "rubiks_cube": re.compile(r"[A-Za-z]'?\d?(?:\s+[A-Za-z]'?\d?)*"),
    "rush_hour": re.compile(r"[A-Z][+-]\d+(?:[\s,]+[A-Z][+-]\d+)*"),
    "sokoban": re.compile(r"[UDLR]*"),
    "tower_of_hanoi": re.compile(rf"{MOVE}(?:\s*\n\s*{MOVE})*"),
}
SHAPES = EVALUATED | READ_PAST


def is_plausible(final: str, task: str, entry: Entry) -> bool:
    """Whether a final answer has a length and characters that a right one may have."""
    right = str(entry.get("answer"))
    if len(final) > max(MOST_CHARACTERS, 2 * len(right)) or "\0" in final:
        return False
    if NO_NUMBER.search(final) and not NO_NUMBER.search(re.sub(r"\\infty|∞", "inf ", right)):
        return False
    return task not in SHAPES or bool(SHAPES[task].fullmatch(final))


# --- conditions: a full score needs them too


def _tokens(text: str) -> list[str | float]:
    """Words in lower case, and numbers."""
    found = re.findall(r"-?\d+(?:\.\d+)?|[^\W\d]+", text.lower())
    return [float(token) if token[-1].isdigit() else token for token in found]


def _that_number(final: str, entry: Entry) -> bool:
    """Separators only between thousands, and nothing in front of the number."""
    return same_plainly(final, str(entry["answer"])) is True


def _that_list(final: str, entry: Entry) -> bool:
    """In any order, if the verifier accepts any."""
    given, expected = json.loads(final), json.loads(entry["answer"])
    return len(given) == len(expected) and all(part in expected for part in given)


def _no_other_words(final: str, entry: Entry) -> bool:
    return Counter(_tokens(final)) <= Counter(_tokens(entry["answer"]))


def _the_same_words(final: str, entry: Entry) -> bool:
    return _tokens(final) == _tokens(entry["answer"])


def _no_other_words_or_numbers(final: str, entry: Entry) -> bool:
    """ "11" for "11 days"."""
    sides = _tokens(final), _tokens(entry["answer"])
    given, expected = ([token for token in side if isinstance(token, float)] for side in sides)
    return given == expected and _no_other_words(final, entry)


def _each_vertex(final: str, entry: Entry) -> bool:
    return json.loads(final).keys() == {str(v) for v in entry["metadata"]["puzzle"]["vertices"]}


def _not_by_chance(final: str, entry: Entry) -> bool:
    """Moves that change nothing are free, so a long enough walk comes to the goal."""
    return len(final) <= 4 * len(entry["answer"])


def _each_to_the_last_digit(final: str, entry: Entry) -> bool:
    """A matrix of numbers rounded to two decimals."""
    given, expected = (
        [[Fraction(number) for number in line.split()] for line in text.strip().splitlines()]
        for text in (final, entry["answer"])
    )
    pairs = zip(sum(given, []), sum(expected, []), strict=True)
    shapes = [[len(row) for row in rows] for rows in (given, expected)]
    return shapes[0] == shapes[1] and all(abs(a - b) <= Fraction(1, 100) for a, b in pairs)


def _to_four_digits(final: str, entry: Entry) -> bool:
    """A probability, within a relative 1e-4 (its verifier: an absolute 1e-4, or a prefix of it)."""
    return math.isclose(Fraction(final), Fraction(entry["answer"]), rel_tol=1e-4)


def _to_the_last_digit(final: str, entry: Entry) -> bool:
    """Within one unit of the expected answer's last digit."""
    _, _, decimals = entry["answer"].partition(".")
    apart = abs(Fraction(final) - Fraction(entry["answer"]))
    return apart <= Fraction(1, 10 ** len(decimals))


CONDITIONS: dict[str, Callable[[str, Entry], bool]] = {
    **dict.fromkeys(("chain_sum", "gsm_symbolic", "number_format", "products"), _that_number),
    **dict.fromkeys(("calendar_arithmetic", "figlet_font", "letter_jumble"), _the_same_words),
    **dict.fromkeys(("number_sorting", "spell_backward", "survo"), _the_same_words),
    **dict.fromkeys(("game_of_life", "palindrome_partitioning"), _that_list),
    "word_sorting": _the_same_words,
    "coin_flip": _to_four_digits,
    "decimal_arithmetic": _to_the_last_digit,
    "graph_color": _each_vertex,
    "knights_knaves": _no_other_words,  # in any order
    "pool_matrix": _each_to_the_last_digit,
    "sokoban": _not_by_chance,
    "time_intervals": _no_other_words_or_numbers,
}


# --- verifiers of our own


def _says_whether(final: str, entry: Entry) -> float:
    """True or False. (reasoning-gym accepts any text as True.)"""
    return float(final.lower() == str(entry["answer"]).lower())


def _is_board(final: str, entry: Entry) -> float:
    """reasoning-gym compares with tuples, which JSON stores as lists."""
    from reasoning_gym.arc.board_format import BoardFormattingOptions, parse_board

    board = parse_board(final, BoardFormattingOptions())
    return float([list(row) for row in board] == entry["metadata"]["output"])


def _reaches(final: str, entry: Entry) -> float:
    """An expression with each given number once. (reasoning-gym accepts other numbers in puzzle24,
    and values close to the target.)"""
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
    """(final answer, entry) -> score; to be called in a sandbox."""
    import reasoning_gym

    score = OWN.get(task) or reasoning_gym.get_score_answer_fn(task)
    holds = CONDITIONS.get(task, lambda *_: True)

    def strict(final: str, entry: Entry) -> float:
        given = float(score(final, entry))
        is_known = given <= 1.0  # more than 1 is a sum over the parts of a wrong answer
        return given if given < 1.0 or (is_known and holds(final, entry)) else 0.0

    return strict
