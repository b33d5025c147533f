"""Grouped-query attention with rotary positions and QK-norm.

Shape legend: B rows, T tokens, N distinct tokens, D d_model, H query heads, G key/value heads,
J = H + 2 G, C head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourstage.model import ops
from fourstage.model.cache import LayerCache
from fourstage.model.config import ModelConfig
from fourstage.model.packing import Packing

Rope = tuple[Tensor, Tensor]  # cos and sin [B or 1, T, 1, C], as rope_angles gives them

# cuDNN's attention spends half a second planning for each new shape: of a decoded token, a batch, a
# piece of a rollout. Flash and memory-efficient attention take any shape.
torch.backends.cuda.enable_cudnn_sdp(False)


class Linear(nn.Linear):
    """A projection without bias whose own __init__ draws the weight from N(0, std^2). ZeRO-3
    partitions a layer when its __init__ ends: what a parent wrote later would be lost."""

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


def rotate(x_BTHC: Tensor, rope: Rope) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) for the halves a, b of C, as transformers does."""
    cos, sin = rope
    return torch.addcmul(x_BTHC * cos, x_BTHC.roll(x_BTHC.shape[-1] // 2, -1), sin).to(x_BTHC.dtype)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245), queries and keys normalised per head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)  # queries, keys, values
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
        """[B, T, D] -> [B, T, D].

        mask: bool [B or 1, 1, T, T], True where attention is allowed; causal by default.
        packing: x is [1, N, D], the distinct tokens of the rows that attend.
        cache: gets the keys and values.
        """
        qkv_BTJC = self.project(x_BTD)
        fits = mask is None and cache is None and self.has_norms() and len(rope[0]) == 1
        gains = (self.q_norm.weight, self.k_norm.weight) if fits else ()
        if fits and ops.applies((qkv_BTJC, *gains, *rope), self.head_dim):
            gain_QC = self.head_gains(query_scale=self.head_dim**-0.5)
            cos_TC, sin_TC = (angles[0, :, 0] for angles in rope)
            qkv_BTJC = ops.kernels.heads(qkv_BTJC, gain_QC, cos_TC, sin_TC, self.q_norm.eps)
            if packing is not None:
                qkv_BTJC = self._spread(qkv_BTJC, packing)
            y_BTHC, _ = ops.kernels.attention(qkv_BTJC, self.heads[0])
        else:
            qkv = self.split(qkv_BTJC, rope)
            if cache is not None:
                cache.store(*qkv[1:])
            if packing is not None:
                qkv_BTJC = torch.cat([x.transpose(1, 2) for x in qkv], dim=2)
                rows = self._spread(qkv_BTJC, packing).split(self.heads, dim=2)
                qkv = [x.transpose(1, 2) for x in rows]
            y_BHTC = F.scaled_dot_product_attention(
                *qkv, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
            y_BTHC = y_BHTC.transpose(1, 2)
        y_BTX = y_BTHC.flatten(2)
        return self.out(y_BTX if packing is None else packing.collect(y_BTX)[None])

    def _spread(self, qkv_1NJC: Tensor, packing: Packing) -> Tensor:
        """Heads of distinct tokens -> of whole rows, [B, T, J, C]."""
        return packing.spread(qkv_1NJC[0].flatten(1)).unflatten(-1, (-1, self.head_dim))

    def project(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, J, C]."""
        return self.qkv(x_BTD).unflatten(-1, (-1, self.head_dim))

    def split(self, qkv_BTJC: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised and rotated, and values; [B, H or G, T, C] each."""
        H, G, _ = self.heads
        qk_BTJC, v_BTGC = qkv_BTJC.split((H + G, G), dim=2)
        if self.has_norms():
            gain_JC = self.head_gains()
            qk_BTJC = F.rms_norm(qk_BTJC, gain_JC.shape[-1:], None, self.q_norm.eps)
            qk_BTJC = qk_BTJC * gain_JC.to(qk_BTJC.dtype)
        else:
            q_BTHC, k_BTGC = qk_BTJC.split((H, G), dim=2)
            qk_BTJC = torch.cat((self.q_norm(q_BTHC), self.k_norm(k_BTGC)), dim=2)
        qk_BTJC = rotate(qk_BTJC, rope).to(v_BTGC.dtype)  # CUDA's autocast has norms in float32
        q_BTHC, k_BTGC = qk_BTJC.split((H, G), dim=2)
        return q_BTHC.transpose(1, 2), k_BTGC.transpose(1, 2), v_BTGC.transpose(1, 2)

    def head_gains(self, query_scale: float = 1.0) -> Tensor:
        """[H + G, C]: what heads are multiplied by after their norms, queries also by the scale."""
        (H, G, _), C = self.heads, self.head_dim
        q_C = k_C = torch.ones(C, device=self.qkv.weight.device)
        if self.has_norms():
            q_C, k_C = self.q_norm.weight, self.k_norm.weight
        return torch.cat(((q_C * query_scale).expand(H, C), k_C.expand(G, C)))

    def has_norms(self) -> bool:
        """Whether both norms can be applied as one: under ZeRO-3 they need their own forwards,
        which gather the weights."""
        return isinstance(self.q_norm, RMSNorm) and self.q_norm.weight.numel() > 0
