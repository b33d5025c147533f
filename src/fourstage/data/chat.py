"""The chat source: conversations without any held-out prompt, and worked problems."""

from __future__ import annotations

from fourstage.data.config import DataConfig, cached
from fourstage.data.conversations import split_chats
from fourstage.data.heldout import heldout_keys
from fourstage.data.reasoning import load_reasoning, worked_train_problems
from fourstage.data.records import Chats, Conversation, Problem, content_digest, prompt_text
from fourstage.data.split import is_heldout
from fourstage.errors import UserError


@cached("chat", "preference", "reasoning")
def load_chat(config: DataConfig) -> Chats:
    """Conversations for sft.

    Raises:
        UserError: no path under data=files, a bad file, an unknown category to exclude, or a side
            of the split with nothing on it.
    """
    chat = config.chat
    if chat.path is None and not config.embedded:
        raise UserError("stages.sft needs data.chat.path=FILE (conversations to learn from)")
    train, heldout, notes = split_chats(config)
    keys = heldout_keys(config)
    clean = [c for c in train if not keys.in_messages(c.messages)]
    notes = notes | {"dropped_with_a_heldout_prompt": len(train) - len(clean)}
    for name, side in (("train", clean), ("held-out", heldout)):
        if not side:
            raise UserError(
                f"data.chat: no conversation on the {name} side of the split "
                f"({len(train) + len(heldout)} in all): give more, or another data.heldout"
            )

    problems = worked_train_problems(config, chat.demonstrations)
    train = [*clean, *demonstrations(problems, chat.terse)]
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
