"""Which side of the split a prompt or a problem is on: one function for every source.

A prompt is held out if the hash of its normalised text is below the share. Only the text decides,
so a prompt is on the same side in every source, order and run.
"""

import hashlib
import re

_NUMBER = r"-?\d+"
_SUM = re.compile(rf"^{_NUMBER}(?: [+-] {_NUMBER})+ = \?$")
_PRODUCT = re.compile(rf"^{_NUMBER}(?: \* {_NUMBER})+ = \?$")
_GCD = re.compile(r"^gcd\(\d+(?:, \d+)+\) = \?$")
SPACE, LONG = re.compile(r"\s"), 2**16  # characters that are split at once
EXPRESSION = re.compile(
    rf"(?<![\w.]){_NUMBER}(?:[ \t]*[-+*][ \t]*{_NUMBER})+(?!\w|\.\d)|gcd\([\d, ]+\)"
)


def normalise(text: str) -> str:
    """The key of a prompt: lower case, single spaces, and one order of operands.

    "3 + 5 = ?" and "5 + 3 = ?" have one key, and so have swapped factors and arguments of gcd. In
    a sum the terms move with their signs.
    """
    text = single_spaced(text.lower())
    if _SUM.match(text):
        terms = re.findall(rf"[+-] {_NUMBER}", "+ " + text)
        return " ".join(sorted(terms)) + " = ?"
    if _PRODUCT.match(text):
        return " * ".join(sorted(re.findall(_NUMBER, text))) + " = ?"
    if _GCD.match(text):
        return "gcd(" + ", ".join(sorted(re.findall(_NUMBER, text))) + ") = ?"
    return text


def single_spaced(text: str) -> str:
    """ " ".join(text.split()), without a list of all words of a long text."""
    parts, at = [], 0
    while at < len(text):
        space = SPACE.search(text, at + LONG)
        end = space.end() if space else len(text)
        parts += [" ".join(words)] if (words := text[at:end].split()) else []
        at = end
    return " ".join(parts)


def short_hash(text: str, length: int = 12) -> str:
    """Hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]


def is_heldout(prompt: str, share: float) -> bool:
    """True if a prompt is on the held-out side, which has `share` of all prompts."""
    return int(short_hash(normalise(prompt)), 16) < share * 16**12


def expressions(text: str, longest: int | None = None) -> set[str]:
    """The arithmetic that a text spells out, in the form of `normalise("... = ?")`.

    Spacing and the order of operands don't matter, and every run inside a longer chain counts:
    "1 + 26 + 4" holds "4+26" too, and "-26+4" holds "26+4". Runs of more than `longest` operands
    are left out.
    """
    found: set[str] = set()
    for match in EXPRESSION.finditer(text.lower()):
        parts = _parts(match[0])
        for start in range(0, len(parts), 2):
            last = len(parts) if longest is None else start + 2 * longest - 1
            for end in range(start + 3, min(last, len(parts)) + 1, 2):
                found.add(_key(parts[start:end]))
                found.add(_key([parts[start].removeprefix("-"), *parts[start + 1 : end]]))
        if len(parts) == 1:
            found.add(_key(parts))
    return found


def whole_expressions(text: str) -> set[str]:
    """As `expressions`, without the runs inside longer chains."""
    return {_key(_parts(match[0])) for match in EXPRESSION.finditer(text.lower())}


def _parts(expression: str) -> list[str]:
    """Numbers at even places, operators between them; gcd(...) is one part."""
    if expression.startswith("gcd"):
        return [f"gcd({', '.join(re.findall(r'[0-9]+', expression))})"]
    first = re.match(_NUMBER, expression)
    assert first is not None
    rest = re.findall(rf"([-+*])[ \t]*({_NUMBER})", expression[first.end() :])
    return [first[0], *(part for pair in rest for part in pair)]


def _key(parts: list[str]) -> str:
    return normalise(f"{' '.join(parts)} = ?")
