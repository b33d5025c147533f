"""A decode step of any network: its own forward over whole right-padded rows, for each new token.

Slow, but always what trains; the fast decoders repeat the arithmetic of modules they know.

Shape legend: B rows, T tokens, S positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourstage.model.transformer import Transformer


class PlainSteps:
    def __init__(self, model: Transformer, real_BS: Tensor | None):
        """real_BS: bool [B, capacity], False on the padding at the left."""
        self.model = model
        self.pads_B = None if real_BS is None else (~real_BS).sum(1)
        self.ids_BT: Tensor | None = None

    def prefill(self, ids_BT: Tensor) -> None:
        self.ids_BT = ids_BT

    def step(self, ids_B: Tensor, at: int) -> Tensor:
        """The tokens at place `at` -> logits [B, V]."""
        before = [] if self.ids_BT is None else [self.ids_BT]
        ids_BT = self.ids_BT = torch.cat([*before, ids_B[:, None]], 1)
        last_B = torch.full_like(ids_B, at)
        if self.pads_B is not None:  # moved to the right, where training has it
            last_B = at - self.pads_B
            places_BT = torch.arange(at + 1, device=ids_B.device) + self.pads_B[:, None]
            ids_BT = ids_BT.gather(1, places_BT.clamp(max=at))
        valid_BT = torch.arange(at + 1, device=ids_B.device) <= last_B[:, None]
        hidden_BTD = self.model(ids_BT, valid_BT=valid_BT).hidden_BTD
        return self.model.logits(hidden_BTD[torch.arange(len(ids_B)), last_B])

    def keep(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was, int64 [b]: rows may be dropped or repeated."""
        self.ids_BT = self.ids_BT[rows]
        self.pads_B = None if self.pads_B is None else self.pads_B[rows]
