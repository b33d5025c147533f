"""Muon on shares of weights takes the steps of Muon on the weights, however they are cut.

Ranks are threads, and DeepSpeed's bookkeeping is made here as it makes it; tests/stages and
test_zero.py have the real one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fourstage.optim import shards, zero_muon
from fourstage.optim.muon import WHOLE, Muon, Split
from fourstage.optim.zero_muon import ZeroMuon, layout

SEVERAL: list[tuple[tuple[int, ...], Split]] = [
    ((16, 6), ([8, 4, 4], 0)),  # queries, keys and values
    ((5, 7), WHOLE),
    ((3, 6, 8), (4, 2)),  # experts' gates and ups
    ((3, 4, 6), WHOLE),
]
SMALL: list[tuple[tuple[int, ...], Split]] = [((2, 3), WHOLE)]
CPU = torch.device("cpu")


class Ranks:
    """Threads that are ranks: what optim/ asks of torch.distributed under ZeRO."""

    def __init__(self, n: int) -> None:
        self.n, self.barrier, self.local = n, threading.Barrier(n), threading.local()
        self.given: list[Tensor] = [torch.empty(0)] * n

    def get_rank(self) -> int:
        return self.local.rank

    def all_reduce(self, x: Tensor) -> None:
        self.given[self.local.rank] = x.clone()
        self.barrier.wait(timeout=20)
        x.copy_(torch.stack(self.given).sum(0))
        self.barrier.wait(timeout=20)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        def as_rank(rank: int) -> Any:
            self.local.rank = rank
            try:
                return work(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.n) as pool:
            futures = [pool.submit(as_rank, rank) for rank in range(self.n)]
        for error in (future.exception() for future in futures):
            if error and not isinstance(error, threading.BrokenBarrierError):  # it broke the others
                raise error
        return [future.result() for future in futures]


def take_part(monkeypatch: pytest.MonkeyPatch, n: int) -> Ranks:
    """n ranks, which the code takes for torch.distributed."""
    ranks = Ranks(n)
    for module in (shards, zero_muon):
        monkeypatch.setattr(module, "dist", ranks)
    return ranks


def made(shapes: list[tuple[tuple[int, ...], Split]], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape, _ in shapes]


def padded(x: Tensor, size: int) -> Tensor:
    return torch.cat([x.flatten(), torch.zeros(size - x.numel())])


def of_a_group(tensors: list[Tensor], n: int, rank: int) -> Tensor:
    """ZeRO-1 and 2: the flat group, padded to a multiple of 2 n."""
    flat = torch.cat([x.flatten() for x in tensors])
    return padded(flat, math.ceil(len(flat) / (2 * n)) * 2 * n).chunk(n)[rank].clone()


def of_each_weight(tensors: list[Tensor], n: int, rank: int) -> Tensor:
    """ZeRO-3: each weight padded to a multiple of n."""
    return torch.cat([padded(x, math.ceil(x.numel() / n) * n).chunk(n)[rank] for x in tensors])


def bookkeeping(weights: list[nn.Parameter], share: Tensor, n: int, rank: int) -> SimpleNamespace:
    """DeepSpeed's optimizers of both kinds, in one."""
    for weight in weights:
        part = of_each_weight([weight.detach()], n, rank)
        weight.ds_shape, weight.ds_tensor = weight.shape, part
        weight.partition_numel = part.numel
    ends = torch.tensor([weight.numel() for weight in weights]).cumsum(0).tolist()
    return SimpleNamespace(
        single_partition_of_fp32_groups=[share],
        partition_size=[len(share)],
        round_robin_bit16_groups=[weights],
        round_robin_bit16_offsets=[[0, *ends[:-1]]],
        fp32_partitioned_groups_flat=[share],
        fp16_groups=[weights],
    )


CUT = {2: of_a_group, 3: of_each_weight}


@pytest.mark.parametrize("at_once", [1, 10**6])
@pytest.mark.parametrize(("shapes", "n"), [(SEVERAL, 1), (SEVERAL, 2), (SEVERAL, 7), (SMALL, 5)])
@pytest.mark.parametrize("stage", CUT)
def test_shares_move_as_whole_weights_do(stage, shapes, n, at_once, monkeypatch):
    """With five ranks for six numbers, some have nothing but padding."""
    monkeypatch.setattr("fourstage.optim.muon.AT_ONCE", {"cpu": at_once})
    monkeypatch.setattr("fourstage.optim.zero_muon.AT_ONCE", {"cpu": at_once})
    ranks = take_part(monkeypatch, n)
    cut, splits = CUT[stage], [split for _, split in shapes]

    def group(params: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": params, "splits": splits, "weight_decay": 0.5}]

    whole = [nn.Parameter(x) for x in made(shapes, seed=0)]
    expected = Muon(group(whole), lr=0.02)
    for step in range(1, 4):
        for weight, grad in zip(whole, made(shapes, step), strict=True):
            weight.grad = grad
        expected.step()

    def train(rank: int) -> Tensor:
        weights = [nn.Parameter(x) for x in made(shapes, seed=0)]
        share = cut([weight.detach() for weight in weights], n, rank).requires_grad_()
        muon = ZeroMuon(group(weights), lr=0.02)
        muon.param_groups[0]["params"] = [share]
        muon.device = CPU
        zero = bookkeeping(weights, share, n, rank)
        muon.pieces = layout(zero, stage, dict(zip(weights, splits, strict=True)), CPU)
        for step in range(1, 4):
            share.grad = cut(made(shapes, step), n, rank)
            muon.step()
        return share.detach()

    for rank, share in enumerate(ranks.run(train)):
        found = cut([weight.detach() for weight in whole], n, rank)
        torch.testing.assert_close(share, found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", CUT)
@pytest.mark.parametrize("wrong", ["another order", "a hole", "half of it", "an unknown weight"])
def test_another_layout_is_refused(stage, wrong, monkeypatch):
    ranks = take_part(monkeypatch, 2)

    def check(rank: int) -> None:
        weights = [nn.Parameter(x) for x in made(SEVERAL, seed=0)]
        splits = dict(zip(weights, [split for _, split in SEVERAL], strict=True))
        share = CUT[stage]([weight.detach() for weight in weights], 2, rank)
        zero = bookkeeping(weights, share, 2, rank)
        if wrong == "another order":
            weights.reverse()
        elif wrong == "a hole":
            share[3:] = share[2:-1].clone()
        elif wrong == "half of it" and stage == 2:
            zero.partition_size = [len(share) // 2]
        elif wrong == "half of it":
            zero.fp32_partitioned_groups_flat = [share[: len(share) // 2]]
        else:
            splits[nn.Parameter(torch.zeros(2, 3))] = WHOLE
        layout(zero, stage, splits, CPU)

    with pytest.raises(AssertionError):
        ranks.run(check)
