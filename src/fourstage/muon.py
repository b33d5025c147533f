"""Muon for the matrices inside the blocks and AdamW for everything else, in one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum U S V^T
of a matrix by about U V^T. As in Moonlight (Liu et al. 2025, arXiv 2502.16982, section 2.2) weight
decay is decoupled and an update is scaled by 0.2 sqrt(max(rows, columns)), which gives it the size
of AdamW's, so that one learning rate does for both.

What one weight holds of several matrices (queries, keys and values; gates and ups; the experts) is
taken apart, and matrices of one shape, of all layers and networks, are worked on together.

Shape legend: M matrices, R rows, C columns, R <= C.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fourstage.model.attention import Attention
from fourstage.model.moe import Experts, SwiGLU

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5  # a, b, c of each iteration
EPS = 1e-7
AT_ONCE = {"cpu": 2**19, "cuda": 2**26}  # numbers worked on together: what a cache, a GPU holds

Split = tuple[int | list[int], int]  # sizes and dimension, of Tensor.split
WHOLE: Split = (2**31, 0)


def hidden_matrices(network: nn.Module) -> list[tuple[nn.Parameter, Split]]:
    """The weights for Muon: attention and experts, with how to split each into its matrices.

    Embedding, heads, norms and routers are not among them. The last two dimensions of a part are a
    matrix, one in front counts matrices.
    """
    found: list[tuple[nn.Parameter, Split]] = []
    for layer in network.modules():
        if isinstance(layer, Attention):
            rows = [heads * layer.head_dim for heads in layer.heads]
            found += [(layer.qkv.weight, (rows, 0)), (layer.out.weight, WHOLE)]
        elif isinstance(layer, SwiGLU):
            rows = layer.down.in_features
            found += [(layer.gate_up.weight, (rows, 0)), (layer.down.weight, WHOLE)]
        elif isinstance(layer, Experts):
            columns = layer.down_EFD.shape[1]
            found += [(layer.gate_up_EDF, (columns, 2)), (layer.down_EFD, WHOLE)]
    return found


def orthogonalize(x_MRC: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T, but for singular values between about 0.7 and 1.2.

    x <- a x + (b x x^T + c (x x^T)^2) x, whose coefficients (Jordan et al.) grow small singular
    values fastest. In the dtype of x.
    """
    x_MRC = x_MRC / x_MRC.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for a, b, c in NEWTON_SCHULZ:
        gram_MRR = x_MRC @ x_MRC.mT
        factor_MRR = torch.baddbmm(gram_MRR, gram_MRR, gram_MRR, beta=b, alpha=c)
        x_MRC = torch.baddbmm(x_MRC, factor_MRR, x_MRC, beta=a)
    return x_MRC


class Muon(torch.optim.Optimizer):
    """A group with "splits", one for each of its parameters, is Muon's; any other is AdamW's.

    lr: step size, the root mean square of an update is about 0.2 lr in Muon's groups.
    weight_decay: decoupled, a share of lr. momentum: Nesterov's, of Muon. betas, eps: AdamW's.
    Newton-Schulz runs in bf16 on a GPU and in the weights' own dtype elsewhere.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "eps": eps,
            "splits": None,
            "fused": True,  # load_state_dict then puts AdamW's counts of steps on the device
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if group["splits"] is None:
                self.step_adamw(weights, group)
            else:
                self.step_muon(weights, group)
        return loss

    def step_muon(self, weights: list[nn.Parameter], group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        splits = dict(zip(group["params"], group["splits"], strict=True))
        by_shape = defaultdict(list)
        for weight in weights:
            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            state["momentum"].lerp_(weight.grad, 1 - momentum)
            weight.mul_(1 - lr * group["weight_decay"])
            each = [x.split(*splits[weight]) for x in (weight, weight.grad, state["momentum"])]
            for parts in zip(*each, strict=True):
                part = tuple(lying(x) for x in parts)
                by_shape[part[0].shape[1:]].append(part)
        for shape, parts in by_shape.items():
            for some in together(parts):
                step_MRC = torch.cat([grad.lerp(average, momentum) for _, grad, average in some])
                step_MRC = orthogonalize(step_MRC.bfloat16() if step_MRC.is_cuda else step_MRC)
                steps = step_MRC.split([len(weight) for weight, _, _ in some])
                for (weight, _, _), step in zip(some, steps, strict=True):
                    weight.add_(step, alpha=-0.2 * lr * math.sqrt(max(shape)))

    def step_adamw(self, weights: list[nn.Parameter], group: dict[str, Any]) -> None:
        for weight in weights:
            if not self.state[weight]:
                self.state[weight] = {
                    "step": torch.zeros((), device=weight.device),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }
        states = [self.state[weight] for weight in weights]
        beta1, beta2 = group["betas"]
        adamw(
            weights,
            [weight.grad for weight in weights],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            **{key: group[key] for key in ("fused", "lr", "weight_decay", "eps")},
            **{"beta1": beta1, "beta2": beta2, "amsgrad": False, "maximize": False},
        )


def lying(x: Tensor) -> Tensor:
    """A view [M, R, C] of matrices, or of one, with R <= C."""
    x = x if x.ndim == 3 else x[None]
    return x if x.shape[1] <= x.shape[2] else x.mT


def together(parts: list[tuple[Tensor, ...]]) -> Iterator[list[tuple[Tensor, ...]]]:
    """In order, as many at once as AT_ONCE says, one at least."""
    first = parts[0][0]
    most = AT_ONCE["cuda" if first.is_cuda else "cpu"] // max(p[0].numel() for p in parts)
    for start in range(0, len(parts), max(1, most)):
        yield parts[start : start + max(1, most)]
