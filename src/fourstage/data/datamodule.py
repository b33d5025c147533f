"""Batches: indexed by step and resumable for training, ready-made for validation.

What a training step reads is a pure function of (seed, step, rank). So a resumed run continues
exactly, and R ranks with B rows each read the rows that one rank with R * B rows would.

Shape legend: B rows, T tokens, N blocks.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict, Unpack

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from fourstage.batch import IGNORE, PairBatch, PromptBatch, TokenBatch, padded
from fourstage.data.records import Conversation, Message, Pair, Problem
from fourstage.data.shards import TokenizedCorpus, Tokens
from fourstage.errors import UserError
from fourstage.tokenizer import Tokenizer

WINDOW = 16  # global batches within which rows are sorted by length

# of a conversation: ids, and their loss mask; of a pair: chosen ids, rejected ids
Row = tuple[list[int], list[int]]
Fitted = tuple[Row | None, bool]  # None if nothing is left of it; whether it was cut


class Steps(TypedDict):
    """The batches that a rank trains on."""

    batch_size: int
    n_batches: int
    seed: int
    rank: NotRequired[int]
    world: NotRequired[int]


@dataclass
class LoaderPair:
    """Batches to train and to validate on, and counts of what was cut or left out."""

    train: StatefulDataLoader
    val: DataLoader | None
    notes: dict[str, int] = field(default_factory=dict)


class StepBatches(IterableDataset):
    """The batches of `n_batches` steps for one rank; each epoch permutes the items afresh.

    With `lengths`, the items of WINDOW global batches are sorted by length and cut into batches,
    which are shuffled: less padding, and still every item once an epoch.
    """

    def __init__(
        self,
        n_items: int,
        batch_size: int,
        n_batches: int,
        seed: int,
        collate: Callable[[list[int]], Any],
        rank: int = 0,
        world: int = 1,
        lengths: Sequence[int] | None = None,
    ):
        assert n_items > 0 and batch_size > 0 and 0 <= rank < world
        self.n_items, self.n_batches, self.seed = n_items, n_batches, seed
        self.collate, self.rank, self.world = collate, rank, world
        self.global_batch = batch_size * world
        self.lengths = None if lengths is None else torch.tensor(lengths)
        self.step = 0
        self.epoch = -1, torch.empty(0)  # the last one, and its order

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Any]:
        while self.step < self.n_batches:
            self.step += 1
            yield self.collate(self.items(self.step - 1))
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def items(self, step: int) -> list[int]:
        """The items that this rank reads in a step."""
        if self.lengths is None:
            rows = self._positions(step * self.global_batch, self.global_batch)
        else:
            rows = self._by_length(self.lengths, step // WINDOW)[step % WINDOW]
        return rows[self.rank :: self.world].tolist()

    def _by_length(self, lengths: Tensor, window: int) -> Tensor:
        """int64 [WINDOW, global batch]: the items of each step of a window."""
        size = WINDOW * self.global_batch
        items = self._positions(window * size, size)
        order = torch.sort(lengths[items], stable=True).indices
        batches = items[order].view(WINDOW, self.global_batch)
        return batches[_permutation(WINDOW, self.seed, "window", window)]

    def _positions(self, start: int, count: int) -> Tensor:
        """int64 [count]: items at positions start, start + 1, ... of all epochs in a row."""
        parts = []
        while count:
            epoch, offset = divmod(start, self.n_items)
            if self.epoch[0] != epoch:
                self.epoch = epoch, _permutation(self.n_items, self.seed, "epoch", epoch)
            parts.append(self.epoch[1][offset : offset + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return torch.cat(parts)


def _permutation(n: int, *key: object) -> Tensor:
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(n, generator=generator)


def pretrain_data(
    corpus: TokenizedCorpus, tokenizer: Tokenizer, *, block_size: int, **steps: Unpack[Steps]
) -> LoaderPair:
    """TokenBatch of [B, block_size], read as they are needed. Validation covers every known
    held-out token once.

    Notes count tokens that are targets, and the characters and UTF-8 bytes that they stand for (an
    unknown character has no bytes). Raises UserError if the train side is shorter than one block.
    """
    notes: dict[str, int] = {}
    for name, side in (("train", corpus.train), ("heldout", corpus.heldout)):
        notes[f"{name}_tokens"] = len(side) - 1
        notes[f"{name}_characters"] = side.characters
        notes[f"{name}_unknown_characters"] = side.unknown
        notes[f"{name}_bytes"] = side.bytes
    n_blocks = notes["train_tokens"] // block_size
    if not n_blocks:
        raise UserError(
            f"data.corpus: {notes['train_tokens']} tokens to train on are less than one block of "
            f"{block_size}: give more text or a smaller block_size"
        )
    notes["dropped_tokens"] = notes["train_tokens"] - n_blocks * block_size

    def collate(items: list[int]) -> TokenBatch:
        return _block_batch(blocks(corpus.train, block_size, items), tokenizer.pad_id)

    train = StepBatches(n_blocks, collate=collate, **steps)
    val = HeldOutBlocks(corpus.heldout, tokenizer, block_size, steps["batch_size"])
    return _loaders(train, val, notes)


class HeldOutBlocks(Dataset):
    """The batches of validation, in order."""

    def __init__(self, tokens: Tokens, tokenizer: Tokenizer, block_size: int, batch_size: int):
        self.tokens, self.tokenizer = tokens, tokenizer
        self.block_size, self.batch_size = block_size, batch_size
        self.n_blocks = max(1, -(-(len(tokens) - 1) // block_size))

    def __len__(self) -> int:
        return -(-self.n_blocks // self.batch_size)

    def __getitem__(self, index: int) -> TokenBatch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows = range(index * self.batch_size, min((index + 1) * self.batch_size, self.n_blocks))
        batch = _block_batch(blocks(self.tokens, self.block_size, rows), self.tokenizer.pad_id)
        if self.tokenizer.unk_id is not None:  # no model can predict an unknown character
            batch.targets[batch.targets == self.tokenizer.unk_id] = IGNORE
        return batch


def blocks(tokens: Tokens, block_size: int, rows: Sequence[int]) -> Tensor:
    """int64 [B, block_size + 1], of rows in a text: neighbours share one token, so that each token
    but the first is a target exactly once; the end of the last block is IGNORE."""
    found_BT = torch.full((len(rows), block_size + 1), IGNORE)
    for i, row in enumerate(rows):
        ids = tokens.read(row * block_size, (row + 1) * block_size + 1)
        found_BT[i, : len(ids)] = torch.from_numpy(ids)
    return found_BT


def _block_batch(rows_BT: Tensor, pad_id: int) -> TokenBatch:
    ids = rows_BT[:, :-1]
    return TokenBatch(ids.masked_fill(ids == IGNORE, pad_id), rows_BT[:, 1:].contiguous())


def sft_data(
    train: Sequence[Conversation],
    heldout: Sequence[Conversation],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    **steps: Unpack[Steps],
) -> LoaderPair:
    """TokenBatch of rows padded to the longest, with loss on the assistant's tokens only. Raises
    UserError if nothing is left to train or validate on."""

    def count(rows: Sequence[Row]) -> dict[str, int]:
        return {
            "answer_tokens": sum(sum(mask) for _, mask in rows),
            "unknown_characters": sum(tokenizer.count_unknown(ids) for ids, _ in rows),
        }

    sides = [
        [fit_conversation(c.messages, tokenizer, max_tokens) for c in side]
        for side in (train, heldout)
    ]
    return _row_loaders("data.chat", sides, count, _masked_batch, tokenizer, max_tokens, steps)


def fit_conversation(messages: Sequence[Message], tokenizer: Tokenizer, max_tokens: int) -> Fitted:
    """A conversation as a row of at most `max_tokens`, and whether it was cut. The oldest exchanges
    go first. None if the last one doesn't fit: truncating changes the question."""
    start = int(messages[0]["role"] == "system")
    for at in range(start, len(messages), 2):
        ids, mask = tokenizer.chat([*messages[:start], *messages[at:]])
        if len(ids) <= max_tokens:
            return (ids, mask), at > start
    return None, True


