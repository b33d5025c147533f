"""Problems from files: is a final answer the expected one?

An answer is one number, or one expression of the same kind as the expected one (the rule is in
docs/evaluation.md). Characters decide most of them, computer algebra the rest, in the sandbox.
"""

import re
from fractions import Fraction
from typing import Any

from fourstage.tokenizer import LOOK_ALIKES

NUMBER = re.compile(
    r"([+-]?)[$£€¥]?(-?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,50})?(\.[0-9]{1,50})?(?:e([+-]?[0-9]{1,2}))?"
    r"[%$£€¥]?",
    re.IGNORECASE,
)
FRACTION = re.compile(r"(-?)(?:([0-9]{1,50}) )?\(?(-?[0-9]{1,50})\)?/\(?(-?[0-9]{1,50})\)?%?")
WRAPPED = re.compile(
    r"\\(?:boxed|fbox)\s*\{(.*)\}|\\boxed ([^\s{}]+)|\\\((.*)\\\)|\\\[(.*)\\\]|\$\$?([^$]*)\$\$?"
    r"|\*\*?([^*]*)\*\*?|`([^`]*)`|\"([^\"]*)\"|\(?([a-zA-Z])\)|\(([+-]?[0-9.]+)\)",
    re.DOTALL,
)
FUNCTIONS = "sqrt|pi|sin|cos|tan|log|ln|exp"
SEPARATORS = re.compile(r"[,;:=<>|%]|\\(?:le|ge|ne|cup|cap|pm|in)(?![a-z])")
WORDS = re.compile(rf"(?<![\\a-z])(?!{FUNCTIONS})[a-z]{{2,}}")
LETTERS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])")
ARITHMETIC = re.compile(r"(?<!^)[+-]|[0-9](?:\*\*|\\times|\\cdot|\\div|[*^])(?=[0-9])")
IRRATIONAL = re.compile(rf"\\(?:{FUNCTIONS})(?![a-z])")
TEXT = re.compile(  # dates, times, labels, scores, units, words; derivatives
    r"^[0-9]+(?:[-:][0-9]+)+$|^[^\\]*[a-z][0-9]|_|^[^\\]*(?!sqrt|sin|cos|tan|log|exp)\b[a-z]{3}"
    rf"|(?:^| )(?!{FUNCTIONS})[a-z]{{2,}}(?: |$)|[0-9] [a-z](?: |$)|[0-9] ?r ?[0-9]|^[^\\]*[a-z]\."
    r"|['\"]|(?<![a-z\\])d[rtuxyz](?![a-z])"
)
COMMANDS = (
    rf"{FUNCTIONS}|frac|sec|csc|cot|arcsin|arccos|arctan|infty|cdot|times|div|pm|mp|le|ge|ne|in|cup"
    "|cap|emptyset|alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|omega|begin|end"
)
READABLE = re.compile(  # what math-verify reads in full; it reads only a part of other texts
    rf"(?!.*[.][.])(?:[\w\s+*/^()\[\]{{}}.,=<>|:;&√-]|\\(?:{COMMANDS})(?![a-zA-Z])|\\[{{}}\\])*",
    re.ASCII,
)
RAISED = {ord(raised): str(n) for n, raised in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
SIGNS = "pi infty cup cap in emptyset le ge ne times cdot div"
LOOKS = str.maketrans(  # some tokenizers can write only the plain ones
    LOOK_ALIKES
    | dict(zip("½⅓⅔¼¾⅕", (" 1/2", " 1/3", " 2/3", " 1/4", " 3/4", " 1/5"), strict=True))
    | dict(zip("π∞∪∩∈∅≤≥≠×·÷", (rf"\{name} " for name in SIGNS.split()), strict=True))
)
ALIKE = (  # other ways of writing -> the one that is compared
    (r"\{,\}", ","),
    (r"\\([%$])", r"\1"),
    (r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}", r"\1"),
    (r"\\(?:displaystyle|left|right|quad|,|!|;|:)(?![a-z])", ""),
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r"\\frac\s*(?:\{([^{}]*)\}|(\w))\s*(?:\{([^{}]*)\}|(\w))", r"\\frac{\1\2}{\3\4}"),
    (r"<=|\\leqs?(?:lant)?(?![a-z])", r"\\le "),
    (r">=|\\geqs?(?:lant)?(?![a-z])", r"\\ge "),
    (r"!=|\\neq(?![a-z])", r"\\ne "),
    (r"\\gt(?![a-z])", ">"),
    (r"\\lt(?![a-z])", "<"),
    (r"\\varnothing(?![a-z])", r"\\emptyset"),
    (r"(?<![\\a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty "),
    (r"\{bmatrix\}", "{pmatrix}"),
    (r"_\{(\w+)\}", r"_\1"),
    (
        r"([0-9])\s*(?:\\times|\\cdot|\*)\s*10\s*(?:\^|\*\*)\s*(?:\{(-?[0-9]+)\}|(-?[0-9]+))",
        r"\1e\2\3",
    ),
    (r"\^?\{?\\circ(?![a-z])\}?|°|(?<=[0-9]) ?degrees?(?![a-z])", ""),  # a unit, as % is
    (r"(?<=[0-9]) ?percent(?![a-z])", "%"),
    (r"(?i)\b([ap])\.m\.?(?![a-z])", r"\1m"),
    (r"(?<![a-zA-Z0-9,]) | (?![a-zA-Z0-9])", ""),
)


