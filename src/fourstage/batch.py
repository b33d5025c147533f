"""Batches of the data and rollouts of the policy.

Shape legend: B rows, T tokens, P prompt tokens, A answer tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORE = -100  # a target without loss


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device, without waiting for a GPU's pending work."""
    to_gpu = x.device.type == "cpu" and torch.device(device).type not in ("cpu", "mps")
    return x.to(device, non_blocking=to_gpu)


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """int64 [B, T]: the rows, right-padded to the longest."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value)


class _Movable:
    """A dataclass of tensors that Lightning can move to a device."""

    def to(self, device: torch.device | str, **kwargs: Any):
        there = {f.name: moved(getattr(self, f.name), device) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **there)  # type: ignore[type-var]


@dataclass
class TokenBatch(_Movable):
    """Next-token prediction: targets[b, t] is the token after ids[b, t], or IGNORE."""

    ids: Tensor  # int64 [B, T], right-padded
    targets: Tensor  # int64 [B, T]

    @property
    def valid(self) -> Tensor:
        """bool [B, T]: False on the padding at the right (leading prompt tokens are valid)."""
        last = (self.targets != IGNORE).long().flip(1).cumsum(1).flip(1)
        return last > 0


@dataclass
class PairBatch(_Movable):
    """Two answers to one prompt, each with its prompt, right-padded to the same T."""

    chosen_ids: Tensor  # int64 [B, T]
    chosen_len: Tensor  # int64 [B], tokens before the padding
    rejected_ids: Tensor  # int64 [B, T]
    rejected_len: Tensor  # int64 [B]

    def rows(self, rows: slice) -> "PairBatch":
        return PairBatch(*(getattr(self, f.name)[rows] for f in fields(self)))


@dataclass
class PromptBatch:
    """Prompts to answer in a rollout; records are what a reward needs to judge the answers."""

    prompt_ids: list[list[int]]
    records: list[Any]
    index: list[int]  # position of each record in its source

    def to(self, device: torch.device | str, **kwargs: Any) -> "PromptBatch":
        return self


@dataclass
class Rollout:
    """Prompts with sampled answers, re-packed to the right-padded rows that training uses.

    It stays on the CPU, where its rows are chosen, cut and packed while a GPU computes;
    rl/rollout.py moves what a network reads. A is the longest answer; `ids` holds prompt + answer +
    padding.
    Answer token a of row b is ids[b, start[b] + a] and is predicted at start[b] + a - 1.
    """

    ids: Tensor  # int64 [B, T]
    start: Tensor  # int64 [B], length of the prompt
    length: Tensor  # int64 [B], answer tokens, the end token included
    logprobs: Tensor  # float [B, A], the sampler's, 0 after the answer
    stopped: Tensor  # bool [B], ended by the end token
    rank: Tensor | None = None  # int64 [B], for Packing; None: too few shared beginnings to pack

    @property
    def mask(self) -> Tensor:
        """bool [B, A]: True on answer tokens."""
        return torch.arange(self.logprobs.shape[1]) < self.length[:, None]

    @property
    def places(self) -> Tensor:
        """int64 [M]: the indices into the flattened [B * A] where the mask is True."""
        return self.mask.flatten().nonzero().squeeze(1)

    @property
    def valid(self) -> Tensor:
        """bool [B, T]: True on prompt and answer, False on padding."""
        return torch.arange(self.ids.shape[1]) < (self.start + self.length)[:, None]

    @property
    def inputs(self) -> Tensor:
        """int64 [B, T - 1]: what a network reads; a row's last token predicts nothing."""
        return self.ids[:, :-1]

    @property
    def is_input(self) -> Tensor:
        """bool [B, T - 1]: False on padding and on a row's last token."""
        return self.valid[:, 1:]

    @property
    def predict_at(self) -> Tensor:
        """int64 [B, A]: the position whose output predicts answer token a (clamped in padding)."""
        steps = torch.arange(self.logprobs.shape[1])
        return (self.start[:, None] + steps - 1).clamp(max=self.ids.shape[1] - 2)

    @property
    def answer_ids(self) -> Tensor:
        """int64 [B, A]: the answer tokens (arbitrary in padding)."""
        at = (self.predict_at + 1).clamp(max=self.ids.shape[1] - 1)
        return self.ids.gather(1, at)

    def rows(self, index: Tensor) -> "Rollout":
        """The rollout of some rows, int64 [b]; ids are cut to the longest of these rows."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        part = Rollout(**{name: None if x is None else x[index] for name, x in named})
        part.ids = part.ids[:, : int((part.start + part.length).max())]
        return part
