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
FRACTION = re.compile(r"(-?)(?:([0-9]{1,50}) )?\(?(-?[0-9]{1,50})\)?/\(?(-?[0-9]{1,50})\)?")
WRAPPED = re.compile(
    r"\\(?:boxed|fbox)\s*\{(.*)\}|\\boxed ([^\s{}]+)|\\\((.*)\\\)|\\\[(.*)\\\]|\$\$?([^$]*)\$\$?"
    r"|\*\*([^*]*)\*\*",
    re.DOTALL,
)
FUNCTIONS = "sqrt|pi|sin|cos|tan|log|ln|exp"
SEPARATORS = re.compile(r"[,;:=<>|%]|\\(?:leq?|geq?|neq?|cup|cap|pm|in)\b")
WORDS = re.compile(rf"(?<![\\a-z])(?!{FUNCTIONS})[a-z]{{2,}}")
ARITHMETIC = re.compile(r"(?<!^)[+-]|[0-9](?:\*\*|\\times|\\cdot|\\div|[*/^])(?=[0-9])")
TEXT = re.compile(
    r"^[0-9]+(?:[-:][0-9]+)+$|^[^\\]*[a-z][0-9]|_|^[^\\]*(?!sqrt|sin|cos|tan|log|exp)\b[a-z]{3}"
)
LOOKS = str.maketrans(LOOK_ALIKES)  # a tokenizer may be able to write only the plain ones


def same_plainly(given: str, expected: str) -> bool | None:
    """Whether a final answer is the expected one; None where only computer algebra can tell."""
    return _same(_plain(given), _plain(expected))


def is_number(text: str) -> bool:
    """Whether a final answer is one number; "$1,000", "40%" and "\\boxed{7}" are."""
    return _number(_plain(text)) is not None


def same_expression(given: str, entry: dict[str, Any]) -> bool:
    """As `same_plainly`, with math-verify for what is left; called in the sandbox, since that
    evaluates what it reads."""
    given, expected = _plain(given), _plain(entry["answer"])
    parts = _parts(given), _parts(expected)
    pairs = zip(*parts, strict=True) if parts[1] else [(given, expected)]
    return all(_equal(*pair) if (same := _same(*pair)) is None else same for pair in pairs)


def _equal(given: str, expected: str) -> bool:
    from math_verify import parse, verify

    left, right = (parse(f"${_latex(t)}$", parsing_timeout=None) for t in (expected, given))
    return bool(verify(left, right, timeout_seconds=None))


def _same(given: str, expected: str) -> bool | None:
    """As `same_plainly`, of plain texts."""
    wanted = _number(expected)
    if wanted is not None and wanted.denominator == 1:  # arithmetic has to be carried out
        return _number(given) == wanted
    if (wanted := wanted or _fraction(expected)) is not None:
        return wanted in (_number(given), _fraction(given))
    if given.replace(" ", "") == expected.replace(" ", ""):
        return True
    if TEXT.search(expected):  # words, names, dates, scores: no formula
        return False
    parts, others = _parts(expected) or [], _parts(given) or []
    if len(parts) != len(others):
        return False
    if parts:
        same = [_same(*pair) for pair in zip(others, parts, strict=True)]
        return False if False in same else None if None in same else True
    given, expected = _latex(given), _latex(expected)
    if given == expected:
        return True
    if not re.search(r"[0-9\\+*/^]", expected) or not _same_kind(given, expected):
        return False
    return None


def _parts(text: str) -> list[str] | None:
    """The brackets and elements of a list, a tuple or an interval, whose order counts; None for
    what is none of them."""
    is_enclosed = text[:1] in ("(", "[") and text[-1:] in (")", "]")
    opened, inside, closed = (text[0], text[1:-1], text[-1]) if is_enclosed else ("", text, "")
    depth, parts = 0, [""]
    for character in inside:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:  # (1,2) \cup (3,4)
            return None
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [opened, *map(str.strip, parts), closed] if len(parts) > 1 else None


def _plain(text: str) -> str:
    r"""Plain characters in lower case, spaces between words only, no $...$ or \boxed{...}."""
    text = " ".join(text.translate(LOOKS).split()).removesuffix(".").strip()
    while wrapped := WRAPPED.fullmatch(text):
        text = next(part for part in wrapped.groups() if part is not None)
        text = text.strip().removesuffix(".")
    text = text.replace("{,}", ",").replace("\\%", "%").replace("\\$", "$").replace("π", r"\pi")
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac([0-9])([0-9])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\(?:text|textbf|mathrm)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\^?\{?\\circ\b\}?|°", "", text)  # a unit, as % is
    text = re.sub(r"\\(?:left|right|,|!|;)|(?<![a-zA-Z0-9,]) | (?![a-zA-Z0-9])", "", text)
    return text.lower() if "\\" not in text else text


def _latex(text: str) -> str:
    r"""sqrt(2), √2, pi, ln 2 and x**10 as \sqrt{2}, \sqrt{2}, \pi, \ln 2 and x^{10}."""
    text = re.sub(r"(?:(?<![\\a-zA-Z])sqrt|√)\(([^()]*)\)|√([0-9]+|[a-z])", r"\\sqrt{\1\2}", text)
    text = re.sub(rf"(?<![\\a-zA-Z])({FUNCTIONS})(?![a-zA-Z])", r"\\\1", text)
    return re.sub(r"(?:\*\*|\^)(?:\((-?[0-9]+)\)|(-?[0-9]+))", r"^{\1\2}", text)


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
    """The value of one fraction of whole numbers: -1/2, -\\frac{1}{2}, 1 4/5, 1\\frac{4}{5}."""
    text = re.sub(r"(?<=[0-9])(?=\\frac)", " ", text)
    text = re.sub(r"\\frac\{(-?[0-9]+)\}\{(-?[0-9]+)\}", r"\1/\2", text)
    match = FRACTION.fullmatch(text)
    if match is None or int(match[4]) == 0:
        return None
    size = int(match[2] or 0) + Fraction(int(match[3]), int(match[4]))
    return -size if match[1] else size


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