def same_plainly(given: str, expected: str) -> bool | None:
    """Whether a final answer is the expected one; None if only computer algebra can tell."""
    try:
        return _same(_plain(given), _plain(expected))
    except RecursionError:  # brackets in brackets, a thousand deep
        return given == expected


def same_expression(given: str, entry: dict[str, Any]) -> bool:
    """As `same_plainly`, with math-verify for the rest. Call it in the sandbox: math-verify
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
    """As `same_plainly`, for plain texts."""
    wanted = _number(expected)
    if wanted is not None and wanted.denominator == 1:  # an answer must carry out the arithmetic
        return _number(given) == wanted
    if (wanted := wanted or _fraction(expected)) is not None:
        return wanted in (_number(given), _fraction(given))
    if _key(given) == _key(expected):
        return True
    if TEXT.search(expected) or _enclosed(given) != _enclosed(expected):
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
    is_formula = re.search(r"[0-9\\+*/^-]", expected)
    if not (is_formula and READABLE.fullmatch(expected) and READABLE.fullmatch(given)):
        return False
    if "." in given and _number(given) is not None and IRRATIONAL.search(expected):
        return False
    return None if _same_kind(given, expected) else False


def _key(text: str) -> str:
    """Without the spaces of "5 cm" and "a, b"."""
    return re.sub(r"(?<=[0-9]) (?=[a-z])|(?<=,) ", "", text)


def _enclosed(text: str) -> str:
    """The brackets around a set or an interval, which are part of it; "" for anything else."""
    match = re.fullmatch(r"(\\?\{|\[).*(\\?\}|[\])])|(\().*(\])", text, re.DOTALL)
    return "".join(x.removeprefix("\\") for x in match.groups() if x) if match else ""


def _parts(text: str) -> list[str] | None:
    """The brackets and elements of a list, a tuple or an interval, in order; else None."""
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        inside = _split(text[1:-1])
        if inside is not None:
            return [text[0], *inside, text[-1]] if len(inside) > 1 else None
    whole = _split(text)  # (1,2), (3,4)
    return whole if whole and len(whole) > 1 else None


def _split(text: str) -> list[str] | None:
    """The parts between commas outside brackets; None if the brackets don't match."""
    depth, parts = 0, [""]
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return None
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _plain(text: str) -> str:
    r"""Plain characters in lower case, spaces between words only, no $...$ or \boxed{...}."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda raised: f"^{{{raised[0].translate(RAISED)}}}", text)
    text = _without_a_stop(" ".join(text.translate(LOOKS).split()))
    while wrapped := WRAPPED.fullmatch(text):
        text = _without_a_stop(wrapped[wrapped.lastindex])
    for written, alike in ALIKE:
        text = re.sub(written, alike, text)
    while wrapped := WRAPPED.fullmatch(text):  # \textbf{(B)}
        text = wrapped[wrapped.lastindex]
    return text.lower() if "\\" not in text else text


def _without_a_stop(text: str) -> str:
    return re.sub(r"(?<![.])[.,;]$", "", text.strip()).strip()  # but 0.333... stays


def _latex(text: str) -> str:
    r"""sqrt(2), √2, pi, ln 2 and x**10 as \sqrt{2}, \sqrt{2}, \pi, \ln 2 and x^{10}."""
    text = re.sub(r"(?:(?<![\\a-zA-Z])sqrt|√)\(([^()]*)\)|√([0-9]+|[a-z])", r"\\sqrt{\1\2}", text)
    text = re.sub(r"\\sqrt\s*([0-9a-z])", r"\\sqrt{\1}", text)
    text = re.sub(rf"(?<![\\a-zA-Z])({FUNCTIONS})(?![a-zA-Z])", r"\\\1", text)
    return re.sub(r"(?:\*\*|\^)(?:\((-?[0-9]+)\)|(-?[0-9]+))", r"^{\1\2}", text)


def _number(text: str) -> Fraction | None:
    """The value of one number: "$1,000", "-7." and "40%" are one; "4,2", "12+30" and "1/2" are not.

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
    """The same separators, words and variables, and no more sums and products of numbers than the
    expected answer leaves."""

    def symbols(text: str) -> tuple[list[str], list[str], set[str]]:
        words = WORDS.findall(text.lower())
        return sorted(SEPARATORS.findall(text)), sorted(words), set(LETTERS.findall(text))

    def operations(text: str) -> int:
        text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text)
        return len(ARITHMETIC.findall(re.sub(r"[(){}\s]", "", text)))

    return symbols(given) == symbols(expected) and operations(given) <= operations(expected)