def conversation_needs(messages: Sequence[Message], tokenizer: Tokenizer) -> int:
    """The least `max_tokens` with which a conversation fits."""
    start = int(messages[0]["role"] == "system")
    return len(tokenizer.chat([*messages[:start], *messages[-2:]])[0])


def _masked_batch(rows: Sequence[Row], pad_id: int) -> TokenBatch:
    """Targets are the next ids where the mask of the next id is 1."""
    targets = [
        [i if has_loss else IGNORE for i, has_loss in zip(ids[1:], mask[1:], strict=True)]
        for ids, mask in rows
    ]
    return TokenBatch(padded([ids[:-1] for ids, _ in rows], pad_id), padded(targets, IGNORE))


def reward_data(
    train: Sequence[Pair],
    heldout: Sequence[Pair],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    **steps: Unpack[Steps],
) -> LoaderPair:
    """PairBatch of [B, T]: prompt, answer and its end token, both answers after the same prompt.
    Raises UserError if nothing is left to train or validate on."""

    def count(rows: Sequence[Row]) -> dict[str, int]:
        return {"unknown_characters": sum(tokenizer.count_unknown(i) for r in rows for i in r)}

    differ = [[p for p in side if not says_the_same(p, tokenizer)] for side in (train, heldout)]
    sides = [[fit_pair(p, tokenizer, max_tokens) for p in side] for side in differ]
    loaders = _row_loaders(
        "data.preference", sides, count, _pair_batch, tokenizer, max_tokens, steps
    )
    loaders.notes["train_same_tokens"] = len(train) - len(differ[0])
    loaders.notes["heldout_same_tokens"] = len(heldout) - len(differ[1])
    return loaders


