"""The same model in transformers, with the same weights; needs `make setup-dev`.

Glm4Moe is our architecture: sigmoid router with a selection bias, QK-norm, grouped queries, shared
expert. Qwen3Moe has a softmax router and is otherwise of the same shape; it only races.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fourstage.errors import UserError
from fourstage.model import ModelConfig, Transformer

EXPERTS = ("eager", "grouped_mm", "batched_mm")  # transformers' experts_implementation


def library(name: str) -> ModuleType:
    """transformers or trl, without what they say at every turn; UserError where it is missing."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise UserError(f"{name} is not installed: `make setup-dev` installs it") from None
    importlib.import_module("transformers").logging.set_verbosity_error()
    return module


def common_values(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """What both of transformers' configs call alike."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_expert,
        "moe_intermediate_size": config.d_expert,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "num_experts_per_tok": config.top_k,
        "norm_topk_prob": config.top_k > 1,
        "max_position_embeddings": config.max_seq_len,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "experts_implementation": "eager",
    }


def glm4_moe(config: ModelConfig, vocab_size: int) -> nn.Module:
    """A Glm4MoeForCausalLM of this shape with its own random weights."""
    transformers = library("transformers")
    warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # no shared expert
    assert config.num_experts > 1, "Glm4Moe needs two experts at least"
    assert config.d_shared % config.d_expert == 0, "its shared expert is a multiple of the others"
    shape = transformers.Glm4MoeConfig(
        **common_values(config, vocab_size),
        n_routed_experts=config.num_experts,
        n_shared_experts=config.d_shared // config.d_expert,
        routed_scaling_factor=config.route_scale,
        first_k_dense_replace=0,
        num_mtp_layers=0,
        use_qk_norm=config.qk_norm,
        partial_rotary_factor=1.0,
    )
    return transformers.Glm4MoeForCausalLM(shape)


def qwen3_moe(config: ModelConfig, vocab_size: int) -> nn.Module:
    """A Qwen3MoeForCausalLM of this shape, which has no shared expert."""
    transformers = library("transformers")
    assert not config.d_shared, "Qwen3Moe has no shared expert"
    shape = transformers.Qwen3MoeConfig(
        **common_values(config, vocab_size), num_experts=config.num_experts
    )
    return transformers.Qwen3MoeForCausalLM(shape)


@torch.no_grad()
def copy_weights(ours: Transformer, theirs: nn.Module) -> None:
    """Our weights and router biases into a Glm4MoeForCausalLM of the same shape; all of them."""
    weights: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": ours.embedding.weight,
        "model.norm.weight": ours.norm.weight,
        "lm_head.weight": (ours.embedding if ours.head is None else ours.head).weight,
    }
    for i, block in enumerate(ours.blocks):
        attention, mlp, layer = block.attention, block.mlp, f"model.layers.{i}"
        heads = [n * attention.head_dim for n in attention.heads]
        q, k, v = attention.qkv.weight.split(heads)
        weights |= {
            f"{layer}.input_layernorm.weight": block.attention_norm.weight,
            f"{layer}.post_attention_layernorm.weight": block.mlp_norm.weight,
            f"{layer}.self_attn.q_proj.weight": q,
            f"{layer}.self_attn.k_proj.weight": k,
            f"{layer}.self_attn.v_proj.weight": v,
            f"{layer}.self_attn.o_proj.weight": attention.out.weight,
            f"{layer}.mlp.gate.weight": mlp.router.proj.weight,
            f"{layer}.mlp.gate.e_score_correction_bias": mlp.router.expert_bias_E,
            f"{layer}.mlp.experts.gate_up_proj": mlp.experts.gate_up_EDF.mT,
            f"{layer}.mlp.experts.down_proj": mlp.experts.down_EFD.mT,
        }
        if ours.config.qk_norm:
            weights[f"{layer}.self_attn.q_norm.weight"] = attention.q_norm.weight
            weights[f"{layer}.self_attn.k_norm.weight"] = attention.k_norm.weight
        gate_up = down = torch.empty(0)
        if mlp.shared is not None:
            gate_up, down = mlp.shared.gate_up.weight, mlp.shared.down.weight
        gate, up = gate_up.chunk(2)
        for name, weight in (("gate", gate), ("up", up), ("down", down)):
            to = f"{layer}.mlp.shared_experts.{name}_proj.weight"
            weights[to] = weight if weight.numel() else theirs.get_parameter(to)
    theirs.load_state_dict(weights)
