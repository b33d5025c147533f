"""The preference source: a user's pairs. With data=embedded the reward stage samples them."""

from __future__ import annotations

from fourstage.data.chat import load_chat
from fourstage.data.config import DataConfig, cached
from fourstage.data.heldout import heldout_keys
from fourstage.data.pairs import split_pairs
from fourstage.data.records import (
    Chats,
    Conversation,
    Message,
    Pair,
    Pairs,
    content_digest,
    prompt_text,
)
from fourstage.errors import UserError


@cached("chat", "preference", "reasoning")
def load_preference(config: DataConfig) -> Pairs | None:
    """The pairs of a file without any held-out prompt; None without a path under data=embedded,
    where the reward stage samples its pairs.

    Raises:
        UserError: no path under data=files, a bad file, or a side of the split with nothing on it.
    """
    if config.preference.path is None:
        if config.embedded:
            return None
        raise UserError(
            "stages.reward and stages.ppo need data.preference.path=FILE "
            "(prompts with a chosen and a rejected answer)"
        )
    train, heldout, notes = split_pairs(config)
    n_pairs, keys = len(train) + len(heldout), heldout_keys(config)
    clean = [p for p in train if not keys.in_messages(_all_messages(p))]
    notes = notes | {"dropped_with_a_heldout_prompt": len(train) - len(clean)}
    same = sum(p.chosen == p.rejected for p in (*clean, *heldout))
    train, heldout = ([p for p in s if p.chosen != p.rejected] for s in (clean, heldout))
    for name, side in (("train", train), ("held-out", heldout)):
        if not side:
            equal = f", {same} left out as their answers are equal" if same else ""
            raise UserError(
                f"data.preference: no pair on the {name} side of the split ({n_pairs} in all"
                f"{equal}): give more, or another data.heldout"
            )
    notes |= {"equal_answers_dropped": same, "train": len(train), "heldout": len(heldout)}
    return Pairs(
        train, heldout, content_digest(*map(_content, train), "", *map(_content, heldout)), notes
    )


def load_prompts(config: DataConfig) -> Chats:
    """What the policies of the preference stages answer, one conversation a prompt: the prompts of
    the pairs (the chosen answer is the conversation's), or of the chats where pairs are sampled.

    Raises:
        UserError: as load_preference and load_chat.
    """
    pairs = load_preference(config)
    if pairs is None:
        return load_chat(config).prompts_only()
    train, heldout = ([_conversation(p) for p in side] for side in (pairs.train, pairs.heldout))
    return Chats(train, heldout, pairs.digest, {}).prompts_only()


def _all_messages(pair: Pair) -> list[Message]:
    answers = [{"role": "assistant", "content": text} for text in (pair.chosen, pair.rejected)]
    return [*pair.messages, *answers]


def _conversation(pair: Pair) -> Conversation:
    return Conversation([*pair.messages, {"role": "assistant", "content": pair.chosen}])


def _content(pair: Pair) -> str:
    return f"{prompt_text(pair.messages)}\x1f{pair.chosen}\x1f{pair.rejected}"
