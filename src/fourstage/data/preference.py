"""The preference source: a user's pairs. With data=embedded the reward stage samples them."""

from dataclasses import replace

from fourstage.data.chat import load_chat
from fourstage.data.config import DataConfig, cached
from fourstage.data.heldout import cleaned, heldout_keys_of_pairs, split_pairs
from fourstage.data.keys import HeldOutKeys
from fourstage.data.records import (
    Chats,
    Conversation,
    Pair,
    Pairs,
    Split,
    content_digest,
    prompt_text,
    prompts_only,
)


@cached("chat", "preference", "reasoning", "knowledge")
def load_preference(config: DataConfig) -> Pairs | None:
    """The pairs of a file without any held-out prompt; None without a path under data=embedded,
    where the reward stage samples its pairs.

    Raises:
        UserError: no path under data=files, a bad file, or a side of the split with nothing on it.
    """
    config.check_given("preference")
    if config.has_hidden_rule:
        return None
    split = split_pairs(config)
    train, heldout = (
        [p for p in side if p.chosen != p.rejected] for side in (split.train, split.heldout)
    )
    equal = len(split.train) + len(split.heldout) - len(train) - len(heldout)
    notes = {**split.notes, "equal_answers_dropped": equal}
    split = Split(train, heldout, notes=notes)
    keys = heldout_keys_of_pairs(config)
    pairs = cleaned(config, "data.preference", split, _gives_away, keys)
    contents = (*map(_content, pairs.train), "", *map(_content, pairs.heldout))
    return replace(pairs, digest=content_digest(*contents))


def load_prompts(config: DataConfig) -> Chats:
    """What the policies of the preference stages answer, one conversation a prompt: the prompts of
    the pairs (the chosen answer is the conversation's), or of the chats where pairs are sampled.

    Raises:
        UserError: as load_preference and load_chat.
    """
    pairs = load_preference(config)
    if pairs is None:
        return prompts_only(load_chat(config))
    train, heldout = ([_conversation(p) for p in side] for side in (pairs.train, pairs.heldout))
    return prompts_only(Split(train, heldout))


def _gives_away(pair: Pair, keys: HeldOutKeys) -> bool:
    return keys.in_messages(pair.messages) or any(map(keys.in_text, (pair.chosen, pair.rejected)))


def _conversation(pair: Pair) -> Conversation:
    return Conversation([*pair.messages, {"role": "assistant", "content": pair.chosen}])


def _content(pair: Pair) -> str:
    found = f"{prompt_text(pair.messages)}\x1f{pair.chosen}\x1f{pair.rejected}"
    return "\x1f".join([found, *pair.unfinished])
