"""Generation's half of the network: prompts once, then one more token for each row at a time.

A step of one token has little arithmetic, so its time is the number of operations. It does what
Transformer.forward does, in fewer of them: what is equal in all steps is made once, such as
rotations that hold the gains of the heads' norms and the 1/sqrt(C) of attention.

Shape legend: B rows, T tokens, D d_model, H query heads, G key/value heads, J = H + 2 G,
C head_dim, S positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fourstage.model.attention import Attention, Rope, rope_angles
from fourstage.model.cache import LayerCache
from fourstage.model.flops import forward_flops, head_flops
from fourstage.model.moe import MoE
from fourstage.model.transformer import Transformer


class Decoder:
    """Continues rows of tokens, whose keys and values it holds; for a network in eval mode.

    capacity: tokens that a row may have in all, for which memory is taken at the first.
    """

    @torch.no_grad()
    def __init__(self, model: Transformer, capacity: int):
        c = model.config
        assert capacity <= c.max_seq_len, f"{capacity} tokens exceed max_seq_len"
        self.model, self.length = model, 0
        positions_1S = torch.arange(capacity, device=model.embedding.weight.device)[None]
        self.rope = rope_angles(positions_1S, c.head_dim, c.rope_theta)
        self.caches = [LayerCache(capacity) for _ in model.blocks]
        # looked up once: a module's attribute costs as much as a small operation
        self.layers = [
            (
                block.attention_norm.weight,
                block.attention.qkv.weight,
                _rope_with_gains(block.attention, self.rope),
                cache,
                block.attention.out.weight,
                block.mlp_norm.weight,
                block.mlp.decode if isinstance(block.mlp, MoE) else block.mlp,
            )
            for block, cache in zip(model.blocks, self.caches, strict=True)
        ]

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor, mask: Tensor | None = None) -> None:
        """The first tokens of each row, int64 [B, T]; mask: bool [B or 1, 1, T, T], else causal.

        Keys and values are all that a next token needs: the last block computes nothing else.
        """
        assert self.length == 0, "the rows have begun"
        model, c, (B, T) = self.model, self.model.config, ids_BT.shape
        cos, sin = self.rope
        rope = cos[:, :T], sin[:, :T]
        x_BTD = model.embedding(ids_BT)
        *others, (last, last_cache) = zip(model.blocks, self.caches, strict=True)
        for block, cache in others:
            x_BTD, _ = block(x_BTD, rope, mask=mask, cache=cache)
        last.attention.store(last.attention_norm(x_BTD), rope, last_cache)
        self.length = T
        below = forward_flops(replace(c, n_layers=c.n_layers - 1), B * T, T) if others else 0
        qkv = head_flops(c.d_model, sum(last.attention.heads) * c.head_dim, B * T)
        model.count_flops(below + qkv, has_backward=False)

    @torch.no_grad()
    def __call__(self, ids_B: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """int64 [B], a token more for each row -> logits [B, V] of the one after it.

        mask_BS: bool, False where a row has padding; S counts the new token.
        """
        model, c, at = self.model, self.model.config, self.length
        B, C, G, n_qk = len(ids_B), c.head_dim, c.n_kv_heads, c.n_heads + c.n_kv_heads
        shape, eps = (c.d_model,), c.norm_eps
        mask = None if mask_BS is None else mask_BS[:, None, None]
        x_BD = F.embedding(ids_B, model.embedding.weight)
        for gain_D, qkv_weight, (cos, sin), cache, out_weight, mlp_gain_D, mlp in self.layers:
            qkv_BJC = F.linear(F.rms_norm(x_BD, shape, gain_D, eps), qkv_weight).view(B, -1, C)
            qk_BJC = qkv_BJC[:, :n_qk]
            if c.qk_norm:
                qk_BJC = F.rms_norm(qk_BJC, (C,), None, eps)
            qk_BJC = torch.addcmul(qk_BJC * cos[at], qk_BJC.roll(C // 2, -1), sin[at])
            qk_BJC = qk_BJC.to(qkv_BJC.dtype)
            cache.append(qk_BJC[:, -G:, None], qkv_BJC[:, n_qk:, None])
            y_BGRC = cache.attend(qk_BJC[:, :-G].reshape(B, G, -1, C), mask)
            x_BD = x_BD + F.linear(y_BGRC.view(B, -1), out_weight)
            x_BD = x_BD + mlp(F.rms_norm(x_BD, shape, mlp_gain_D, eps))
        self.length = at + 1
        model.count_flops(forward_flops(c, B, at + 1), has_backward=False)
        return model.logits(F.rms_norm(x_BD, shape, model.norm.weight, eps))

    def keep(self, rows: Tensor) -> None:
        """Row i is then what row rows[i] was, int64 [b]: some rows less, or a row several times."""
        for cache in self.caches:
            cache.keep(rows)


def _rope_with_gains(attention: Attention, rope: Rope) -> Rope:
    """cos and sin [S, H + G, C]: y = x cos + (x rolled by C/2) sin is the head, normalised or not,
    times its gain, rotated; queries are divided by sqrt(C) too."""
    (H, G, _), C = attention.heads, attention.head_dim
    cos_S1C, sin_S1C = rope[0][0], rope[1][0]
    gain_JC = torch.ones(H + G, C, device=cos_S1C.device)
    if attention.has_norms():
        gain_JC[:H], gain_JC[H:] = attention.q_norm.weight, attention.k_norm.weight
    gain_JC[:H] *= C**-0.5
    return cos_S1C * gain_JC, sin_S1C * gain_JC.roll(C // 2, -1)
