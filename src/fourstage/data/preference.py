"""The preference source: a user's pairs. With data=embedded the reward stage samples them."""

from __future__ import annotations

from fourstage.data.chat import held_out, load_chat, states_heldout
from fourstage.data.config import DataConfig, cached
from fourstage.data.files import read_records
from fourstage.data.reasoning import heldout_keys
from fourstage.data.records import (
    Chats,
    Conversation,
    Message,
    Pair,
    Pairs,
    content_digest,
    opening,
    prompt_text,
)
from fourstage.data.schemas import pair_from, usable
from fourstage.data.split import normalise
from fourstage.errors import UserError


@cached("preference", "reasoning")
def load_preference(config: DataConfig) -> Pairs | None:
    """The pairs of a file, split by the hash of the prompt's opening; None without a path under
    data=embedded, where the reward stage samples its pairs.

    Raises:
        UserError: no path under data=files, a bad file, or a side of the split with nothing on it.
    """
    preference = config.preference
    if preference.path is None:
        if config.embedded:
            return None
        raise UserError(
            "stages.reward and stages.ppo need data.preference.path=FILE "
            "(prompts with a chosen and a rejected answer)"
        )
    problem_keys = keys = heldout_keys(config)
    pairs, unusable = usable(read_records(preference.path), pair_from)
    notes = {"unusable_records": unusable}
    if preference.heldout_path is None:
        heldout = [p for p in pairs if held_out(opening(p.messages), config, keys)]
        train = [p for p in pairs if not held_out(opening(p.messages), config, keys)]
    else:
        heldout, unusable = usable(read_records(preference.heldout_path), pair_from)
        keys |= {normalise(opening(p.messages)) for p in heldout}
        train = [p for p in pairs if normalise(opening(p.messages)) not in keys]
        notes["unusable_records"] += unusable
        notes["dropped_from_train_as_heldout"] = len(pairs) - len(train)
    clean = [p for p in train if not states_heldout(_all_messages(p), problem_keys)]
    notes["dropped_with_a_heldout_problem"] = len(train) - len(clean)
    train = clean
    same = sum(p.chosen == p.rejected for p in (*train, *heldout))
    train, heldout = ([p for p in s if p.chosen != p.rejected] for s in (train, heldout))
    for name, side in (("train", train), ("held-out", heldout)):
        if not side:
            equal = f", {same} left out as their answers are equal" if same else ""
            raise UserError(
                f"data.preference: no pair on the {name} side of the split ({len(pairs)} in all"
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
