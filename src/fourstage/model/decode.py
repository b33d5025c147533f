"""Generation's half of the network: prompts once, then one more token for each row at a time.

A step of one token has little arithmetic, so its time is the number of operations. On a CPU in
float32 the whole step is one (native/decode.cpp). Elsewhere it is what Transformer.forward does, in
fewer of them: what is equal in all steps is made once, such as rotations that hold the gains of the
heads' norms and the 1/sqrt(C) of attention, and autocast's half-precision weights.

Shape legend: B rows, T tokens, D d_model, H query heads, G key/value heads, J = H + 2 G,
C head_dim, S positions, V vocabulary.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourstage.model.attention import Attention, Rope, rope_angles
from fourstage.model.cache import LayerCache
from fourstage.model.flops import forward_flops, head_flops
from fourstage.model.moe import MoE, Router
from fourstage.model.native.decode import KernelSteps
from fourstage.model.precision import LARGE_VOCABULARY, full_precision
from fourstage.model.recording import Recording, can_record
from fourstage.model.transformer import Transformer

RECORD_AFTER = 4  # steps of the same rows, after which a GPU records one and replays it


class Decoder:
    """Continues rows of tokens, whose keys and values it holds; for a network in eval mode.

    capacity: tokens that a row may have in all, for which memory is taken at the first.
    real_BS: bool [B, capacity], False where a row has padding, which is at its left and never seen.
    """

    @torch.no_grad()
    def __init__(self, model: Transformer, capacity: int, real_BS: Tensor | None = None):
        c = model.config
        assert capacity <= c.max_seq_len, f"{capacity} tokens exceed max_seq_len"
        self.model, self.capacity, self.length = model, capacity, 0
        places_1S = torch.arange(capacity, device=model.embedding.weight.device)[None]
        rope = rope_angles(places_1S, c.head_dim, c.rope_theta)
        make = KernelSteps if KernelSteps.fits(model) else TorchSteps
        self.steps = make(model, capacity, rope, real_BS)

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor) -> None:
        """The first tokens of each row, int64 [B, T].

        Keys and values are all that a next token needs: the last block computes nothing else.
        """
        model, c, (B, T) = self.model, self.model.config, ids_BT.shape
        assert self.length == 0, "the rows have begun"
        assert self.capacity >= T, f"the rows hold {self.capacity} tokens"
        self.steps.prefill(ids_BT)
        self.length = T
        flops = head_flops(c.d_model, (c.n_heads + 2 * c.n_kv_heads) * c.head_dim, B * T)
        if c.n_layers > 1:
            flops += forward_flops(replace(c, n_layers=c.n_layers - 1), B * T, T)
        model.count_flops(flops, has_backward=False)

    @torch.no_grad()
    def __call__(self, ids_B: Tensor) -> Tensor:
        """int64 [B], a token more for each row -> logits [B, V] of the one after it."""
        model, c, B, at = self.model, self.model.config, len(ids_B), self.length
        assert at < self.capacity, f"the rows hold {self.capacity} tokens"
        logits_BV = self.steps.step(ids_B, at)
        self.length = at + 1
        head = head_flops(c.d_model, model.vocab_size, B)
        model.count_flops(forward_flops(c, B, at + 1) + head, has_backward=False)
        return logits_BV

    def keep(self, rows: Tensor) -> None:
        """Row i is then what row rows[i] was, int64 [b]: some rows less, or a row several times."""
        self.steps.keep(rows)


class TorchSteps:
    """What Decoder runs where the kernel does not fit: on a GPU, in half precision."""

    def __init__(self, model: Transformer, capacity: int, rope: Rope, real_BS: Tensor | None):
        self.model, self.capacity, self.rope, self.real_BS = model, capacity, rope, real_BS
        self.recording: Recording | None = None
        self.steps_alike = 0  # since the rows changed
        self.places_1S = torch.arange(capacity, device=model.embedding.weight.device)[None]
        self.caches = [LayerCache(capacity) for _ in model.blocks]
        self.dtype = dtype = _compute_dtype(model)
        # looked up once: a module's attribute costs as much as a small operation
        self.layers = [
            (
                block.attention_norm.weight,
                block.attention.qkv.weight.to(dtype),
                _rope_with_gains(block.attention, rope),
                cache,
                block.attention.out.weight.to(dtype),
                block.mlp_norm.weight,
                mlp.decode if isinstance(mlp, MoE) else mlp,
            )
            for block, cache in zip(model.blocks, self.caches, strict=True)
            for mlp in [_cast(block.mlp, dtype)]
        ]
        is_large = model.vocab_size > LARGE_VOCABULARY
        head_weight = (model.head or model.embedding).weight
        self.head_weight = head_weight.to(dtype) if is_large else head_weight

    def prefill(self, ids_BT: Tensor) -> None:
        T = ids_BT.shape[1]
        cos, sin = self.rope
        rope = cos[:, :T], sin[:, :T]
        mask = None if self.real_BS is None else _prefill_mask(self.real_BS[:, :T])
        x_BTD = self.model.embedding(ids_BT)
        *others, (last, last_cache) = zip(self.model.blocks, self.caches, strict=True)
        for block, cache in others:
            x_BTD, _ = block(x_BTD, rope, mask=mask, cache=cache)
        last.attention.store(last.attention_norm(x_BTD), rope, last_cache)

    def step(self, ids_B: Tensor, at: int) -> Tensor:
        """The tokens at place `at` -> logits [B, V]; recorded, where that can be, after some."""
        is_steady = self.steps_alike >= RECORD_AFTER
        if self.recording is None and is_steady and can_record(self.model, self.dtype):
            self.recording = Recording(self.compute, ids_B, at)
        self.steps_alike += 1
        return (self.recording or self.compute)(ids_B, at)

    def compute(self, ids_B: Tensor, at: int | Tensor) -> Tensor:
        """What step gives.

        With a place in a tensor, int64 [1], all shapes are those of the capacity and nothing is
        asked of the GPU, so that one recording serves every place.
        """
        model, c = self.model, self.model.config
        B, C, G, n_qk = len(ids_B), c.head_dim, c.n_kv_heads, c.n_heads + c.n_kv_heads
        shape, eps = (c.d_model,), c.norm_eps
        S, mask = self._seen(at)
        x_BD = F.embedding(ids_B, model.embedding.weight)
        for gain_D, qkv_weight, (cos, sin), cache, out_weight, mlp_gain_D, mlp in self.layers:
            qkv_BJC = F.linear(F.rms_norm(x_BD, shape, gain_D, eps), qkv_weight).view(B, -1, C)
            qk_BJC = qkv_BJC[:, :n_qk]
            if c.qk_norm:
                qk_BJC = F.rms_norm(qk_BJC, (C,), None, eps)
            qk_BJC = torch.addcmul(qk_BJC * cos[at], qk_BJC.roll(C // 2, -1), sin[at])
            qk_BJC = qk_BJC.to(qkv_BJC.dtype)
            cache.store(qk_BJC[:, -G:, None], qkv_BJC[:, n_qk:, None], at)
            y_BGRC = cache.attend(qk_BJC[:, :-G].reshape(B, G, -1, C), S, mask)
            x_BD = x_BD + F.linear(y_BGRC.view(B, -1), out_weight)
            x_BD = x_BD + mlp(F.rms_norm(x_BD, shape, mlp_gain_D, eps))
        h_BD = F.rms_norm(x_BD, shape, model.norm.weight, eps)
        with full_precision(h_BD):
            return F.linear(h_BD.to(self.head_weight.dtype), self.head_weight)

    def _seen(self, at: int | Tensor) -> tuple[int, Tensor | None]:
        """S, and bool [B or 1, 1, 1, S]: which of the first S places a token at `at` sees."""
        if isinstance(at, int):
            real_BS = self.real_BS
            return at + 1, None if real_BS is None else real_BS[:, None, None, : at + 1]
        seen_BS = self.places_1S <= at
        if self.real_BS is not None:
            seen_BS = seen_BS & self.real_BS
        return self.capacity, seen_BS[:, None, None]

    def keep(self, rows: Tensor) -> None:
        for cache in self.caches:
            cache.keep(rows)
        self.real_BS = None if self.real_BS is None else self.real_BS[rows]
        self.recording, self.steps_alike = None, 0


def _compute_dtype(model: Transformer) -> torch.dtype:
    """What autocast would make of the weights at each step, anew where it keeps no cache."""
    weight = model.embedding.weight
    has_autocast = torch.is_autocast_enabled(weight.device.type)
    return torch.get_autocast_dtype(weight.device.type) if has_autocast else weight.dtype


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module, or one like it with weights of its own in dtype; routers keep full precision."""
    if isinstance(module, Router) or all(w.dtype == dtype for w in module.parameters()):
        return module
    twin = copy(module)
    twin._parameters = {
        name: weight if weight is None else nn.Parameter(weight.to(dtype), requires_grad=False)
        for name, weight in module._parameters.items()
    }
    twin._modules = {name: _cast(child, dtype) for name, child in module.named_children()}
    return twin


def _rope_with_gains(attention: Attention, rope: Rope) -> Rope:
    """cos and sin [S, H + G, C]: y = x cos + (x rolled by C/2) sin is the head, normalised or not,
    times its gain, rotated."""
    (cos_S1C, sin_S1C), gain_JC = (x[0] for x in rope), attention.head_gains()
    return cos_S1C * gain_JC, sin_S1C * gain_JC.roll(attention.head_dim // 2, -1)


def _prefill_mask(real_BT: Tensor) -> Tensor:
    """bool [B, 1, T, T], causal over real tokens.

    Padding sees itself: not every attention backend defines a softmax over nothing.
    """
    T = real_BT.shape[1]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=real_BT.device).tril()
    self_TT = torch.eye(T, dtype=torch.bool, device=real_BT.device)
    return ((causal_TT & real_BT[:, None, :]) | self_TT)[:, None]
