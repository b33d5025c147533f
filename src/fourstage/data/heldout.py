"""Which conversations and pairs are held out, and what no stage may train on.

Held-out prompts of every source together make one set of keys, by which all sources are cleaned.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from fourstage.data.config import ChatConfig, DataConfig, cached
from fourstage.data.files import Row
from fourstage.data.keys import HeldOutKeys, keys_of, openings
from fourstage.data.knowledge import split_questions
from fourstage.data.problems import split_problems
from fourstage.data.records import Chats, Conversation, Pair, Pairs, Split
from fourstage.data.schemas import Unusable, conversation_from, pair_from
from fourstage.data.userfiles import split_file
from fourstage.errors import UserError

T = TypeVar("T")


@cached("chat", "reasoning", "knowledge")
def split_chats(config: DataConfig) -> Chats:
    """Conversations, split by how they open; none where the config names none.

    Raises:
        UserError: a bad file, or more facts than there are.
    """
    chat = config.chat
    if chat.path is not None:

        def build(row: Row) -> Conversation:
            conversation = conversation_from(row)
            if _is_too_long(conversation, chat):
                limits = "data.chat.max_prompt_chars or max_answer_chars"
                raise Unusable(row, "too_long", f"longer than {limits} allows")
            return conversation

        return split_file(config, "chat", build, split_problems(config).heldout)
    return split_questions(config) if config.embedded else Split([], [])


def _is_too_long(conversation: Conversation, chat: ChatConfig) -> bool:
    most = {"user": chat.max_prompt_chars, "assistant": chat.max_answer_chars}
    limits = ((m["content"], most.get(m["role"])) for m in conversation.messages)
    return any(limit is not None and len(text) > limit for text, limit in limits)


@cached("preference", "reasoning")
def split_pairs(config: DataConfig) -> Pairs:
    """A user's pairs, split by how their prompts open; none without a path.

    Raises:
        UserError: a bad file.
    """
    if config.preference.path is None:
        return Split([], [])
    return split_file(config, "preference", pair_from, split_problems(config).heldout)


@cached("chat", "preference", "reasoning", "knowledge")
def heldout_keys(config: DataConfig) -> HeldOutKeys:
    """The keys of the held-out problems, chat prompts and prompts of pairs that the config names.
    Votes are no part of them: else a handful would retrain what gave the answers, as most are on
    questions that sft has learned.

    Raises:
        UserError: a bad file of any of these sources.
    """
    return _keys(config, [pair for pair in split_pairs(config).heldout if not pair.is_vote])


@cached("chat", "preference", "reasoning", "knowledge")
def heldout_keys_of_pairs(config: DataConfig) -> HeldOutKeys:
    """The same with those of held-out votes, which reward and ppo don't train on.

    Raises:
        UserError: as heldout_keys.
    """
    return _keys(config, split_pairs(config).heldout)


def _keys(config: DataConfig, pairs: list[Pair]) -> HeldOutKeys:
    prompts = [*openings(split_chats(config).heldout), *openings(pairs)]
    return keys_of(split_problems(config).heldout, prompts)


def cleaned(
    config: DataConfig,
    where: str,
    split: Split[T],
    gives_away: Callable[[T, HeldOutKeys], bool],
    keys: HeldOutKeys | None = None,
) -> Split[T]:
    """The split without train items that give away a held-out prompt of any source, or of `keys`.

    Raises:
        UserError: a side has nothing on it.
    """
    keys = keys or heldout_keys(config)
    train = [item for item in split.train if not gives_away(item, keys)]
    notes = {**split.notes, "dropped_with_a_heldout_prompt": len(split.train) - len(train)}
    check_sides(where, train, split.heldout, notes)
    return Split(train, split.heldout, notes=notes)


def check_sides(
    where: str, train: Sequence[object], heldout: Sequence[object], notes: Mapping[str, int]
) -> None:
    """Raise UserError if a side of the split has nothing on it."""
    for name, side in (("train", train), ("held-out", heldout)):
        if not side:
            lost = ", ".join(f"{n:,} {why.replace('_', ' ')}" for why, n in notes.items() if n)
            key = "data.heldout"
            if where == "data.corpus":
                key = "data.corpus.heldout or, without a path, data.corpus.reference"
            raise UserError(
                f"{where}: nothing on the {name} side of the split, {len(train) + len(heldout):,} "
                f"on the other{f' ({lost})' if lost else ''}: give more, or another {key}"
            )
