"""What of a stage's data its settings and the tokenizer leave: asked before anything trains.

A stage that would be left without data is refused. Where more than LOUD of it would be lost, a
warning says how much, by which setting, and what another value would keep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fourstage.data.chat import load_chat
from fourstage.data.config import DataConfig
from fourstage.data.corpus import load_corpus
from fourstage.data.datamodule import fit_conversation, fit_pair, says_the_same
from fourstage.data.preference import load_preference
from fourstage.data.problems import split_problems
from fourstage.data.records import Chats, Conversation, Message, Pairs, Problem
from fourstage.data.schemas import NOT_READ
from fourstage.data.sources import kept, left_out
from fourstage.errors import UserError
from fourstage.ladder import LADDER
from fourstage.tokenizer import Tokenizer

LEAST_PROMPT = 8  # tokens of a prompt whose beginning is cut
LOUD = 0.1  # share of records whose loss is said loudly
ENOUGH = 0.99  # share of records that a better setting keeps
LOUD_UNKNOWN = 0.01  # share of characters that the tokenizer doesn't know
MOST_UNKNOWN = 0.2


def check_corpus(config: DataConfig, tokenizer: Tokenizer, block_size: int) -> list[str]:
    corpus = load_corpus(config)
    least = sum(map(len, corpus.train)) + len(corpus.train)
    if least < block_size:  # a token has a character at least
        raise UserError(
            f"data.corpus: at most {least} tokens to train on are less than one block of "
            f"{block_size}: give more text or a smaller stages.pretrain.block_size"
        )
    return [
        *check_unknown("data.corpus", [*corpus.train, *corpus.heldout], tokenizer),
        *without_steps(config, "data.corpus.problems", config.corpus.problems),
    ]


def check_chats(
    config: DataConfig, tokenizer: Tokenizer, max_tokens: int, max_seq_len: int
) -> list[str]:
    chats = load_chat(config)
    texts = (text for c in chats.train for text in contents(c.messages))
    return [
        *check_unknown("data.chat", texts, tokenizer),
        *check_conversations(chats, tokenizer, max_tokens, max_seq_len),
        *without_steps(config, "data.chat.demonstrations", config.chat.demonstrations),
    ]


def check_preferences(
    config: DataConfig,
    tokenizer: Tokenizer,
    max_tokens: int,
    max_new_tokens: int,
    max_seq_len: int,
) -> list[str]:
    pairs = load_preference(config)
    if pairs is not None:
        texts = (text for p in pairs.train for text in (*contents(p.messages), p.chosen))
        return [
            *check_unknown("data.preference", texts, tokenizer),
            *check_pairs(pairs, tokenizer, max_tokens, max_seq_len),
        ]
    if max_tokens - max_new_tokens < LEAST_PROMPT:
        raise UserError(
            f"stages.reward.max_new_tokens: {max_new_tokens} tokens leave no room "
            f"for a prompt in stages.reward.max_tokens={max_tokens}: lower it"
        )
    return []


def check_questions(
    stage: str, records: Sequence[Any], settings: Any, tokenizer: Tokenizer, max_seq_len: int
) -> list[str]:
    """Of a stage that answers prompts."""
    room = max_seq_len - settings.max_new_tokens
    texts = (text for r in records for text in contents(r.prompt_messages))
    return [
        *check_unknown(f"data.{LADDER[stage].source}", texts, tokenizer),
        *check_prompts(records, tokenizer, f"stages.{stage}", settings.max_prompt_tokens, room),
    ]


def contents(messages: Iterable[Message]) -> list[str]:
    return [message["content"] for message in messages]


def lost_on_reading(config: DataConfig, stage: str) -> list[str]:
    """What was left out of a user's file when it was read, where that is much."""
    source = LADDER[stage].source
    if getattr(config, source).path is None:
        return []
    rest, counts = kept(config, stage), left_out(config, stage)
    unread = {name: counts.pop(name) for name in list(counts) if name.startswith(NOT_READ)}
    lines = [
        f"data.{source}: {name.replace('_', ' ')}: {count:,} of {count + rest:,} records"
        for name, count in counts.items()
        if count > LOUD * (count + rest) and "paragraphs" not in name
    ]
    if unread:
        names = (f"{name.removeprefix(NOT_READ)} ({n:,})" for name, n in unread.items())
        lines.append(f"data.{source}: fields that are not read: {', '.join(names)}")
    return lines


def check_unknown(where: str, texts: Iterable[str], tokenizer: Tokenizer) -> list[str]:
    """A warning, or UserError, where many characters are all the same <unk> to the model."""
    total, unknown = 0, Counter[str]()
    for text in texts:
        total += len(text)
        unknown += tokenizer.unknown_characters(text)
    share = unknown.total() / max(1, total)
    if share <= LOUD_UNKNOWN:
        return []
    commonest = " ".join(character for character, _ in unknown.most_common(8))
    line = (
        f"{where}: the tokenizer doesn't know {100 * share:.1f} % of the characters "
        f"(most often {commonest}): the model sees them all as one <unk>"
    )
    if share > MOST_UNKNOWN:
        raise UserError(f"{line}: transliterate the text, or choose other data")
    return [line]