def says_the_same(pair: Pair, tokenizer: Tokenizer) -> bool:
    """True if a pair's two answers are the same tokens, so that neither can be preferred."""
    return _answer(pair, "chosen", tokenizer) == _answer(pair, "rejected", tokenizer)


def fit_pair(pair: Pair, tokenizer: Tokenizer, max_tokens: int) -> Fitted:
    """Chosen and rejected ids of at most `max_tokens`, and whether the prompt's beginning was cut;
    None if that leaves no room for the prompt."""
    chosen, rejected = (_answer(pair, side, tokenizer) for side in ("chosen", "rejected"))
    prompt = tokenizer.prompt(pair.messages)
    room = max_tokens - max(len(chosen), len(rejected))
    fitted = tokenizer.shorten(prompt, room)
    return fitted and (fitted + chosen, fitted + rejected), len(prompt) > room


def pair_needs(pair: Pair, tokenizer: Tokenizer) -> int:
    """The least `max_tokens` with which a pair fits."""
    answers = (_answer(pair, side, tokenizer) for side in ("chosen", "rejected"))
    return tokenizer.shortest_prompt + max(map(len, answers))


def _answer(pair: Pair, side: str, tokenizer: Tokenizer) -> list[int]:
    """One that was cut off has no end of turn, nor will it have one when ppo scores it."""
    ids = tokenizer.encode(getattr(pair, side))
    return ids if side in pair.unfinished else [*ids, tokenizer.eot_id]


def _pair_batch(rows: Sequence[Row], pad_id: int) -> PairBatch:
    both = [ids for side in zip(*rows, strict=True) for ids in side]  # all chosen, all rejected
    chosen_BT, rejected_BT = padded(both, pad_id).chunk(2)
    chosen_B, rejected_B = torch.tensor([len(ids) for ids in both]).chunk(2)
    return PairBatch(chosen_BT, chosen_B, rejected_BT, rejected_B)


def _row_loaders(
    source: str,
    sides: Sequence[Sequence[Fitted]],
    count: Callable[[Sequence[Row]], dict[str, int]],
    batch_of: Callable[[Sequence[Row], int], Any],
    tokenizer: Tokenizer,
    max_tokens: int,
    steps: Steps,
) -> LoaderPair:
    """Batches of padded rows, of like length each. Notes count what was cut or dropped to fit."""
    notes: dict[str, int] = {}
    kept: list[list[Row]] = []
    for name, fitted in zip(("train", "heldout"), sides, strict=True):
        rows = [row for row, _ in fitted if row is not None]
        if not rows:
            raise UserError(
                f"{source}: no {name} record fits into max_tokens={max_tokens}: raise it or give "
                "shorter records"
            )
        notes[f"{name}_truncated"] = sum(cut for row, cut in fitted if row is not None)
        notes[f"{name}_dropped"] = len(fitted) - len(rows)
        notes[f"{name}_rows"] = len(rows)
        notes |= {f"{name}_{what}": n for what, n in count(rows).items()}
        kept.append(rows)
    train, heldout = kept

    def collate(items: list[int]) -> Any:
        return batch_of([train[i] for i in items], tokenizer.pad_id)

    def length(row: Row) -> int:
        return max(map(len, row))

    lengths = [length(row) for row in train]
    batches = StepBatches(len(train), collate=collate, lengths=lengths, **steps)
    heldout = sorted(heldout, key=length)
    size = steps["batch_size"]
    val = [batch_of(heldout[i : i + size], tokenizer.pad_id) for i in range(0, len(heldout), size)]
    return _loaders(batches, val, notes)


def prompt_data(
    records: Sequence[Problem | Conversation | Pair],
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    **steps: Unpack[Steps],
) -> LoaderPair:
    """PromptBatch of B prompts; longer ones are left out, since truncating changes the question.
    Raises UserError if none fits."""
    encoded = [tokenizer.prompt(record.prompt_messages) for record in records]
    index = [i for i, ids in enumerate(encoded) if len(ids) <= max_prompt_tokens]
    if not index:
        raise UserError(
            f"none of {len(records)} prompts fits into max_prompt_tokens={max_prompt_tokens}: "
            "raise it or give shorter prompts"
        )
    notes = {
        "prompts": len(index),
        "dropped": len(records) - len(index),
        "unknown_characters": sum(tokenizer.count_unknown(encoded[i]) for i in index),
    }

    def collate(items: list[int]) -> PromptBatch:
        at = [index[i] for i in items]
        return PromptBatch([encoded[i] for i in at], [records[i] for i in at], at)

    return _loaders(StepBatches(len(index), collate=collate, **steps), None, notes)


def _loaders(
    train: StepBatches, val: list[Any] | Dataset | None, notes: dict[str, int]
) -> LoaderPair:
    ready_made: dict[str, Any] = {"batch_size": None, "collate_fn": lambda batch: batch}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11
        loader = StatefulDataLoader(train, num_workers=0, **ready_made)
        ready = None if val is None else DataLoader(val, **ready_made)
    return LoaderPair(loader, ready, notes)
