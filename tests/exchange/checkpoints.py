"""Small random checkpoints, made by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fourstage.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # so that what differs shows
    "rms_norm_eps": 1e-5,
}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "glm": (
        "Glm4Moe",
        {
            "head_dim": 16,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 0,
            "use_qk_norm": True,
            "routed_scaling_factor": 1.5,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0},
        },
    ),
    "qwen": ("Qwen3", {"head_dim": 16, "rope_parameters": ROPE}),
    "llama": ("Llama", {"rope_parameters": ROPE}),
}


def network(kind: str, vocab_size: int = 110, **changes: Any) -> Any:
    """A random model of transformers, with a correction bias and gains that are not neutral."""
    name, values = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(
        **{**SHAPE, **values, "vocab_size": vocab_size, **changes}
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for tensor_name, tensor in model.state_dict().items():
        if "norm" in tensor_name:
            tensor.uniform_(0.5, 1.5)
        if tensor_name.endswith("e_score_correction_bias"):
            tensor.normal_(std=0.5)
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    """With the character tokenizer beside it."""
    model.save_pretrained(folder, **options)
    Tokenizer.char().save(folder)
    return folder


@torch.no_grad()
def logits(model: Any, ids_BT: Tensor) -> Tensor:
    return model(ids_BT).logits.float()
