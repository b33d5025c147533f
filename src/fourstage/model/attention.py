"""Grouped-query attention with rotary positions, QK-norm and a key/value cache.

Shape legend: B rows, T tokens, S cached tokens, D d_model, H query heads, G key/value heads,
C head_dim.
"""

from __future__ import annotations

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


def rotate(x_BTHC: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) for the halves a, b of C, as transformers does."""
    cos, sin = rope
    return torch.addcmul(x_BTHC * cos, x_BTHC.roll(x_BTHC.shape[-1] // 2, -1), sin).to(x_BTHC.dtype)


class LayerCache:
    """One layer's keys and values [B, G, capacity, C], of which the first `length` are filled."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def append(self, k_BGTC: Tensor, v_BGTC: Tensor) -> tuple[Tensor, Tensor]:
        """Stores T new tokens; all keys and values so far, [B, G, S, C]."""
        b, g, t, c = k_BGTC.shape
        if self.k is None or self.v is None:
            self.k = k_BGTC.new_empty(b, g, self.capacity, c)
            self.v = v_BGTC.new_empty(b, g, self.capacity, c)
        end = self.length + t
        assert end <= self.capacity, f"the cache holds {self.capacity} tokens, not {end}"
        self.k[:, :, self.length : end] = k_BGTC
        self.v[:, :, self.length : end] = v_BGTC
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class KVCache:
    """The static cache of all layers; the first forward takes the memory for `capacity` tokens."""

    def __init__(self, n_layers: int, capacity: int):
        self.layers = [LayerCache(capacity) for _ in range(n_layers)]

    @property
    def length(self) -> int:
        return self.layers[0].length

    def keep(self, rows: Tensor) -> None:
        """Leaves only these rows, int64 [b], in this order."""
        for layer in self.layers:
            assert layer.k is not None and layer.v is not None, "the cache is empty"
            layer.k, layer.v = layer.k[rows], layer.v[rows]


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
        rope: tuple[Tensor, Tensor],
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
        q_BTHC, k_BTGC, v_BTGC = qkv.split(self.heads, dim=2)
        q = rotate(self.q_norm(q_BTHC), rope).transpose(1, 2)
        k = rotate(self.k_norm(k_BTGC), rope).transpose(1, 2)
        v = v_BTGC.transpose(1, 2)
        if cache is not None:
            assert mask is not None or T == 1 or cache.length == 0, "a later chunk needs a mask"
            k, v = cache.append(k, v)
        if T == 1:  # the query heads of one group take the place of query tokens: no copy of k, v
            q = q.reshape(B, k.shape[1], -1, self.head_dim)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.out(y.reshape(B, 1, -1))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return self.out(y.transpose(1, 2).reshape(B, T, -1))

    def is_fused(self, qkv: Tensor, rope: tuple[Tensor, Tensor]) -> bool:
        """Whether the hand-written gradient fits; under ZeRO-3 the norms' weights are elsewhere."""
        has_weights = isinstance(self.q_norm, RMSNorm) and self.q_norm.weight.numel() > 0
        same_positions = len(rope[0]) == 1
        fits = has_weights and same_positions and qkv.shape[1] <= fused.LONGEST
        return fits and fused.applies(qkv)
