"""A decode step in PyTorch's operations: on a GPU, in half precision, or where no kernel fits.

It computes what Transformer.forward does in fewer operations. What all steps share is computed
once: rotations that include the gains of the heads' norms and attention's 1/sqrt(C), and the
weights in autocast's half precision.

Shape legend: B rows, T tokens, D d_model, H query heads, G key/value heads, R = H / G, J = H + 2 G,
C head_dim, S positions, V vocabulary.
"""

from copy import copy
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourstage.model.attention import Rope, rope_angles
from fourstage.model.cache import LayerCache
from fourstage.model.config import ModelConfig
from fourstage.model.moe import MoE, Router
from fourstage.model.precision import LARGE_VOCABULARY, autocast_dtype, full_precision
from fourstage.model.transformer import Block, Transformer

Description = tuple[type, dict[str, Any], dict[str, Any]]  # class, shapes of weights, settings


def _described(module: nn.Module) -> Description:
    shapes = {name: x is not None and x.shape for name, x in module._parameters.items()}
    if isinstance(module, Transformer):  # its attributes count and cache what it does
        return type(module), shapes, {}
    others = {"training", "p"}  # generation has no dropout
    public = {name: x for name, x in vars(module).items() if name[0] != "_" and name not in others}
    return type(module), shapes, public


@lru_cache(maxsize=4)
def _as_built(config: ModelConfig, vocab_size: int) -> dict[str, Description]:
    with torch.device("meta"):
        network = Transformer(config, vocab_size)
    return {name: _described(module) for name, module in network.named_modules()}


def is_as_built(model: Transformer, any_router: bool = False) -> bool:
    """Whether all modules are what the network's config builds, whose arithmetic a decode step
    repeats: in class, settings and shapes, without hooks or methods of their own. any_router: a
    Router may be of another kind."""
    found, built = dict(model.named_modules()), _as_built(model.config, model.vocab_size)
    if any(module._forward_hooks or module._forward_pre_hooks for module in found.values()):
        return False
    free = tuple(n for n, module in found.items() if any_router and isinstance(module, Router))
    found, built = (
        {name: what for name, what in side.items() if not name.startswith(free)}
        for side in (found, built)
    )
    return found.keys() == built.keys() and all(map(_is_alike, found.values(), built.values()))


def _is_alike(module: nn.Module, built: Description) -> bool:
    if any(hasattr(type(module), name) for name in vars(module)):  # a method of its own
        return False
    kind, shapes, settings = _described(module)
    # it may have settings besides
    return (kind, shapes) == built[:2] and {**settings, **built[2]} == settings


