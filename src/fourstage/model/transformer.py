"""The decoder: embedding, pre-norm blocks of attention and experts, final norm, head.

Shape legend: B rows, T tokens, N distinct tokens, D d_model, V vocabulary, L layers, E experts.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fourstage.model.attention import Attention, Linear, RMSNorm, Rope, rope_angles
from fourstage.model.cache import LayerCache
from fourstage.model.config import ModelConfig
from fourstage.model.flops import forward_flops, head_flops
from fourstage.model.moe import MoE, Routing, SwiGLU
from fourstage.model.packing import Packing
from fourstage.model.precision import LARGE_VOCABULARY, full_precision


@dataclass
class RouterStats:
    """What the routers of one forward did. Without gradient, except aux_loss."""

    load_LE: Tensor  # float, valid tokens per expert
    experts: list[Tensor]  # per layer int64 [B * T, K]: the chosen experts, unordered
    aux_loss: Tensor  # scalar to add to the loss: summed over layers, coefficients included


@dataclass
class ModelOutput:
    hidden_BTD: Tensor  # after the final norm, for Transformer.logits
    router: RouterStats | None  # None in a dense model


class BlockWeights(NamedTuple):
    """What a decode step reads of a block, in kernels/decode.cpp's order; None: no such weight."""

    attention_gain: Tensor  # [D]
    qkv: Tensor  # [(H + 2 G) C, D]
    head_gain: Tensor  # [H + G, C], of queries divided by sqrt(C)
    out: Tensor  # [D, H C]
    mlp_gain: Tensor  # [D]
    gate_up: Tensor  # [E, D, 2 F], of a dense model [2 F, D]
    down: Tensor  # [E, F, D], of a dense model [D, F]
    router: Tensor | None = None  # [E, D]
    bias: Tensor | None = None  # [E]
    shared_gate_up: Tensor | None = None  # [2 F_s, D]
    shared_down: Tensor | None = None  # [D, F_s]


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config, config.d_expert) if config.dense else MoE(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope,
        valid_BT: Tensor | None = None,
        mask: Tensor | None = None,
        packing: Packing | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """cache: gets the keys and values; then the routing has no statistics."""
        h_BTD = self.attention(self.attention_norm(x_BTD), rope, mask, packing, cache)
        x_BTD = x_BTD + self.dropout(h_BTD)
        h_BTD = self.mlp_norm(x_BTD)
        if isinstance(self.mlp, MoE):
            y_BTD, routing = self.mlp(h_BTD, valid_BT, has_stats=cache is None)
        else:
            y_BTD, routing = self.mlp(h_BTD), None
        return x_BTD + self.dropout(y_BTD), routing

    def weights(self) -> BlockWeights:
        """For decoders (../sampling), which have to know the block's modules."""
        attention, mlp = self.attention, self.mlp
        if isinstance(mlp, MoE):
            experts, router = mlp.experts, mlp.router
            of_mlp = [experts.gate_up_EDF, experts.down_EFD]
            of_mlp += [router.proj.weight, router.expert_bias_E]
            if mlp.shared is not None:
                of_mlp += [mlp.shared.gate_up.weight, mlp.shared.down.weight]
        else:
            of_mlp = [mlp.gate_up.weight, mlp.down.weight]
        return BlockWeights(
            self.attention_norm.weight,
            attention.qkv.weight,
            attention.head_gains(query_scale=attention.head_dim**-0.5),
            attention.out.weight,
            self.mlp_norm.weight,
            *of_mlp,
        )


class Transformer(nn.Module):
    """Training rows are right-padded, so causal attention needs no mask.

    load_LE: valid tokens per expert of the training forwards (train mode, with gradients) since
    the last take_load; None before the first, and in a dense model.
    checkpoint_activations: training forwards keep only each block's input, and the backward
    computes the rest again: less memory, a third more time.
    records_steps: whether a decode step may become a CUDA graph (sampling/recording.py).
    flops: FLOPs of this process's forwards so far (flops.py). A forward with gradients counts three
    times, for its backward; recomputed activations don't count.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.flops = 0
        self.checkpoint_activations = False
        self.records_steps = False
        self.recorded_steps: Any = None  # kept from one rollout to the next
        self.training_blocks: list[Callable[..., Any]] = []  # compiled, where that was asked for
        # not a buffer: DDP would overwrite each rank's counts with rank 0's
        self.load_LE: Tensor | None = None
        self.embedding = Embedding(vocab_size, config.d_model, config.init_std)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        tied = config.tie_embeddings
        self.head = None if tied else Linear(config.d_model, vocab_size, config.init_std)

    def _apply(self, *args: Any, **kwargs: Any) -> "Transformer":
        self.recorded_steps = None  # they read the weights at their old addresses
        return super()._apply(*args, **kwargs)

    def forward(self, ids_BT: Tensor | Packing, *, valid_BT: Tensor | None = None) -> ModelOutput:
        """int64 [B, T] -> hidden states [B, T, D] and the routers' statistics.

        valid_BT: bool, False on padding, which is routed but not counted as load or in a loss.

        A Packing -> hidden states [1, N, D] of its distinct tokens; the routers count a token once
        for each row that has it.
        """
        packing, (B, T) = None, ids_BT.shape
        if isinstance(ids_BT, Packing):
            packing, ids_BT, valid_BT = ids_BT, ids_BT.ids_N[None], ids_BT.copies_N[None]
            positions_1T = packing.positions_N[None]
        else:
            positions_1T = torch.arange(T, device=ids_BT.device)[None]
        c = self.config
        assert c.max_seq_len >= T, f"{T} tokens exceed max_seq_len"
        rope = rope_angles(positions_1T, c.head_dim, c.rope_theta)
        x_BTD = self.embedding(ids_BT)
        routings = []
        is_training = self.training and torch.is_grad_enabled()
        # torch.compile would compile anew for each packing
        may_compile = is_training and self.training_blocks and packing is None
        for block in self.training_blocks if may_compile else self.blocks:
            if is_training and self.checkpoint_activations:
                block = partial(checkpoint, block, use_reentrant=False)
            x_BTD, routing = block(x_BTD, rope, valid_BT, packing=packing)
            routings.append(routing)
        flops = forward_flops(c, ids_BT.numel(), T, queries=B * T)
        self.count_flops(flops, has_backward=x_BTD.requires_grad)
        hidden_BTD = self.norm(x_BTD)
        if c.dense:
            return ModelOutput(hidden_BTD, None)
        load_LE = torch.stack([r.load_E for r in routings])
        if is_training:
            self.load_LE = load_LE if self.load_LE is None else self.load_LE + load_LE
        aux_loss = torch.stack([r.aux_loss for r in routings]).sum()
        stats = RouterStats(load_LE, [r.experts_NK for r in routings], aux_loss)
        return ModelOutput(hidden_BTD, stats)

    def compile_blocks(self, dynamic: bool | None = None, backend: str = "inductor") -> None:
        """Compiles the blocks for training forwards; they are alike, so that one is compiled.

        dynamic: True compiles once for all numbers of rows and tokens (except for a single row, and
        again without valid_BT); None specializes on the first shapes.
        """
        self.training_blocks = [
            torch.compile(block, backend=backend, dynamic=dynamic) for block in self.blocks
        ]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], in float32 even under autocast, unless the vocabulary is large."""
        d_model = self.config.d_model
        flops = head_flops(d_model, self.vocab_size, hidden.numel() // d_model)
        self.count_flops(flops, has_backward=hidden.requires_grad)
        is_small = self.vocab_size <= LARGE_VOCABULARY
        with full_precision(hidden) if is_small else nullcontext():
            hidden = hidden.to(self.embedding.weight.dtype) if is_small else hidden
            if self.config.tie_embeddings:
                return F.linear(hidden, self.embedding.weight)
            assert self.head is not None, "a scalar model's backbone has no token head"
            return self.head(hidden)

    def count_flops(self, forward: int, *, has_backward: bool) -> None:
        """Adds the FLOPs of a forward, and of its backward where it has one."""
        self.flops += 3 * forward if has_backward else forward

    def take_load(self) -> Tensor | None:
        """load_LE, which then starts over."""
        load_LE, self.load_LE = self.load_LE, None
        return load_LE

    def expert_bias_LE(self) -> Tensor:
        """A copy of the routers' selection biases."""
        return torch.stack([block.mlp.router.expert_bias_E for block in self.blocks])

    @torch.no_grad()
    def update_expert_bias(self, load_LE: Tensor) -> None:
        """Moves each bias by bias_step * sign(mean load - load), centred; once per optimizer step.

        DeepSeek-V3, section 2.1.2; centred as in torchtitan. load_LE: the step's, over all ranks.
        """
        step_LE = self.config.bias_step * (load_LE.mean(-1, keepdim=True) - load_LE).sign()
        step_LE -= step_LE.mean(-1, keepdim=True)
        for block, step_E in zip(self.blocks, step_LE, strict=True):
            block.mlp.router.expert_bias_E += step_E


class Embedding(nn.Embedding):
    """Its own __init__ draws the vectors from N(0, std^2) (see attention.Linear)."""

    def __init__(self, vocab_size: int, dim: int, std: float):
        self.std = std
        super().__init__(vocab_size, dim)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
