"""Reads conversations, of chatterbot-corpus or from a user's file, and splits them in two."""

from __future__ import annotations

from pathlib import Path

from fourstage.data.config import DataConfig, cached
from fourstage.data.files import Paths, read_records
from fourstage.data.keys import HeldOutKeys, keys_of, openings
from fourstage.data.problems import split_problems
from fourstage.data.records import Conversation, opening, prompt_text
from fourstage.data.schemas import added, conversation_from, usable
from fourstage.data.split import is_heldout
from fourstage.errors import UserError


@cached("chat", "reasoning")
def split_chats(
    config: DataConfig,
) -> tuple[list[Conversation], list[Conversation], dict[str, int]]:
    """Conversations to train on, held-out ones, and notes; those that open alike stand on the same
    side. Nothing where the config names none.

    Raises:
        UserError: a bad file, or an unknown category to exclude.
    """
    chat = config.chat
    notes: dict[str, int] = {}
    if chat.path is None:
        if not config.embedded:
            return [], [], notes
        conversations = _limited(chatterbot(chat.exclude, notes), config, notes)
    else:
        conversations = _limited(_from_file(chat.path, config, notes), config, notes)
    if chat.heldout_path is not None:
        heldout = _limited(_from_file(chat.heldout_path, config, notes), config, notes)
        keys = keys_of(split_problems(config)[1], openings(heldout))
        train = [c for c in conversations if not keys.hold(opening(c.messages))]
        notes["dropped_from_train_as_heldout"] = len(conversations) - len(train)
        return train, heldout, notes
    keys = keys_of(split_problems(config)[1])
    heldout = [c for c in conversations if is_held_out(opening(c.messages), config, keys)]
    train = [c for c in conversations if not is_held_out(opening(c.messages), config, keys)]
    return train, heldout, notes


def is_held_out(prompt: str, config: DataConfig, keys: HeldOutKeys) -> bool:
    """By the prompt's hash, or because it is a held-out problem of the reasoning source."""
    return is_heldout(prompt, config.heldout) or keys.hold(prompt)


def chatterbot(exclude: list[str], notes: dict[str, int]) -> list[Conversation]:
    """The English conversations of the chatterbot-corpus package (BSD licence).

    Items that YAML read as numbers, dates or nothing end their conversation; of an odd number of
    turns the last is cut; repeated conversations count once.

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
            texts = []
            for turn in turns:
                if not isinstance(turn, str) or not turn.strip():
                    not_text += 1
                    break
                texts.append(turn.strip())
            texts = texts[: len(texts) // 2 * 2]
            roles = ("user", "assistant")
            messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]
            if messages:
                found.append(Conversation(messages))
    distinct = {prompt_text(c.messages): c for c in found}
    notes |= {"not_text": not_text, "repeated": len(found) - len(distinct)}
    return list(distinct.values())


def _from_file(path: Paths, config: DataConfig, notes: dict[str, int]) -> list[Conversation]:
    records = read_records(path, config.chat.columns)
    conversations, more = usable(records, conversation_from)
    notes |= added(notes, more)
    return conversations


def _limited(
    conversations: list[Conversation], config: DataConfig, notes: dict[str, int]
) -> list[Conversation]:
    """Without conversations that have a longer answer or prompt than the config allows."""
    limits = {"user": config.chat.max_prompt_chars, "assistant": config.chat.max_answer_chars}
    kept = [
        c
        for c in conversations
        if all(
            len(m["content"]) <= limit
            for m in c.messages
            if (limit := limits.get(m["role"])) is not None
        )
    ]
    notes["dropped_as_too_long"] = (
        notes.get("dropped_as_too_long", 0) + len(conversations) - len(kept)
    )
    return kept
