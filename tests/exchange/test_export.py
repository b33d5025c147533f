"""An exported run is the same model to transformers, to our own import, and byte for byte."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fourstage.errors import UserError
from fourstage.exchange.architectures import exported_config
from fourstage.exchange.export import export, export_run, write_folder
from fourstage.model import ScalarModel
from fourstage.model.tensor_file import write_safetensors
from fourstage.model.weights import load_policy
from fourstage.runs.store import find_run
from fourstage.tokenizer import Tokenizer
from tests.exchange.exports import (
    EXPERTS,
    FILES,
    IDS_BT,
    NANO,
    SHAPES,
    files,
    logits,
    network,
    reimported,
    rounded,
    save_run,
    tokenizer,
    typed,
)
from tests.hub_tokenizers import chatml

ROOT = Path(__file__).parents[2]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is\n2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Sure?"},
]


# --- the same model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_in_transformers(shape: str, dtype: torch.dtype, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = network(SHAPES[shape])
    export_run(save_run(tmp_path, model), tmp_path / "it", dtype=dtype)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "it", dtype=torch.float32, output_loading_info=True
    )
    assert not any(map(len, info.values())), info
    expected = logits(model if dtype == torch.float32 else rounded(model), IDS_BT)
    assert expected.std() > 0.1
    with torch.no_grad():
        found = theirs(IDS_BT).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_again_is_the_same_bytes(shape: str, kind: str, tmp_path: Path) -> None:
    words = tokenizer(kind)
    model = network(SHAPES[shape], words.vocab_size)
    one, two = tmp_path / "one", tmp_path / "two"
    export_run(save_run(tmp_path, model, words), one)
    again = reimported(one, expert_path=model.config.expert_path)
    torch.testing.assert_close(logits(again, IDS_BT), logits(model, IDS_BT), atol=1e-5, rtol=0)
    write_folder(two, again, Tokenizer.from_folder(one))
    assert sorted(files(one)) == FILES and files(one) == files(two)


def test_a_model_of_width_one(tmp_path: Path) -> None:
    shape = {"d_model": 1, "d_expert": 1, "expert_path": "loop"}
    model = network(replace(NANO, **shape))
    export_run(save_run(tmp_path, model), tmp_path / "it")
    again = reimported(tmp_path / "it", **shape)
    torch.testing.assert_close(logits(again, IDS_BT), logits(model, IDS_BT), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", ["moe_nano", "odd_shared", "tied", "dense_tiny"])
def test_there_and_back_again_in_bfloat16(shape: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    export_run(save_run(tmp_path, network(SHAPES[shape])), one, dtype=torch.bfloat16)
    write_folder(two, reimported(one), Tokenizer.from_folder(one), dtype=torch.bfloat16)
    assert files(one) == files(two)
    kinds = {x.dtype for name, x in load_file(one / "model.safetensors").items() if "_bias" in name}
    assert kinds <= {torch.float32}  # transformers keeps the routers' biases so


def test_a_network_in_memory_gives_the_bytes_of_its_run(tmp_path: Path) -> None:
    for shape in ("odd_shared", "tied", "llama"):
        model = network(SHAPES[shape])
        export_run(save_run(tmp_path / shape, model), tmp_path / f"{shape}-run")
        write_folder(tmp_path / f"{shape}-memory", model, Tokenizer.char())
        assert files(tmp_path / f"{shape}-run") == files(tmp_path / f"{shape}-memory")


# --- the files


def test_the_config_of_a_model_with_experts() -> None:
    shape = replace(NANO, d_shared=NANO.d_expert + 1, tie_embeddings=True, max_seq_len=640)
    assert exported_config(shape, 103) == {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "vocab_size": 103,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 640,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        },
        "partial_rotary_factor": 1.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
        "use_qk_norm": True,
    }
    assert exported_config(SHAPES["top_1"], 103)["norm_topk_prob"] is False


@pytest.mark.parametrize("shape", EXPERTS)
def test_weights_are_those_of_the_run(shape: str, tmp_path: Path) -> None:
    model, config = network(SHAPES[shape]), SHAPES[shape]
    export_run(save_run(tmp_path, model), tmp_path / "it")
    found, own = load_file(tmp_path / "it" / "model.safetensors"), model.state_dict()
    layer, mlp = "model.layers.1.", "blocks.1.mlp."
    D, F, S = config.d_model, config.d_expert, config.d_shared
    H, G, C = config.n_heads, config.n_kv_heads, config.head_dim

    def same(name: str, expected: torch.Tensor) -> None:
        assert torch.equal(found.pop(layer + name), expected), name

    qkv = own["blocks.1.attention.qkv.weight"]
    same("self_attn.q_proj.weight", qkv[: H * C])
    same("self_attn.k_proj.weight", qkv[H * C : (H + G) * C])
    same("self_attn.v_proj.weight", qkv[(H + G) * C :])
    same("self_attn.o_proj.weight", own["blocks.1.attention.out.weight"])
    same("input_layernorm.weight", own["blocks.1.attention_norm.weight"])
    same("post_attention_layernorm.weight", own["blocks.1.mlp_norm.weight"])
    if config.qk_norm:
        same("self_attn.q_norm.weight", own["blocks.1.attention.q_norm.weight"])
        same("self_attn.k_norm.weight", own["blocks.1.attention.k_norm.weight"])
    same("mlp.gate.weight", own[f"{mlp}router.proj.weight"])
    same("mlp.gate.e_score_correction_bias", own[f"{mlp}router.expert_bias_E"])
    for e in range(config.num_experts):
        gate_up, down = own[f"{mlp}experts.gate_up_EDF"][e], own[f"{mlp}experts.down_EFD"][e]
        same(f"mlp.experts.{e}.gate_proj.weight", gate_up[:, :F].T)
        same(f"mlp.experts.{e}.up_proj.weight", gate_up[:, F:].T)
        same(f"mlp.experts.{e}.down_proj.weight", down.T)
    width = -(-max(S, 1) // F) * F  # no shared expert: one of zeros
    gate, up, down = torch.zeros(width, D), torch.zeros(width, D), torch.zeros(D, width)
    if S:
        gate[:S], up[:S] = own[f"{mlp}shared.gate_up.weight"].chunk(2)
        down[:, :S] = own[f"{mlp}shared.down.weight"]
    same("mlp.shared_experts.gate_proj.weight", gate)
    same("mlp.shared_experts.up_proj.weight", up)
    same("mlp.shared_experts.down_proj.weight", down)
    assert not [name for name in found if name.startswith(layer)]
    head = own["embedding.weight" if config.tie_embeddings else "head.weight"]
    assert torch.equal(found["lm_head.weight"], head)  # written where it is tied, too
    assert torch.equal(found["model.embed_tokens.weight"], own["embedding.weight"])
    assert torch.equal(found["model.norm.weight"], own["norm.weight"])


def test_generation_ends_where_an_answer_does(tmp_path: Path) -> None:
    words = Tokenizer.char()
    export_run(save_run(tmp_path, network(NANO)), tmp_path / "it")
    ends = json.loads((tmp_path / "it" / "generation_config.json").read_text())
    assert ends == {
        "bos_token_id": words.bos_id,
        "eos_token_id": words.eot_id,
        "pad_token_id": words.pad_id,
    }
    config = json.loads((tmp_path / "it" / "config.json").read_text())
    assert config.items() >= ends.items()


def test_a_tokenizer_of_the_hub_keeps_its_template_and_its_ends(tmp_path: Path) -> None:
    words = Tokenizer.from_folder(chatml(tmp_path / "theirs"))
    one, two = tmp_path / "one", tmp_path / "two"
    export_run(save_run(tmp_path, network(NANO, words.vocab_size), words), one)
    again = Tokenizer.from_folder(one)
    assert again.prompt(MESSAGES) == words.prompt(MESSAGES) and again.eos_ids == words.eos_ids
    write_folder(two, reimported(one), again)
    assert files(one) == files(two)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_the_tokenizer_in_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    words = tokenizer(kind)
    export_run(save_run(tmp_path, network(NANO, words.vocab_size), words), tmp_path / "it")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "it")
    found = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert list(found) == words.prompt(MESSAGES)
    text = "Two words, 12 things.\n"
    assert theirs(text)["input_ids"] == words.encode(text)
    assert theirs.decode(words.encode(text)) == text


def test_tensors_wider_in_bytes_come_first(tmp_path: Path) -> None:
    """A reader of a mapped file needs numbers of four bytes at multiples of four."""
    parts = {
        "a": torch.ones(3, dtype=torch.bfloat16),
        "b": torch.arange(5.0),
        "c": torch.ones(2, 2),
    }
    layout = {name: (x.dtype, x.shape) for name, x in parts.items()}
    write_safetensors(tmp_path / "x.safetensors", layout, parts.items())
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], x) for name, x in parts.items())
    header = json.loads((tmp_path / "x.safetensors").read_bytes()[8:].partition(b"}}")[0] + b"}}")
    assert [header[name]["data_offsets"] for name in "bca"] == [[0, 20], [20, 36], [36, 42]]


# --- reward models


def test_a_dense_reward_model_is_a_sequence_classifier(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for shape in ("dense_tiny", "llama"):
        torch.manual_seed(0)
        model = ScalarModel(network(SHAPES[shape]))
        export_run(save_run(tmp_path / shape, model, stage="reward"), tmp_path / f"{shape}-it")
        assert "generation_config.json" not in files(tmp_path / f"{shape}-it")
        theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / f"{shape}-it", output_loading_info=True
        )
        assert not any(map(len, info.values())), info
        length_B = torch.tensor([60, 7, 23])
        ids_BT = IDS_BT.clamp(min=1)
        ids_BT[torch.arange(60) >= length_B[:, None]] = 0  # <pad>
        with torch.no_grad():
            expected = model.last(ids_BT, length_B)
            found = theirs(ids_BT, attention_mask=(ids_BT != 0).long()).logits
        torch.testing.assert_close(found.squeeze(1), expected, atol=1e-5, rtol=1e-5)


def test_a_reward_model_with_experts_has_no_class(tmp_path: Path) -> None:
    run = save_run(tmp_path, ScalarModel(network(NANO)), stage="reward")
    with pytest.raises(UserError, match="for which transformers has no class: only dense ones"):
        export(run, tmp_path / "it", lambda usage: "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


# --- of trained ladders


def test_every_stage_of_a_trained_ladder(ladder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for stage in ("pretrain", "sft", "ppo", "grpo"):
        to = tmp_path / stage
        typed(ladder, f"run={stage}", f"to={to}")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(to)
        model, tokenizer = load_policy(find_run(ladder, stage))
        ids = torch.tensor([tokenizer.prompt(MESSAGES)])
        with torch.no_grad():
            found = theirs(ids).logits
        torch.testing.assert_close(found, logits(model.eval(), ids), atol=1e-4, rtol=0)
    assert "| sft | " in (to / "README.md").read_text()  # the table of stages


@pytest.mark.slow  # two processes that train
def test_a_ladder_from_an_export_gives_the_export_again(tmp_path: Path) -> None:
    def train(*arguments: str) -> None:
        command = [sys.executable, "train.py", "stage=pretrain", *arguments]
        command += ["trainer=cpu", "logger=none", f"outputs={tmp_path}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    one, two = tmp_path / "one", tmp_path / "two"
    train("model=moe_nano", "debug=fast", "tokenizer=bpe", "tokenizer.vocab_size=400")
    typed(tmp_path, "run=pretrain", f"to={one}")
    train(f"stages.pretrain.parent=hf:{one}", "stages.pretrain.max_steps=0")
    typed(tmp_path, "run=pretrain", f"to={two}")
    assert files(one) == files(two)
    assert (one / "README.md").read_text() != (two / "README.md").read_text()
