"""The one exception for a user's mistakes."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in a command, a config or a file: one line that says what is wrong and what to do.
    Entry points print it without a traceback and end with exit code 1."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known names that are spelt alike, or else all of them."""
    names = list(known)
    near = get_close_matches(name, names)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(names)}"
