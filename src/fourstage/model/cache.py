"""A layer's cached keys and values, and one more token's attention to them.

Shape legend: B rows, T tokens, S stored tokens, G key/value heads, R queries of each, C head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class LayerCache:
    """One layer's keys and values, [rows, G, capacity, C], filled from the left.

    rows: the maximum number, which then stay in place in memory; 0: as many as there are.
    """

    def __init__(self, capacity: int, rows: int = 0):
        self.capacity, self.rows = capacity, rows
        self.k = self.v = torch.empty(0)  # until the first token

    def store(self, k_BGTC: Tensor, v_BGTC: Tensor, at: int | Tensor = 0) -> None:
        """T new tokens from place `at` on; one token's may be int64 [1], known to a GPU only."""
        B, G, T, C = k_BGTC.shape
        if not self.k.numel():
            # zeros, as a recorded step multiplies places that are not filled yet by 0
            self.k = k_BGTC.new_zeros(self.rows or B, G, self.capacity, C)
            self.v = torch.zeros_like(self.k)
        if isinstance(at, Tensor):
            self.k[:B].index_copy_(2, at, k_BGTC)
            self.v[:B].index_copy_(2, at, v_BGTC)
            return
        self.k[:B, :, at : at + T] = k_BGTC
        self.v[:B, :, at : at + T] = v_BGTC

    def keep(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was, int64 [b]: rows may be dropped or repeated."""
        k, v = self.k.index_select(0, rows), self.v.index_select(0, rows)
        if self.rows:
            self.k[: len(rows)], self.v[: len(rows)] = k, v
        else:
            self.k, self.v = k, v

    def clear(self) -> None:
        """For new rows: places that are not filled yet are multiplied by 0, so must be finite."""
        self.k.zero_()
        self.v.zero_()

    def attend(self, q_BGRC: Tensor, S: int, mask: Tensor | None = None) -> Tensor:
        """Attention of one token's queries, divided by sqrt(C), to the first S tokens.

        mask: bool [B or 1, 1, 1, S].
        """
        k, v = (x[: len(q_BGRC), :, :S] for x in (self.k, self.v))
        return F.scaled_dot_product_attention(q_BGRC, k, v, attn_mask=mask, scale=1.0)
