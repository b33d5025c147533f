"""Parts of a step on a CPU as one kernel each, forward and backward (kernels/*.cpp).

A CPU spends as long on passes over memory as on matrix products, so these take few of them.
attention.py and moe.py have the plain expressions, which everything else uses (a GPU, half
precision, torch.compile, a machine without a compiler, widths that are no multiple of 16);
tests/model/test_fused.py holds each equal.

Shape legend: N tokens, B rows, T tokens, H query heads, G key/value heads, J = H + 2 G, C head_dim,
E experts, K of them a token, M = N K choices, F_ d_expert.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fourstage import kernels
from fourstage.model.packing import Packing

LARGEST = 2**20  # numbers of a Linear's weight; PyTorch's product is as good for a larger one


def applies(x: Tensor, *widths: int) -> bool:
    """Whether there are kernels for x: on a CPU, in float32, and for these widths."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and kernels.fits(*widths)
    )


class Linear(torch.autograd.Function):
    """x times the transposed weight."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        x, (width, d_in) = x.contiguous(), weight.shape
        y = x.new_empty(*x.shape[:-1], width)
        ctx.sizes = x.numel() // d_in, d_in, width
        kernels.call("linear_forward", *ctx.sizes, x, weight, y)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grads = torch.empty_like(x), torch.empty_like(weight)
        kernels.call("linear_backward", *ctx.sizes, x, weight, grad.contiguous(), *grads)
        return grads


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, where gate and up are the halves of the last dimension."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        width = gate_up.shape[-1] // 2
        y = gate_up.new_empty(*gate_up.shape[:-1], width)
        kernels.call("swiglu_forward", y.numel() // width, width, gate_up, y)
        ctx.save_for_backward(gate_up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        width = grad.shape[-1]
        grad_gate_up = torch.empty_like(gate_up)
        rows = grad.numel() // width
        kernels.call("swiglu_backward", rows, width, gate_up, grad.contiguous(), grad_gate_up)
        return grad_gate_up


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, ctx.eps = x.contiguous(), eps
        y, width = torch.empty_like(x), x.shape[-1]
        kernels.call("rms_norm_forward", x.numel() // width, width, x, weight, eps, y)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight, width = torch.empty_like(x), torch.empty_like(weight), x.shape[-1]
        sizes = x.numel() // width, width
        grad = grad.contiguous()
        kernels.call("rms_norm_backward", *sizes, x, weight, ctx.eps, grad, grad_x, grad_weight)
        return grad_x, grad_weight, None


def causal_attention(
    qkv_BTJC: Tensor,
    q_weight_C: Tensor,
    k_weight_C: Tensor,
    rope: tuple[Tensor, Tensor],
    n_heads: int,
    eps: float,
    packing: Packing | None = None,
) -> Tensor:
    """[B, T, H + 2 G, C] -> [B, T, H C]: normalised and rotated queries and keys, then attention.

    rope: as rope_angles gives it for positions [1, T]. packing: see Attention.forward.
    """
    B, T, J, C = qkv_BTJC.shape
    weights = (q_weight_C * C**-0.5).expand(n_heads, C), k_weight_C.expand((J - n_heads) // 2, C)
    qkv_BTJC = _Heads.apply(qkv_BTJC, torch.cat(weights), rope[0][0], rope[1][0], eps)
    if packing is not None:
        qkv_BTJC = packing.spread(qkv_BTJC.view(1, T, J * C))[0].view(*packing.shape, J, C)
    y_BTHC = _CausalAttention.apply(qkv_BTJC, n_heads)
    if packing is not None:
        y_BTHC = packing.collect(y_BTHC.flatten(2)[None])
    return y_BTHC.reshape(B, T, n_heads * C)


class _Heads(torch.autograd.Function):
    """RMSNorm and rotation of the first heads, which are those that have a weight."""

    @staticmethod
    def forward(ctx, qkv_BTJC: Tensor, weight_JC: Tensor, cos_T1C, sin_T1C, eps: float) -> Tensor:
        B, T, J, C = qkv_BTJC.shape
        qkv_BTJC = qkv_BTJC.contiguous()
        ctx.sizes, ctx.eps = (B * T, T, J, len(weight_JC), C), eps
        inputs = qkv_BTJC, weight_JC, cos_T1C, sin_T1C
        y_BTJC = torch.empty_like(qkv_BTJC)
        kernels.call("heads_forward", *ctx.sizes, *inputs, eps, y_BTJC)
        ctx.save_for_backward(*inputs)
        return y_BTJC

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTJC: Tensor):
        saved = ctx.saved_tensors
        grads = torch.empty_like(saved[0]), torch.empty_like(saved[1])
        kernels.call("heads_backward", *ctx.sizes, *saved, ctx.eps, grad_BTJC.contiguous(), *grads)
        return *grads, None, None, None


class _CausalAttention(torch.autograd.Function):
    """[B, T, J, C], queries divided by sqrt(C) -> [B, T, H, C]."""

    @staticmethod
    def forward(ctx, qkv_BTJC: Tensor, n_heads: int) -> Tensor:
        B, T, J, C = qkv_BTJC.shape
        qkv_BTJC = qkv_BTJC.contiguous()
        y_BTHC, log_sums_BHT = (
            qkv_BTJC.new_empty(B, T, n_heads, C),
            qkv_BTJC.new_empty(B, n_heads, T),
        )
        ctx.sizes = B, T, n_heads, (J - n_heads) // 2, C
        kernels.call("attention_forward", *ctx.sizes, qkv_BTJC, y_BTHC, log_sums_BHT)
        ctx.save_for_backward(qkv_BTJC, y_BTHC, log_sums_BHT)
        return y_BTHC

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTHC: Tensor):
        saved = ctx.saved_tensors
        grad_qkv = torch.empty_like(saved[0])
        kernels.call("attention_backward", *ctx.sizes, *saved, grad_BTHC.contiguous(), grad_qkv)
        return grad_qkv, None


class Experts(torch.autograd.Function):
    """See moe.Experts.grouped; order_M: the choices by expert, of which e's end at ends_E[e]."""

    @staticmethod
    def forward(
        ctx, x_ND, gate_up_EDF, down_EFD, gates_NK, order_M: Tensor, ends_E: Tensor
    ) -> Tensor:
        (N, K), (E, F_, D) = gates_NK.shape, down_EFD.shape
        ctx.sizes = N, K, E, D, F_
        inputs = x_ND.contiguous(), gate_up_EDF, down_EFD, gates_NK.contiguous(), order_M, ends_E
        hidden_MF, y_ND = x_ND.new_empty(N * K, 2 * F_), x_ND.new_empty(N, D)
        kernels.call("experts_forward", *ctx.sizes, *inputs, hidden_MF, y_ND)
        ctx.save_for_backward(*inputs, hidden_MF)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND: Tensor):
        saved = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in saved[:4]]
        kernels.call("experts_backward", *ctx.sizes, *saved, grad_ND.contiguous(), *grads)
        return *grads, None, None


def newton_schulz(x_MRC: Tensor, coefficients: tuple[tuple[float, float, float], ...]) -> Tensor:
    """muon.orthogonalize of matrices of norm 1, R <= C; no gradient."""
    is_square = x_MRC.shape[1] == x_MRC.shape[2]
    x = x_MRC.clone() if is_square else x_MRC.mT.contiguous()  # so that x^T x is the smaller one
    kernels.call("orthogonalize", *x.shape, torch.tensor(coefficients), len(coefficients), x)
    return x if is_square else x.mT
