"""A folder in Hugging Face's format as one GGUF file, for llama.cpp and what builds on it.

Keys and tensors have the names that llama.cpp's loader asks for (tried: llama-cpp-python 0.3.36).
Matrices keep the folder's dtype; norms, routers and selection biases are float32.

What llama.cpp does differently from us:

- With the character tokenizer, a character that has no token is left out: no <unk>, and no
  ASCII look-alike for a typographic quote or dash.
- It doesn't normalise: a text that isn't in NFC may get other tokens than from a tokenizer that
  does, as Qwen's.
- Added tokens in a text, such as <think>, are parsed; in a chat special ones too.
- Activations are rounded to bfloat16 before they meet bfloat16 weights, and keys and values to
  float16, unless it is told otherwise (type_k, type_v; --cache-type-k, --cache-type-v).
"""

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from fourstage.errors import UserError
from fourstage.exchange.architectures import Values, filled, kind_of
from fourstage.exchange.checkpoint import SINGLE, opened, read_config
from fourstage.tokenizer import SPLIT, Tokenizer
from fourstage.tokenizer.byte_level import BYTES, parts
from fourstage.tokenizer.card import read_card

FAMILIES = {"glm4_moe": "glm4moe", "qwen3": "qwen3", "llama": "llama"}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
SIGMOID = 2  # of the gating functions
KEY_TYPES = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}

