"""Rows of tokens of which equal beginnings are computed once.

The answers of a group begin with one prompt, and often go on alike. Under a causal mask what the
network makes of a token depends on the tokens up to it and on nothing else, so each distinct
beginning is one token of a packed forward: a prefix tree of the rows, without their padding. Only
attention sees the rows whole.

Shape legend: B rows, T tokens, N distinct tokens, M = B * T places, G tables, X numbers.
"""

from __future__ import annotations

from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fourstage.batch import moved


class Take:
    """x_NX -> x_NX[index_M], whose gradient is summed in a fixed order.

    index_select would scatter-add it: a row at a time on a CPU, with atomics on a GPU, where no two
    runs would be bit-identical.
    """

    def __init__(self, index_M: Tensor, n: int):
        self.index_M = index_M
        sorted_M, self.order_M = index_M.sort(stable=True)
        self.starts_N = torch.searchsorted(sorted_M, torch.arange(n, device=index_M.device))

    def __call__(self, x_NX: Tensor) -> Tensor:
        return _Take.apply(x_NX, self.index_M, self.order_M, self.starts_N)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NX: Tensor, index_M: Tensor, order_M: Tensor, starts_N: Tensor) -> Tensor:
        ctx.save_for_backward(order_M, starts_N)
        return x_NX.index_select(0, index_M)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MX: Tensor):
        order_M, starts_N = ctx.saved_tensors
        return F.embedding_bag(order_M, grad_MX, starts_N, mode="sum"), None, None, None


def ranks(ids_BT: Tensor, length_B: Tensor) -> Tensor:
    """int64 [B]: each row's place in lexicographic order, in which the longest beginning that a row
    shares with any row before it is the one it shares with its neighbour."""
    rows = [row[:n] for row, n in zip(ids_BT.tolist(), length_B.tolist(), strict=True)]
    return torch.tensor(sorted(range(len(rows)), key=rows.__getitem__)).argsort()


class Packing:
    """Where the distinct tokens of some rows stand; found on the CPU, read where `to` moves it.

    ids_N, positions_N: int64, the distinct tokens and their positions in their rows.
    copies_N: float, in how many rows each is.
    place_BT: int64, the number of each row's tokens; any number where there is padding.
    """

    def __init__(self, ids_BT: Tensor, length_B: Tensor, rank_B: Tensor):
        """ids_BT: int64, right-padded rows, each of length_B tokens; rank_B as `ranks` gives it."""
        T = ids_BT.shape[1]
        self.shape = ids_BT.shape
        order_B = rank_B.argsort()
        sorted_BT = ids_BT[order_B]
        is_real_BT = torch.arange(T) < length_B[order_B, None]
        is_old_BT = is_real_BT.clone()
        is_old_BT[:1] = False
        is_old_BT[1:] &= is_real_BT[:-1] & (sorted_BT[1:] == sorted_BT[:-1])
        is_new_BT = is_real_BT & (is_old_BT.cumprod(1) == 0)
        self.first_N = is_new_BT.flatten().nonzero().squeeze(1)
        number_BT = (is_new_BT.flatten().cumsum(0) - 1).view(self.shape) * is_new_BT
        self.row_places_BT = number_BT.cummax(0).values  # in the sorted order, as first_N
        self.place_BT = torch.empty_like(ids_BT).index_copy_(0, order_B, self.row_places_BT)
        self.ids_N = sorted_BT.flatten()[self.first_N]
        self.positions_N = self.first_N % T
        copies_N = torch.zeros(len(self))
        is_real_M = is_real_BT.flatten().to(copies_N.dtype)
        self.copies_N = copies_N.scatter_add_(0, self.row_places_BT.flatten(), is_real_M)
        self._takes: dict[int, tuple[Take, Take]] = {}  # the layers of a network share them

    def to(self, device: torch.device) -> Packing:
        there = copy(self)
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        vars(there).update({name: moved(x, device) for name, x in tensors.items()}, _takes={})
        return there

    def __len__(self) -> int:
        return len(self.ids_N)

    def spread(self, x_GNX: Tensor) -> Tensor:
        """G tables of the distinct tokens -> the same of whole rows, [G, B, T, X]."""
        G, _, X = x_GNX.shape
        rows_MX = self.takes(G)[0](x_GNX.reshape(-1, X))
        return rows_MX.view(G, *self.shape, X)

    def collect(self, y_GBTX: Tensor) -> Tensor:
        """Of whole rows -> of the distinct tokens, [N, G, X]."""
        G, X = y_GBTX.shape[0], y_GBTX.shape[-1]
        return self.takes(G)[1](y_GBTX.reshape(-1, X)).view(len(self), G, X)

    def takes(self, tables: int) -> tuple[Take, Take]:
        """For spread and for collect."""
        if tables not in self._takes:
            table_G1 = torch.arange(tables, device=self.ids_N.device)[:, None]
            n, m = len(self), self.place_BT.numel()
            to_rows = Take((table_G1 * n + self.row_places_BT.flatten()).flatten(), tables * n)
            to_tokens = Take((table_G1 * m + self.first_N).t().flatten(), tables * m)
            self._takes[tables] = to_rows, to_tokens
        return self._takes[tables]
