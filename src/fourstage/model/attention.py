"""Grouped-query attention with rotary positions, QK-norm and a key/value cache.

Shape legend: B rows, T tokens, S cached tokens, D d_model, H query heads, G key/value heads,
C head_dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourstage.model import fused
from fourstage.model.config import ModelConfig


class Linear(nn.Linear):
    """A projection without bias, drawn from N(0, std^2) where it is made.

    ZeRO-3 partitions a layer as soon as its own __init__ ends: what a parent writes into it later
    would be lost.
    """

    def __init__(self, d_in: int, d_out: int, std: float):
        self.std = std
        super().__init__(d_in, d_out, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if fused.applies(x):
            return fused.RMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rope_angles(positions_BT: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, 1, C] for `rotate` (RoPE, Su et al. 2021, arXiv 2104.09864, eq. 34).

    Pair (i, i + C/2) turns by position * theta^(-2i/C). The first half of sin has its minus sign.
    """
    even = torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=torch.float32)
    angle = positions_BT[..., None, None].float() * theta ** (-even / head_dim)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


Rope = tuple[Tensor, Tensor]  # cos and sin, as rope_angles gives them


def rotate(x_BTHC: Tensor, rope: Rope) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) for the halves a, b of C, as transformers does."""
    cos, sin = rope
    return torch.addcmul(x_BTHC * cos, x_BTHC.roll(x_BTHC.shape[-1] // 2, -1), sin).to(x_BTHC.dtype)


class LayerCache:
    """One layer's keys and values, [B, G, capacity, C], of which the first `length` are filled.

    On a CPU the keys lie in memory as [B, G, C, capacity]: see `attend`.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def append(self, k_BGTC: Tensor, v_BGTC: Tensor) -> tuple[Tensor, Tensor]:
        """Stores T new tokens; all keys and values so far, [B, G, S, C]."""
        b, g, t, c = k_BGTC.shape
        if self.k is None or self.v is None:
            self.v = v_BGTC.new_empty(b, g, self.capacity, c)
            if k_BGTC.device.type == "cpu":
                self.k = k_BGTC.new_empty(b, g, c, self.capacity).mT
            else:
                self.k = torch.empty_like(self.v)
        end = self.length + t
        assert end <= self.capacity, f"the cache holds {self.capacity} tokens, not {end}"
        self.k[:, :, self.length : end] = k_BGTC
        self.v[:, :, self.length : end] = v_BGTC
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def keep(self, rows: Tensor) -> None:
        assert self.k is not None and self.v is not None, "the cache is empty"
        self.v = self.v.index_select(0, rows)
        if self.k.is_contiguous():
            self.k = self.k.index_select(0, rows)
        else:
            self.k = self.k.mT.index_select(0, rows).mT

    def attend(self, q_BGRC: Tensor, mask: Tensor | None) -> Tensor:
        """What R queries of one token see of all that is stored, [B, G, R, C].

        mask: bool [B, 1, 1, S]. Flash attention is made for many queries. For so few a CPU is twice
        as fast with weighted sums of rows, which embedding_bag takes: scores are the rows of K^T
        (one for each of C channels) weighted by a query, the result rows of V weighted by softmax.
        """
        assert self.k is not None and self.v is not None, "the cache is empty"
        (B, G, R, C), S = q_BGRC.shape, self.length
        if q_BGRC.device.type != "cpu" or q_BGRC.dtype != torch.float32:
            k, v = self.k[:, :, :S], self.v[:, :, :S]
            return F.scaled_dot_product_attention(q_BGRC, k, v, attn_mask=mask)
        q_NC = (q_BGRC * C**-0.5).view(-1, C)
        channels_NC = _rows(B * G, R, C, C)
        scores_NS = weighted_sums(self.k.mT.view(-1, self.capacity), channels_NC, q_NC)[:, :S]
        if mask is not None:
            scores_NS = scores_NS.view(B, -1, S).masked_fill(~mask[:, 0], -torch.inf).view(-1, S)
        tokens_NS = _rows(B * G, R, self.capacity, S)
        y_NC = weighted_sums(self.v.view(-1, C), tokens_NS, scores_NS.softmax(-1))
        return y_NC.view(B, G, R, C)


def weighted_sums(table: Tensor, rows_NM: Tensor, weights_NM: Tensor) -> Tensor:
    """out[n] = sum_m weights[n, m] * table[rows[n, m]]"""
    return F.embedding_bag(rows_NM, table, mode="sum", per_sample_weights=weights_NM)


