"""Which numbers of which weights a process works on.

DeepSpeed's ZeRO gives each rank flat shards of the weights; which numbers a shard holds is its own
bookkeeping (0.19, runtime/zero/stage_1_and_2.py and stage3.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Shard = tuple[Tensor, list["Held"]]  # what an optimizer works on, and the weights in it


@dataclass(frozen=True)
class Held:
    """Where `here`, this rank's numbers of a weight, are in the weight and in a shard."""

    weight: nn.Parameter
    shape: torch.Size
    here: Tensor
    of: slice
    at: slice


def shards_of(zero: Any, stage: int) -> Iterator[Shard]:
    """A rank's fp32 shards. zero: DeepSpeed's optimizer of a ZeRO stage."""
    return (of_weights if stage == 3 else of_groups)(zero)


def of_groups(zero: Any) -> Iterator[Shard]:
    """ZeRO-1 and 2: a group's weights, concatenated, in as many parts as there are ranks."""
    for shard, size, weights, offsets in zip(
        zero.single_partition_of_fp32_groups,
        zero.partition_size,
        zero.round_robin_bit16_groups,
        zero.round_robin_bit16_offsets,
        strict=True,
    ):
        assert shard.shape == (size,)
        start = dist.get_rank() * size
        held: list[Held] = []
        for weight, offset in zip(weights, offsets, strict=True):
            first = max(start, offset)
            last = max(first, min(start + size, offset + weight.numel()))
            of, at = slice(first - offset, last - offset), slice(first - start, last - start)
            held.append(Held(weight, weight.shape, weight.flatten()[of], of, at))
        yield shard, held


def of_weights(zero: Any) -> Iterator[Shard]:
    """ZeRO-3: each weight in as many parts as there are ranks; a rank's parts are concatenated."""
    for shard, weights in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        end = 0
        held: list[Held] = []
        for weight in weights:
            size, shape = weight.partition_numel(), weight.ds_shape
            first = min(dist.get_rank() * size, shape.numel())
            of = slice(first, min(first + size, shape.numel()))
            at = slice(end, end + of.stop - of.start)
            held.append(Held(weight, shape, weight.ds_tensor.flatten()[: at.stop - end], of, at))
            end += size
        assert shard.shape == (end,)
        yield shard, held
