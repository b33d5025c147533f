"""The keys and values that a layer has computed, and one more token's attention to them.

Shape legend: B rows, T tokens, S stored tokens, H query heads, G key/value heads, R = H / G,
C head_dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


class LayerCache:
    """One layer's keys and values, [B, G, capacity, C], of which the first ones are filled.

    On a CPU the keys lie in memory as [B, G, C, capacity]: see `attend`.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def store(self, k_BGTC: Tensor, v_BGTC: Tensor, at: int | Tensor = 0) -> None:
        """T new tokens, from place `at` on; int64 [1], which only a GPU may know, for one token."""
        b, g, t, c = k_BGTC.shape
        if self.k is None or self.v is None:
            if k_BGTC.device.type == "cpu":
                self.v = v_BGTC.new_empty(b, g, self.capacity, c)
                self.k = k_BGTC.new_empty(b, g, c, self.capacity).mT
            else:  # zeros, as a recorded step multiplies places by 0 that are not filled yet
                self.v = v_BGTC.new_zeros(b, g, self.capacity, c)
                self.k = torch.zeros_like(self.v)
        if isinstance(at, Tensor):
            self.k.index_copy_(2, at, k_BGTC)
            self.v.index_copy_(2, at, v_BGTC)
            return
        assert at + t <= self.capacity, f"the cache holds {self.capacity} tokens, not {at + t}"
        self.k[:, :, at : at + t] = k_BGTC
        self.v[:, :, at : at + t] = v_BGTC

    def keep(self, rows: Tensor) -> None:
        """Row i is then what row rows[i] was, int64 [b]: some rows less, or a row several times."""
        assert self.k is not None and self.v is not None, "the cache is empty"
        self.v = self.v.index_select(0, rows)
        if self.k.is_contiguous():
            self.k = self.k.index_select(0, rows)
        else:
            self.k = self.k.mT.index_select(0, rows).mT

    def attend(self, q_BGRC: Tensor, S: int, mask: Tensor | None = None) -> Tensor:
        """What R queries of one token, divided by sqrt(C), see of the first S, [B, G, R, C].

        mask: bool [B or 1, 1, 1, S]. Flash attention is made for many queries. For so few a CPU is
        twice as fast with weighted sums of rows, which embedding_bag takes: scores are the rows of
        K^T (one for each of C channels) weighted by a query, the result rows of V weighted by
        softmax.
        """
        assert self.k is not None and self.v is not None, "the cache is empty"
        B, G, R, C = q_BGRC.shape
        if q_BGRC.device.type != "cpu" or q_BGRC.dtype != torch.float32:
            k, v = self.k[:, :, :S], self.v[:, :, :S]
            return F.scaled_dot_product_attention(q_BGRC, k, v, attn_mask=mask, scale=1.0)
        q_NC = q_BGRC.reshape(-1, C)
        channels = _bags(B * G, R, C, C)
        scores_NS = weighted_sums(self.k.mT.view(-1, self.capacity), channels, q_NC)[:, :S]
        if mask is not None:
            scores_NS = scores_NS.view(B, -1, S).masked_fill(~mask[:, 0], -torch.inf).view(-1, S)
        tokens = _bags(B * G, R, self.capacity, S)
        y_NC = weighted_sums(self.v.view(-1, C), tokens, scores_NS.softmax(-1))
        return y_NC.view(B, G, R, C)


def weighted_sums(table: Tensor, bags: tuple[Tensor, Tensor], weights_NM: Tensor) -> Tensor:
    """out[n] = sum_m weights[n, m] * table[rows[n, m]]; bags: see `_bags`."""
    # F.embedding_bag would make the starts anew each time
    return torch.embedding_bag(table, *bags, False, 0, False, weights_NM.view(-1), False)[0]


@lru_cache(maxsize=8)
def _bags(tables: int, repeats: int, stride: int, used: int) -> tuple[Tensor, Tensor]:
    """The first `used` rows of each of `tables` tables, `repeats` times each; all layers share it.

    int32 [tables * repeats * used] and where each bag starts; a table takes `stride` rows.
    """
    first = torch.arange(tables, dtype=torch.int32).mul_(stride).repeat_interleave(repeats)
    rows = first[:, None] + torch.arange(used, dtype=torch.int32)
    return rows.flatten(), torch.arange(len(first), dtype=torch.int32).mul_(used)
