"""Router health: how evenly the experts share the tokens, and how the routing changes.

Shape legend: L layers, E experts, N tokens, K experts chosen per token.
"""

import math

import torch
from torch import Tensor


def load_health(load_LE: Tensor) -> dict[str, Tensor]:
    """Per layer [L], from the number of tokens of each expert:

    load_entropy: entropy of the load / log E; 1 where all experts are equally busy
    max_over_mean: load of the busiest expert / mean load, from 1 to E
    dead_experts: experts without tokens
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
    """Share of the tokens whose set of experts has changed, float [L]."""
    changed_LNK = before_LNK.sort(-1).values != after_LNK.sort(-1).values
    return changed_LNK.any(-1).float().mean(-1)
