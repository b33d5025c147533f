"""The English conversations of the chatterbot-corpus package (BSD licence)."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

from fourstage.data.records import Conversation, prompt_text
from fourstage.errors import UserError


def chatterbot(exclude: list[str]) -> tuple[list[Conversation], dict[str, int]]:
    """The distinct conversations, and notes.

    Turns that YAML reads as numbers, dates or nothing end their conversation; the last of an odd
    number of turns is cut.

    Raises:
        UserError: a category to exclude that does not exist.
    """
    import chatterbot_corpus
    import yaml

    files = sorted((Path(chatterbot_corpus.__file__).parent / "data" / "english").glob("*.yml"))
    categories = [file.stem for file in files]
    for name in exclude:
        if name not in categories:
            raise UserError(
                f"data.chat.exclude: no category '{name}' (there are {', '.join(categories)})"
            )
    found: list[Conversation] = []
    not_text = 0
    for file in files:
        if file.stem in exclude:
            continue
        loaded = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        for turns in loaded["conversations"]:
            texts = [turn.strip() for turn in takewhile(_is_text, turns)]
            not_text += len(texts) < len(turns)
            exchanges = zip(texts[::2], texts[1::2], strict=False)
            messages = [
                {"role": role, "content": text}
                for exchange in exchanges
                for role, text in zip(("user", "assistant"), exchange, strict=True)
            ]
            if messages:
                found.append(Conversation(messages))
    distinct = {prompt_text(c.messages): c for c in found}
    return list(distinct.values()), {"not_text": not_text, "repeated": len(found) - len(distinct)}


def _is_text(turn: Any) -> bool:
    return isinstance(turn, str) and bool(turn.strip())
