"""Reads a user's preference pairs and splits them in two."""

from __future__ import annotations

from fourstage.data.config import DataConfig, cached
from fourstage.data.conversations import is_held_out
from fourstage.data.files import read_records
from fourstage.data.keys import keys_of, openings
from fourstage.data.problems import split_problems
from fourstage.data.records import Pair, opening
from fourstage.data.schemas import added, pair_from, usable


@cached("preference", "reasoning")
def split_pairs(config: DataConfig) -> tuple[list[Pair], list[Pair], dict[str, int]]:
    """Pairs to train on, held-out ones, and notes, split by the hash of the prompt's opening;
    nothing without a path.

    Raises:
        UserError: a bad file.
    """
    preference = config.preference
    if preference.path is None:
        return [], [], {}
    pairs, notes = usable(read_records(preference.path, preference.columns), pair_from)
    if preference.heldout_path is None:
        keys = keys_of(split_problems(config)[1])
        heldout = [p for p in pairs if is_held_out(opening(p.messages), config, keys)]
        train = [p for p in pairs if not is_held_out(opening(p.messages), config, keys)]
    else:
        records = read_records(preference.heldout_path, preference.columns)
        heldout, more = usable(records, pair_from)
        notes = added(notes, more)
        keys = keys_of(split_problems(config)[1], openings(heldout))
        train = [p for p in pairs if not keys.hold(opening(p.messages))]
        notes["dropped_from_train_as_heldout"] = len(pairs) - len(train)
    return train, heldout, notes
