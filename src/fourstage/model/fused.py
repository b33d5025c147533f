"""Parts of a training step on a CPU with their gradients written out.

A CPU spends as long on passes over memory as on matrix products, so these take few of them: no
concatenation of the halves' gradients, no zero-filled gradients of slices, attention scores only
below the diagonal. attention.py and moe.py have the plain expressions, which everything else uses
(a GPU, half precision, no gradient, and torch.compile, which fuses them, but for the attention: see
opaque.py); tests/model/test_fused.py holds each equal.

Shape legend: B rows, T tokens, H query heads, G key/value heads, R = H / G, C head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fourstage.model.packing import Packing

CHUNK = 32  # queries at once: below the diagonal is left out by whole chunks
LONGEST = 512  # tokens; the scores are kept for the backward, and flash attention keeps none


def applies(x: Tensor) -> bool:
    """Whether x is worth a hand-written gradient: one is needed, on a CPU, in float32."""
    return (
        x.requires_grad
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, where gate and up are the halves of the last dimension."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        active = F.silu(gate)
        ctx.save_for_backward(gate_up, active)
        return active * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        gate_up, active = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(active, grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rstd = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, rstd = ctx.saved_tensors
        n = x * rstd
        dn = grad * n
        grad_weight = dn.flatten(0, -2).sum(0)
        mean = (dn @ weight).div_(-x.shape[-1]).unsqueeze(-1)
        return torch.mul(grad, weight, out=dn).addcmul_(n, mean).mul_(rstd), grad_weight, None


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
    G = (J - n_heads) // 2
    R = n_heads // G
    weight_JC = torch.cat((q_weight_C.expand(n_heads, C), k_weight_C.expand(G, C)))
    q_BGTRC, k_BGTC, v_BGTC = _Heads.apply(qkv_BTJC, weight_JC, rope[0][0], rope[1][0], eps)
    if packing is not None:
        q, k, v = (packing.spread(x[0].flatten(2)) for x in (q_BGTRC, k_BGTC, v_BGTC))
        rows = packing.shape[1]
        y = _CausalAttention.apply(
            q.view(-1, rows * R, C), k.view(-1, rows, C), v.view(-1, rows, C)
        )
        return packing.collect(y.view(G, *packing.shape, R * C)).view(B, T, n_heads * C)
    q_NQC = q_BGTRC.view(B * G, T * R, C)  # row t * R + r: a chunk of queries is a slice
    y_NQC = _CausalAttention.apply(q_NQC, k_BGTC.view(B * G, T, C), v_BGTC.view(B * G, T, C))
    return y_NQC.view(B, G, T, R, C).transpose(1, 2).reshape(B, T, n_heads * C)


class _Heads(torch.autograd.Function):
    """RMSNorm and rotation of queries and keys, queries divided by sqrt(C), laid out by head."""

    @staticmethod
    def forward(ctx, qkv_BTJC: Tensor, weight_JC: Tensor, cos_T1C, sin_T1C, eps: float):
        B, T, J, C = qkv_BTJC.shape
        n_qk, half = len(weight_JC), C // 2  # n_qk = H + G
        G = J - n_qk
        H = n_qk - G
        x = qkv_BTJC[:, :, :n_qk]
        rstd = torch.linalg.vecdot(x, x).div_(C).add_(eps).rsqrt_().unsqueeze(-1)
        n = x * rstd
        scale_J1 = torch.ones(n_qk, 1)
        scale_J1[:H] = C**-0.5
        weight_JC = weight_JC * scale_J1
        y = n * (cos_T1C * weight_JC)
        sin_TJC = sin_T1C * weight_JC.roll(half, -1)
        y[..., :half].addcmul_(n[..., half:], sin_TJC[..., :half])
        y[..., half:].addcmul_(n[..., :half], sin_TJC[..., half:])
        ctx.save_for_backward(qkv_BTJC, weight_JC, scale_J1, cos_T1C, sin_T1C, rstd)
        q = y[:, :, :H].view(B, T, G, H // G, C).transpose(1, 2).contiguous()
        k = y[:, :, H:].transpose(1, 2).contiguous()
        return q, k, qkv_BTJC[:, :, n_qk:].transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor):
        qkv_BTJC, weight_JC, scale_J1, cos, sin, rstd = ctx.saved_tensors
        B, T, J, C = qkv_BTJC.shape
        n_qk, half = len(weight_JC), C // 2
        H = 2 * n_qk - J
        x = qkv_BTJC[:, :, :n_qk]
        grad = torch.empty_like(x)
        grad[:, :, :H].view(B, T, J - n_qk, -1, C).copy_(grad_q.transpose(1, 2))
        grad[:, :, H:].copy_(grad_k.transpose(1, 2))
        grad_qkv = torch.empty_like(qkv_BTJC)
        grad_qkv[:, :, n_qk:].copy_(grad_v.transpose(1, 2))
        d = torch.mul(grad, cos, out=grad_qkv[:, :, :n_qk])  # turned back
        d[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        d[..., half:].addcmul_(grad[..., :half], sin[..., :half])
        n = x * rstd
        dn = torch.mul(n, d, out=grad)
        grad_weight = dn.sum((0, 1)) * scale_J1
        mean = torch.linalg.vecdot(dn, weight_JC.expand_as(dn)).div_(-C).unsqueeze(-1)
        d.mul_(weight_JC).addcmul_(n, mean).mul_(rstd)
        return grad_qkv, grad_weight, None, None, None


class _CausalAttention(torch.autograd.Function):
    """attend, with its gradient."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        probs = [q.new_empty(shape) for shape in chunks(q, k)]
        ctx.save_for_backward(q, k, v, *probs)
        return attend(q, k, v, probs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, *probs = ctx.saved_tensors
        return attend_backward(grad, q, k, v, probs)


def chunks(q: Tensor, k: Tensor) -> list[tuple[int, int, int]]:
    """(N, queries, keys) of each chunk that attend takes, for its q and k."""
    N, T, R = len(q), k.shape[1], q.shape[1] // k.shape[1]
    ends = [min(start + CHUNK, T) for start in range(0, T, CHUNK)]
    return [(N, R * (end - i * CHUNK), end) for i, end in enumerate(ends)]


def attend(q: Tensor, k: Tensor, v: Tensor, probs: list[Tensor]) -> Tensor:
    """softmax(q k^T + causal mask) v, chunk after chunk of queries, each with the keys up to it.

    N matrices: q [N, T R, C] (row t * R + r is query t), k and v [N, T, C] -> [N, T R, C].
    probs: memory for the probabilities of each chunk, of the shapes that `chunks` gives.
    """
    T, R = k.shape[1], q.shape[1] // k.shape[1]
    ahead = torch.full((min(CHUNK, T),) * 2, -torch.inf).triu(1).repeat_interleave(R, 0)
    y, start = torch.empty_like(q), 0
    for p in probs:
        end = p.shape[2]
        rows = slice(start * R, end * R)
        torch.bmm(q[:, rows], k[:, :end].transpose(1, 2), out=p)
        p[:, :, start:] += ahead[: (end - start) * R, : end - start]
        torch.softmax(p, -1, out=p)
        y[:, rows] = torch.bmm(p, v[:, :end])
        start = end
    return y


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, probs: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of attend's q, k and v from that of its output."""
    R, start = q.shape[1] // k.shape[1], 0
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for p in probs:
        end = p.shape[2]
        rows = slice(start * R, end * R)
        grad_p = torch.bmm(grad[:, rows], v[:, :end].transpose(1, 2))
        grad_v[:, :end] += torch.bmm(p.transpose(1, 2), grad[:, rows])
        grad_s = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
        grad_q[:, rows] = torch.bmm(grad_s, k[:, :end])
        grad_k[:, :end] += torch.bmm(grad_s.transpose(1, 2), q[:, rows])
        start = end
    return grad_q, grad_k, grad_v
