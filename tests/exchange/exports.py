"""Small models of every shape that is exported, as finished runs."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from fourstage.model import ModelConfig, ScalarModel, Transformer
from fourstage.model.weights import save_weights
from fourstage.tokenizer import Tokenizer
from tests.fakes import config

NANO, TINY, DENSE = (
    ModelConfig(**config(f"model={name}")["model"])
    for name in ("moe_nano", "moe_tiny", "dense_tiny")
)
SHAPES = {
    "moe_nano": NANO,
    "moe_tiny": TINY,
    "top_1": replace(NANO, top_k=1, route_scale=1.5),
    "shared": replace(NANO, d_shared=2 * NANO.d_expert),
    "odd_shared": replace(NANO, d_shared=NANO.d_expert + 13),
    "tied": replace(NANO, tie_embeddings=True),
    "no_qk_norm": replace(NANO, qk_norm=False, norm_eps=1e-6, rope_theta=5e5),
    "wide_heads": replace(NANO, head_dim=64, n_kv_heads=2),
    "dense_tiny": DENSE,
    "dense_tied": replace(DENSE, tie_embeddings=True),
    "llama": replace(DENSE, qk_norm=False),
}
EXPERTS = [name for name, shape in SHAPES.items() if not shape.dense]


@cache
def bpe() -> Tokenizer:
    texts = ["The quick brown fox jumps over the lazy dog, and then over 12 naïve 狐狸."] * 3
    return Tokenizer.bpe(texts, 300)


def network(shape: ModelConfig, vocab_size: int = 103, seed: int = 0) -> Transformer:
    """With weights large enough that what differs shows, gains and biases that aren't neutral."""
    torch.manual_seed(seed)
    made = Transformer(shape, vocab_size).eval()
    with torch.no_grad():
        for name, x in made.state_dict().items():
            if "norm" in name:
                x.uniform_(0.5, 1.5)
            elif name.endswith("expert_bias_E"):
                x.normal_(std=0.3)
            elif name != "embedding.weight":
                x.mul_(5)
    return made


def save_run(
    outputs: Path, model: nn.Module, tokenizer: Tokenizer | None = None, stage: str = "sft"
) -> Path:
    """As a finished run of the stage."""
    run_id = stage.ljust(10, "x")
    folder = outputs / "runs" / f"{stage}-{run_id}"
    folder.mkdir(parents=True)
    save_weights(folder, model, tokenizer or Tokenizer.char())
    backbone = model.backbone if isinstance(model, ScalarModel) else model
    record = {"id": run_id, "stage": stage, "parents": {}, "debug": None, "group": run_id}
    record |= {"status": "finished", "started": "2026-01-01", "finished": "2026-01-02"}
    shape = {"seed": 0, "model": {"name": backbone.config.name}, "stages": {stage: {}}}
    record |= {"config": shape, "cost": {"seconds": 1.0}}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def rounded(model: Transformer) -> Transformer:
    """With the weights that a bfloat16 file holds; the biases of the routers stay."""
    for name, x in model.state_dict().items():
        if not name.endswith("expert_bias_E"):
            x.copy_(x.to(torch.bfloat16))
    return model


@torch.no_grad()
def logits(model: Transformer, ids_BT: Tensor) -> Tensor:
    return model.logits(model(ids_BT).hidden_BTD)
