"""What no stage may train on: the held-out prompts of every source, as one set of keys for all."""

from __future__ import annotations

from fourstage.data.config import DataConfig, cached
from fourstage.data.conversations import split_chats
from fourstage.data.keys import HeldOutKeys, keys_of, openings
from fourstage.data.pairs import split_pairs
from fourstage.data.problems import split_problems


@cached("chat", "preference", "reasoning")
def heldout_keys(config: DataConfig) -> HeldOutKeys:
    """The keys of the held-out problems, chat prompts and prompts of pairs that the config names.

    Raises:
        UserError: a bad file of any of these sources.
    """
    prompts = [*openings(split_chats(config)[1]), *openings(split_pairs(config)[1])]
    return keys_of(split_problems(config)[1], prompts)
