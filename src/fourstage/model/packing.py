"""Rows of tokens whose common prefixes are computed once.

A group's answers share a prompt, and often their first tokens. Under a causal mask a token's hidden
state depends only on the tokens up to it, so each distinct prefix is one token of a packed forward:
a prefix tree of the rows, without padding. Only attention sees whole rows.

Shape legend: B rows, T tokens, N distinct tokens, M = B * T places, X numbers.
"""

from copy import copy
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fourstage.batch import moved


class Take:
    """x_NX -> x_NX[index_M], whose gradient is summed in a fixed order.

    index_select's own gradient is a scatter-add: slow on a CPU, and with atomics on a GPU, so that
    no two runs are bit-identical.
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
    """int64 [B]: each row's place in lexicographic order, where no earlier row shares a longer
    prefix with a row than its neighbour does."""
    rows = [row[:n] for row, n in zip(ids_BT.tolist(), length_B.tolist(), strict=True)]
    return torch.tensor(sorted(range(len(rows)), key=rows.__getitem__)).argsort()


class Packing:
    """The distinct tokens of some rows, and where they are; built on the CPU, moved by `to`.

    ids_N, positions_N: int64, the distinct tokens and their positions in their rows.
    copies_N: float, the number of rows that have each.
    place_BT: int64, each row's tokens as numbers of distinct tokens; arbitrary on padding.
    """

    def __init__(self, ids_BT: Tensor, length_B: Tensor, rank_B: Tensor):
        """ids_BT: int64, right-padded rows of length_B tokens; rank_B: as `ranks` returns it."""
        T = ids_BT.shape[1]
        self.shape = ids_BT.shape
        order_B = rank_B.argsort()
        sorted_BT = ids_BT[order_B]
        is_real_BT = torch.arange(T) < length_B[order_B, None]
        is_same_BT = is_real_BT[1:] & is_real_BT[:-1] & (sorted_BT[1:] == sorted_BT[:-1])
        is_new_BT = is_real_BT.clone()
        is_new_BT[1:] &= is_same_BT.cumprod(1) == 0  # differs from the row before, here or earlier
        self.first_N = is_new_BT.flatten().nonzero().squeeze(1)
        number_BT = (is_new_BT.flatten().cumsum(0) - 1).view(self.shape) * is_new_BT
        self.row_places_BT = number_BT.cummax(0).values  # in the sorted order, as first_N
        self.place_BT = torch.empty_like(ids_BT).index_copy_(0, order_B, self.row_places_BT)
        self.ids_N = sorted_BT.flatten()[self.first_N]
        self.positions_N = self.first_N % T
        copies_N = torch.zeros(len(self))
        is_real_M = is_real_BT.flatten().to(copies_N.dtype)
        self.copies_N = copies_N.scatter_add_(0, self.row_places_BT.flatten(), is_real_M)

    def to(self, device: torch.device) -> "Packing":
        there = copy(self)
        vars(there).pop("takes", None)
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        vars(there).update({name: moved(x, device) for name, x in tensors.items()})
        return there

    def __len__(self) -> int:
        return len(self.ids_N)

    def spread(self, x_NX: Tensor) -> Tensor:
        """Distinct tokens -> whole rows, [B, T, X]."""
        return self.takes[0](x_NX).view(*self.shape, -1)

    def collect(self, y_BTX: Tensor) -> Tensor:
        """Whole rows -> distinct tokens, [N, X]."""
        return self.takes[1](y_BTX.flatten(0, 1))

    @cached_property
    def takes(self) -> tuple[Take, Take]:
        """Those of spread and collect, which all layers share."""
        return Take(self.row_places_BT.flatten(), len(self)), Take(self.first_N, self.shape.numel())
