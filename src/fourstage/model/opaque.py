"""Workarounds for F.grouped_mm: under torch.compile, and on Blackwell.

torch.compile supports it in bfloat16 only, so in other precisions it gets an opaque operation.
Uncompiled code calls F.grouped_mm directly: a custom operation costs some 10 us.

Shape legend: M token copies sorted by expert, E experts, D and F_ the widths of a weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class ZeroWhereEmpty(torch.autograd.Function):
    """The identity on a weight [E, D, F_]; its gradient is set to 0 for experts without tokens. On
    compute capability 10 grouped_mm's backward doesn't write those (pytorch 172439, 193633)."""

    @staticmethod
    def forward(ctx, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(ends_E)
        return w_EDF.view_as(w_EDF)

    @staticmethod
    def backward(ctx, grad_EDF: Tensor):
        (ends_E,) = ctx.saved_tensors
        has_tokens_E = ends_E.diff(prepend=ends_E.new_zeros(1)) > 0
        return torch.where(has_tokens_E[:, None, None], grad_EDF, 0), None


def leaves_gaps(x: Tensor) -> bool:
    """Whether grouped_mm's backward may leave the gradients of some experts unwritten."""
    return x.device.type == "cuda" and torch.cuda.get_device_capability(x.device)[0] == 10


@torch.library.custom_op("fourstage::grouped_mm", mutates_args=())
def grouped_mm(x_MD: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """[M, D] and [E, D, F_] -> [M, F_]: expert e's rows end at ends_E[e], int32."""
    return F.grouped_mm(x_MD, w_EDF, offs=ends_E)


@torch.library.custom_op("fourstage::grouped_outer", mutates_args=())
def _grouped_outer(x_MD: Tensor, grad_MF: Tensor, ends_E: Tensor) -> Tensor:
    """[M, D] and [M, F_] -> [E, D, F_]: the gradient of grouped_mm's weight."""
    return F.grouped_mm(x_MD.t(), grad_MF, offs=ends_E)


def _grouped_mm_backward(ctx, grad_MF: Tensor):
    x_MD, w_EDF, ends_E = ctx.saved_tensors
    grad_MF = grad_MF.contiguous()
    return grouped_mm(grad_MF, w_EDF.mT, ends_E), _grouped_outer(x_MD, grad_MF, ends_E), None


grouped_mm.register_fake(lambda x_MD, w_EDF, ends_E: x_MD.new_empty(x_MD.shape[0], w_EDF.shape[2]))
_grouped_outer.register_fake(
    lambda x_MD, grad_MF, ends_E: x_MD.new_empty(ends_E.shape[0], x_MD.shape[1], grad_MF.shape[1])
)
grouped_mm.register_autograd(
    _grouped_mm_backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
