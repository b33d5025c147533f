"""A pretrained checkpoint in Hugging Face's format: config.json, safetensors and a tokenizer.

Weights go tensor by tensor from the mapped file into the network's parameters, which are float32,
so that a checkpoint is never in memory as a whole beside the network.

Shape legend: D d_model, E experts, F width of an expert, V vocabulary.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fourstage.errors import UserError
from fourstage.exchange.architectures import filled, model_config
from fourstage.files import read_json, write_json
from fourstage.model import ModelConfig, Transformer
from fourstage.model.moe import MoE, SwiGLU
from fourstage.model.transformer import Block

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARED = ".mlp.shared_experts."
BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")  # a row for each token
FUSED = ".mlp.experts.gate_up_proj"  # all experts of a layer in one tensor
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
AT_ONCE = 2**26  # bytes read of a file before it is mapped anew, which frees the pages read
PLAIN = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Checkpoint:
    """What the plan has to know of a checkpoint. vocab_size: rows of its embedding, which may be
    more than its tokenizer has tokens; max_positions: of the tokens that it was made for."""

    folder: Path
    model: ModelConfig
    vocab_size: int
    max_positions: int


def read_checkpoint(folder: Path, name: str) -> Checkpoint:
    """A checkpoint's shape, for a model of this name. Raises UserError for a folder without
    config, weights or tokenizer, and for an architecture that ours can't represent."""
    where = str(folder / "config.json")
    config = read_config(folder)
    model_config(config, name, where)  # before any weight is looked for
    weight_files(folder)
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder}: no tokenizer.json: save the tokenizer beside the weights")
    model = model_config(config, name, where, has_shared=has_shared_expert(folder))
    values = filled(config, where)
    return Checkpoint(folder, model, values["vocab_size"], values["max_position_embeddings"])


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json: is it a Hugging Face checkpoint?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): copy the checkpoint again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: no JSON object: copy the checkpoint again")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that hold the weights. Raises UserError if one is missing."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    try:
        names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
        files = [folder / name for name in names]
    except FileNotFoundError:
        if list(folder.glob("*.bin")):
            raise UserError(
                f"{folder}: only .bin weights, which can run code when they are read: save the "
                "model as safetensors (save_pretrained does)"
            ) from None
        raise UserError(f"{folder}: no {SINGLE} and no {INDEX}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / INDEX}: broken: copy the checkpoint again") from None
    if missing := [path.name for path in files if not path.exists()]:
        raise UserError(f"{folder}: {missing[0]} is missing: copy the checkpoint again")
    return files


def has_shared_expert(folder: Path) -> bool:
    """Whether there is a shared expert that does anything. Some formats need one, of zeros."""
    return any(tensor.any() for name, tensor in _tensors(folder) if SHARED in name)


def load_checkpoint(folder: Path, model: ModelConfig, vocab_size: int) -> Transformer:
    """The network with the checkpoint's weights in float32, on the CPU.

    vocab_size: how many rows of its embedding are taken, the first ones; the rest is padding that
    stands for no token. Raises UserError, one line, for tensors that are missing, unknown, of
    another shape or not finite, and for broken files.
    """
    values = filled(read_config(folder), str(folder / "config.json"))
    with torch.device("meta"):  # nothing is drawn that would be overwritten
        network = Transformer(model, vocab_size)
    network.to_empty(device="cpu")
    is_fused = any(name.endswith(FUSED) for name in _names(folder))
    places, seen = weights(network, is_fused), set()
    unused = range(model.n_layers, model.n_layers + values.get("num_nextn_predict_layers", 0))
    other_head = False
    for name, tensor in _tensors(folder):
        if (place := places.get(name)) is None:
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            is_unused = layer is not None and int(layer[1]) in unused  # predicts further ahead
            is_empty = SHARED in name and not model.d_shared and not tensor.any()
            if name == "lm_head.weight" and model.tie_embeddings:
                other_head = not _same_as_embedding(folder, tensor)
            elif not (is_unused or is_empty or name.endswith(".rotary_emb.inv_freq")):
                raise UserError(f"{folder}: {name} has no place in our model")
            continue
        shape = list(place.shape)
        if name in BY_TOKEN:
            shape[0] = values["vocab_size"]
        if list(tensor.shape) != shape:
            raise UserError(
                f"{folder}: {name} has the shape {list(tensor.shape)}, config.json says {shape}"
            )
        if tensor.dtype not in PLAIN:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{folder}: {name} is {kind}: needed is float32, bfloat16 or float16")
        if not all(map(torch.isfinite, tensor.aminmax())):  # isfinite of all would need a copy
            raise UserError(f"{folder}: {name} is not finite: take another checkpoint")
        with torch.no_grad():
            place.copy_(tensor[: len(place)])
        seen.add(name)
    if missing := sorted(places.keys() - seen):
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise UserError(f"{folder}: {missing[0]}{more} missing: copy the checkpoint again")
    if other_head:
        raise UserError(
            f"{folder}: tie_word_embeddings: true, but lm_head.weight differs from "
            "model.embed_tokens.weight: needed is false, or one without the other"
        )
    return network


