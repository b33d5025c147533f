"""What a stage's settings and the tokenizer leave of its data, checked before anything trains.

A stage without data is refused. If more than LOUD of the data would be lost, a warning says how
much, by which setting, and what another value would keep.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from fourstage.data.chat import load_chat
from fourstage.data.config import DataConfig
from fourstage.data.corpus import Corpus, load_corpus
from fourstage.data.datamodule import conversation_needs, pair_needs, says_the_same
from fourstage.data.preference import load_preference
from fourstage.data.problems import split_problems
from fourstage.data.records import Message
from fourstage.data.sources import kept, left_out
from fourstage.data.userfiles import NOT_READ
from fourstage.errors import UserError
from fourstage.ladder import LADDER
from fourstage.tokenizer import Tokenizer

LEAST_PROMPT = 8  # tokens that sampled pairs leave for a prompt
LOUD = 0.1  # share of the data whose loss is worth a warning
ENOUGH = 0.99  # share of the data that a better setting keeps
LOUD_UNKNOWN = 0.01  # share of characters that the tokenizer doesn't know
MOST_UNKNOWN = 0.2
ENOUGH_TEXT = 10**7  # characters that show which ones the tokenizer doesn't know


def check_corpus(
    config: DataConfig, tokenizer: Tokenizer, block_size: int, stage: str = "pretrain"
) -> list[str]:
    corpus = load_corpus(config)
    # a token has a byte at least, and each document one that begins it
    most = corpus.train.bytes + len(corpus.train)
    if most < block_size:
        raise UserError(
            f"data.corpus: at most {most} tokens to train on are less than one block of "
            f"{block_size}: give more text or a smaller stages.{stage}.block_size"
        )
    return [
        *check_unknown("data.corpus", _beginning(corpus), tokenizer),
        *without_steps(config, "data.corpus.problems", config.corpus.problems),
    ]


def _beginning(corpus: Corpus) -> Iterator[str]:
    """The first texts, at least ENOUGH_TEXT characters if there are so many."""
    left = ENOUGH_TEXT
    for _, text in chain(corpus.train.texts(), corpus.heldout.texts()):
        yield text
        left -= len(text)
        if left <= 0:
            return


def check_chats(
    config: DataConfig, tokenizer: Tokenizer, max_tokens: int, max_seq_len: int, stage: str = "sft"
) -> list[str]:
    chats = load_chat(config)
    texts = [text for c in chats.train for text in contents(c.messages)]
    train, heldout = (
        [conversation_needs(c.messages, tokenizer) for c in side]
        for side in (chats.train, chats.heldout)
    )
    limit = f"stages.{stage}.max_tokens", max_tokens, max_seq_len
    lost = some_fit("data.chat: no train record", train, *limit)
    some_fit("data.chat: no heldout record", heldout, *limit)
    return [
        *check_unknown("data.chat", texts, tokenizer),
        *lost,
        *without_steps(config, "data.chat.demonstrations", config.chat.demonstrations),
    ]


def check_preferences(
    config: DataConfig,
    tokenizer: Tokenizer,
    max_tokens: int,
    max_new_tokens: int,
    max_seq_len: int,
    stage: str = "reward",
) -> list[str]:
    pairs = load_preference(config)
    where = f"stages.{stage}"
    if pairs is None:
        if max_tokens - max_new_tokens < max(LEAST_PROMPT, tokenizer.shortest_prompt):
            raise UserError(
                f"{where}.max_new_tokens: {max_new_tokens} tokens leave no room for a prompt in "
                f"{where}.max_tokens={max_tokens}: lower it"
            )
        return []
    texts = [text for p in pairs.train for text in (*contents(p.messages), p.chosen)]
    warnings = check_unknown("data.preference", texts, tokenizer)
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
        what = f"data.preference: no {name} record"
        needs = [pair_needs(pair, tokenizer) for pair in differ]
        lost = some_fit(what, needs, f"{where}.max_tokens", max_tokens, max_seq_len)
        warnings += lost if name == "train" else []
    return warnings


def check_questions(
    stage: str, records: Sequence[Any], settings: Any, tokenizer: Tokenizer, max_seq_len: int
) -> list[str]:
    """For a stage that answers prompts: UserError if none fits, or none of a task."""
    where, limit = f"stages.{stage}.max_prompt_tokens", settings.max_prompt_tokens
    texts = [text for r in records for text in contents(r.prompt_messages)]
    warnings = check_unknown(f"data.{LADDER[stage].source}", texts, tokenizer)
    needs: dict[str, list[int]] = {}  # task -> the tokens of its prompts
    for record in records:
        length = len(tokenizer.prompt(record.prompt_messages))
        needs.setdefault(getattr(record, "task", "prompts"), []).append(length)
    every = sorted(length for lengths in needs.values() for length in lengths)
    gone = [task for task, lengths in needs.items() if min(lengths) > limit]
    if len(gone) == len(needs):
        raise UserError(
            f"{where}: none of {len(every)} prompts fits into {limit} tokens: raise it "
            f"({every[int(ENOUGH * (len(every) - 1))]} keeps nearly all) or give shorter prompts"
        )
    if gone:
        raise UserError(
            f"{where}={limit}: no problem of {', '.join(gone)} fits: raise it (to "
            f"{max(min(needs[task]) for task in gone)} or more) or leave "
            f"{'it' if len(gone) == 1 else 'them'} out"
        )
    lost = some_fit("no prompt", every, where, limit, max_seq_len - settings.max_new_tokens)
    if lost and len(needs) > 1:
        counts = (f"{t} {sum(n <= limit for n in ns):,} of {len(ns):,}" for t, ns in needs.items())
        lost[0] += f" (kept: {', '.join(counts)})"
    return warnings + lost


def contents(messages: Iterable[Message]) -> list[str]:
    return [message["content"] for message in messages]


def lost_on_reading(config: DataConfig, stage: str) -> list[str]:
    """What was left out of a user's file when it was read, if that is much."""
    source = LADDER[stage].source
    if getattr(config, source).path is None:
        return []
    rest, lines, unread = kept(config, stage), [], []
    for name, count in left_out(config, stage).items():
        if name.startswith(NOT_READ):
            unread.append(f"{name.removeprefix(NOT_READ)} ({count:,})")
        elif count > LOUD * (count + rest) and "paragraphs" not in name:
            why = name.replace("_", " ")
            lines.append(f"data.{source}: {why}: {count:,} of {count + rest:,} records")
    if unread:
        lines.append(f"data.{source}: fields that are not read: {', '.join(unread)}")
    return lines


