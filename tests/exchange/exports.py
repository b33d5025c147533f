"""Small models of every shape that is exported: as finished runs, as exported folders, and what our
own decoder answers."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from fourstage.exchange.__main__ import main
from fourstage.exchange.checkpoint import load_checkpoint, read_checkpoint
from fourstage.exchange.export import write_folder
from fourstage.model import ModelConfig, ScalarModel, Transformer
from fourstage.model.weights import save_weights
from fourstage.sampling.generate import Sampling, generate
from fourstage.tokenizer import Tokenizer
from tests.model.configs import read_config

NANO = read_config("moe_nano", init_std=0.2)  # weights far apart, so that what differs shows
DENSE = read_config("dense_tiny", init_std=0.1)
SHAPES: dict[str, ModelConfig] = {
    "moe_nano": NANO,
    "moe_tiny": read_config("moe_tiny", init_std=0.1),
    "top_1": replace(NANO, top_k=1, route_scale=2.5),
    "shared": replace(NANO, d_shared=2 * NANO.d_expert),
    "odd_shared": replace(NANO, d_shared=NANO.d_expert + 13),
    "odd_widths": replace(NANO, d_model=31, d_expert=7, d_shared=9, expert_path="loop"),
    "tied": replace(NANO, tie_embeddings=True),
    "no_qk_norm": replace(NANO, qk_norm=False, norm_eps=1e-6, rope_theta=5e5),
    "wide_heads": replace(NANO, head_dim=64, n_kv_heads=2),
    "dense_tiny": DENSE,
    "dense_tied": replace(DENSE, tie_embeddings=True),
    "llama": replace(DENSE, qk_norm=False, tie_embeddings=True),
}
EXPERTS = [name for name, shape in SHAPES.items() if not shape.dense]
SERVED = ("moe_nano", "top_1", "odd_shared", "tied", "dense_tiny", "llama")  # a class or trait each
TEXTS = ["The quick brown fox jumps over the lazy dog. Say it is 12 + 3 = 15?\n", "It is so. "] * 20
TIE = 1e-4  # logits that other software may order in another way


@cache
def tokenizer(name: str) -> Tokenizer:
    """char or bpe."""
    return Tokenizer.char() if name == "char" else Tokenizer.bpe(TEXTS, 320)


def network(shape: ModelConfig, vocab_size: int = 103, seed: int = 0) -> Transformer:
    """Random weights, gains and selection biases that are not neutral."""
    torch.manual_seed(seed)
    made = Transformer(shape, vocab_size).eval()
    with torch.no_grad():
        for name, x in made.state_dict().items():
            if "norm" in name:
                x.uniform_(0.5, 1.5)
            elif name.endswith("expert_bias_E"):
                x.normal_(std=0.5)
    return made


def rounded(model: Transformer) -> Transformer:
    """With the weights that a bfloat16 file holds; the biases of the routers stay."""
    for name, x in model.state_dict().items():
        if not name.endswith("expert_bias_E"):
            x.copy_(x.to(torch.bfloat16))
    return model


@torch.no_grad()
def logits(model: Transformer, ids_BT: Tensor) -> Tensor:
    return model.logits(model(ids_BT).hidden_BTD)


def save_run(
    outputs: Path, model: nn.Module, words: Tokenizer | None = None, stage: str = "sft"
) -> Path:
    """As a finished run of the stage."""
    run_id = stage.ljust(10, "x")
    folder = outputs / "runs" / f"{stage}-{run_id}"
    folder.mkdir(parents=True)
    save_weights(folder, model, words or tokenizer("char"))
    backbone = model.backbone if isinstance(model, ScalarModel) else model
    record = {"id": run_id, "stage": stage, "parents": {}, "debug": None, "group": run_id}
    record |= {"status": "finished", "started": "2026-01-01", "finished": "2026-01-02"}
    shape = {"seed": 0, "model": {"name": backbone.config.name}, "stages": {stage: {}}}
    record |= {"config": shape, "cost": {"seconds": 1.0}}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


# --- exported again, and by the command

IDS_BT = torch.randint(103, (3, 60), generator=torch.Generator().manual_seed(1))
FILES = ["config.json", "generation_config.json", "model.safetensors"]
FILES += ["tokenizer.json", "tokenizer_config.json"]


def reimported(folder: Path, **changes):
    """The network that stages.pretrain.parent=hf:FOLDER starts from."""
    model = replace(read_checkpoint(folder, "it").model, **changes)
    return load_checkpoint(folder, model, Tokenizer.from_folder(folder).vocab_size).eval()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def typed(outputs: Path, *arguments: str) -> None:
    main([f"outputs={outputs}", *arguments])


# --- as a folder that answers


@dataclass(frozen=True)
class Export:
    """An exported folder, and the model that it was made of."""

    folder: Path
    model: Transformer
    tokenizer: Tokenizer


def exported(shape: str, folder: Path, kind: str = "char") -> Export:
    """One of SHAPES with a tokenizer."""
    words = tokenizer(kind)
    model = network(SHAPES[shape], words.vocab_size)
    write_folder(folder, model, words)
    return Export(folder, model, words)


def questions(words: Tokenizer, n: int) -> list[str]:
    """n texts, no two of as many tokens."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abc de 12+=?\n", k=i + 1)) for i in range(3 * n)]
    by_length = {len(words.encode(text)): text for text in texts}
    assert len(by_length) >= n
    return list(by_length.values())[:n]


def prompts(words: Tokenizer, n: int) -> list[list[int]]:
    """The ids up to the answer of n questions."""
    return [words.prompt([asked(text)]) for text in questions(words, n)]


def asked(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def shown(words: Tokenizer, ids: list[int]) -> str:
    """A text as other software shows it: <unk> is a special token and left out."""
    return words.decode([i for i in ids if i != words.unk_id])


def greedy(export: Export, rows: list[list[int]], length: int) -> list[list[int]]:
    """Our own answers, with the token that ends them."""
    how = Sampling(max_new_tokens=length, stop_id=export.tokenizer.eot_id, temperature=0)
    return generate(export.model, rows, how).answer_ids


@torch.no_grad()
def ties(
    export: Export, rows: list[list[int]], ours: list[list[int]], theirs: list[list[int]]
) -> int:
    """How many answers differ because two tokens' logits were within TIE where they part; fails
    for one that differs for another reason."""
    count = 0
    for prompt, own, other in zip(rows, ours, theirs, strict=True):
        if own == other:
            continue
        same = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), None)
        assert same is not None, f"one answer is the beginning of the other: {own}, {other}"
        hidden = export.model(torch.tensor([prompt + own[:same]])).hidden_BTD[0, -1]
        logits = export.model.logits(hidden)
        gap = (logits[own[same]] - logits[other[same]]).abs().item()
        assert gap < TIE, f"token {same} is {other[same]}, not {own[same]}: {gap:.2g} apart"
        count += 1
    return count
