"""Problems from files: is a final answer the expected one?

It is one number, or one expression of the same kind as the expected one (docs/evaluation.md has the
rule). What characters can tell is told at once; the rest is computer algebra, in the sandbox.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from fourstage.tokenizer import LOOK_ALIKES

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