class TorchSteps:
    """One decoder's rows: their keys and values, and the weights as a step reads them."""

    @staticmethod
    def supports(model: Transformer) -> bool:
        """Whether a step computes what this network's modules compute. A router is called, so any
        kind of Router will do."""
        return is_as_built(model, any_router=True)

    def __init__(
        self, model: Transformer, capacity: int, real_BS: Tensor | None = None, rows: int = 0
    ):
        """rows: the maximum number, where keys and values may not move in memory; 0: they may."""
        c = model.config
        self.model, self.capacity = model, capacity
        self.real_BS, self.is_padded = real_BS, real_BS is not None
        self.places_1S = torch.arange(capacity, device=model.embedding.weight.device)[None]
        self.rope = rope_angles(self.places_1S, c.head_dim, c.rope_theta)
        self.caches = [LayerCache(capacity, rows) for _ in model.blocks]
        self.dtype = autocast_dtype(model.embedding.weight)
        self.casts: list[tuple[Tensor, Tensor]] = []  # weights in dtype, and their originals
        # looked up once: reading a module's attribute costs as much as a small operation
        self.layers = [
            self._layer(block, cache)
            for block, cache in zip(model.blocks, self.caches, strict=True)
        ]
        is_large = model.vocab_size > LARGE_VOCABULARY
        head_weight = (model.head or model.embedding).weight
        self.head_weight = self.cast(head_weight) if is_large else head_weight

    def _layer(self, block: Block, cache: LayerCache) -> tuple[Any, ...]:
        """What compute reads of a block."""
        w, mlp = block.weights(), self.cast_module(block.mlp)
        rope, qkv, out = rope_with_gains(w.head_gain, self.rope), self.cast(w.qkv), self.cast(w.out)
        mlp = mlp.decode if isinstance(mlp, MoE) else mlp
        return rope, cache, w.attention_gain, qkv, out, w.mlp_gain, mlp

    def prefill(self, ids_BT: Tensor) -> None:
        B, T = ids_BT.shape
        rope = self.rope[0][:, :T], self.rope[1][:, :T]
        mask = prefill_mask(self.real_BS[:B, :T]) if self.is_padded else None
        x_BTD = self.model.embedding(ids_BT)
        *others, (last, last_cache) = zip(self.model.blocks, self.caches, strict=True)
        for block, cache in others:
            x_BTD, _ = block(x_BTD, rope, mask=mask, cache=cache)
        qkv_BTJC = last.attention.project(last.attention_norm(x_BTD))
        last_cache.store(*last.attention.split(qkv_BTJC, rope)[1:])

    def step(self, ids_B: Tensor, at: int | Tensor) -> Tensor:
        """The tokens at place `at` -> logits [B, V]. For a place in a tensor, int64 [1], all shapes
        are those of the capacity and nothing waits for the GPU, so that a recording serves every
        place."""
        model, c = self.model, self.model.config
        B, C, G, n_qk = len(ids_B), c.head_dim, c.n_kv_heads, c.n_heads + c.n_kv_heads
        shape, eps = (c.d_model,), c.norm_eps
        S, mask = self._seen(B, at)
        x_BD = F.embedding(ids_B, model.embedding.weight)
        for (cos, sin), cache, gain_D, qkv_weight, out_weight, mlp_gain_D, mlp in self.layers:
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

    def _seen(self, B: int, at: int | Tensor) -> tuple[int, Tensor | None]:
        """S, and bool [B or 1, 1, 1, S]: which of the first S places a token at `at` attends to."""
        if isinstance(at, int):
            return at + 1, self.real_BS[:B, None, None, : at + 1] if self.is_padded else None
        seen_BS = self.places_1S <= at
        if self.real_BS is not None:
            seen_BS = seen_BS & self.real_BS[:B]
        return self.capacity, seen_BS[:, None, None]

    def keep(self, rows: Tensor) -> None:
        for cache in self.caches:
            cache.keep(rows)
        self.real_BS = None if self.real_BS is None else self.real_BS[rows]

    def cast(self, weight: Tensor) -> Tensor:
        if weight.dtype == self.dtype:
            return weight
        self.casts.append((weight.to(self.dtype), weight))
        return self.casts[-1][0]

    def cast_module(self, module: nn.Module) -> nn.Module:
        """The module, or a copy with weights in dtype; routers stay in full precision."""
        if isinstance(module, Router) or all(w.dtype == self.dtype for w in module.parameters()):
            return module
        twin = copy(module)
        twin._parameters = {
            name: w if w is None else nn.Parameter(self.cast(w), requires_grad=False)
            for name, w in module._parameters.items()
        }
        twin._modules = {name: self.cast_module(x) for name, x in module.named_children()}
        return twin


def rope_with_gains(gain_JC: Tensor, rope: Rope) -> Rope:
    """cos and sin [S, H + G, C]: x cos + (x rolled by C/2) sin is x times its gain, rotated."""
    cos_S1C, sin_S1C = (x[0] for x in rope)
    return cos_S1C * gain_JC, sin_S1C * gain_JC.roll(gain_JC.shape[1] // 2, -1)


def prefill_mask(real_BT: Tensor) -> Tensor:
    """bool [B, 1, T, T], causal over real tokens; padding sees itself, as not every attention
    backend defines a softmax over nothing."""
    at_T = torch.arange(real_BT.shape[1], device=real_BT.device)
    seen_BTT = (at_T <= at_T[:, None]) & real_BT[:, None]
    return (seen_BTT | (at_T == at_T[:, None]))[:, None]
