"""Grouped-query attention with rotary positions and QK-norm.

Shape legend: B rows, T tokens, S keys, D d_model, H query heads, G key/value heads,
C head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourstage.model import fused
from fourstage.model.cache import LayerCache
from fourstage.model.config import ModelConfig
from fourstage.model.packing import Packing

# cuDNN's attention makes a plan for each new shape, half a second for each: of a decoded token,
# of a batch, of a piece of a rollout. Flash and memory-efficient attention take any shape.
torch.backends.cuda.enable_cudnn_sdp(False)


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

    def forward(self, x: Tensor) -> Tensor:
        d_in, d_out = self.in_features, self.out_features
        if d_in * d_out <= fused.LARGEST and fused.applies(x, d_in, d_out):
            return fused.Linear.apply(x, self.weight)
        return super().forward(x)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if fused.applies(x, x.shape[-1]):
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
        mask: Tensor | None = None,
        packing: Packing | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]; mask: bool [B or 1, 1, T, T], True where T may look; else causal.

        packing: x is [1, N, D], the distinct tokens of the rows that attend.
        cache: gets the keys and values.
        """
        B, T, _ = x_BTD.shape
        qkv = self.qkv(x_BTD).view(B, T, -1, self.head_dim)
        if cache is None and mask is None and self.is_fused(qkv, rope):
            weights = self.q_norm.weight, self.k_norm.weight
            y = fused.causal_attention(qkv, *weights, rope, self.heads[0], self.q_norm.eps, packing)
            return self.out(y)
        q, k, v = self.split(qkv, rope)
        q, k, v = (x_BTHC.transpose(1, 2) for x_BTHC in (q, k, v))
        if cache is not None:
            cache.store(k, v)
        if packing is not None:  # [1, H, N, C] -> [B, H, T, C]
            q, k, v = (packing.spread(x[0]).transpose(0, 1) for x in (q, k, v))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        if packing is not None:
            return self.out(packing.collect(y.transpose(0, 1)).view(B, T, -1))
        return self.out(y.transpose(1, 2).reshape(B, T, -1))

    def store(self, x_BTD: Tensor, rope: Rope, cache: LayerCache) -> None:
        """Only what forward would store in the cache."""
        B, T, _ = x_BTD.shape
        _, k, v = self.split(self.qkv(x_BTD).view(B, T, -1, self.head_dim), rope)
        cache.store(k.transpose(1, 2), v.transpose(1, 2))

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
        qk_BTJC = rotate(qk_BTJC, rope).to(qkv_BTJC.dtype)  # CUDA's autocast has norms in float32
        q, k = qk_BTJC.split((H, G), dim=2)
        return q, k, qkv_BTJC[:, :, H + G :]

    def head_gains(self) -> Tensor:
        """float [H + G, C]: what a head, normalised or not, is multiplied with; queries are divided
        by sqrt(C) too."""
        (H, G, _), C = self.heads, self.head_dim
        gain_JC = torch.ones(H + G, C, device=self.qkv.weight.device)
        if self.has_norms():
            gain_JC[:H], gain_JC[H:] = self.q_norm.weight, self.k_norm.weight
        gain_JC[:H] *= C**-0.5
        return gain_JC

    def has_norms(self) -> bool:
        """Whether both norms can be applied as one; under ZeRO-3 their weights are elsewhere."""
        return isinstance(self.q_norm, RMSNorm) and self.q_norm.weight.numel() > 0

    def is_fused(self, qkv: Tensor, rope: Rope) -> bool:
        """Whether the kernels fit: one set of positions for all rows, and norms."""
        return len(rope[0]) == 1 and self.has_norms() and fused.applies(qkv, self.head_dim)
