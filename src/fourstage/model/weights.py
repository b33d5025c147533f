"""Plain weights in and out, whatever trained them: model.safetensors, config.json, tokenizer.json.

config.json (`Shape`) is enough to build the network without the project's configuration, and to
tell whether the other two files are intact. Files are written under a temporary name, synced and
renamed, so that a kill never leaves half a file.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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


@dataclass(frozen=True)
class Stored:
    """A finished run's model on disk, found to be intact."""

    folder: Path
    shape: Shape
    tokenizer: Tokenizer

    def network(self) -> Transformer | ScalarModel:
        """Of its shape, with random weights."""
        network = Transformer(self.shape.model, self.shape.vocab_size)
        return network if self.shape.kind == "policy" else ScalarModel(network)

    def empty_network(self) -> Transformer | ScalarModel:
        """Of its shape, without weights: `fill` gives them to a part. Raises UserError unless the
        file has those of all parts, and no others."""
        with torch.device("meta"):
            network = self.network()
        with readable(self.folder), safe_open(self.folder / WEIGHTS, "pt") as file:
            if set(file.keys()) != set(network.state_dict()):
                raise UserError(misfit(self.folder))
        return network

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Give a part of the empty network its weights; `prefix` is the part's name, with a dot.
        They stay in the mapped file until they are used. Raises UserError for numbers that aren't
        finite, and for other shapes."""
        with readable(self.folder), safe_open(self.folder / WEIGHTS, "pt") as file:
            state = {name: file.get_tensor(prefix + name) for name in module.state_dict()}
        for name, weight in state.items():
            check_finite(self.folder, prefix + name, weight)
        with fitting(self.folder):
            module.load_state_dict(state, assign=True)


def open_stored(folder: Path, kind: Kind | None = None) -> Stored:
    """What load_policy and load_scalar load. Raises UserError if it is missing, damaged, or of
    another kind than asked for."""
    with readable(folder):
        shape = build(Shape, read_json(folder / "config.json"), f"{folder}/config.json")
        tokenizer = Tokenizer.load(folder)
        sums = {WEIGHTS: shape.weights_sha256, TOKENIZER: shape.tokenizer_sha256}
        for name, digest in sums.items():
            if digest not in (None, sha256(folder / name)):
                raise UserError(
                    f"{folder / name}: damaged, its bytes are not those that training wrote: copy "
                    "it again, or train it again"
                )
        with safe_open(folder / WEIGHTS, "pt"):  # whether it has a header
            pass
    if kind not in (shape.kind, None):
        wanted = {"policy": "a language model", "scalar": "a reward model"}
        raise UserError(f"{folder}: holds {wanted[shape.kind]}, but {wanted[kind]} is needed here")
    return Stored(folder, shape, tokenizer)


def _load(folder: Path, kind: Kind) -> tuple[Any, Tokenizer]:
    stored = open_stored(folder, kind)
    with readable(folder):
        weights = load_file(folder / WEIGHTS)
    network = stored.network()
    for name, weight in weights.items():
        check_finite(folder, name, weight)
    with fitting(folder):
        network.load_state_dict(weights)
    return network, stored.tokenizer


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """UserError for a finished run's files that are missing or broken."""
    try:
        yield
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


@contextmanager
def fitting(folder: Path) -> Iterator[None]:
    """UserError where load_state_dict finds that weights have other names or shapes."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(misfit(folder)) from error


def misfit(folder: Path) -> str:
    return f"{folder}: the weights do not fit the shape in config.json"


def check_finite(folder: Path, name: str, weight: Tensor) -> None:
    if not all(map(torch.isfinite, weight.aminmax())):
        raise UserError(f"{folder}: {name} is not finite: train it again with a lower lr")
