"""What torch.compile takes as one operation each in a float32 step, and does not look into.

It has no grouped product in float32 at all, and it would unroll an attention's chunks into a graph
of its own for each number of tokens. Everything between these it fuses from the plain expressions.
Uncompiled code calls what is wrapped here directly: an operation of one's own costs some 10 us.

Shape legend: B rows, T tokens, H query heads, G key/value heads, R = H / G, C head_dim;
M token copies sorted by expert, E experts, D and F_ the widths of a weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fourstage.model import fused


def is_needed(x: Tensor) -> bool:
    """Whether x is being compiled into something that has no grouped product of its own."""
    return torch.compiler.is_compiling() and x.dtype != torch.bfloat16


def has_attention(x: Tensor, tokens: int) -> bool:
    """Whether fused.py's attention is the faster one in what x is being compiled into."""
    is_float32_on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return torch.compiler.is_compiling() and is_float32_on_cpu and tokens <= fused.LONGEST


@torch.library.custom_op("fourstage::grouped_mm", mutates_args=())
def grouped_mm(x_MD: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """[M, D] and [E, D, F_] -> [M, F_]: expert e's rows end at ends_E[e], int32."""
    return F.grouped_mm(x_MD, w_EDF, offs=ends_E)


@torch.library.custom_op("fourstage::grouped_outer", mutates_args=())
def _grouped_outer(x_MD: Tensor, grad_MF: Tensor, ends_E: Tensor) -> Tensor:
    """[M, D] and [M, F_] -> [E, D, F_]: the gradient of grouped_mm's weight."""
    return F.grouped_mm(x_MD.t(), grad_MF, offs=ends_E)


@grouped_mm.register_fake
def _(x_MD: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    return x_MD.new_empty(x_MD.shape[0], w_EDF.shape[2])


@_grouped_outer.register_fake
def _(x_MD: Tensor, grad_MF: Tensor, ends_E: Tensor) -> Tensor:
    return x_MD.new_empty(ends_E.shape[0], x_MD.shape[1], grad_MF.shape[1])


def _keep_inputs(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx, grad_MF: Tensor):
    x_MD, w_EDF, ends_E = ctx.saved_tensors
    grad_MF = grad_MF.contiguous()
    return grouped_mm(grad_MF, w_EDF.mT, ends_E), _grouped_outer(x_MD, grad_MF, ends_E), None


grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_keep_inputs)


def kept(q: Tensor, k: Tensor) -> int:
    """How many probabilities attend keeps; without a loop, as sizes may be symbols."""
    (N, rows, _), T = q.shape, k.shape[1]
    whole, rest = T // fused.CHUNK, T % fused.CHUNK
    return N * (rows // T) * (fused.CHUNK**2 * whole * (whole + 1) // 2 + rest * T)


def _parts(q: Tensor, k: Tensor, probs: Tensor) -> list[Tensor]:
    """The chunks of probs: one tensor, as an operation may not return more for more tokens."""
    shapes = fused.chunks(q, k)
    parts = probs.split([N * rows * keys for N, rows, keys in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@torch.library.custom_op("fourstage::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """fused.attend's result, and the probabilities of all chunks, one after the other."""
    probs = q.new_empty(kept(q, k))
    return fused.attend(q, k, v, _parts(q, k, probs)), probs


@torch.library.custom_op("fourstage::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, probs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return fused.attend_backward(grad, q, k, v, _parts(q, k, probs))


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(kept(q, k))


@_attend_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, probs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep_probs(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _gradients(ctx, grad: Tensor, _: Tensor | None):
    return _attend_backward(grad.contiguous(), *ctx.saved_tensors)


_attend.register_autograd(_gradients, setup_context=_keep_probs)


def causal_attention(q_BTHC: Tensor, k_BTGC: Tensor, v_BTGC: Tensor) -> Tensor:
    """[B, T, H, C] and twice [B, T, G, C] -> [B, T, H C]."""
    B, T, H, C = q_BTHC.shape
    G = k_BTGC.shape[2]
    q_BGTRC = (q_BTHC * C**-0.5).view(B, T, G, H // G, C).transpose(1, 2)
    k, v = (x.transpose(1, 2).reshape(B * G, T, C) for x in (k_BTGC, v_BTGC))
    y, _ = _attend(q_BGTRC.reshape(B * G, T * (H // G), C), k, v)
    return y.view(B, G, T, H // G, C).transpose(1, 2).reshape(B, T, H * C)
