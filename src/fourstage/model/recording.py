"""A decode step as a CUDA graph: hundreds of small kernels that a GPU runs by one command."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fourstage.model.transformer import Transformer

Step = Callable[[Tensor, Tensor], Tensor]  # tokens [B] and their place [1] -> logits [B, V]


def can_record(model: Transformer, dtype: torch.dtype) -> bool:
    """Whether a step of this network, in dtype, can be recorded where that was asked for.

    A GPU's grouped product asks for the groups' sizes, which a recording cannot, unless it is the
    one of Hopper (9) and data-center Blackwell (10) in bf16; a consumer's Blackwell (12) has none.
    """
    if not model.records_steps or model.embedding.weight.device.type != "cuda":
        return False
    if model.config.dense:
        return True
    is_grouped = model.config.expert_path == "grouped" and dtype == torch.bfloat16
    return is_grouped and torch.cuda.get_device_capability()[0] in (9, 10)


class Recording:
    """Records a step of B rows, and replays it for other tokens and places."""

    def __init__(self, step: Step, ids_B: Tensor, at: int):
        """step must not wait for the GPU; it runs once for this place, which its replay repeats."""
        self.ids_B = ids_B.clone()
        self.at_1 = torch.full((1,), at, device=ids_B.device)
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # libraries set themselves up at a first call
            step(self.ids_B, self.at_1)
        current.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits_BV = step(self.ids_B, self.at_1)

    def __call__(self, ids_B: Tensor, at: int) -> Tensor:
        self.ids_B.copy_(ids_B)
        self.at_1.fill_(at)
        self.graph.replay()
        return self.logits_BV.clone()
