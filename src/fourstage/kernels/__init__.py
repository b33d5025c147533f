"""A CPU's kernels in C++, each an operation of PyTorch (torch.ops.fourstage) with its gradient.

PyTorch runs a step as hundreds of passes over memory; these take a few, and their matrix product is
the faster one for the few rows of an expert or of a decode step (docs/performance.md). They work on
float32, in widths that 16 divides. The package works without this folder, through PyTorch.
"""

from fourstage.kernels.build import WIDTH, check, fits, is_available, kind, run
from fourstage.kernels.operations import (
    attention,
    experts,
    heads,
    linear,
    newton_schulz,
    rms_norm,
)

__all__ = [
    "WIDTH",
    "attention",
    "check",
    "experts",
    "fits",
    "heads",
    "is_available",
    "kind",
    "linear",
    "newton_schulz",
    "rms_norm",
    "run",
]
