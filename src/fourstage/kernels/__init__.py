"""The CPU's C++ kernels, as operations of PyTorch (torch.ops.fourstage) with their gradients.

Where PyTorch makes hundreds of passes over memory, these make a few, and their matrix product is
faster for the few rows of an expert or a decode step (docs/performance.md). They need float32, and
widths that are multiples of 16. The package works without this folder, through PyTorch.
"""

from fourstage.kernels.build import WIDTH, fits, is_available, kind, run
from fourstage.kernels.operations import attention, experts, heads, linear, newton_schulz, rms_norm

__all__ = ["WIDTH", "fits", "is_available", "kind", "run"]
__all__ += ["attention", "experts", "heads", "linear", "newton_schulz", "rms_norm"]
