"""The tensors of a resume state: the same, whatever number of processes and strategy wrote them.

Each process writes the numbers that it works on into a file of its own, so nothing is gathered: of
each trained weight a range of the flattened weight, and the same range of each of its optimizer
states (exp_avg and exp_avg_sq of AdamW, momentum of Muon). A process that reads takes the ranges
that it needs from whichever files have them. Without ZeRO every process works on all numbers, and
the first one writes them.

A file is safetensors; a tensor's name in it is "WHAT START NAME", such as
"exp_avg 4096 policy.head.weight". START is empty for what isn't divided: an optimizer's count of
steps, and buffers, of which WHAT is "buffer". A JSON file beside it says of which save it is, how
many files that has, and each tensor's CRC-32.
"""

import shlex
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors import safe_open
from torch import Tensor, nn

from fourstage.errors import UserError
from fourstage.files import read_json, write_json
from fourstage.model.tensor_file import raw, write_safetensors
from fourstage.optim.shards import Held, Shard, shards_of
from fourstage.parallel.strategies import ZeroStrategy

WEIGHT, BUFFER = "weight", "buffer"  # beside the names of the optimizer's states


def write_tensors(trainer: L.Trainer, folder: Path, save: str) -> None:
    """Write what this process has to, if anything. Every process has to call it, with the same name
    for this save."""
    tensors = dict(own_tensors(trainer))
    if not tensors:
        return
    sums: dict[str, int] = {}

    def summed() -> Iterator[tuple[str, Tensor]]:
        for name, x in tensors.items():
            x = x.cpu()
            sums[name] = zlib.crc32(raw(x))
            yield name, x

    layout = {name: (x.dtype, x.shape) for name, x in tensors.items()}
    path = folder / f"rank-{trainer.global_rank:05}.safetensors"
    write_safetensors(path, layout, summed())
    files = trainer.world_size if isinstance(trainer.strategy, ZeroStrategy) else 1
    write_json(path.with_suffix(".json"), {"save": save, "files": files, "crc32": sums})


@torch.no_grad()
def read_tensors(trainer: L.Trainer, folder: Path, save: str) -> None:
    """Give the networks and the optimizer what `write_tensors` wrote, in any other job. Every
    process has to call it. Raises UserError for files that are missing, damaged or of another save,
    ValueError, KeyError or safetensors' own error unless they have exactly what these networks
    need."""
    check_files(trainer, folder, save)
    with ExitStack() as stack:
        stored = Stored(folder, stack)
        optimizer, shards = optimizer_and_shards(trainer)
        names = names_of(trainer)
        if missing := set(names.values()) ^ stored.names():
            raise ValueError(f"weights that are not in both: {sorted(missing)[:3]}")
        for shard, held in shards:
            read_shard(stored, optimizer, shard, held, names)
        for name, buffer in buffers_of(trainer).items():
            buffer.copy_(stored.whole(BUFFER, name).view(buffer.shape))
    if isinstance(trainer.strategy, ZeroStrategy) and trainer.strategy.zero_stage_3:
        gather_small_weights(trainer.strategy.deepspeed_engine.optimizer)


def check_files(trainer: L.Trainer, folder: Path, save: str) -> None:
    """Raise UserError, on every rank, unless the folder has all files of this save and no others,
    with the numbers that were written. Each rank reads a part of the files for that."""
    paths = sorted(folder.glob("rank-*.safetensors"))
    notes = {path: read_json(path.with_suffix(".json")) for path in paths}
    n_files = next((note["files"] for note in notes.values() if note["save"] == save), 1)
    wanted = {folder / f"rank-{rank:05}.safetensors" for rank in range(n_files)}
    wrong = [f"{path.name} is missing" for path in sorted(wanted - {*paths})]
    for path, note in notes.items():
        if path not in wanted or note["save"] != save:
            wrong.append(f"{path.name} is of another save")
    for path in paths[trainer.global_rank :: trainer.world_size] if not wrong else ():
        if name := damaged(path, notes[path]["crc32"]):
            wrong.append(f"{path.name} is damaged ({name})")
    found = torch.tensor(len(wrong), dtype=torch.int32, device=trainer.strategy.root_device)
    if int(trainer.strategy.reduce(found, reduce_op="max")):
        raise UserError(
            f"{folder}: {wrong[0] if wrong else 'damaged, as another process says'}: restore it "
            f"from a copy, or train the stage from the start: rm -r {shlex.quote(str(folder))}"
        )


def damaged(path: Path, sums: dict[str, int]) -> str | None:
    """The first tensor that isn't what was written."""
    with safe_open(path, "pt") as file:
        different = (name for name in sums if zlib.crc32(raw(file.get_tensor(name))) != sums[name])
        return next(different, None)