def check_unknown(where: str, texts: Iterable[str], tokenizer: Tokenizer) -> list[str]:
    """A warning if many characters are all the same <unk> to the model; UserError if most are."""
    if tokenizer.unk_id is None:
        return []
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
        raise UserError(f"{line}: take tokenizer=bpe, transliterate the text, or choose other data")
    return [line]


def without_steps(config: DataConfig, where: str, wanted: int) -> list[str]:
    """The tasks without worked solutions, if the stage is to learn from some."""
    if not wanted:
        return []
    train = split_problems(config).train
    mute = {p.task for p in train} - {p.task for p in train if p.worked}
    what = f"{where}: {', '.join(sorted(mute))} has no worked solutions to learn from"
    return [what] if mute else []


def some_fit(what: str, needs: Sequence[int], where: str, limit: int, most: int) -> list[str]:
    """A warning if a limit loses much, with the first of its doublings that keeps ENOUGH.

    what: "no ... record", for the UserError if nothing fits. needs: the tokens that each record
    takes at least. where: the limit's key. most: the tokens that the model allows.
    """

    def fitting(tokens: int) -> int:
        return sum(n <= tokens for n in needs)

    fit = better = fitting(limit)
    if len(needs) - fit <= LOUD * len(needs):
        return []
    other = max(1, limit)
    while other < most and better < ENOUGH * len(needs):
        other = min(2 * other, most)
        better = fitting(other)
    advice = "they are too long for model.max_seq_len as well"
    if better > fit:
        advice = f"{other} would keep {better:,}"
    if fit == 0:
        raise UserError(f"{what} fits into {where}={limit}: {advice} of {len(needs):,}")
    return [f"{where}={limit} leaves out {len(needs) - fit:,} of {len(needs):,} records: {advice}"]
