"""Muon under DeepSpeed's ZeRO (parallel/strategies.py): each rank has a flat shard of the weights.

Momentum and weight decay are elementwise: each rank keeps those of its shard. Only an orthogonal
step needs whole matrices. So the directions of some weights at a time are gathered by a sum over
the ranks, to which each adds its shard and zeros elsewhere; each rank then computes the matrices
that its shard touches and keeps its part of their steps. Which numbers a shard holds is DeepSpeed's
own bookkeeping (0.19, runtime/zero/stage_1_and_2.py and stage3.py), checked at the start against
the weights themselves.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fourstage.optim.muon import AT_ONCE, Muon, Split, add_orthogonal, matrices, worked_in
from fourstage.optim.shards import Held, shards_of


@dataclass(frozen=True)
class Piece:
    """What a rank's flat shard holds of one weight; may be empty."""

    shape: torch.Size  # of the weight
    split: Split
    of: slice  # of the flattened weight
    at: slice  # of the shard
    touched: list[slice]  # the matrices that `of` touches, in each part [M, R, C] of the weight


class ZeroMuon(Muon):
    """Muon whose weights are shards. Steps are collective: every rank has to take the same ones."""

    device: torch.device  # where matrices are gathered and processed
    pieces: dict[Tensor, list[list[Piece]]]  # of each shard; those of an inner list at once

    def add_steps(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        for shard in weights:
            for some in self.pieces[shard]:
                self.add_steps_of(some, shard, group["lr"])

    def add_steps_of(self, some: list[Piece], shard: Tensor, lr: float) -> None:
        sizes = [piece.shape.numel() for piece in some]
        steps = torch.zeros(sum(sizes), dtype=shard.dtype, device=self.device)
        directions = torch.zeros_like(steps, dtype=worked_in(steps))
        whole = list(zip(some, steps.split(sizes), directions.split(sizes), strict=True))
        for piece, _, direction in whole:
            direction[piece.of].copy_(shard.grad[piece.at])
        dist.all_reduce(directions)  # adds zeros
        parts: list[tuple[Tensor, Tensor]] = []
        for piece, *both in whole:
            shaped = (matrices(x.view(piece.shape), piece.split) for x in both)
            for m, step, direction in zip(piece.touched, *shaped, strict=True):
                if m.start < m.stop:
                    parts.append((step[m], direction[m]))
        add_orthogonal(parts, lr)
        for piece, step, _ in whole:
            shard[piece.at].add_(step[piece.of].to(shard.device))


def splits_of(optimizer: Muon) -> dict[nn.Parameter, Split]:
    """Must be called before DeepSpeed replaces the weights by shards."""
    found: dict[nn.Parameter, Split] = {}
    for group in optimizer.param_groups:
        if group["splits"] is not None:
            found |= zip(group["params"], group["splits"], strict=True)
    return found


# --- the layout


@torch.no_grad()
def layout(
    zero: Any, stage: int, splits: dict[nn.Parameter, Split], device: torch.device
) -> dict[Tensor, list[list[Piece]]]:
    """The pieces in each of DeepSpeed's shards of weights that have splits; collective.

    zero: DeepSpeed's optimizer of a ZeRO stage. Raises AssertionError if its shards are not laid
    out as expected.
    """
    pieces: dict[Tensor, list[list[Piece]]] = {}
    missing = dict(splits)
    for shard, held in shards_of(zero, stage):
        if held[0].weight not in splits:
            continue  # AdamW's
        assert all(shard[x.at].equal(x.here) for x in held)
        counts = torch.tensor([len(x.here) for x in held], device=device)
        dist.all_reduce(counts)
        assert counts.tolist() == [x.shape.numel() for x in held]
        own = [(x, missing.pop(x.weight)) for x in held]
        pieces[shard] = at_once(
            [Piece(x.shape, split, x.of, x.at, touched(x, split)) for x, split in own], device
        )
    assert not missing
    return pieces


def touched(x: Held, split: Split) -> list[slice]:
    """See Piece. The matrices are contiguous, as a weight's last two dimensions are a matrix."""
    is_here = torch.zeros(x.shape, dtype=torch.bool)
    is_here.view(-1)[x.of] = True
    found = (part.any(dim=2).any(dim=1).nonzero() for part in matrices(is_here, split))
    return [slice(int(m.min()), int(m.max()) + 1) if len(m) else slice(0, 0) for m in found]


def at_once(pieces: list[Piece], device: torch.device) -> list[list[Piece]]:
    """In order, as many weights at once as AT_ONCE allows, at least one."""
    found: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if piece.shape.numel() > room:
            found.append([])
            room = AT_ONCE[device.type]
        found[-1].append(piece)
        room -= piece.shape.numel()
    return found
