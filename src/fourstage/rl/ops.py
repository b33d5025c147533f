"""The maths that more than one stage uses: pure functions of tensors.

Shape legend: B answers, A answer tokens, V vocabulary. A mask is bool [B, A], True on answers.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def token_logprobs(logits_BAV: Tensor, ids_BA: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each id under softmax(logits / temperature), float32 [B, A]."""
    logits_BAV = logits_BAV.float() / temperature
    picked_BA = logits_BAV.gather(-1, ids_BA.unsqueeze(-1)).squeeze(-1)
    return picked_BA - logits_BAV.logsumexp(-1)


def moments(x_M: Tensor) -> Tensor:
    """[count, sum, sum of squares], float64 [3]: they add up over ranks."""
    x_M = x_M.double()
    return torch.stack([x_M.new_full((), len(x_M)), x_M.sum(), x_M.square().sum()])


def whiten(x: Tensor, moments: Tensor, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(variance + eps), unbiased variance, from the `moments` of all ranks."""
    count, total, squares = moments
    mean = total / count
    variance = (squares - count * mean.square()) / (count - 1).clamp(min=1)
    return ((x - mean) * (variance.clamp(min=0) + eps).rsqrt()).to(x.dtype)


# KL(policy || reference) estimated from samples of the policy (Schulman 2020,
# joschu.net/blog/kl-approx.html). k1 and k3 are unbiased, k2 and k3 are never negative.
KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": lambda logp, ref: logp - ref,
    "k2": lambda logp, ref: 0.5 * (logp - ref).square(),
    "k3": lambda logp, ref: torch.exp(ref - logp) - (ref - logp) - 1,
}


def clipped_surrogate(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """Per-token policy loss max(-A r, -A clip(r, 1 - low, 1 + high)), r = exp(logp - logp_old).

    Schulman et al. 2017, arXiv 1707.06347, eq. 7 with its sign flipped. All tensors [B, A];
    `advantage` may be [B, 1].
    """
    ratio = torch.exp(logp - logp_old)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


def ratio_stats(
    log_ratio: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    mean: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """How far the policy moved from the sampler, over the True entries of mask.

    log_ratio [B, A] is logp - logp_old. approx_kl is the k3 estimate of KL(old || new) from samples
    of old. `mean(x, mask)` may include the other ranks' rows.
    """
    ratio = log_ratio.exp()
    return {
        "approx_kl": mean(ratio - 1 - log_ratio, mask),
        "ratio_mean": mean(ratio, mask),
        "ratio_max": (ratio * mask).max(),
        "clip_low": mean((ratio < 1 - clip_low).float(), mask),
        "clip_high": mean((ratio > 1 + clip_high).float(), mask),
    }
