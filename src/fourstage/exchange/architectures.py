"""Which Hugging Face config.json is one of our models, and which config.json one of ours has.

Three architectures map onto ours: Glm4Moe (sigmoid router with a selection bias), Qwen3 (dense,
with QK-norm) and Llama (dense, without). A key that config.json leaves out has the default that
transformers 5.23 gives it, written down in DEFAULTS.
"""

import json
from collections.abc import Mapping
from typing import Any

from fourstage.errors import UserError
from fourstage.model import ModelConfig
from fourstage.settings import build

Values = Mapping[str, Any]

# transformers 5 skips what belongs to layers 46 and 92 of a Glm4Moe (extra layers of GLM-4.5's)
MOST_LAYERS = 46
GROUPED = 8  # their grouped product needs rows of 16 bytes, so many numbers of 16 bits
LONGEST = 4096  # default max_seq_len at most: the loss of a large vocabulary is cut by it

ARCHITECTURES = {
    "Glm4MoeForCausalLM": "glm4_moe",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
}
EVERY = {  # what the three have in common
    "vocab_size": None,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "glm4_moe": {
        **EVERY,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": None,  # hidden_size / num_attention_heads
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
        "num_nextn_predict_layers": 1,
    },
    "qwen3": {
        **EVERY,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "layer_types": None,  # all of them full attention
    },
    "llama": {
        **EVERY,
        "num_hidden_layers": 32,
        "num_key_value_heads": None,  # as many as query heads
        "head_dim": None,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
    },
}
RENAMED = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}
# what a key must be; without it the network would compute something else
NEEDED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "use_sliding_window": False,
    "quantization_config": None,
}


def kind_of(config: Values, where: str) -> str:
    """The model type of a config.json. Raises UserError unless it is one of ARCHITECTURES."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    kind = ARCHITECTURES.get(name) if name else config.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        what = f"architectures: {name!r}" if name else f"model_type: {kind!r}"
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{where}: {what} does not map onto our model: needed is one of {known}")
    return kind


def filled(config: Values, where: str) -> dict[str, Any]:
    """The keys of DEFAULTS with the config's values. Raises UserError for an unknown architecture,
    a missing vocabulary or a rope that is scaled."""
    kind = kind_of(config, where)
    values = {RENAMED.get(key, key): value for key, value in config.items()}
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    scaled = rope.get("rope_type", rope.get("type", "default"))
    if scaled != "default":
        _refuse(where, "rope_scaling", scaled, "null")
    if any(isinstance(one, dict) for one in rope.values()):
        _refuse(where, "rope_parameters", rope, "the same in each layer")
    found = dict(DEFAULTS[kind])
    for key, default in found.items():
        found[key] = rope.get(key, values.get(key, default))
    if found["vocab_size"] is None:
        raise UserError(f"{where}: it has no vocab_size")
    if "num_nextn_predict_layers" in found:
        found["num_nextn_predict_layers"] = found["num_nextn_predict_layers"] or 0
    for key in ("vocab_size", "num_nextn_predict_layers"):
        if not isinstance(found.get(key, 0), int):
            raise UserError(f"{where}: {key}: expected a whole number, got {found[key]!r}")
    return found


def model_config(config: Values, name: str, where: str, *, has_shared: bool = True) -> ModelConfig:
    """The ModelConfig of a config.json; `where` names the file in messages.

    has_shared: whether the shared experts' weights, if there are any, are more than zeros. Raises
    UserError, which names the key, for what our network does not compute.
    """
    kind, v = kind_of(config, where), filled(config, where)
    for key, needed in NEEDED.items():
        if key in v and v[key] != needed:
            _refuse(where, key, v[key], needed)
    try:
        if any(one != "full_attention" for one in v.get("layer_types") or ()):
            _refuse(where, "layer_types", v["layer_types"], "full_attention in each layer")
        heads = v["num_attention_heads"]
        values = {
            **(_experts(v, where, has_shared) if kind == "glm4_moe" else _dense(v, kind)),
            "name": name,
            "d_model": v["hidden_size"],
            "n_layers": v["num_hidden_layers"],
            "n_heads": heads,
            "n_kv_heads": v["num_key_value_heads"] or heads,
            "head_dim": v["head_dim"] or v["hidden_size"] // heads,
            "max_seq_len": min(v["max_position_embeddings"], LONGEST),
            "rope_theta": v["rope_theta"],
            "norm_eps": v["rms_norm_eps"],
            "tie_embeddings": v["tie_word_embeddings"],
            "init_std": v["initializer_range"],
        }
        return build(ModelConfig, values, where)
    except (TypeError, ZeroDivisionError) as error:
        raise UserError(f"{where}: broken ({error}): copy the checkpoint again") from None


# --- the other way


def exported_config(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The config.json of one of our models, with each key that a reader's default could get wrong.

    Raises UserError for a model that stock software would load wrongly.
    """
    kind = "glm4_moe" if not model.dense else "qwen3" if model.qk_norm else "llama"
    if kind == "glm4_moe" and model.n_layers > MOST_LAYERS:
        raise UserError(
            f"{model.n_layers} layers: transformers leaves out layer {MOST_LAYERS} of a "
            f"Glm4MoeForCausalLM, so {MOST_LAYERS} layers at most can be exported"
        )
    if kind == "llama" and model.d_model % model.n_heads:
        raise UserError(
            f"n_heads: {model.n_heads} does not divide d_model ({model.d_model}), which "
            "transformers needs of a LlamaForCausalLM, so this model cannot be exported"
        )
    names = {kind: name for name, kind in ARCHITECTURES.items()}
    return {
        "architectures": [names[kind]],
        "model_type": kind,
        "vocab_size": vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_seq_len,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_theta": model.rope_theta,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        **(_exported_dense(model) if model.dense else _exported_experts(model)),
    }


