"""Grouped-query attention with rotary positions and QK-norm.

Shape legend: B rows, T tokens, S keys, D d_model, H query heads, G key/value heads,
C head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fourstage.model import ops
from fourstage.model.cache import LayerCache
from fourstage.model.config import ModelConfig
from fourstage.model.ops import Rope
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
        return ops.linear(x, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


def rope_angles(positions_BT: Tensor, head_dim: int, theta: float) -> Rope:
    """cos and sin [B, T, 1, C] for `ops.rotate` (RoPE, Su et al. 2021, arXiv 2104.09864, eq. 34).

    Pair (i, i + C/2) turns by position * theta^(-2i/C). The first half of sin has its minus sign.
    """
    even = torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=torch.float32)
    angle = positions_BT[..., None, None].float() * theta ** (-even / head_dim)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


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
        return self.out(ops.attention(self.project(x_BTD), rope, mask, packing, cache))

    def store(self, x_BTD: Tensor, rope: Rope, cache: LayerCache) -> None:
        """Only what forward would store in the cache."""
        cache.store(*ops.heads(self.project(x_BTD), rope)[1:])

    def project(self, x_BTD: Tensor) -> ops.Heads:
        B, T, _ = x_BTD.shape
        qkv_BTJC = self.qkv(x_BTD).view(B, T, -1, self.head_dim)
        if self.has_norms():
            gains = self.q_norm.weight, self.k_norm.weight
            return ops.Heads(qkv_BTJC, self.heads, gains, self.q_norm.eps)
        q, k, _ = qkv_BTJC.split(self.heads, dim=2)
        normed = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        return ops.Heads(qkv_BTJC, self.heads, normed_BTJC=normed)

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
