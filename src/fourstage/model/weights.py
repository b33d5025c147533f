"""Plain weights in and out, whatever trained them: model.safetensors, config.json, tokenizer.json.

config.json (`Shape`) is enough to build the network without the project's configuration, and to
tell whether the other two files are intact. Files are written under a temporary name, synced and
renamed, so that a kill never leaves half a file.
"""

import hashlib
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fourstage.errors import UserError
from fourstage.files import read_json, write_json
from fourstage.model import ModelConfig, ScalarModel, Transformer
from fourstage.settings import Bounded, at_least, build
from fourstage.tokenizer import Tokenizer

Kind = Literal["policy", "scalar"]
WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"


def save_weights(folder: Path, network: Transformer | ScalarModel, tokenizer: Tokenizer) -> None:
    """Writes the network's weights (any dtype, any device), its shape and the tokenizer."""
    tokenizer.save(folder)
    weights = network.state_dict()
    # clones, as safetensors refuses tied or expanded tensors, which share memory
    plain = {name: w.detach().cpu().clone().contiguous() for name, w in weights.items()}
    partial = folder / f".{WEIGHTS}.{os.getpid()}"
    try:
        save_file(plain, partial)
        shutil.copymode(folder / TOKENIZER, partial)  # safetensors' is readable by the owner only
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        digest = sha256(partial)
        os.replace(partial, folder / WEIGHTS)
    finally:
        partial.unlink(missing_ok=True)
    kind: Kind = "scalar" if isinstance(network, ScalarModel) else "policy"
    backbone = network.backbone if isinstance(network, ScalarModel) else network
    shape = {"kind": kind, "vocab_size": backbone.vocab_size, "model": asdict(backbone.config)}
    sums = {"weights_sha256": digest, "tokenizer_sha256": sha256(folder / TOKENIZER)}
    write_json(folder / "config.json", {**shape, **sums})


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_policy(folder: Path) -> tuple[Transformer, Tokenizer]:
    """The language model of a finished run, on the CPU, and its tokenizer. Raises UserError where
    the folder holds no language model, or a broken one."""
    return _load(folder, "policy")


def load_scalar(folder: Path) -> tuple[ScalarModel, Tokenizer]:
    """The reward model of a finished reward run, likewise."""
    return _load(folder, "scalar")


@dataclass(frozen=True, kw_only=True)
class Shape(Bounded):
    """What config.json holds."""

    kind: Kind
    vocab_size: int = at_least(1)
    model: ModelConfig
    weights_sha256: str | None = None  # of model.safetensors; None in older runs
    tokenizer_sha256: str | None = None  # of tokenizer.json


def _load(folder: Path, kind: Kind) -> tuple[Any, Tokenizer]:
    try:
        shape = build(Shape, read_json(folder / "config.json"), f"{folder}/config.json")
        tokenizer = Tokenizer.load(folder)
        sums = {WEIGHTS: shape.weights_sha256, TOKENIZER: shape.tokenizer_sha256}
        for name, digest in sums.items():
            if digest not in (None, sha256(folder / name)):
                raise UserError(
                    f"{folder / name}: damaged, its bytes are not those that training wrote: copy "
                    "it again, or train it again"
                )
        weights = load_file(folder / WEIGHTS)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = Path(error.filename or WEIGHTS).name
        raise UserError(f"{folder}: no {missing}: is it a finished run?") from error
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror})") from error
    except (ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: broken weights or config ({reason}): train it again") from error
    if shape.kind != kind:
        wanted = {"policy": "a language model", "scalar": "a reward model"}
        raise UserError(f"{folder}: holds {wanted[shape.kind]}, but {wanted[kind]} is needed here")
    network = Transformer(shape.model, shape.vocab_size)
    network = network if kind == "policy" else ScalarModel(network)
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise UserError(f"{folder}: {name} is not finite: train it again with a lower lr")
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{folder}: the weights do not fit the shape in config.json") from error
    return network, tokenizer