# Hugging Face's names and llama.cpp's, in the order of the file
FIRST = {"model.embed_tokens.weight": "token_embd.weight"}
ATTENTION = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
}
DENSE = {
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
EXPERTS = {  # *: all of a layer as one tensor
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.*.gate_proj.weight": "ffn_gate_exps.weight",
    "mlp.experts.*.up_proj.weight": "ffn_up_exps.weight",
    "mlp.experts.*.down_proj.weight": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
LAST = {"model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}

# How a tokenizer cuts texts before it merges, and whether a piece that is a token skips merging
TRIPLETS = SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")  # of digits, as Llama 3 and GLM-4
PRE_TOKENIZERS = {
    ((SPLIT, "bytes"), False): "qwen2",
    ((TRIPLETS, "bytes"), True): "llama-bpe",
    ((TRIPLETS, "bytes"), False): "smaug-bpe",
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens
NEVER = "<pad> <pad>"  # a merge that no text needs: the list must not be empty


@dataclass(frozen=True)
class Entry:
    """A tensor of the file. sources: their names in the folder, several if they are stacked;
    heads: whose rows llama.cpp turns in another order, or 0."""

    name: str
    sources: list[str]
    shape: list[int]
    dtype: torch.dtype
    heads: int


def write_gguf(source: Path, path: Path, name: str) -> None:
    """Write the model in the folder `source`, which an export has made, into one file.

    The weights pass through memory one tensor at a time. Raises UserError without the package
    gguf, for a reward model, and for a tokenizer that llama.cpp can't have; OSError if the file
    can't be written.
    """
    gguf = package()
    config, where = read_config(source), str(source / "config.json")
    if "SequenceClassification" in str(config.get("architectures")):
        raise UserError("a reward model writes no text: format=gguf is for models that do")
    kind, values = kind_of(config, where), filled(config, where)
    entries = layout(kind, values, source / SINGLE)
    kinds, types = gguf.GGMLQuantizationType, gguf.LlamaFileType
    stored_as = {torch.float32: kinds.F32, torch.bfloat16: kinds.BF16}
    file_types = {torch.float32: types.ALL_F32, torch.bfloat16: types.MOSTLY_BF16}
    keys = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(file_types[entries[0].dtype]),
        **model_keys(kind, values),
        **tokenizer_keys(source, values["vocab_size"]),
    }
    with closing(gguf.GGUFWriter(path, FAMILIES[kind])) as writer:
        for key, value in keys.items():
            writer.add_key_value(key, value, gguf.GGUFValueType[KEY_TYPES[type(value)]])
        for x in entries:
            size = torch.Size(x.shape).numel() * x.dtype.itemsize
            writer.add_tensor_info(x.name, x.shape, None, size, stored_as[x.dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    with open(path, "ab") as file:  # numpy, with which gguf writes, doesn't say that a disk is full
        for x in entries:
            file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
            file.write(read(x, source / SINGLE).view(torch.uint8).numpy().data)
        file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


def package() -> Any:
    """gguf, which is optional. Raises UserError if it isn't installed."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            "format=gguf needs gguf: install it with `pip install -c constraints.txt -e '.[gguf]'` "
            "in the repository"
        ) from None
    return gguf


# --- weights


def layout(kind: str, values: Values, path: Path) -> list[Entry]:
    """The tensors of the file, in its order, from those of a safetensors file."""
    block = ATTENTION | (EXPERTS if kind == "glm4_moe" else DENSE)
    names = dict(FIRST)
    for i in range(values["num_hidden_layers"]):
        names |= {f"model.layers.{i}.{theirs}": f"blk.{i}.{ours}" for theirs, ours in block.items()}
    names |= LAST
    turned = {}
    if kind == "llama":  # the others turn pairs as they are in the folder
        heads = values["num_attention_heads"]
        turned = {"attn_q": heads, "attn_k": values["num_key_value_heads"] or heads}
    found = []
    with opened(path) as file:
        stored = set(file.keys())
        for theirs, ours in names.items():
            sources = [theirs]
            if "*" in theirs:
                sources = [theirs.replace("*", str(e)) for e in range(values["n_routed_experts"])]
            if sources[0] not in stored:
                continue  # norms of queries and keys, or a head: not every model has them
            one = file.get_slice(sources[0])
            shape = [len(sources)] * ("*" in theirs) + one.get_shape()
            is_plain = len(shape) == 1 or "ffn_gate_inp" in ours
            dtype = torch.float32 if is_plain else DTYPES[one.get_dtype()]
            found.append(Entry(ours, sources, shape, dtype, turned.get(ours.split(".")[-2], 0)))
    return found


def read(entry: Entry, path: Path) -> Tensor:
    """A tensor of the file, contiguous."""
    with opened(path) as file:
        x = torch.stack([file.get_tensor(name) for name in entry.sources]).view(entry.shape)
    if entry.heads:
        # llama.cpp turns the pairs (0, 1), (2, 3), ...; in Hugging Face's format the two of a pair
        # are half a head apart
        x = x.unflatten(0, (entry.heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return x.to(entry.dtype).contiguous()


def model_keys(kind: str, values: Values) -> dict[str, Any]:
    """The shape of the model."""
    heads = values["num_attention_heads"]
    head_dim = values["head_dim"] or values["hidden_size"] // heads
    found = {
        "vocab_size": values["vocab_size"],
        "context_length": values["max_position_embeddings"],
        "embedding_length": values["hidden_size"],
        "block_count": values["num_hidden_layers"],
        "attention.head_count": heads,
        "attention.head_count_kv": values["num_key_value_heads"] or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(values["rms_norm_eps"]),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(values["rope_theta"]),
    }
    if kind == "glm4_moe":
        found |= {
            "leading_dense_block_count": 0,
            "expert_feed_forward_length": values["moe_intermediate_size"],
            "expert_count": values["n_routed_experts"],
            "expert_used_count": values["num_experts_per_tok"],
            "expert_shared_count": values["n_shared_experts"],
            "expert_gating_func": SIGMOID,
            "expert_weights_norm": values["norm_topk_prob"],
            "expert_weights_scale": float(values["routed_scaling_factor"]),
        }
    else:
        found["feed_forward_length"] = values["intermediate_size"]
    return {f"{FAMILIES[kind]}.{key}": value for key, value in found.items()}


# --- the tokenizer


def tokenizer_keys(source: Path, vocab_size: int) -> dict[str, Any]:
    """Tokens, merges, ends and chat template; `vocab_size`: rows of the embedding."""
    tokenizer = Tokenizer.load(source)
    text = (source / "tokenizer.json").read_text(encoding="utf-8")
    backend, spec = tokenizers.Tokenizer.from_str(text), json.loads(text)
    card = read_card(source, backend)
    bos, eos = tokenizer.bos_id, backend.token_to_id(card.tokens["eos_token"])
    around = backend.encode("").ids  # what software puts round a text
    texts, kinds = tokens(spec, vocab_size)
    template = card.template
    if "bos_token" in template and "bos_token" not in card.tokens:
        # llama.cpp would put the token of bos_token_id there, which every file has
        template = "{%- set bos_token = '' -%}" + template
    found = {
        "model": "gpt2",
        "pre": pre_tokenizer(spec),
        "tokens": texts,
        "token_type": kinds,
        "merges": [" ".join(pair) for pair in spec["model"]["merges"]] or [NEVER],
        "bos_token_id": bos,
        "padding_token_id": tokenizer.pad_id,
        "add_bos_token": around[:1] == [bos],
        "add_eos_token": around[-1:] == [eos] and around != [bos],
    }
    ends = list(dict.fromkeys([eos, *tokenizer.eos_ids]))  # the second, if any, is the answer's
    ends = ends if len(ends) > 1 else 2 * ends
    names = ("eos_token_id", "eot_token_id", "eom_token_id")  # there is no key for a fourth
    found |= dict(zip(names, ends, strict=False))
    if tokenizer.unk_id is not None:
        found["unknown_token_id"] = tokenizer.unk_id
    keys = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    return keys | {"tokenizer.chat_template": template}


def tokens(spec: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The text of each id, in the byte alphabet unless it is an added one, and its kind."""
    texts = [f"[PAD{i}]" for i in range(vocab_size)]  # ids that no token has
    kinds = [UNUSED] * vocab_size
    letters = {byte: letter for letter, byte in BYTES.items()}
    for token, i in spec["model"]["vocab"].items():
        if is_of_characters(spec):
            token = "".join(letters[byte] for byte in token.encode())
        texts[i], kinds[i] = token, NORMAL
    for added in spec["added_tokens"]:
        texts[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return texts, kinds


def pre_tokenizer(spec: Mapping[str, Any]) -> str:
    """llama.cpp's name for the way in which texts are cut before tokens are merged. Raises
    UserError for one that it doesn't have."""
    if is_of_characters(spec) and not spec["model"]["merges"]:
        return "qwen2"  # any will do
    steps = tuple(map(step, parts(spec["pre_tokenizer"])))
    found = PRE_TOKENIZERS.get((steps, bool(spec["model"].get("ignore_merges"))))
    if found is None:
        raise UserError(
            "llama.cpp can't cut texts as this tokenizer does (pre_tokenizer in tokenizer.json): "
            "export with format=hf"
        )
    return found


def step(part: Mapping[str, Any]) -> str:
    """A part of a pre-tokenizer, as PRE_TOKENIZERS names it."""
    match part:
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}:
            return "" if part["invert"] else regex
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "ByteLevel"}:
            return "words" if part["use_regex"] else "bytes"
    return ""


def is_of_characters(spec: Mapping[str, Any]) -> bool:
    """Whether tokens are text as it is: as of `char`, whose tokens are a character each."""
    return spec["pre_tokenizer"] is None
