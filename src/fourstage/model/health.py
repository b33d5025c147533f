"""Whether the routers of a model are healthy: how evenly they share the tokens, what has changed.

Shape legend: L layers, E experts, N tokens, K experts chosen per token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def load_health(load_LE: Tensor) -> dict[str, Tensor]:
    """Per layer [L], from the tokens that each expert got:

    load_entropy: of the load, over log E: 1 where all experts are equally busy
    max_over_mean: load of the busiest expert over the mean load, from 1 to E
    dead_experts: experts that got no token
    """
    share_LE = load_LE / load_LE.sum(-1, keepdim=True).clamp(min=1)
    return {
        "load_entropy": torch.special.entr(share_LE).sum(-1) / math.log(load_LE.shape[1]),
        "max_over_mean": load_LE.amax(-1) / load_LE.mean(-1).clamp(min=1e-9),
        "dead_experts": (load_LE == 0).sum(-1),
    }


def bias_spread(bias_LE: Tensor) -> Tensor:
    """Largest minus smallest selection bias of each layer, [L]."""
    return bias_LE.amax(-1) - bias_LE.amin(-1)


def drift(before_LNK: Tensor, after_LNK: Tensor) -> Tensor:
    """Share of the tokens whose set of experts is another one, float [L]; order means nothing."""
    changed_LNK = before_LNK.sort(-1).values != after_LNK.sort(-1).values
    return changed_LNK.any(-1).float().mean(-1)
