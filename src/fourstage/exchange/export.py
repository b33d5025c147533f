"""A run's model as a folder that stock software reads: config.json, safetensors and a tokenizer.

The network's weights are written under the names and in the shapes of a class that transformers
ships (architectures.py), so no code of ours is needed to load them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from torch import Tensor

from fourstage.errors import UserError
from fourstage.exchange.architectures import exported_config
from fourstage.exchange.checkpoint import SHARED, SINGLE, block_weights, end_weights
from fourstage.exchange.gguf import package, write_gguf
from fourstage.files import locked, read_json, remove, swap_in, write_json
from fourstage.model import ModelConfig, ScalarModel, Transformer
from fourstage.model.tensor_file import write_safetensors
from fourstage.model.weights import Kind, Stored, open_stored
from fourstage.tokenizer import Tokenizer

CARD, GGUF = "README.md", "model.gguf"
BIAS = ".e_score_correction_bias"  # always float32, as transformers keeps it
HEAD = "lm_head.weight"

FILES = {CARD, SINGLE, GGUF, "config.json", "generation_config.json", "tokenizer.json"}
FILES |= {"tokenizer_config.json"}
USAGE = {
    "policy": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "What is an LLM?"}],
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt",
)
ids = model.generate(**inputs, max_new_tokens=200)[0]
print(tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True))""",
    "scalar": """\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForSequenceClassification.from_pretrained(".")
conversation = [
    {"role": "user", "content": "What is an LLM?"},
    {"role": "assistant", "content": "A large language model."},
]
inputs = tokenizer.apply_chat_template(conversation, return_dict=True, return_tensors="pt")
with torch.no_grad():
    print(model(**inputs).logits.item())  # higher is better""",
    "gguf": """\
from llama_cpp import Llama

model = Llama("model.gguf", n_ctx=0)
messages = [{"role": "user", "content": "What is an LLM?"}]
said = model.create_chat_completion(messages, max_tokens=200, temperature=0)
print(said["choices"][0]["message"]["content"])""",
}

Part = dict[str, Tensor]  # weights by Hugging Face's names


def export_run(
    run: Path, to: Path, *, dtype: torch.dtype = torch.float32, kind: Kind | None = None
) -> Kind:
    """Write a finished run's model into the folder `to`, in Hugging Face's format, and return its
    kind.

    The weights pass through memory a block at a time. Raises UserError for a model of another kind
    than asked for, or one that no class of transformers computes, and for broken files.
    """
    stored = open_stored(run, kind)
    if stored.shape.kind == "scalar" and not stored.shape.model.dense:
        raise UserError(
            f"{run.name}: holds a reward model with experts, for which transformers has no class: "
            "only dense ones (model=dense_tiny) can be exported"
        )
    network = stored.empty_network()
    write_folder(to, network, stored.tokenizer, stored_parts(stored, network), dtype)
    return stored.shape.kind


def stored_parts(stored: Stored, network: Transformer | ScalarModel) -> Iterator[Part]:
    """The weights of a run, a block at a time; `network` is the run's empty one."""
    is_scalar = isinstance(network, ScalarModel)
    backbone, prefix = (network.backbone, "backbone.") if is_scalar else (network, "")
    if is_scalar:
        stored.fill(network.head, "head.")
    for name in ("embedding", "norm", "head"):
        if (module := getattr(backbone, name)) is not None:
            stored.fill(module, f"{prefix}{name}.")
    yield _ends(network)
    for i, block in enumerate(backbone.blocks):
        stored.fill(block, f"{prefix}blocks.{i}.")
        yield block_weights(i, block)
        block.to("meta")


def network_parts(network: Transformer | ScalarModel) -> Iterator[Part]:
    """The weights of a network in memory."""
    yield _ends(network)
    backbone = network.backbone if isinstance(network, ScalarModel) else network
    for i, block in enumerate(backbone.blocks):
        yield block_weights(i, block)


def _ends(network: Transformer | ScalarModel) -> Part:
    if isinstance(network, ScalarModel):
        return {**end_weights(network.backbone), "score.weight": network.head.weight.detach()}
    return end_weights(network)


