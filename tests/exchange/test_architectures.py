"""Which config.json maps onto which model, and the line for each that does not."""

from __future__ import annotations

import pytest

from fourstage.errors import UserError
from fourstage.exchange.architectures import ARCHITECTURES, DEFAULTS, RENAMED, model_config
from fourstage.model import ModelConfig

GLM = {
    "architectures": ["Glm4MoeForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 0,
    "use_qk_norm": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 1.0},
}
# of the published Qwen3-0.6B, as transformers 4.51 wrote it
QWEN = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}


def test_glm() -> None:
    assert model_config(GLM, "mine", "config.json") == ModelConfig(
        name="mine",
        d_model=64,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        num_experts=8,
        top_k=2,
        d_expert=32,
        d_shared=32,
        max_seq_len=256,
        rope_theta=5e5,
        norm_eps=1e-5,
        qk_norm=True,
    )
    assert model_config(GLM, "mine", "config.json", has_shared=False).d_shared == 0
    assert model_config({**GLM, "n_shared_experts": 3}, "m", "config.json").d_shared == 96


def test_qwen3_0_6b() -> None:
    found = model_config(QWEN, "Qwen3-0.6B", "config.json")
    assert found == ModelConfig(
        name="Qwen3-0.6B",
        d_model=1024,
        n_layers=28,
        n_heads=16,
        n_kv_heads=8,
        head_dim=128,
        num_experts=1,
        top_k=1,
        d_expert=3072,
        max_seq_len=4096,
        rope_theta=1e6,
        norm_eps=1e-6,
        qk_norm=True,
        tie_embeddings=True,
    )
    assert found.count_params(151936)[0] == 596_049_920


def test_defaults_of_missing_keys() -> None:
    found = model_config(LLAMA, "mine", "config.json")
    assert (found.head_dim, found.n_kv_heads, found.d_expert) == (16, 4, 11008)
    assert (found.rope_theta, found.norm_eps, found.max_seq_len) == (1e4, 1e-6, 2048)
    assert not found.qk_norm and not found.tie_embeddings
    qwen = {key: QWEN[key] for key in ("architectures", "vocab_size")}
    found = model_config(qwen, "mine", "config.json")
    assert (found.head_dim, found.d_model, found.n_layers) == (128, 4096, 32)


def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for kind, defaults in DEFAULTS.items():
        config = transformers.AutoConfig.for_model(kind)
        written = {RENAMED.get(k, k): v for k, v in config.to_dict().items()}
        rope = written["rope_parameters"]
        for key, default in defaults.items():
            now = rope.get(key, written.get(key))
            if default is None or (now is None and default in (1.0, False)):
                continue  # from another key, or a key that the class doesn't have
            if key == "layer_types":
                continue
            assert now == default, (kind, key)


@pytest.mark.parametrize(
    ("config", "changes", "line"),
    [
        (GLM, {"rope_parameters": {"rope_theta": 1e4}}, "partial_rotary_factor: 0.5 .* is 1.0$"),
        (GLM, {"rope_parameters": None, "partial_rotary_factor": 0.25}, "factor: 0.25"),
        (GLM, {"first_k_dense_replace": 1}, "first_k_dense_replace: 1 .* needed is 0$"),
        (GLM, {"n_group": 2}, "n_group: 2 .* needed is 1$"),
        (GLM, {"topk_group": 2}, "topk_group: 2 .* needed is 1$"),
        (
            GLM,
            {"norm_topk_prob": False},
            "norm_topk_prob: false .* true with num_experts_per_tok 2",
        ),
        (
            GLM,
            {"num_experts_per_tok": 1},
            "norm_topk_prob: true .* is false with num_experts_per_tok",
        ),
        (GLM, {"n_routed_experts": 1}, "n_routed_experts: 1 .* 2 or more"),
        (GLM, {"attention_bias": True}, "attention_bias: true .* needed is false"),
        (GLM, {"quantization_config": {"bits": 4}}, 'quantization_config: {"bits": 4} .* is null'),
        (QWEN, {"use_sliding_window": True}, "use_sliding_window: true"),
        (QWEN, {"layer_types": ["sliding_attention"] * 28}, "layer_types: "),
        (QWEN, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling: yarn .* is null"),
        (QWEN, {"rope_scaling": "linear"}, "rope_scaling: linear"),
        (QWEN, {"hidden_act": "gelu"}, "hidden_act: gelu .* needed is silu"),
        (QWEN, {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias: true"),
        (LLAMA, {"rope_parameters": {"rope_type": "llama3"}}, "rope_scaling: llama3"),
        (LLAMA, {"rope_parameters": {"a": {"rope_theta": 5.0}}}, "rope_parameters: .* each layer"),
        (LLAMA, {"vocab_size": None}, "it has no vocab_size"),
        (LLAMA, {"vocab_size": "110"}, "vocab_size: expected a whole number, got '110'"),
        (GLM, {"num_nextn_predict_layers": "1"}, "num_nextn_predict_layers: expected a whole"),
        (QWEN, {"layer_types": 5}, "broken"),
        (QWEN, {"layer_types": [["a"]]}, "layer_types: "),
        (LLAMA, {"hidden_size": "64"}, "broken"),
        (LLAMA, {"num_attention_heads": 0}, "broken"),
        (LLAMA, {"model_type": "mistral"}, "model_type: 'mistral' does not map"),
        ({}, {}, "model_type: None does not map"),
        ({}, {"architectures": [["a"]], "model_type": ["b"]}, r"model_type: \['b'\] does not map"),
        (QWEN, {"architectures": ["Qwen3MoeForCausalLM"]}, "'Qwen3MoeForCausalLM' does not map"),
        (QWEN, {"architectures": ["MixtralForCausalLM"]}, f"one of {', '.join(ARCHITECTURES)}"),
    ],
)
def test_what_does_not_map_names_its_key(config, changes, line) -> None:
    with pytest.raises(UserError, match=f"^config.json.*{line}") as caught:
        model_config({**config, **changes}, "mine", "config.json")
    assert "\n" not in str(caught.value)
