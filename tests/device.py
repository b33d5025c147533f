"""Where tests run, and how near two results must be to each other there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if IS_GPU else "cpu")
TRAINER: dict[str, Any] = {"accelerator": "gpu" if IS_GPU else "cpu", "devices": 1}

FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}  # sums in another order, or of another kernel
BFLOAT16 = 2e-2  # of a tensor's norm: 8 bits of each number are kept, layer after layer

# between weights after some steps
ROUNDING = 1e-5 if IS_GPU else 1e-6  # of rows in other pieces
REPEATED = 1e-5 if IS_GPU else 0.0  # of equal runs: a GPU may add in another order each time


def close(
    found: Tensor, want: Tensor, dtype: torch.dtype = torch.float32, name: str = "found"
) -> None:
    """The same numbers but for the rounding of the type that they were computed in."""
    found, want = found.detach().cpu().float(), want.detach().cpu().float()
    if dtype == torch.float32:
        torch.testing.assert_close(found, want, **FLOAT32, msg=lambda text: f"{name}: {text}")
    else:
        assert (found - want).norm() < BFLOAT16 * want.norm(), name


def repeated(found: Tensor, want: Tensor) -> None:
    """The same computation once more: the same bits on a CPU."""
    if IS_GPU:
        close(found, want)
    else:
        assert torch.equal(found, want)
