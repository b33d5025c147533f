"""A CUDA graph without CUDA: the operations of a step, run again on the same memory.

As a graph does, it reads the tensors that it was recorded with, whatever is in them by then, writes
its results where they were, and knows nothing of Python's numbers but those of the recording.
"""

from __future__ import annotations

from os.path import commonprefix
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fourstage.model import opaque, ops
from fourstage.sampling import recording
from fourstage.sampling.generate import Generation


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            alias = [x.alias_info for x in func._schema.returns]
            if any(x is not None and not x.is_write for x in alias):
                continue  # a view
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


class StandIn:
    """In place of sampling.recording.Recording."""

    recorded: ClassVar[list[int]] = []  # the rows of each, since a test began
    replays: ClassVar[list[tuple[int, int]]] = []  # rows that were asked for, and the place

    def __init__(self, step: Any, ids_U: Tensor, at: int, beside: StandIn | None = None) -> None:
        assert beside is None or isinstance(beside, StandIn)
        self.ids_U = ids_U.clone()
        self.at_1 = torch.full((1,), at, device=ids_U.device)
        step(self.ids_U, self.at_1)
        with Tape() as self.tape:
            self.logits_UV = step(self.ids_U, self.at_1)
        self.recorded.append(len(ids_U))

    def __call__(self, ids_B: Tensor, at: int) -> Tensor:
        self.ids_U[: len(ids_B)] = ids_B
        self.at_1.fill_(at)
        guard = torch._C._DisableAutocast()
        with torch.no_grad():
            self.tape.replay()
        del guard
        self.replays.append((len(ids_B), at))
        return self.logits_UV[: len(ids_B)].clone()


def record_with(monkeypatch: Any, kind: type[StandIn] = StandIn) -> None:
    """A network that asks for it has its steps recorded by what stands in, on any device."""
    monkeypatch.setattr(recording, "Recording", kind)
    monkeypatch.setattr(recording, "can_record", lambda model, dtype: model.records_steps)
    # what PyTorch sees as one operation, as on a GPU: on a CPU it is none, or some for each expert
    monkeypatch.setattr(ops, "applies", lambda *_: False)
    monkeypatch.setattr(ops, "grouped_mm", opaque.grouped_mm)
    monkeypatch.setattr(StandIn, "recorded", [])
    monkeypatch.setattr(StandIn, "replays", [])


def gaps(found: Generation, want: Generation) -> list[float]:
    """How far the log-probs of each token are apart, until rounding lets two answers part."""
    gaps = []
    for i, answers in enumerate(zip(found.answer_ids, want.answer_ids, strict=True)):
        n = len(commonprefix(answers))
        pairs = zip(found.logprobs[i][:n], want.logprobs[i][:n], strict=True)
        gaps += [abs(a - b) for a, b in pairs]
    return gaps
