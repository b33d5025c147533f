"""Checkpoints of transformers give the same logits here, or one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourstage.errors import UserError
from fourstage.exchange.checkpoint import digest, load_checkpoint, read_checkpoint
from tests.exchange.checkpoints import logits, network, save

IDS_BT = torch.randint(110, (3, 40), generator=torch.Generator().manual_seed(1))


def ours(folder: Path, vocab_size: int = 110, **changes) -> torch.Tensor:
    """Logits of the checkpoint in our network."""
    model = read_checkpoint(folder, "it").model
    model = type(model)(**{**vars(model), **changes})
    policy = load_checkpoint(folder, model, vocab_size).eval()
    with torch.no_grad():
        return policy.logits(policy(IDS_BT).hidden_BTD)


@pytest.mark.parametrize("path", ["grouped", "loop"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("glm", {}),
        ("glm", {"tie_word_embeddings": True}),
        ("glm", {"n_shared_experts": 2}),
        ("glm", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
        ("glm", {"use_qk_norm": False, "head_dim": 8}),
        ("qwen", {}),
        ("qwen", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 12}),
    ],
)
def test_logits_are_those_of_transformers(kind, changes, path, tmp_path) -> None:
    model = network(kind, **changes)
    folder = save(model, tmp_path / "it")
    expected = logits(model, IDS_BT)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(folder, expert_path=path), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["glm", "qwen"])
def test_sharded_and_in_bfloat16(kind, tmp_path) -> None:
    model = network(kind).to(torch.bfloat16)
    folder = save(model, tmp_path / "it", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    # not model.float(): its rotary frequencies are rounded already
    again = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    expected = logits(again, IDS_BT)
    torch.testing.assert_close(ours(folder), expected, atol=1e-4, rtol=0)


def test_a_shared_expert_of_zeros_is_none(tmp_path) -> None:
    model = network("glm")
    for name, tensor in model.state_dict().items():
        if "shared_experts" in name:
            tensor.zero_()
    folder = save(model, tmp_path / "it")
    assert read_checkpoint(folder, "it").model.d_shared == 0
    torch.testing.assert_close(ours(folder), logits(model, IDS_BT), atol=1e-4, rtol=0)


def test_rows_of_the_embedding_that_stand_for_no_token_are_left_out(tmp_path) -> None:
    model = network("qwen", vocab_size=128)
    found = ours(save(model, tmp_path / "it"))
    torch.testing.assert_close(found, logits(model, IDS_BT)[..., :110], atol=1e-4, rtol=0)


def test_experts_stored_as_one_tensor(tmp_path) -> None:
    model = network("glm")
    folder = save(model, tmp_path / "it")
    rename(folder, {name: name for name in model.state_dict()}, model.state_dict())
    torch.testing.assert_close(ours(folder), logits(model, IDS_BT), atol=1e-4, rtol=0)


def test_what_predicts_further_ahead_is_left_out(tmp_path) -> None:
    folder = save(model := network("glm"), tmp_path / "it")
    edit(folder, {"model.layers.2.eh_proj.weight": torch.ones(2)})
    torch.testing.assert_close(ours(folder), logits(model, IDS_BT), atol=1e-4, rtol=0)


def rename(folder: Path, names: dict[str, str], state: dict) -> None:
    save_file({new: state[old].contiguous() for old, new in names.items()}, folder / WEIGHTS)


def edit(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) remove tensors."""
    weights = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: x for name, x in weights.items() if x is not None}, folder / WEIGHTS)


WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
BROKEN = {
    "a tensor is missing": ({UP: None}, rf"{UP} is missing"),
    "two are": ({UP: None, "model.norm.weight": None}, r"and 1 more are missing"),
    "an unknown tensor": ({"model.extra": torch.ones(1)}, "model.extra has no place in our model"),
    "another shape": ({UP: torch.ones(3, 32)}, rf"{UP} has the shape \[3, 32\], .* \[48, 32\]"),
    "a bias": ({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, "q_proj.bias has no"),
    "not finite": ({UP: torch.full((48, 32), float("nan"))}, rf"{UP} is not finite"),
    "integers": ({UP: torch.ones(48, 32, dtype=torch.int8)}, rf"{UP} is int8: needed is float32"),
    "a vocabulary": ({"lm_head.weight": torch.ones(9, 32)}, r"\[9, 32\], .* \[110, 32\]"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_wrong_tensors_are_one_line(what, tmp_path) -> None:
    folder = save(network("qwen"), tmp_path / "it")
    changes, line = BROKEN[what]
    edit(folder, changes)
    with pytest.raises(UserError, match=line) as caught:
        ours(folder)
    assert "\n" not in str(caught.value)


def test_a_tied_head_must_be_the_embedding(tmp_path) -> None:
    folder = save(model := network("qwen", tie_word_embeddings=True), tmp_path / "it")
    head = model.state_dict()["model.embed_tokens.weight"]
    edit(folder, {"lm_head.weight": head.clone()})
    torch.testing.assert_close(ours(folder), logits(model, IDS_BT), atol=1e-4, rtol=0)
    edit(folder, {"lm_head.weight": head + 1})
    with pytest.raises(UserError, match="tie_word_embeddings: true, but lm_head.weight differs"):
        ours(folder)


def test_broken_folders_are_one_line(tmp_path) -> None:
    whole = save(network("qwen"), tmp_path / "whole", max_shard_size="20KB")
    shard = sorted(whole.glob("*.safetensors"))[1]
    for break_it, line in (
        (lambda: shard.write_bytes(shard.read_bytes()[:-100]), "broken or cut off"),
        (lambda: shard.unlink(), f"{shard.name} is missing"),
        (lambda: (whole / f"{WEIGHTS}.index.json").write_text("{"), "index.json: broken"),
        (lambda: (whole / f"{WEIGHTS}.index.json").unlink(), f"no {WEIGHTS} and no"),
        (lambda: (whole / "pytorch_model.bin").write_bytes(b"x"), "only .bin weights"),
        (lambda: (whole / "config.json").write_text("[]"), "no JSON object"),
        (lambda: (whole / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda: (whole / "config.json").unlink(), "no config.json"),
    ):
        break_it()
        with pytest.raises(UserError, match=line):
            ours(whole)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no config.json"):
        read_checkpoint(tmp_path / "empty", "it")
    folder = save(network("qwen"), tmp_path / "it")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer.json"):
        read_checkpoint(folder, "it")


def test_the_digest_is_of_the_content(tmp_path) -> None:
    memo, folder = tmp_path / "memo", save(network("qwen"), tmp_path / "it")
    first = digest(folder, memo)
    assert re.fullmatch("[0-9a-f]{16}", first)
    (kept,) = memo.iterdir()
    known = json.loads(kept.read_text())
    known[WEIGHTS][2] = "remembered"
    kept.write_text(json.dumps(known))
    assert digest(folder, memo) != first, "the stored sum was not used"
    kept.write_text("[")
    assert digest(folder, memo) == first
    folder.rename(tmp_path / "moved")
    folder = tmp_path / "moved"
    assert digest(folder, memo) == first
    edit(folder, {UP: torch.ones(48, 32)})
    assert digest(folder, memo) != first
    first = digest(folder, memo)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert digest(folder, memo) != first
