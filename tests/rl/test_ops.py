"""The maths by hand: expectations are written out, or follow from logarithms of fractions."""

from math import e, log, sqrt

import pytest
import torch

from fourstage.rl.ops import (
    KL_ESTIMATORS,
    clipped_surrogate,
    moments,
    ratio_stats,
    token_logprobs,
    whiten,
)

T = torch.tensor


def mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x[mask].mean()


def close(got: torch.Tensor, want, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got, T(want), atol=atol, rtol=1e-5)


# --- log-probabilities and entropy


def test_token_logprobs_under_a_temperature():
    logits = T([0.1, 0.2, 0.3, 0.4]).log().expand(1, 3, 4) + 7.0  # a constant changes nothing
    ids = T([[2, 0, 3]])
    close(token_logprobs(logits, ids), [[log(0.3), log(0.1), log(0.4)]])
    # at 1/2 probabilities are squared: 0.01, 0.04, 0.09, 0.16 of 0.30
    close(token_logprobs(logits, ids, 0.5), [[log(0.3), log(1 / 30), log(16 / 30)]])
    # at 2 they become their square roots, of 1.9436195 in all
    close(
        token_logprobs(logits, ids, 2.0),
        [[log(0.5477226 / 1.9436195), log(0.3162278 / 1.9436195), log(0.6324555 / 1.9436195)]],
    )


def test_half_precision_logits_are_scored_in_single_precision():
    logits = torch.randn(2, 3, 50).bfloat16()
    assert token_logprobs(logits, torch.zeros(2, 3).long()).dtype == torch.float32
    total = sum(token_logprobs(logits, torch.full((2, 3), i)).exp() for i in range(50))
    close(total, [[1.0] * 3] * 2, atol=1e-5)


# --- whitening


def test_moments_of_two_ranks_add_up_and_whiten_the_whole_batch():
    one, two = T([[1.0, 2.0, 99.0]]), T([[3.0, 4.0, -50.0]])
    mask = T([[True, True, False]])
    assert moments(one[mask]).tolist() == [2.0, 3.0, 5.0]
    both = moments(one[mask]) + moments(two[mask])
    assert both.tolist() == [4.0, 10.0, 30.0]
    # mean 2.5, unbiased variance (2.25 + 0.25 + 0.25 + 2.25) / 3 = 5/3
    close(whiten(one, both)[mask], [-1.5 / sqrt(5 / 3), -0.5 / sqrt(5 / 3)])
    close(whiten(two, both)[mask], [0.5 / sqrt(5 / 3), 1.5 / sqrt(5 / 3)])


def test_whiten_adds_eps_to_an_unbiased_variance():
    x = T([[1e-4, -1e-4]])  # unbiased variance 2e-8, so the divisor is sqrt(3e-8)
    mask = torch.ones(1, 2, dtype=torch.bool)
    close(whiten(x, moments(x[mask])), [[1 / sqrt(3), -1 / sqrt(3)]])


@pytest.mark.parametrize("x", [[[5.0, 5.0, 5.0]], [[5.0]]])
def test_equal_values_whiten_to_zero(x):
    x = T(x)
    assert whiten(x, moments(x[x == 5])).tolist() == torch.zeros_like(x).tolist()


def test_whiten_is_exact_far_from_zero():
    x = T([[10_001.0, 9_999.0]])  # the sum of squares needs more than 24 bits
    white = whiten(x, moments(x[x > 0]))
    assert white.dtype == torch.float32
    close(white, [[1 / sqrt(2), -1 / sqrt(2)]])


# --- KL estimators


def test_kl_estimators_by_hand():
    logp, ref = T([log(0.5), log(0.25)]), T([log(0.25), log(0.5)])
    ln2 = log(2)  # d = ln 2, then -ln 2
    close(KL_ESTIMATORS["k1"](logp, ref), [ln2, -ln2])
    close(KL_ESTIMATORS["k2"](logp, ref), [ln2**2 / 2, ln2**2 / 2])
    close(KL_ESTIMATORS["k3"](logp, ref), [0.5 - 1 + ln2, 2 - 1 - ln2])


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    """The mean over p is KL(p || q), with p = (1/2, 1/2) and q = (1/4, 3/4)."""
    p, q = T([0.5, 0.5]), T([0.25, 0.75])
    want = 0.5 * log(2) + 0.5 * log(2 / 3)
    close((p * KL_ESTIMATORS[estimator](p.log(), q.log())).sum(), want)


# --- the clipped surrogate


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 1.0, -1.2, 0.0),  # good and already likelier: no more reward for it
        (0.5, 1.0, -0.5, -0.5),  # good but less likely than before: unclipped
        (1.5, -1.0, 1.5, 1.5),  # bad and likelier: unclipped
        (0.5, -1.0, 0.8, 0.0),  # bad and already less likely
        (1.1, 2.0, -2.2, -2.2),  # within the range
        (1.0, -3.0, 3.0, 3.0),
    ],
)
def test_clipped_surrogate_in_every_case(ratio, advantage, loss, slope):
    old = T([[-2.0]])
    logp = (old + log(ratio)).requires_grad_()
    got = clipped_surrogate(logp, old, T([[advantage]]), 0.2, 0.2)
    close(got.detach(), [[loss]])
    (gradient,) = torch.autograd.grad(got.sum(), logp)
    close(gradient, [[slope]])


def test_the_clip_range_may_be_lopsided():
    old = torch.zeros(1, 3)
    logp = T([[1.25, 1.5, 0.75]]).log()
    got = clipped_surrogate(logp, old, T([[1.0, 1.0, -1.0]]), 0.2, 0.28)
    close(got, [[-1.25, -1.28, 0.8]])


def test_one_advantage_for_all_tokens_of_an_answer():
    logp = T([[1.0, 1.1], [1.0, 0.9]]).log()
    got = clipped_surrogate(logp, torch.zeros(2, 2), T([[1.0], [-2.0]]), 0.2, 0.2)
    close(got, [[-1.0, -1.1], [2.0, 1.8]])


def test_ratio_stats_leave_padding_out():
    log_ratio = T([[log(1.5), log(0.5), 50.0], [0.0, -50.0, 50.0]])
    mask = T([[True, True, False], [True, False, False]])
    stats = ratio_stats(log_ratio, mask, 0.2, 0.28, mean)
    # ratios 1.5, 0.5, 1: r - 1 - ln r is 0.5 - ln 1.5, ln 2 - 0.5 and 0, ln(4/3) in all
    want = {
        "approx_kl": log(4 / 3) / 3,
        "ratio_mean": 1.0,
        "ratio_max": 1.5,
        "clip_low": 1 / 3,
        "clip_high": 1 / 3,
    }
    assert {name: x.item() for name, x in stats.items()} == pytest.approx(want, abs=1e-6)


def test_ratio_stats_use_both_ends_of_the_range():
    log_ratio, mask = T([[log(1.25), log(0.75)]]), torch.ones(1, 2, dtype=torch.bool)
    wide = ratio_stats(log_ratio, mask, 0.3, 0.28, mean)
    assert (wide["clip_low"], wide["clip_high"]) == (0.0, 0.0)
    narrow = ratio_stats(log_ratio, mask, 0.2, 0.2, mean)
    assert (narrow["clip_low"], narrow["clip_high"]) == (0.5, 0.5)
    moved = ratio_stats(T([[1.0, 1.0]]), mask, 0.2, 0.2, mean)
    assert moved["approx_kl"].item() == pytest.approx(e - 2)  # e - 1 - 1
