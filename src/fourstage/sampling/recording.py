"""A decode step as a CUDA graph: hundreds of small kernels that a GPU launches at once.

A graph holds addresses, so keys, values and half-precision weights stay in place from one rollout
to the next, which overwrites them. There is a graph for each of a few numbers of rows; surplus rows
are computed but not read.

Shape legend: B rows, U rows of a graph, S positions, V vocabulary.
"""

import weakref
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fourstage.model.precision import autocast_dtype
from fourstage.model.transformer import Transformer
from fourstage.sampling.steps import TorchSteps, rope_with_gains

RECORD_AFTER = 4  # steps of the same rows, after which one is recorded: that takes 30 to 60 ms
LEAST_REPLAYS = 24  # a recording pays off if at least so many steps follow
ROWS = sorted({m << k for m in (2, 3) for k in range(20)} | {1})  # 1, 2, 3, 4, 6, 8, 12, 16, ...
PLACES = 64  # the number of a row's places is a multiple of it

Step = Callable[[Tensor, Tensor], Tensor]  # tokens [U] and their place [1] -> logits [U, V]


def can_record(model: Transformer, dtype: torch.dtype) -> bool:
    """Whether recording was asked for and a step of this network in dtype allows it.

    grouped_mm reads the groups' sizes on the host, which a recording can't, except for bf16 on
    Hopper (9) and data-center Blackwell (10); consumer Blackwell (12) isn't one of them.
    """
    if not model.records_steps or model.embedding.weight.device.type != "cuda":
        return False
    if model.config.dense:
        return True
    is_grouped = model.config.expert_path == "grouped" and dtype == torch.bfloat16
    return is_grouped and torch.cuda.get_device_capability()[0] in (9, 10)


def recorded_steps(
    model: Transformer, capacity: int, real_BS: Tensor | None, rows: int, user: Any
) -> "RecordedSteps | None":
    """The steps that the network keeps, lent to this decoder (user) while it lives; None where they
    can't be recorded or another decoder has them."""
    dtype = autocast_dtype(model.embedding.weight)
    kept: RecordedSteps | None = model.recorded_steps
    if not rows or not can_record(model, dtype) or (kept and kept.user() is not None):
        return None
    if kept is None or not kept.serve(rows, capacity, dtype):
        model.recorded_steps = kept = None  # frees the memory first
        kept = model.recorded_steps = RecordedSteps(model, rows, capacity)
    kept.begin(real_BS, capacity)
    kept.user = weakref.ref(user)
    return kept


class RecordedSteps(TorchSteps):
    """A network's steps, for one decoder after another, and the graphs recorded so far."""

    def __init__(self, model: Transformer, rows: int, capacity: int):
        places, device = -(-capacity // PLACES) * PLACES, model.embedding.weight.device
        self.rows = _row_bucket(rows)
        real_BS = torch.ones(self.rows, places, dtype=torch.bool, device=device)
        super().__init__(model, places, real_BS, self.rows)
        self.graphs: dict[int, Recording] = {}  # by the number of rows
        self.addresses = _addresses(model)
        self.user: Callable[[], Any] = lambda: None  # the decoder that has the steps

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a network records its own steps."""

    def serve(self, rows: int, capacity: int, dtype: torch.dtype) -> bool:
        """Whether these rows fit, and the weights haven't moved."""
        fit = rows <= self.rows and capacity <= self.capacity
        return fit and dtype == self.dtype and self.addresses == _addresses(self.model)

    def begin(self, real_BS: Tensor | None, capacity: int) -> None:
        """Takes over another decoder's rows and the current weights."""
        self.end, self.steps_alike = capacity, 0
        for cache in self.caches:
            cache.clear()
        self.real_BS.fill_(True)
        self.is_padded = real_BS is not None
        if real_BS is not None:
            self.real_BS[: len(real_BS), :capacity] = real_BS
        for weight, original in self.casts:
            weight.copy_(original)
        for (rope, *_), block in zip(self.layers, self.model.blocks, strict=True):
            current = rope_with_gains(block.weights().head_gain, self.rope)
            for x, now in zip(rope, current, strict=True):
                x.copy_(now)

    def step(self, ids_B: Tensor, at: int) -> Tensor:
        rows = _row_bucket(len(ids_B))
        is_worth_it = self.steps_alike >= RECORD_AFTER and self.end - at >= LEAST_REPLAYS
        if rows not in self.graphs and is_worth_it:
            ids_U = torch.cat((ids_B, ids_B.new_zeros(rows - len(ids_B))))
            beside = next(iter(self.graphs.values()), None)
            self.graphs[rows] = Recording(super().step, ids_U, at, beside)
        self.steps_alike += 1
        return self.graphs.get(rows, super().step)(ids_B, at)

    def keep(self, rows: Tensor) -> None:
        for cache in self.caches:
            cache.keep(rows)
        self.real_BS[: len(rows)] = self.real_BS[rows]
        self.steps_alike = 0


def _row_bucket(rows: int) -> int:
    return ROWS[bisect_left(ROWS, rows)]


def _addresses(model: Transformer) -> list[int]:
    return [x.data_ptr() for x in (*model.parameters(), *model.buffers())]


class Recording:
    """Records a step of U rows and replays it for other tokens and places."""

    def __init__(self, step: Step, ids_U: Tensor, at: int, beside: "Recording | None" = None):
        """step must not wait for the GPU. It runs once first, for the same place.

        beside: another recording, whose scratch memory is shared, as no two run at once.
        """
        self.ids_U = ids_U.clone()
        self.at_1 = torch.full((1,), at, device=ids_U.device)
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # libraries initialize themselves in their first call
            step(self.ids_U, self.at_1)
        current.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=beside and beside.graph.pool()):
            self.logits_UV = step(self.ids_U, self.at_1)

    def __call__(self, ids_B: Tensor, at: int) -> Tensor:
        self.ids_U[: len(ids_B)] = ids_B
        self.at_1.fill_(at)
        self.graph.replay()
        return self.logits_UV[: len(ids_B)].clone()