def write_folder(
    to: Path,
    network: Transformer | ScalarModel,
    tokenizer: Tokenizer,
    parts: Iterable[Part] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a model's config.json, generation_config.json, weights and tokenizer.

    parts: the weights, where the network itself is on the meta device.
    """
    is_scalar = isinstance(network, ScalarModel)
    backbone = network.backbone if is_scalar else network
    config = exported_config(backbone.config, backbone.vocab_size) | ends(tokenizer)
    config["dtype"] = str(dtype).removeprefix("torch.")
    to.mkdir(parents=True, exist_ok=True)  # another export that waits may have made it
    write_tokenizer(to, tokenizer, backbone.config.max_seq_len)
    if is_scalar:
        name = config["architectures"][0].replace("CausalLM", "SequenceClassification")
        config |= {"architectures": [name], "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    else:
        write_json(to / "generation_config.json", ends(tokenizer))
    write_json(to / "config.json", config)

    def named(found: Iterable[Part]) -> Iterator[tuple[str, Tensor]]:
        for part in found:
            yield from completed(part, backbone.config).items()

    layout = {
        name: (torch.float32 if name.endswith(BIAS) else dtype, x.shape)
        for name, x in named(network_parts(network))
    }
    write_safetensors(to / SINGLE, layout, named(parts or network_parts(network)))


def ends(tokenizer: Tokenizer) -> dict[str, int | list[int]]:
    """What begins, ends and pads a text."""
    eos = tokenizer.eos_ids
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": eos if len(eos) > 1 else eos[0],
        "pad_token_id": tokenizer.pad_id,
    }


def write_tokenizer(to: Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """With the settings that AutoTokenizer needs to make batches."""
    tokenizer.save(to)
    remove(to / "generation_config.json")  # of a tokenizer that isn't ours: `ends` says the same
    more = {
        "pad_token": tokenizer.decode([tokenizer.pad_id], keep_special=True),  # Llama's has none
        "padding_side": "left",  # answers of a batch go on behind its prompts
        "model_max_length": max_seq_len,
    }
    path = to / "tokenizer_config.json"
    write_json(path, dict(sorted((read_json(path) | more).items())))


def completed(part: Part, model: ModelConfig) -> Part:
    """With what other people's classes need: for a model with experts a head of its own, and shared
    experts that are there and as wide as config.json says, if need be with zeros.

    A SwiGLU unit whose weights are zeros adds nothing, so that this changes no logit.
    """
    if model.dense:
        return part
    if model.tie_embeddings and "model.embed_tokens.weight" in part:
        return {**part, HEAD: part["model.embed_tokens.weight"]}
    found = dict(part)
    for name, x in part.items():
        if not name.endswith(BIAS):
            continue
        width = max(1, -(-model.d_shared // model.d_expert)) * model.d_expert
        for kind in ("gate", "up", "down"):
            at = f"{name.split('.mlp.')[0]}{SHARED}{kind}_proj.weight"
            shape = (model.d_model, width) if kind == "down" else (width, model.d_model)
            whole = torch.zeros(shape, device=x.device)
            if (own := part.get(at)) is not None:
                whole[: own.shape[0], : own.shape[1]] = own
            found[at] = whole
    return found


# --- into its place


def export(
    run: Path,
    to: Path,
    card: Callable[[str], str],
    *,
    format: Literal["hf", "gguf"] = "hf",
    dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> None:
    """Export a finished run into the folder `to`, with a model card. `card` writes that, with an
    example of use in it. Raises UserError if it can't be done, and leaves nothing half-written."""
    if format == "gguf":
        package()  # before anything is written
    try:
        check_target(to, force)
        part, lock = (to.with_name(f".{to.name}.{kind}") for kind in ("part", "lock"))
        part.mkdir(parents=True, exist_ok=True)  # else the lock would be waited for in vain
        with locked(FileLock(lock), str(to)):
            try:
                check_target(to, force)
                remove(part)  # a kill may have left something in it
                if format == "hf":
                    usage = USAGE[export_run(run, part, dtype=dtype)]
                else:
                    export_run(run, part / "hf", dtype=dtype, kind="policy")
                    write_gguf(part / "hf", part / GGUF, run.name)
                    remove(part / "hf")
                    usage = USAGE["gguf"]
                (part / CARD).write_text(card(usage), encoding="utf-8")
                swap_in(part, to)
            finally:
                remove(part)
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{to}: cannot be written ({error.strerror})") from None


def check_target(to: Path, force: bool) -> None:
    """Raise UserError for a folder that must not be replaced."""
    if to.is_file():
        raise UserError(f"{to}: is a file: name a folder with to=")
    found = [path.name for path in sorted(to.iterdir())] if to.is_dir() else []
    if found and not force:
        raise UserError(f"{to} exists: give another to=, or force=true to replace it")
    if others := [name for name in found if name not in FILES]:
        raise UserError(f"{to} holds {others[0]}, which no export wrote: give another to=")
