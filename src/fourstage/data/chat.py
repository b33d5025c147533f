"""The chat source: chatterbot-corpus or a user's conversations, and worked problems."""

from __future__ import annotations

from pathlib import Path

from fourstage.data.config import DataConfig, cached
from fourstage.data.files import read_records
from fourstage.data.reasoning import (
    heldout_keys,
    holds_heldout,
    load_reasoning,
    worked_train_problems,
)
from fourstage.data.records import (
    Chats,
    Conversation,
    Message,
    Problem,
    content_digest,
    opening,
    prompt_text,
)
from fourstage.data.schemas import conversation_from, usable
from fourstage.data.split import is_heldout, normalise
from fourstage.errors import UserError


@cached("chat", "reasoning")
def load_chat(config: DataConfig) -> Chats:
    """Conversations for sft; those that open alike stand on the same side.

    Raises:
        UserError: no path under data=files, a bad file, an unknown category to exclude, or a side
            of the split with nothing on it.
    """
    chat = config.chat
    notes: dict[str, int] = {}
    problem_keys = keys = heldout_keys(config)
    if chat.path is None:
        if not config.embedded:
            raise UserError("stages.sft needs data.chat.path=FILE (conversations to learn from)")
        conversations = _limited(chatterbot(chat.exclude, notes), config, notes)
    else:
        conversations = _limited(_from_file(chat.path, notes), config, notes)
    if chat.heldout_path is not None:
        heldout = _limited(_from_file(chat.heldout_path, notes), config, notes)
        keys |= {normalise(opening(c.messages)) for c in heldout}
        train = [c for c in conversations if normalise(opening(c.messages)) not in keys]
        notes["dropped_from_train_as_heldout"] = len(conversations) - len(train)
    else:
        heldout = [c for c in conversations if held_out(opening(c.messages), config, keys)]
        train = [c for c in conversations if not held_out(opening(c.messages), config, keys)]
    clean = [c for c in train if not states_heldout(c.messages, problem_keys)]
    notes["dropped_with_a_heldout_problem"] = len(train) - len(clean)
    train = clean
    for name, side in (("train", train), ("held-out", heldout)):
        if not side:
            raise UserError(
                f"data.chat: no conversation on the {name} side of the split "
                f"({len(conversations)} in all): give more, or another data.heldout"
            )

    problems = worked_train_problems(config, chat.demonstrations)
    train = [*train, *demonstrations(problems, chat.terse)]
    if problems:
        share = config.heldout / (1 - config.heldout)
        held = [p for p in load_reasoning(config).heldout if p.worked]
        heldout = [*heldout, *demonstrations(held[: round(len(problems) * share)], chat.terse)]
    notes |= {"train": len(train), "heldout": len(heldout), "demonstrations": len(problems)}
    texts = (prompt_text(c.messages) for side in (train, [], heldout) for c in side)
    return Chats(train, heldout, content_digest(str(len(train)), *texts), notes)


def demonstrations(problems: list[Problem], terse: dict[str, float]) -> list[Conversation]:
    """Solved problems as conversations; a share of a task's, by hash, only gives the answer."""
    return [
        p.conversation(terse=is_heldout(f"terse {p.question}", terse.get(p.task, 0.0)))
        for p in problems
    ]


def held_out(prompt: str, config: DataConfig, keys: frozenset[str]) -> bool:
    """By the prompt's hash, or because it is a held-out problem of the reasoning source."""
    return is_heldout(prompt, config.heldout) or normalise(prompt) in keys


def states_heldout(messages: list[Message], keys: frozenset[str]) -> bool:
    """True if any of the messages states a held-out problem or its expression."""
    return any(holds_heldout(m["content"], keys) for m in messages)


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


def _from_file(path: str, notes: dict[str, int]) -> list[Conversation]:
    conversations, unusable = usable(read_records(path), conversation_from)
    notes["unusable_records"] = notes.get("unusable_records", 0) + unusable
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