def weights(network: Transformer, fused: bool = False) -> dict[str, Tensor]:
    """Hugging Face's names and shapes -> views of the network's weights.

    fused: the routed experts of a layer as two tensors, [E, 2 F, D] and [E, D, F].
    """
    found = end_weights(network)
    for i, block in enumerate(network.blocks):
        found |= block_weights(i, block, fused)
    return found


def end_weights(network: Transformer) -> dict[str, Tensor]:
    """Of the embedding, the last norm and the head."""
    found = {
        "model.embed_tokens.weight": network.embedding.weight.detach(),
        "model.norm.weight": network.norm.weight.detach(),
    }
    if network.head is not None:
        found["lm_head.weight"] = network.head.weight.detach()
    return found


def block_weights(i: int, block: Block, fused: bool = False) -> dict[str, Tensor]:
    """Of the i-th block."""
    attention = block.attention
    q, k, v = attention.qkv.weight.split([n * attention.head_dim for n in attention.heads])
    named = {
        "input_layernorm": block.attention_norm.weight,
        "post_attention_layernorm": block.mlp_norm.weight,
        "self_attn.q_proj": q,
        "self_attn.k_proj": k,
        "self_attn.v_proj": v,
        "self_attn.o_proj": attention.out.weight,
    }
    if attention.has_norms():
        named["self_attn.q_norm"] = attention.q_norm.weight
        named["self_attn.k_norm"] = attention.k_norm.weight
    found = {f"model.layers.{i}.{name}.weight": x for name, x in named.items()}
    found |= {f"model.layers.{i}.mlp.{name}": x for name, x in _mlp(block.mlp, fused).items()}
    return {name: x.detach() for name, x in found.items()}


def _mlp(mlp: nn.Module, fused: bool) -> dict[str, Tensor]:
    if isinstance(mlp, SwiGLU):
        return _swiglu(mlp.gate_up.weight, mlp.down.weight)
    assert isinstance(mlp, MoE)
    found = {
        "gate.weight": mlp.router.proj.weight,
        "gate.e_score_correction_bias": mlp.router.expert_bias_E,
    }
    gate_up_EFD = mlp.experts.gate_up_EDF.transpose(1, 2)
    down_EDF = mlp.experts.down_EFD.transpose(1, 2)
    if fused:
        found |= {"experts.gate_up_proj": gate_up_EFD, "experts.down_proj": down_EDF}
    else:
        for e, (gate_up, down) in enumerate(zip(gate_up_EFD, down_EDF, strict=True)):
            found |= {f"experts.{e}.{name}": x for name, x in _swiglu(gate_up, down).items()}
    if mlp.shared is not None:
        shared = _swiglu(mlp.shared.gate_up.weight, mlp.shared.down.weight)
        found |= {f"shared_experts.{name}": x for name, x in shared.items()}
    return found


def _swiglu(gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    gate, up = gate_up.chunk(2)
    return {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: broken or cut off ({reason}): copy it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _names(folder: Path) -> list[str]:
    """Of the tensors, without reading one."""
    found = []
    for path in weight_files(folder):
        with opened(path) as file:
            found += file.keys()
    return found


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, one at a time: it is a view of the file and lasts until the next."""
    for path in weight_files(folder):
        with opened(path) as file:
            names = list(file.keys())
        while names:
            read = 0
            with opened(path) as file:
                while names and read < AT_ONCE:
                    tensor = file.get_tensor(name := names.pop(0))
                    read += tensor.nbytes
                    yield name, tensor


def _same_as_embedding(folder: Path, head_VD: Tensor) -> bool:
    for path in weight_files(folder):
        with opened(path) as file:
            if (name := "model.embed_tokens.weight") in file.keys():  # noqa: SIM118  not a dict
                return torch.equal(file.get_tensor(name), head_VD)
    return False


# --- which checkpoint it is


def digest(folder: Path, memo: Path) -> str:
    """16 hexadecimal digits of the contents of its weights and its tokenizer.

    `memo`: a folder where the sum of each file is kept by its path, size and time, so that a large
    checkpoint isn't read at every start.
    """
    there = (folder / name for name in TOKENIZER_FILES)
    files = [*weight_files(folder), *(path for path in there if path.exists())]
    kept = memo / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.json"
    try:
        known = dict(read_json(kept))
    except (OSError, ValueError, TypeError):
        known = {}
    found = {path.name: _sum_of(path, known.get(path.name)) for path in files}
    if found != known:
        write_json(kept, found)
    sums = "".join(f"{name} {found[name][-1]}\n" for name in sorted(found))
    return hashlib.sha256(sums.encode()).hexdigest()[:16]


def _sum_of(path: Path, known: Any) -> list[Any]:
    """[size, time of change in ns, sha256]."""
    stat = path.stat()
    if isinstance(known, list) and known[:2] == [stat.st_size, stat.st_mtime_ns]:
        return known
    with open(path, "rb") as file:
        return [stat.st_size, stat.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()]
