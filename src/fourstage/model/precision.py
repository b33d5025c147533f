"""What stays in float32 while autocast runs the rest of a network in half precision.

In half precision a router's near-ties would flip, a reward model's scores would tie, and the
sampler's log-probabilities would differ from the trainer's by more than a step changes the policy.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

LARGE_VOCABULARY = 4096  # above it the logits are computed in half precision too: it saves too much


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Turns autocast off on x's device."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What autocast computes in on x's device; x's own dtype where autocast is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
