"""What modules compute: by a kernel on a CPU in float32, otherwise by PyTorch's operations.

Each function has the plain expression next to the kernel (../kernels), which equals it
(tests/kernels). A GPU, half precision, torch.compile, a machine without a compiler and widths that
aren't multiples of 16 take the plain one.

Shape legend: N tokens, D d_model, E experts, K of them chosen per token, M = N K copies of tokens
sorted by expert, F d_expert; R and C rows and columns of a matrix.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fourstage.model import opaque
from fourstage.model.precision import autocast_dtype

try:
    from fourstage import kernels
except ImportError:  # the folder is optional
    kernels = None

LARGEST = 2**20  # elements of a Linear's weight: for larger ones PyTorch's product is as fast


def has_kernels(*widths: int) -> bool:
    """Whether there are kernels on this machine, and for these widths."""
    return kernels is not None and kernels.fits(*widths)


def applies(tensors: Sequence[Tensor], *widths: int) -> bool:
    """Whether a kernel takes these tensors: all on a CPU, in float32."""
    return (
        all(x.is_cpu and x.dtype == torch.float32 for x in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()  # they can't differentiate these
        and has_kernels(*widths)
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x times the transposed weight."""
    if weight.numel() <= LARGEST and applies((x, weight), *weight.shape):
        return kernels.linear(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], len(weight))
    return F.linear(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    if applies((x, weight), x.shape[-1]):
        return kernels.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the halves of the last dimension (Shazeer 2020, arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _Dispatch(torch.autograd.Function):
    """Copies the tokens into expert order, x_MD[m] = x_ND[order_M[m] // K].

    The gradient gathers a token's K copies. PyTorch's own would scatter-add, with atomics on a GPU,
    so that no two runs would be bit-identical.
    """

    @staticmethod
    def forward(ctx, x_ND: Tensor, order_M: Tensor, place_NK: Tensor) -> Tensor:
        ctx.save_for_backward(place_NK)
        return x_ND.index_select(0, order_M // place_NK.shape[1])

    @staticmethod
    def backward(ctx, grad_MD: Tensor):
        (place_NK,) = ctx.saved_tensors
        return F.embedding_bag(place_NK, grad_MD, mode="sum"), None, None


class _Combine(torch.autograd.Function):
    """The way back: y_ND[n] = sum_k gates_NK[n, k] * y_MD[place_NK[n, k]]."""

    @staticmethod
    def forward(ctx, y_MD: Tensor, gates_NK: Tensor, order_M: Tensor, place_NK: Tensor) -> Tensor:
        ctx.save_for_backward(y_MD, gates_NK, order_M, place_NK)
        return F.embedding_bag(place_NK, y_MD, mode="sum", per_sample_weights=gates_NK)

    @staticmethod
    def backward(ctx, grad_ND: Tensor):
        y_MD, gates_NK, order_M, place_NK = ctx.saved_tensors
        grad_MD = grad_ND.index_select(0, order_M // place_NK.shape[1])
        grad_gates_NK = torch.linalg.vecdot(grad_MD, y_MD)[place_NK]
        return grad_MD * gates_NK.flatten()[order_M, None], grad_gates_NK, None, None


def grouped_mm(x_MD: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """[M, D] and [E, D, F] -> [M, F]: expert e's rows end at ends_E[e]."""
    if opaque.leaves_gaps(w_EDF):
        w_EDF = opaque.ZeroWhereEmpty.apply(w_EDF, ends_E)
    if torch.compiler.is_compiling() and x_MD.dtype != torch.bfloat16:
        return opaque.grouped_mm(x_MD, w_EDF, ends_E)
    return F.grouped_mm(x_MD, w_EDF, offs=ends_E)


def experts(
    x_ND: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, experts_NK: Tensor, gates_NK: Tensor
) -> Tensor:
    """The sum of each token's SwiGLU experts times their gates, by one grouped product per weight
    over copies of the tokens, sorted by expert."""
    expert_M, order_M = experts_NK.flatten().sort(stable=True)
    every_E = torch.arange(len(down_EFD), device=order_M.device)
    ends_E = torch.searchsorted(expert_M, every_E, right=True, out_int32=True)
    if applies((x_ND, gate_up_EDF, down_EFD, gates_NK), *down_EFD.shape[1:]):
        return kernels.experts(x_ND, gate_up_EDF, down_EFD, gates_NK, order_M, ends_E)[0]
    place_NK = torch.empty_like(order_M)
    place_NK[order_M] = torch.arange(len(order_M), device=order_M.device)
    place_NK = place_NK.view_as(experts_NK)
    dtype = autocast_dtype(x_ND)
    x_MD = _Dispatch.apply(x_ND.to(dtype), order_M, place_NK)
    h_MF = swiglu(grouped_mm(x_MD, gate_up_EDF.to(dtype), ends_E))
    y_MD = grouped_mm(h_MF, down_EFD.to(dtype), ends_E)
    return _Combine.apply(y_MD, gates_NK.to(dtype), order_M, place_NK).to(x_ND.dtype)


def newton_schulz(x_MRC: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """x <- a x + (b x x^T + c (x x^T)^2) x for each a, b, c; matrices of norm 1, R <= C. Has no
    gradient."""
    if applies((x_MRC,), *x_MRC.shape[1:]):
        is_square = x_MRC.shape[1] == x_MRC.shape[2]
        x_MCR = x_MRC if is_square else x_MRC.mT  # the kernel takes R >= C
        y_MCR = kernels.newton_schulz(x_MCR, x_MRC.new_tensor(coefficients))
        return y_MCR if is_square else y_MCR.mT
    for a, b, c in coefficients:
        gram_MRR = x_MRC @ x_MRC.mT
        factor_MRR = torch.baddbmm(gram_MRR, gram_MRR, gram_MRR, beta=b, alpha=c)
        x_MRC = torch.baddbmm(x_MRC, factor_MRR, x_MRC, beta=a)
    return x_MRC
