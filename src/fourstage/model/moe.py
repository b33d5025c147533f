"""Mixture of experts: sigmoid top-k router, dropless SwiGLU experts, balanced by a bias.

Follows DeepSeek-V3 (arXiv 2412.19437, eq. 12-16), without its device limits and sequence-wise loss.

Shape legend: N tokens (B * T), D d_model, E experts, K experts chosen per token, F d_expert.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourstage.model import ops
from fourstage.model.attention import Linear
from fourstage.model.config import ModelConfig
from fourstage.model.precision import full_precision


class SwiGLU(nn.Module):
    """The MLP of a dense model, and the shared expert."""

    def __init__(self, config: ModelConfig, d_hidden: int):
        super().__init__()
        out_std = config.init_std / (2 * config.n_layers) ** 0.5
        self.gate_up = Linear(config.d_model, 2 * d_hidden, config.init_std)
        self.down = Linear(d_hidden, config.d_model, out_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.swiglu(self.gate_up(x)))


@dataclass
class Routing:
    """What one router decided for N tokens, in float32."""

    experts_NK: Tensor  # int64
    gates_NK: Tensor
    load_E: Tensor | None = None  # valid tokens per expert
    aux_loss: Tensor | None = None  # scalar, switch loss and z-loss times their coefficients


def switch_loss(scores_NE: Tensor, load_E: Tensor, valid_N: Tensor | None = None) -> Tensor:
    """E * sum_e f_e P_e (Switch Transformer, arXiv 2101.03961, eq. 4); 1 at perfect balance.

    f_e is expert e's share of the N * K choices, without a gradient; P_e is the mean over tokens of
    score_e / sum(scores), as the scores are sigmoids.
    """
    share_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
    f_E = load_E / load_E.sum().clamp(min=1)
    return scores_NE.shape[1] * (f_E * masked_mean(share_NE, valid_N)).sum()


def z_loss(logits_NE: Tensor, valid_N: Tensor | None = None) -> Tensor:
    """mean(logsumexp(logits)^2) (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return masked_mean(logits_NE.logsumexp(-1).square(), valid_N)


def masked_mean(x: Tensor, valid_N: Tensor | None) -> Tensor:
    """Mean over the valid entries of the first dimension; 0 if there are none."""
    if valid_N is None:
        return x.mean(0)
    weight_N = valid_N.to(x.dtype)
    return torch.einsum("n,n...->...", weight_N, x) / weight_N.sum().clamp(min=1)


class Router(nn.Module):
    """Scores every expert with a sigmoid, takes the top k of score + bias, gates with the score."""

    expert_bias_E: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top_k = config.top_k
        self.route_scale = config.route_scale
        self.switch_coef = config.switch_coef if config.balance == "switch" else 0.0
        self.z_loss_coef = config.z_loss_coef
        self.proj = Linear(config.d_model, config.num_experts, config.init_std)
        self.register_buffer("expert_bias_E", torch.zeros(config.num_experts))

    def forward(self, x_ND: Tensor, valid_N: Tensor | None, has_stats: bool = True) -> Routing:
        with full_precision(x_ND):
            return self.route(x_ND.float(), valid_N, has_stats)

    def route(self, x_ND: Tensor, valid_N: Tensor | None, has_stats: bool) -> Routing:
        """forward, for float32."""
        logits_NE = F.linear(x_ND, self.proj.weight.float())
        scores_NE = self.scores(logits_NE)
        choice_NE = scores_NE.detach() + self.expert_bias_E
        experts_NK = choice_NE.topk(self.top_k, dim=-1, sorted=False).indices
        gates_NK = scores_NE.gather(1, experts_NK)
        if self.top_k > 1:
            gates_NK = gates_NK / (gates_NK.sum(-1, keepdim=True) + 1e-20)
        if self.route_scale != 1:
            gates_NK = gates_NK * self.route_scale
        if not has_stats:
            return Routing(experts_NK, gates_NK)
        load_E = count_load(experts_NK, scores_NE.shape[1], valid_N)
        aux_loss = logits_NE.new_zeros(())
        if self.switch_coef:
            aux_loss = aux_loss + self.switch_coef * switch_loss(scores_NE, load_E, valid_N)
        if self.z_loss_coef:
            aux_loss = aux_loss + self.z_loss_coef * z_loss(logits_NE, valid_N)
        return Routing(experts_NK, gates_NK, load_E, aux_loss)

    def scores(self, logits_NE: Tensor) -> Tensor:
        return logits_NE.sigmoid()


def count_load(experts_NK: Tensor, num_experts: int, valid_N: Tensor | None) -> Tensor:
    """float [E]: how many valid tokens chose each expert; sums to K * valid tokens."""
    weight_NK = torch.ones_like(experts_NK, dtype=torch.float32)
    if valid_N is not None:
        weight_NK = weight_NK * valid_N[:, None]
    load_E = weight_NK.new_zeros(num_experts)
    return load_E.scatter_add_(0, experts_NK.flatten(), weight_NK.flatten())


class Experts(nn.Module):
    """E SwiGLU experts as two stacked weights; no token is dropped."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D, F_ = config.num_experts, config.d_model, config.d_expert
        self.num_experts, self.d_expert = E, F_  # under ZeRO-3 weights lose their shapes
        self.use_loop = config.expert_path == "loop"
        self.gate_up_EDF = nn.Parameter(torch.empty(E, D, 2 * F_))
        self.down_EFD = nn.Parameter(torch.empty(E, F_, D))
        nn.init.normal_(self.gate_up_EDF, std=config.init_std)
        nn.init.normal_(self.down_EFD, std=config.init_std / (2 * config.n_layers) ** 0.5)

    def forward(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> Tensor:
        if self.use_loop:
            return self.loop(x_ND, experts_NK, gates_NK)
        return ops.experts(x_ND, self.gate_up_EDF, self.down_EFD, experts_NK, gates_NK)

    def loop(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> Tensor:
        """The reference: expert by expert, each on the tokens that chose it."""
        y_ND = torch.zeros_like(x_ND)
        for e in range(self.num_experts):
            token, k = torch.where(experts_NK == e)
            y = ops.swiglu(x_ND[token] @ self.gate_up_EDF[e]) @ self.down_EFD[e]
            y_ND = y_ND.index_add(0, token, (gates_NK[token, k, None] * y).to(y_ND.dtype))
        return y_ND


class MoE(nn.Module):
    """Routed experts, plus a shared one that every token uses if d_shared isn't 0."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = SwiGLU(config, config.d_shared) if config.d_shared else None

    def forward(
        self, x_BTD: Tensor, valid_BT: Tensor | None = None, has_stats: bool = True
    ) -> tuple[Tensor, Routing]:
        """[B, T, D] -> [B, T, D] and what the router did.

        valid_BT: bool, or how often each token counts; padding is routed but not counted.
        """
        x_ND = x_BTD.flatten(0, 1)
        valid_N = None if valid_BT is None else valid_BT.flatten()
        routing = self.router(x_ND, valid_N, has_stats)
        y_ND = self.experts(x_ND, routing.experts_NK, routing.gates_NK)
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view_as(x_BTD), routing

    def decode(self, x_BD: Tensor) -> Tensor:
        """forward without statistics."""
        routing = self.router.forward(x_BD, None, has_stats=False)
        y_BD = self.experts.forward(x_BD, routing.experts_NK, routing.gates_NK)
        return y_BD if self.shared is None else y_BD + self.shared(x_BD)
