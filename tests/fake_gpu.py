"""A GPU that is not there: tensors on the device "fakegpu", whose numbers lie in the CPU's memory.

Code that mixes devices fails as it would on a GPU, and takes the branches that a GPU takes. What
makes the processor wait for a GPU is counted, by the line of fourstage that does it.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "fakegpu"


class Backend(_DummyBackendModule):
    """What PyTorch asks of a device type, in this process from then on."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        pass


_setup_privateuseone_for_python_backend(NAME, Backend())
DEVICE = torch.device(NAME, 0)

MOVES = ("aten._to_copy", "aten.copy_")  # from one device to another
INDEXES = ("aten.index.", "aten.index_put", "aten._index_put")  # a GPU's tensor, by a CPU's index
READS = (torch.Tensor.tolist, torch.Tensor.__format__, torch.Tensor.__reduce_ex__)
WAITS = (
    *("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._unique2"),
    *("aten.masked_scatter_backward", "aten.bincount"),
)


class OnGPU(torch.Tensor):
    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> OnGPU:
        shape, strides = numbers.size(), numbers.stride()
        made = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=numbers.dtype, device=DEVICE
        )
        made.numbers = numbers
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the numbers; its result is where the operands are, or where it was asked."""
    name = str(func)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if isinstance(x, OnGPU)]
    elsewhere = [x for x in tensors if not isinstance(x, OnGPU) and x.ndim > 0]
    if here and elsewhere and not name.startswith(MOVES + INDEXES):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    device = kwargs.get("device")
    is_here = bool(here) if device is None else torch.device(device).type == NAME

    def numbers(x: Any) -> Any:
        if isinstance(x, torch.device):
            return torch.device("cpu")
        return x.numbers if isinstance(x, OnGPU) else x

    wrappers = {id(x.numbers): x for x in here}

    def wrapped(x: Any) -> Any:
        if id(x) in wrappers:  # changed in place
            return wrappers[id(x)]
        return OnGPU(x) if is_here and isinstance(x, torch.Tensor) else x

    args, kwargs = tree_map(numbers, (args, kwargs))
    return tree_map(wrapped, func(*args, **kwargs))


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = run(func, args, kwargs or {}), str(func)
        if name.startswith(MOVES) and isinstance(out, OnGPU):
            source = args[1] if name.startswith("aten.copy_") else args[0]
            # a number (what is logged) goes where nothing is left to wait for
            is_upload = not isinstance(source, OnGPU) and source.ndim > 0
            if is_upload and not _is_non_blocking(func, args, kwargs or {}):
                self.waits[_line()] += 1
        elif any(isinstance(x, OnGPU) for x in tree_leaves(args)):
            leaves = name.startswith(MOVES)
            by_mask = name.startswith(INDEXES) and any(
                isinstance(x, OnGPU) and x.dtype == torch.bool for x in tree_leaves(args[1])
            )
            if leaves or by_mask or name.startswith(WAITS):
                self.waits[_line()] += 1
        return out


def _is_non_blocking(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    if str(func).startswith("aten.copy_"):
        return bool(args[2]) if len(args) > 2 else False
    return bool(kwargs.get("non_blocking", False))


def _line() -> str:
    frames = [f for f in traceback.extract_stack() if "/src/fourstage/" in f.filename]
    return f"{frames[-1].filename.rpartition('/')[2]}: {frames[-1].line}" if frames else "elsewhere"


class Functions(TorchFunctionMode):
    """What works below the reach of a dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == NAME:
            return func(*args, **{**kwargs, "device": "cpu"}).to(device)
        if func in READS and isinstance(args[0], OnGPU):
            return func(args[0].cpu(), *args[1:])
        return func(*args, **kwargs)


@contextmanager
def fake_gpu() -> Iterator[Counter[str]]:
    """How often each line of fourstage made the processor wait."""
    with Functions(), Operations() as operations:
        yield operations.waits


class NoSetup(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        assert device == DEVICE


def trainer_options() -> dict[str, Any]:
    """For a Trainer whose one device is this."""
    return {"accelerator": NoSetup(), "strategy": SingleDeviceStrategy(device=DEVICE)}