@lru_cache(maxsize=8)
def _rows(tables: int, repeats: int, stride: int, used: int) -> Tensor:
    """The first `used` rows of each of `tables` tables, `repeats` times each; all layers share it.

    int32 [tables * repeats, used]; a table takes `stride` rows.
    """
    first = torch.arange(tables, dtype=torch.int32).mul_(stride).repeat_interleave(repeats)
    return first[:, None] + torch.arange(used, dtype=torch.int32)


class KVCache:
    """The static cache of all layers; the first forward takes the memory for `capacity` tokens."""

    def __init__(self, n_layers: int, capacity: int):
        self.layers = [LayerCache(capacity) for _ in range(n_layers)]
        self.capacity = capacity
        self.angles: Rope | None = None

    @property
    def length(self) -> int:
        return self.layers[0].length

    def rope(self, start: int, end: int, head_dim: int, theta: float, device) -> Rope:
        """cos and sin [1, T, 1, C] of positions start to end, from a table of all of them."""
        if self.angles is None:
            every = torch.arange(self.capacity, device=device)[None]
            self.angles = rope_angles(every, head_dim, theta)
        cos, sin = self.angles
        return cos[:, start:end], sin[:, start:end]

    def keep(self, rows: Tensor) -> None:
        """Row i is then what row rows[i] was, int64 [b]: some rows less, or a row several times."""
        for layer in self.layers:
            layer.keep(rows)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245), queries and keys normalised per head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        self.head_dim = config.head_dim
        out_std = config.init_std / (2 * config.n_layers) ** 0.5
        self.qkv = Linear(config.d_model, sum(self.heads) * config.head_dim, config.init_std)
        self.out = Linear(config.n_heads * config.head_dim, config.d_model, out_std)
        norm = RMSNorm if config.qk_norm else lambda *_: nn.Identity()
        self.q_norm = norm(config.head_dim, config.norm_eps)
        self.k_norm = norm(config.head_dim, config.norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope,
        cache: LayerCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]; mask: bool [B or 1, 1, T, S], True where T may look at S.

        Without a mask attention is causal (a single new token sees the whole cache).
        """
        B, T, _ = x_BTD.shape
        qkv = self.qkv(x_BTD).view(B, T, -1, self.head_dim)
        if cache is None and mask is None and self.is_fused(qkv, rope):
            weights = self.q_norm.weight, self.k_norm.weight
            y = fused.causal_attention(qkv, *weights, rope, self.heads[0], self.q_norm.eps)
            return self.out(y)
        q, k, v = (x_BTHC.transpose(1, 2) for x_BTHC in self.split(qkv, rope))
        if cache is not None:
            assert mask is not None or T == 1 or cache.length == 0, "a later chunk needs a mask"
            k, v = cache.append(k, v)
            if T == 1:  # the query heads of one group take the place of query tokens
                q = q.reshape(B, k.shape[1], -1, self.head_dim)
                return self.out(cache.attend(q, mask).reshape(B, 1, -1))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return self.out(y.transpose(1, 2).reshape(B, T, -1))

    def store(self, x_BTD: Tensor, rope: Rope, cache: LayerCache) -> None:
        """Only what forward would append to the cache."""
        B, T, _ = x_BTD.shape
        _, k, v = self.split(self.qkv(x_BTD).view(B, T, -1, self.head_dim), rope)
        cache.append(k.transpose(1, 2), v.transpose(1, 2))

    def split(self, qkv_BTJC: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised and rotated, and values; [B, T, H or G, C] each."""
        H, G, _ = self.heads
        if self.has_norms():
            weights = self.q_norm.weight.expand(H, -1), self.k_norm.weight.expand(G, -1)
            n_BTJC = F.rms_norm(qkv_BTJC[:, :, : H + G], (self.head_dim,), None, self.q_norm.eps)
            qk_BTJC = n_BTJC * torch.cat(weights).to(n_BTJC.dtype)
        else:
            q, k, _ = qkv_BTJC.split(self.heads, dim=2)
            qk_BTJC = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        q, k = rotate(qk_BTJC, rope).split((H, G), dim=2)
        return q, k, qkv_BTJC[:, :, H + G :]

    def has_norms(self) -> bool:
        """Whether both norms can be applied as one; under ZeRO-3 their weights are elsewhere."""
        return isinstance(self.q_norm, RMSNorm) and self.q_norm.weight.numel() > 0

    def is_fused(self, qkv: Tensor, rope: Rope) -> bool:
        """Whether the hand-written gradient fits."""
        fits = len(rope[0]) == 1 and qkv.shape[1] <= fused.LONGEST
        return fits and self.has_norms() and fused.applies(qkv)