def without_steps(config: DataConfig, where: str, wanted: int) -> list[str]:
    """The tasks of which no worked solution is known, where the stage is to learn from some."""
    if not wanted:
        return []
    train = split_problems(config)[0]
    mute = sorted({p.task for p in train} - {p.task for p in train if p.worked})
    names = ", ".join(mute)
    return [f"{where}: {names} has no worked solutions to learn from"] if mute else []


def check_conversations(
    chats: Chats, tokenizer: Tokenizer, limit: int, max_seq_len: int
) -> list[str]:
    """Raise UserError where sft_data would have no row to train or to validate on."""

    def keeps(records: Sequence[Conversation], limit: int) -> int:
        return sum(fit_conversation(c.messages, tokenizer, limit)[0] is not None for c in records)

    for name, side in (("train", chats.train), ("heldout", chats.heldout)):
        some_kept(f"data.chat: no {name}", "stages.sft.max_tokens", side, keeps, limit, max_seq_len)
    return loss("stages.sft.max_tokens", chats.train, keeps, limit, max_seq_len)


def check_pairs(pairs: Pairs, tokenizer: Tokenizer, limit: int, max_seq_len: int) -> list[str]:
    """Raise UserError where reward_data would have no row to train or to validate on."""

    def keeps(records: Sequence[Any], limit: int) -> int:
        return sum(fit_pair(pair, tokenizer, limit)[0] is not None for pair in records)

    warnings = []
    for name, side in (("train", pairs.train), ("heldout", pairs.heldout)):
        differ = [pair for pair in side if not says_the_same(pair, tokenizer)]
        if not differ:
            raise UserError(
                f"data.preference: the two answers of each {name} pair are the same to the "
                "tokenizer: give pairs whose answers differ in characters that it knows"
            )
        if (same := len(side) - len(differ)) > LOUD * len(side):
            warnings.append(
                f"data.preference: {same:,} of {len(side):,} {name} pairs are left out: their two "
                "answers are the same to the tokenizer"
            )
        where = "stages.reward.max_tokens"
        some_kept(f"data.preference: no {name}", where, differ, keeps, limit, max_seq_len)
        if name == "train":
            warnings += loss(where, differ, keeps, limit, max_seq_len)
    return warnings


def check_prompts(
    records: Sequence[Problem | Conversation],
    tokenizer: Tokenizer,
    where: str,
    limit: int,
    room: int,
) -> list[str]:
    """Raise UserError where prompt_data would leave out every prompt, or all those of a task."""
    where = f"{where}.max_prompt_tokens"
    lengths = [len(tokenizer.prompt(record.prompt_messages)) for record in records]
    tasks = [getattr(record, "task", None) for record in records]
    every = Counter(tasks)
    fit = Counter(t for t, length in zip(tasks, lengths, strict=True) if length <= limit)
    gone = [str(task) for task in every if not fit[task]]
    if len(gone) == len(every):
        raise UserError(
            f"{where}: none of {len(records)} prompts fits into {limit} tokens: raise it "
            f"({sorted(lengths)[int(ENOUGH * (len(lengths) - 1))]} keeps nearly all) or give "
            "shorter prompts"
        )
    if gone:
        needed = max(
            min(n for t, n in zip(tasks, lengths, strict=True) if str(t) == task) for task in gone
        )
        raise UserError(
            f"{where}={limit}: no problem of {', '.join(gone)} fits: raise it (to {needed} or "
            f"more) or leave {'it' if len(gone) == 1 else 'them'} out"
        )

    def keeps(lengths: Sequence[int], limit: int) -> int:
        return sum(length <= limit for length in lengths)

    warnings = loss(where, lengths, keeps, limit, room)
    if warnings and len(every) > 1:
        counts = (f"{task} {fit[task]:,} of {n:,}" for task, n in every.items())
        warnings[0] += f" (kept: {', '.join(counts)})"
    return warnings


def some_kept(
    what: str,
    where: str,
    records: Sequence[Any],
    keeps: Callable[[Sequence[Any], int], int],
    limit: int,
    most: int,
) -> None:
    """Raise UserError where a limit keeps nothing, with the least of its doublings that does."""
    if keeps(records, limit):
        return
    other = limit
    while other < most and not keeps(records, other):
        other = min(2 * other, most)
    if kept := keeps(records, other):
        advice = f"raise it: {other} would keep {kept:,} of {len(records):,}"
    else:
        advice = "they are too long for model.max_seq_len as well: give shorter records"
    raise UserError(f"{what} record fits into {where}={limit}: {advice}")


def loss(
    where: str,
    records: Sequence[Any],
    keeps: Callable[[Sequence[Any], int], int],
    limit: int,
    most: int,
) -> list[str]:
    """A warning where a limit loses much, with the least of its doublings that keeps ENOUGH."""
    lost = len(records) - keeps(records, limit)
    if lost <= LOUD * len(records):
        return []
    line = f"{where}={limit} leaves out {lost:,} of {len(records):,} records"
    other, fit = limit, len(records) - lost
    while other < most and fit < ENOUGH * len(records):
        other = min(2 * other, most)
        fit = keeps(records, other)
    if fit > len(records) - lost:
        return [f"{line}: {other} would keep {fit:,}"]
    return [f"{line}: they are too long for model.max_seq_len as well"]
