"""What modules compute: by a kernel on a CPU in float32, elsewhere in PyTorch's operations.

Each function has the plain expression, and where there is one the kernel (../kernels), which equals
it (tests/kernels). A GPU, half precision, torch.compile, a machine without a compiler and widths
that 16 does not divide take the plain one.

Shape legend: N tokens, B rows, T tokens of a row, S keys, D d_model, H query heads, G key/value
heads, J = H + 2 G, C head_dim, E experts, K of them a token, M = N K copies of tokens sorted by
expert, F d_expert; of a matrix R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fourstage.model import opaque
from fourstage.model.cache import LayerCache
from fourstage.model.packing import Packing

try:
    from fourstage import kernels
except ImportError:  # whoever needs none may delete the folder
    kernels = None

LARGEST = 2**20  # numbers of a Linear's weight; PyTorch's product is as good for a larger one
Rope = tuple[Tensor, Tensor]  # cos and sin [B or 1, T, 1, C], as rope_angles gives them
Gains = tuple[Tensor, Tensor]  # [C] each, of a query's and of a key's norm


def has_kernels(*widths: int) -> bool:
    """Whether there are kernels on this machine, and for these widths."""
    return kernels is not None and kernels.fits(*widths)


def kernels_kind() -> str:
    """For records: with others the last digits of sums differ."""
    return "no kernels" if kernels is None else kernels.kind()


def applies(tensors: Sequence[Tensor], *widths: int) -> bool:
    """Whether a kernel takes these tensors: all on a CPU, in float32."""
    return (
        all(x.is_cpu and x.dtype == torch.float32 for x in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()  # which differentiate no custom_op
        and has_kernels(*widths)
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x times the transposed weight."""
    if weight.numel() <= LARGEST and applies((x, weight), *weight.shape):
        return kernels.linear(x, weight)
    return F.linear(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    if applies((x, weight), x.shape[-1]):
        return kernels.rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the halves of the last dimension (Shazeer 2020, arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


# ---- attention


def rotate(x_BTHC: Tensor, rope: Rope) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) for the halves a, b of C, as transformers does."""
    cos, sin = rope
    return torch.addcmul(x_BTHC * cos, x_BTHC.roll(x_BTHC.shape[-1] // 2, -1), sin).to(x_BTHC.dtype)


class Heads(NamedTuple):
    """What a token's heads are made of."""

    qkv_BTJC: Tensor  # queries, keys and values
    numbers: tuple[int, int, int]  # of heads: H, G, G
    gains: Gains | None = None  # of the norms that queries and keys are still to pass
    eps: float = 0.0
    normed_BTJC: Tensor | None = None  # queries and keys, where there are no gains


def heads(x: Heads, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, normalised and rotated, and values; [B, H or G, T, C] each."""
    H, G, _ = x.numbers
    qk_BTJC, v_BTGC = x.normed_BTJC, x.qkv_BTJC[:, :, H + G :]
    if x.gains is not None:
        gain_JC = torch.cat((x.gains[0].expand(H, -1), x.gains[1].expand(G, -1)))
        n_BTJC = F.rms_norm(x.qkv_BTJC[:, :, : H + G], gain_JC.shape[-1:], None, x.eps)
        qk_BTJC = n_BTJC * gain_JC.to(n_BTJC.dtype)
    qk_BTJC = rotate(qk_BTJC, rope).to(v_BTGC.dtype)  # CUDA's autocast has norms in float32
    q_BTHC, k_BTGC = qk_BTJC.split((H, G), dim=2)
    return q_BTHC.transpose(1, 2), k_BTGC.transpose(1, 2), v_BTGC.transpose(1, 2)


def attention(
    x: Heads,
    rope: Rope,
    mask: Tensor | None = None,
    packing: Packing | None = None,
    cache: LayerCache | None = None,
) -> Tensor:
    """What queries see, [B, T, H C]; mask, packing and cache as in Attention.forward."""
    B, T, _, C = x.qkv_BTJC.shape
    fits = mask is None and cache is None and x.gains is not None and len(rope[0]) == 1
    if fits and applies((x.qkv_BTJC, *x.gains, *rope), C):
        return _kernel_attention(x, rope, packing).reshape(B, T, -1)
    q, k, v = heads(x, rope)
    if cache is not None:
        cache.store(k, v)
    if packing is not None:  # [1, H, N, C] -> [B, H, T, C]
        q, k, v = (packing.spread(x[0]).transpose(0, 1) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    if packing is not None:
        return packing.collect(y.transpose(0, 1)).view(B, T, -1)
    return y.transpose(1, 2).reshape(B, T, -1)


def _kernel_attention(x: Heads, rope: Rope, packing: Packing | None) -> Tensor:
    """[B, T, H, C], or of distinct tokens [N, H, C]."""
    (_, T, J, C), (H, G, _) = x.qkv_BTJC.shape, x.numbers
    gain_JC = torch.cat(((x.gains[0] * C**-0.5).expand(H, C), x.gains[1].expand(G, C)))
    cos_TC, sin_TC = (angles[0, :, 0] for angles in rope)
    qkv_BTJC = kernels.heads(x.qkv_BTJC, gain_JC, cos_TC, sin_TC, x.eps)
    if packing is None:
        return kernels.attention(qkv_BTJC, H)[0]
    rows_BTX = packing.spread(qkv_BTJC.view(1, T, J * C))[0]
    y_BTHC, _ = kernels.attention(rows_BTX.view(*packing.shape, J, C), H)
    return packing.collect(y_BTHC.flatten(2)[None])


# ---- experts


class _Dispatch(torch.autograd.Function):
    """Copies the tokens into expert order, x_MD[m] = x_ND[order_M[m] // K].

    A token's K copies have known places, so the gradient is gathered; PyTorch would scatter-add,
    with atomics on a GPU, and no two runs would be bit-identical.
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
    w_EDF = opaque.without_gaps(w_EDF, ends_E)
    if opaque.is_needed(x_MD):
        return opaque.grouped_mm(x_MD, w_EDF, ends_E)
    return F.grouped_mm(x_MD, w_EDF, offs=ends_E)


def experts(
    x_ND: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, experts_NK: Tensor, gates_NK: Tensor
) -> Tensor:
    """The sum of each token's SwiGLU experts times their gates.

    Tokens' copies are sorted by expert, and a weight is one grouped product.
    """
    expert_M, order_M = experts_NK.flatten().sort(stable=True)
    every_E = torch.arange(len(down_EFD), device=order_M.device)
    ends_E = torch.searchsorted(expert_M, every_E, right=True, out_int32=True)
    if applies((x_ND, gate_up_EDF, down_EFD, gates_NK), *down_EFD.shape[1:]):
        return kernels.experts(x_ND, gate_up_EDF, down_EFD, gates_NK, order_M, ends_E)[0]
    place_NK = torch.empty_like(order_M)
    place_NK[order_M] = torch.arange(len(order_M), device=order_M.device)
    place_NK = place_NK.view_as(experts_NK)
    dtype = x_ND.dtype
    if torch.is_autocast_enabled(x_ND.device.type):
        dtype = torch.get_autocast_dtype(x_ND.device.type)
    x_MD = _Dispatch.apply(x_ND.to(dtype), order_M, place_NK)
    h_MF = swiglu(grouped_mm(x_MD, gate_up_EDF.to(dtype), ends_E))
    y_MD = grouped_mm(h_MF, down_EFD.to(dtype), ends_E)
    return _Combine.apply(y_MD, gates_NK.to(dtype), order_M, place_NK).to(x_ND.dtype)


# ---- Muon


def newton_schulz(x_MRC: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """x <- a x + (b x x^T + c (x x^T)^2) x for each a, b, c; matrices of norm 1, R <= C. It has no
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
