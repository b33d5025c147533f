"""What stays in float32 where the rest of a network runs under autocast, in half precision.

Near-ties of a router would flip, scores of a reward model would tie, and the log-probabilities of
the sampler and the trainer would differ by more than a policy moves in a step.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

LARGE_VOCABULARY = 4096  # tokens above which logits are worth the rounding: their product is large


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Without autocast, where it is on for x's device."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