def optimizer_and_shards(trainer: L.Trainer) -> tuple[torch.optim.Optimizer, list[Shard]]:
    """The optimizer that has the states, and what it works on in this process."""
    (optimizer,) = trainer.optimizers
    if isinstance(trainer.strategy, ZeroStrategy):
        return optimizer.optimizer, list(shards_of(optimizer, trainer.strategy.zero_stage))
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return optimizer, [(weight, [whole(weight)]) for weight in weights]


def whole(weight: nn.Parameter) -> Held:
    everything = slice(0, weight.numel())
    return Held(weight, weight.shape, weight.detach().view(-1), everything, everything)


def names_of(trainer: L.Trainer) -> dict[nn.Parameter, str]:
    """Of the trained weights."""
    named = trainer.lightning_module.named_parameters()
    return {weight: name for name, weight in named if weight.requires_grad}


def buffers_of(trainer: L.Trainer) -> dict[str, Tensor]:
    """What moves without an optimizer, such as the routers' biases; the same on every rank."""
    module = trainer.lightning_module
    weights = dict(module.named_parameters())
    return {name: x for name, x in module.state_dict().items() if name not in weights}


def own_tensors(trainer: L.Trainer) -> Iterator[tuple[str, Tensor]]:
    """What this process writes, as views where that can be."""
    is_sharded = isinstance(trainer.strategy, ZeroStrategy)
    if not (is_sharded or trainer.is_global_zero):
        return
    names = names_of(trainer)
    optimizer, shards = optimizer_and_shards(trainer)
    for shard, held in shards:
        states = {WEIGHT: shard, **optimizer.state.get(shard, {})}
        for x in held:
            for what, state in states.items() if x.of.stop > x.of.start else ():
                if state.shape == shard.shape:
                    yield f"{what} {x.of.start} {names[x.weight]}", state.detach().view(-1)[x.at]
                elif x.of.start == 0:
                    yield f"{what}  {names[x.weight]}", state.detach()
    if trainer.is_global_zero:
        for name, buffer in buffers_of(trainer).items():
            yield f"{BUFFER}  {name}", buffer


def read_shard(
    stored: "Stored",
    optimizer: torch.optim.Optimizer,
    shard: Tensor,
    held: list[Held],
    names: dict[nn.Parameter, str],
) -> None:
    """The weights, whole where they are kept whole, and the optimizer's states."""
    flat = shard.detach().view(-1)
    for what, is_divided in stored.states(names[held[0].weight]).items():
        if not is_divided:
            value = stored.whole(what, names[held[0].weight])
            optimizer.state[shard][what] = value.to(shard.device)
            continue
        state = flat
        if what != WEIGHT:  # what pads a shard is 0
            state = torch.zeros_like(flat)
            optimizer.state[shard][what] = state.view(shard.shape)
        for x in held:
            stored.read(what, names[x.weight], x.of, state[x.at])
    for x in held:
        if x.weight.numel() == x.shape.numel():  # not under ZeRO-3
            everything = x.weight.detach().view(-1)
            stored.read(WEIGHT, names[x.weight], slice(0, len(everything)), everything)
        else:
            x.here.copy_(flat[x.at])


def gather_small_weights(zero: Any) -> None:
    """ZeRO-3 keeps small weights whole on every rank, beside their shards."""
    if zero.persistent_parameters:
        first = zero.persistent_parameters[0]
        first.partition(zero.persistent_parameters)
        first.all_gather(zero.persistent_parameters)


class Stored:
    """The files of a state: for each WHAT and NAME its pieces, [(start, file, name in it)]."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.pieces: dict[str, dict[str, list[tuple[int | None, Any, str]]]]
        self.pieces = defaultdict(lambda: defaultdict(list))
        for path in sorted(folder.glob("rank-*.safetensors")):
            file = stack.enter_context(safe_open(path, "pt"))
            for key in list(file.keys()):
                what, start, name = key.split(" ", 2)
                self.pieces[name][what].append((int(start) if start else None, file, key))

    def names(self) -> set[str]:
        """Of the weights."""
        return {name for name, found in self.pieces.items() if WEIGHT in found}

    def states(self, name: str) -> dict[str, bool]:
        """What there is of a weight, and whether it is divided."""
        return {what: found[0][0] is not None for what, found in self.pieces[name].items()}

    def whole(self, what: str, name: str) -> Tensor:
        ((_, file, key),) = self.pieces[name][what]
        return file.get_tensor(key)

    def read(self, what: str, name: str, of: slice, into: Tensor) -> None:
        """Numbers `of` a flattened weight, or of one of its states."""
        missing = of.stop - of.start
        for start, file, key in self.pieces[name][what]:
            piece = file.get_slice(key)
            first, last = max(of.start, start), min(of.stop, start + piece.get_shape()[0])
            if first < last:
                into[first - of.start : last - of.start] = piece[first - start : last - start]
                missing -= last - first
        if missing:
            raise ValueError(f"{name}: {missing} numbers of its {what} are missing")