def _exported_experts(model: ModelConfig) -> dict[str, Any]:
    # twice, as some readers look only here; without it half of each head would be rotated
    rope = {"rope_type": "default", "rope_theta": model.rope_theta, "partial_rotary_factor": 1.0}
    is_odd = model.d_model % GROUPED or model.d_expert % GROUPED
    return {
        **({"experts_implementation": "eager"} if is_odd else {}),
        "rope_parameters": rope,
        "partial_rotary_factor": 1.0,
        "intermediate_size": model.top_k * model.d_expert,  # of dense layers, which there are none
        "moe_intermediate_size": model.d_expert,
        "n_routed_experts": model.num_experts,
        # vLLM, SGLang and llama.cpp need a shared expert: one of zeros, if ours has none
        "n_shared_experts": max(1, -(-model.d_shared // model.d_expert)),
        "num_experts_per_tok": model.top_k,
        "norm_topk_prob": model.top_k > 1,
        "routed_scaling_factor": model.route_scale,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
        "use_qk_norm": model.qk_norm,
    }


def _exported_dense(model: ModelConfig) -> dict[str, Any]:
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "intermediate_size": model.d_expert,
        **({"use_sliding_window": False} if model.qk_norm else {"mlp_bias": False}),
    }


# --- parts of model_config


def _experts(v: Values, where: str, has_shared: bool) -> dict[str, Any]:
    if v["n_routed_experts"] == 1:
        _refuse(where, "n_routed_experts", 1, "2 or more")
    normalised = v["num_experts_per_tok"] > 1  # our rule: the gate of a single expert stays raw
    if v["norm_topk_prob"] is not normalised:
        what = f"{json.dumps(normalised)} with num_experts_per_tok {v['num_experts_per_tok']}"
        _refuse(where, "norm_topk_prob", v["norm_topk_prob"], what)
    return {
        "num_experts": v["n_routed_experts"],
        "top_k": v["num_experts_per_tok"],
        "d_expert": v["moe_intermediate_size"],
        # several shared experts are one, as wide as all together
        "d_shared": v["n_shared_experts"] * v["moe_intermediate_size"] if has_shared else 0,
        "route_scale": v["routed_scaling_factor"],
        "qk_norm": v["use_qk_norm"],
    }


def _dense(v: Values, kind: str) -> dict[str, Any]:
    one = {"num_experts": 1, "top_k": 1, "d_expert": v["intermediate_size"]}
    return {**one, "qk_norm": kind == "qwen3"}


def _refuse(where: str, key: str, value: Any, needed: Any) -> None:
    said, wanted = (x if isinstance(x, str) else json.dumps(x) for x in (value, needed))
    raise UserError(f"{where}: {key}: {said[:60]} does not map onto our model: needed is {wanted}")
