"""Muon for the matrices inside the blocks and AdamW for everything else, in one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum U S V^T
of a matrix by about U V^T. As in Moonlight (Liu et al. 2025, arXiv 2502.16982, section 2.2) weight
decay is decoupled and an update is scaled by 0.2 sqrt(max(rows, columns)), which gives it the size
of AdamW's, so that one learning rate does for both.

A weight that holds several matrices (queries, keys and values; gates and ups; the experts) is split
into them, and matrices of one shape, from all layers of a network, are processed together.

Shape legend: M matrices, R rows, C columns, R <= C.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fourstage.model import ops
from fourstage.model.attention import Attention
from fourstage.model.moe import Experts, SwiGLU

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5  # a, b, c of each iteration
AT_ONCE = {"cpu": 2**19, "cuda": 2**26}  # numbers processed together: what a cache, a GPU holds
Split = tuple[int | list[int], int]  # sizes and dimension, of Tensor.split
WHOLE: Split = (2**31, 0)


def hidden_matrices(network: nn.Module) -> list[tuple[nn.Parameter, Split]]:
    """The weights for Muon, of attention and experts, and how to split each into its matrices.

    Embedding, heads, norms and routers are not among them. The last two dimensions of a part are a
    matrix, one in front of them counts matrices.
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
            columns = layer.d_expert
            found += [(layer.gate_up_EDF, (columns, 2)), (layer.down_EFD, WHOLE)]
    return found


def orthogonalize(x_MRC: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T: most singular values come out between 0.7 and 1.2.

    By Newton-Schulz iterations with coefficients (Jordan et al.) that raise small singular values
    fast. In the dtype of x, also under autocast.
    """
    with torch.autocast(x_MRC.device.type, enabled=False):
        x_MRC = x_MRC / x_MRC.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        return ops.newton_schulz(x_MRC, NEWTON_SCHULZ)


class Muon(torch.optim.Optimizer):
    """A group with "splits", one per parameter, is for Muon; any other is for AdamW.

    lr: step size; the root mean square of an update is about 0.2 lr in Muon's groups.
    weight_decay: decoupled, a share of lr. momentum: Nesterov's, for Muon. betas, eps: for AdamW.
    Newton-Schulz runs in bf16 on a GPU and in the weights' own dtype elsewhere. A step overwrites
    the gradients of Muon's weights. ZeRO has a subclass (zero_muon.py).
    """

    # like PyTorch's fused AdamW: Lightning leaves it to us to unscale the gradients of 16-mixed
    _step_supports_amp_scaling = True

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        eps: float = 1e-8,
    ) -> None:
        own = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "splits": None}
        # fused: load_state_dict then puts AdamW's counts of steps on the device
        super().__init__(groups, {**own, "betas": betas, "eps": eps, "fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if group["splits"] is None:
                self.step_adamw(weights, group)
            else:
                self.step_muon(weights, group)
        return loss

    def step_muon(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for weight in weights:
            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            state["momentum"].lerp_(weight.grad, 1 - momentum)
            weight.grad.lerp_(state["momentum"], momentum)  # the step's direction, from here on
            weight.mul_(1 - lr * group["weight_decay"])
        self.add_steps(weights, group)

    def add_steps(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """Moves weights in the directions that replaced their gradients. Each rank moves a part of
        the weights and sends it to the others."""
        splits = dict(zip(group["params"], group["splits"], strict=True))
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        movers = assigned(weights, world)
        parts: list[tuple[Tensor, Tensor]] = []
        for weight, mover in zip(weights, movers, strict=True):
            if mover == rank:
                both = (matrices(x, splits[weight]) for x in (weight, weight.grad))
                parts += zip(*both, strict=True)
        add_orthogonal(parts, group["lr"])
        if world > 1:
            pairs = zip(weights, movers, strict=True)
            for sent in [dist.broadcast(weight, src, async_op=True) for weight, src in pairs]:
                sent.wait()

    def step_adamw(self, weights: list[nn.Parameter], group: dict[str, Any]) -> None:
        for weight in weights:
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
                state |= {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        names = ("exp_avg", "exp_avg_sq", "step")
        first, second, steps = ([self.state[w][name] for w in weights] for name in names)
        own = {name: group[name] for name in ("lr", "weight_decay", "eps", "fused")}
        own["beta1"], own["beta2"] = group["betas"]
        grads = [weight.grad for weight in weights]
        adamw(weights, grads, first, second, [], steps, **own, amsgrad=False, maximize=False)


def assigned(weights: list[Tensor], world: int) -> list[int]:
    """The rank that moves each weight: the largest first, to the rank with the least to do."""
    movers, load = [0] * len(weights), [0] * world
    for i in sorted(range(len(weights)), key=lambda i: -weights[i].numel()):
        movers[i] = load.index(min(load))
        load[movers[i]] += weights[i].numel()
    return movers


def matrices(x: Tensor, split: Split) -> list[Tensor]:
    """The parts of a weight as views [M, R, C]."""
    parts = [part if part.ndim == 3 else part[None] for part in x.split(*split)]
    return [part if part.shape[1] <= part.shape[2] else part.mT for part in parts]


def add_orthogonal(parts: list[tuple[Tensor, Tensor]], lr: float) -> None:
    """For each pair (weights, directions) [M, R, C]: adds the steps to the weights."""
    by_shape = defaultdict(list)
    for part in parts:
        by_shape[part[0].shape[1:]].append(part)
    for shape, alike in by_shape.items():
        at_once = AT_ONCE["cuda" if alike[0][0].is_cuda else "cpu"]
        size = max(1, at_once // max(weights.numel() for weights, _ in alike))
        for some in (alike[start : start + size] for start in range(0, len(alike), size)):
            directions_MRC = torch.cat([direction for _, direction in some])
            steps_MRC = orthogonalize(directions_MRC.to(worked_in(directions_MRC)))
            steps = steps_MRC.split([len(weights) for weights, _ in some])
            for (weights, _), step in zip(some, steps, strict=True):
                weights.add_(step, alpha=-0.2 * lr * math.sqrt(max(shape)))


def worked_in(x: Tensor) -> torch.dtype:
    """The dtype of Newton-Schulz."""
    return torch.bfloat16 if x.is_cuda else x.dtype
