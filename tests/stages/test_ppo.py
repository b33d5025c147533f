"""PPO: the formulas by hand, and what one rollout does to the networks."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fourstage.rl.ops import moments
from fourstage.rl.rollout import answer_logprobs, answer_texts, final_scores, pack
from fourstage.sampling.generate import Generation, sampler_of
from fourstage.stages import PPOModule
from fourstage.stages.ppo import (
    Experience,
    adapted_kl_coef,
    clipped_value_loss,
    explained_variance,
    gae,
    token_rewards,
)
from tests.device import REPEATED, ROUNDING
from tests.stages.tiny import (
    TINY,
    TOKENIZER,
    biases,
    distance,
    fit,
    make_policy,
    make_scalar,
    prompt_batches,
    steady,
    use_sgd,
    weights,
    without_logprobs,
)

T = torch.tensor
SMALL = {
    "max_new_tokens": 10,
    "max_prompt_tokens": 20,
    "minibatch_size": 4,
    "micro_batch_size": 4,
    "batch_size": 4,
    "max_steps": 1,
    "lr": 0.01,
    "temperature": 1.0,
    "epochs": 2,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "kl_estimator": "k1",
    "kl_coef": 0.05,
    "kl_target": 0.0,
    "max_approx_kl": 0.0,
    "missing_eos_penalty": 1.0,
    "gamma": 1.0,
    "gae_lambda": 0.95,
    "value_clip": 0.2,
    "value_coef": 0.1,
    "balance_router": False,
}


def close(got: torch.Tensor, want, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got, T(want), atol=atol, rtol=1e-5)


# --- the formulas


def test_token_rewards_by_hand():
    kl = T([[0.5, -1.0, 2.0], [1.0, 99.0, 99.0]])  # after the answer it means nothing
    got = token_rewards(T([10.0, -3.0]), kl, T([3, 1]), kl_coef=0.1)
    close(got, [[-0.05, 0.1, 9.8], [-3.1, 0.0, 0.0]])


def test_gae_by_hand():
    rewards, values = T([[0.0, 0.0, 1.0]]), T([[0.5, 0.6, 0.7]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    # deltas 0.1, 0.1, 0.3
    advantages, returns = gae(rewards, values, mask, 1.0, 0.95)
    close(advantages, [[0.1 + 0.95 * 0.385, 0.1 + 0.95 * 0.3, 0.3]])
    close(returns, [[0.96575, 0.985, 1.0]])
    # deltas 0.9 x 0.6 - 0.5, 0.9 x 0.7 - 0.6, 0.3; each further one counts 0.45
    advantages, returns = gae(rewards, values, mask, 0.9, 0.5)
    close(advantages, [[0.04 + 0.45 * 0.165, 0.03 + 0.45 * 0.3, 0.3]])
    close(returns, [[0.61425, 0.765, 1.0]])


def test_gae_of_ragged_answers_ends_with_each_of_them():
    """The value after the last token is 0, whatever stands there."""
    rewards = T([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    values = T([[0.25, 50.0, -50.0], [0.5, 1.0, 50.0]])
    mask = T([[True, False, False], [True, True, False]])
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    close(advantages, [[0.75, 0.0, 0.0], [1.5, 1.0, 0.0]])
    close(returns, [[1.0, 0.0, 0.0], [2.0, 2.0, 0.0]])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.99, 1.0)])
def test_gae_equals_its_definition_as_a_sum(gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, one token at a time."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 5, 7, generator=generator)
    lengths = [7, 1, 3, 5, 7]
    mask = torch.arange(7) < T(lengths)[:, None]
    advantages, returns = gae(rewards * mask, values, mask, gamma, lam)
    for b, n in enumerate(lengths):
        v = [*values[b, :n].tolist(), 0.0]
        delta = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(7):
            want = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
            assert advantages[b, t].item() == pytest.approx(want, abs=1e-5)
            assert returns[b, t].item() == pytest.approx(want + v[t] if t < n else 0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope"),
    [
        (1.1, 1.0, 2.0, 0.405, -0.9),  # within the range
        (1.5, 1.0, 2.0, 0.32, 0.0),  # towards the return, too fast: held at 1.2
        (0.5, 1.0, 2.0, 1.125, -1.5),  # away from it: the plain loss is larger than at 0.8
        (3.5, 1.0, 2.0, 1.125, 1.5),  # past it by more than the clipped 1.2 falls short
        (0.5, 1.0, 0.0, 0.32, 0.0),  # the same downwards, held at 0.8
    ],
)
def test_clipped_value_loss(value, old, target, loss, slope):
    values = T([[value]], requires_grad=True)
    got = clipped_value_loss(values, T([[old]]), T([[target]]), 0.2)
    close(got.detach(), [[loss]])
    (gradient,) = torch.autograd.grad(got.sum(), values)
    close(gradient, [[slope]])


def explained_locally(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    return explained_variance(moments((returns - values)[mask]), moments(returns[mask]))


def test_explained_variance():
    returns, mask = T([[1.0, 2.0, 3.0, 999.0]]), T([[True, True, True, False]])

    def explained(*values: float) -> float:
        return explained_locally(T([[*values, 0.0]]), returns, mask).item()

    assert explained(1.0, 2.0, 3.0) == 1.0
    assert explained(11.0, 12.0, 13.0) == 1.0  # a constant error is no variance
    assert explained(2.0, 2.0, 2.0) == pytest.approx(0.0)
    assert explained(4.0, 3.0, 2.0) == pytest.approx(1 - (8 / 3) / (2 / 3))
    assert explained_locally(returns, torch.ones(1, 4), mask).isfinite()


@pytest.mark.parametrize(
    ("kl", "coef"),
    [(6.0, 0.1), (6.3, 0.1 * (1 + 0.05 * 0.064)), (12.0, 0.10128), (0.0, 0.09872), (-5.0, 0.09872)],
)
def test_adapted_kl_coef(kl, coef):
    """Target 6, 64 answers of a horizon of 1000: at most 1.28 % a rollout."""
    got = adapted_kl_coef(T(0.1), T(kl), target=6.0, n=64, horizon=1000)
    assert got.item() == pytest.approx(coef, rel=1e-5)


# --- the stage


def make(judge=None, model=TINY, seed: int = 0, sampler_of=sampler_of, **changes) -> PPOModule:
    policy = make_policy(model=model)
    reward = make_scalar(model=model)
    reference = make_policy(seed=7, model=model)  # far from the policy, so that the KL is felt
    s = steady("ppo", **{**SMALL, **changes})
    value = deepcopy(reward).train()
    networks = policy, value, reference, reward
    return PPOModule(*networks, TOKENIZER, s, seed, judge, sampler_of=sampler_of)


def seen_by(module: PPOModule) -> list[Experience]:
    """What the module's rollouts hold, on the CPU, once it has been trained."""
    found, collect = [], module.collect

    def keep(prompts):
        seen = collect(prompts)
        here = {k: x.cpu() for k, x in vars(seen).items() if isinstance(x, Tensor)}
        found.append(replace(seen, **here))
        return seen

    module.collect = keep
    return found


def test_experience_is_what_the_formulas_say():
    module = make(kl_coef=0.3, missing_eos_penalty=2.0, epochs=1)
    found = seen_by(module)
    policy = make_policy()
    fit(module, prompt_batches(1))
    (x,) = found
    r, mask = x.rollout, x.rollout.mask
    assert 0 < r.stopped.sum() < 4 and len(set(r.length.tolist())) > 1  # a case worth testing
    close(x.score_B, final_scores(make_scalar(), r).tolist(), atol=1e-5)
    ref = answer_logprobs(make_policy(seed=7), r).detach()
    kl = (answer_logprobs(policy, r).detach() - ref) * mask
    close(x.kl_BA, kl.tolist(), atol=1e-4)
    penalised = x.score_B - 2.0 * (~r.stopped).float()
    rewards = token_rewards(penalised, kl, r.length, 0.3)
    advantages, returns = gae(rewards, x.values_BA, mask, 1.0, 0.95)
    close(x.returns_BA, returns.tolist(), atol=1e-4)
    white = x.advantages_BA[mask]
    assert white.mean().abs() < 1e-5
    assert white.std().item() == pytest.approx(1.0, abs=1e-4)
    flat = advantages[mask]
    torch.testing.assert_close(white, (flat - flat.mean()) / flat.std(), atol=1e-3, rtol=1e-3)
    assert not x.advantages_BA[~mask].any()


def test_two_passes_are_the_gradients_of_the_loss_written_out(monkeypatch):
    """On one unpadded row after the other; both passes compare with the sampler's policy."""
    use_sgd(monkeypatch)
    module = make(epochs=2, value_coef=0.7, lr=0.05)
    found = seen_by(module)
    policy, value = make_policy(), make_scalar()
    metrics = fit(module, prompt_batches(1)).callback_metrics
    assert metrics["train/clip_high"] + metrics["train/clip_low"] > 0.05
    (x,) = found
    n_tokens = x.rollout.length.sum()
    parameters = [*policy.parameters(), *value.parameters()]
    for _ in range(2):
        loss = torch.zeros(())
        for row, (start, n) in enumerate(zip(x.rollout.start, x.rollout.length, strict=True)):
            ids = x.rollout.ids[row : row + 1, : start + n]
            logp = policy.logits(policy(ids).hidden_BTD)[0].log_softmax(-1)
            at, advantage = torch.arange(n), x.advantages_BA[row, :n]
            ratio = (logp[start - 1 + at, ids[0, start:]] - x.rollout.logprobs[row, :n]).exp()
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            new = value(ids)[0, start - 1 + at]
            old, target = x.values_BA[row, :n], x.returns_BA[row, :n]
            near = torch.minimum(torch.maximum(new, old - 0.2), old + 0.2)
            error = torch.maximum((new - target).square(), (near - target).square())
            loss = loss + (0.7 * 0.5 * error - surrogate).sum() / n_tokens
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, gradient in zip(parameters, gradients, strict=True):
                p -= 0.05 * gradient
    trained = [*module.policy.parameters(), *module.value.parameters()]
    for p, q in zip(parameters, trained, strict=True):
        torch.testing.assert_close(q, p, atol=ROUNDING, rtol=1e-5)


def test_one_piece_of_four_answers_equals_four_of_one(monkeypatch):
    use_sgd(monkeypatch)
    results = []
    for micro in (4, 1):
        module = make(micro_batch_size=micro, max_steps=2, epochs=2, lr=0.02, clip_norm=0.5)
        found = seen_by(module)
        metrics = fit(module, prompt_batches(2)).callback_metrics
        results.append((weights(module), metrics, [x.rollout.ids for x in found]))
    assert len(set(found[0].rollout.length.tolist())) > 1
    assert distance(weights(make()), results[0][0]) > 1e-3
    (whole, metrics, ids), (pieces, others, same_ids) = results
    assert all(a.equal(b) for a, b in zip(ids, same_ids, strict=True))
    assert distance(whole, pieces) < ROUNDING
    same = {n: pytest.approx(x.item(), abs=2e-4) for n, x in metrics.items()}
    assert {name: x.item() for name, x in others.items()} == same


def test_minibatches_take_every_answer_once_a_pass():
    """In an order drawn from the seed; within a step from the shortest to the longest."""
    module = make(minibatch_size=3)
    total = SimpleNamespace(processed=5)
    epoch_loop = SimpleNamespace(batch_progress=SimpleNamespace(total=total))
    fit_loop = SimpleNamespace(epoch_loop=epoch_loop)
    module.trainer = SimpleNamespace(world_size=1, global_rank=0, fit_loop=fit_loop)
    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    answers = [[7] * n for n in lengths]
    rollout = pack([[1]] * 8, Generation(answers, None, [True] * 8), pad_id=0)
    passes = [[rows.tolist() for rows in module.minibatches(rollout, epoch)] for epoch in (0, 1, 0)]
    assert [len(rows) for rows in passes[0]] == [3, 3, 2]
    assert sorted(sum(passes[0], [])) == sorted(sum(passes[1], [])) == list(range(8))
    assert passes[0] == passes[2] != passes[1]
    for rows in passes[0]:
        found = [lengths[row] for row in rows]
        assert found == sorted(found)
    total.processed = 6
    assert passes[0] != [rows.tolist() for rows in module.minibatches(rollout, 0)]


def test_scoring_in_pieces_keeps_the_order_of_the_rows():
    module = make(micro_batch_size=2)
    lengths = [3, 1, 4, 1, 5]
    answers = [[7] * n for n in lengths]
    rollout = pack([[1]] * 5, Generation(answers, None, [True] * 5), pad_id=0)
    got = module.in_pieces(lambda part: part.length * 10, rollout)
    assert got.tolist() == [30, 10, 40, 10, 50]


def test_the_frozen_networks_do_not_change_and_are_not_saved():
    module = make(epochs=2)
    frozen = module.frozen
    before = {name: weights(network) for name, network in frozen.items()}
    policy, value = weights(module.policy), weights(module.value)
    fit(module, prompt_batches(1))
    assert set(before) == {"reference", "reward"}
    for name, network in frozen.items():
        assert distance(before[name], weights(network)) == 0
        assert not network.training
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    assert distance(policy, weights(module.policy)) > 1e-3
    assert distance(value, weights(module.value)) > 1e-3
    assert {name.split(".")[0] for name in module.state_dict()} == {"policy", "value", "kl_coef"}
    trained = {id(p) for group in module.optimizers().param_groups for p in group["params"]}
    ours = [*module.policy.parameters(), *module.value.parameters()]
    assert trained == {id(p) for p in ours}


def test_the_routers_bias_is_frozen():
    module = make(epochs=2)
    fit(module, prompt_batches(1))
    assert not any(bias.any() for bias in biases(module).values())
    moving = make(epochs=2, balance_router=True)
    fit(moving, prompt_batches(1))
    assert any(bias.any() for bias in biases(moving).values())


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_good_answer_becomes_likelier_and_a_bad_one_less(monkeypatch, advantage):
    """A small step on one answer alone; the others have no advantage."""
    use_sgd(monkeypatch)
    module = make(epochs=1, lr=1e-3, value_coef=0.0)
    found, collect = [], module.collect

    def judged(prompts):
        x = collect(prompts)
        x.advantages_BA = torch.zeros_like(x.advantages_BA)
        x.advantages_BA[2] = advantage
        found.append(x)
        return x

    module.collect = judged
    fit(module, prompt_batches(1))
    rollout = found[0].rollout
    after = (answer_logprobs(module.policy, rollout) * rollout.mask).sum(1)
    change = after - rollout.logprobs.sum(1)
    assert change[2] * advantage > 1e-3


def test_the_hidden_rule_is_logged_and_never_trained_on():
    results = []
    for judge in (None, lambda record, text, stopped: len(text) + 100.0 * stopped):
        module = make(judge=judge, max_steps=2)
        found = seen_by(module)
        metrics = fit(module, prompt_batches(2)).callback_metrics
        results.append((weights(module), metrics))
    rollout = found[-1].rollout
    texts = answer_texts(rollout, TOKENIZER)
    gold = (sum(map(len, texts)) + 100.0 * rollout.stopped.sum().item()) / 4
    assert results[1][1]["train/true_score"].item() == pytest.approx(gold)
    assert "train/true_score" not in results[0][1]
    assert distance(results[0][0], results[1][0]) <= REPEATED


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_sampler_without_log_probs_trains_alike(monkeypatch, temperature):
    """Some other engine: the old policy's log-probs are then computed by ours."""
    use_sgd(monkeypatch)
    results = []
    for sampler in (sampler_of, without_logprobs):
        module = make(sampler_of=sampler, temperature=temperature, max_steps=2, epochs=2)
        metrics = fit(module, prompt_batches(2)).callback_metrics
        results.append((weights(module), {k: v.item() for k, v in metrics.items()}))
    (want, metrics), (found, others) = results
    assert (learned := distance(weights(make()), want)) > 1e-3
    assert distance(want, found) < 1e-3 * learned
    assert others == {name: pytest.approx(x, abs=2e-4) for name, x in metrics.items()}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_log_of_a_rollout(temperature):
    module = make(
        epochs=2, minibatch_size=2, temperature=temperature, model=replace(TINY, dropout=0.2)
    )
    found = seen_by(module)
    metrics = {k: v.item() for k, v in fit(module, prompt_batches(1)).callback_metrics.items()}
    (x,) = found
    assert 0 <= metrics["train/sampler_gap"] < 1e-4  # sampler and trainer agree, dropout or not
    assert metrics["train/score"] == pytest.approx(x.score_B.mean().item(), abs=1e-5)
    assert metrics["train/kl"] == pytest.approx(x.kl_BA.sum().item() / 4, abs=1e-4)
    assert metrics["train/answer_length"] == x.rollout.length.sum().item() / 4
    assert metrics["train/stop_rate"] == x.rollout.stopped.sum().item() / 4
    entropy = -x.rollout.logprobs.sum() / x.rollout.length.sum()
    assert metrics["train/entropy"] == pytest.approx(entropy.item(), rel=1e-4)
    explained = explained_locally(x.values_BA, x.returns_BA, x.rollout.mask)
    assert metrics["train/explained_variance"] == pytest.approx(explained.item(), abs=1e-5)
    wanted = "approx_kl clip_high clip_low ratio_mean ratio_max value_loss policy_loss grad_norm"
    assert {f"train/{name}" for name in wanted.split()} <= set(metrics)
    assert module.tokens_generated == x.rollout.length.sum()
    assert module.tokens_seen == module.settings.epochs * (x.rollout.start + x.rollout.length).sum()


def test_a_rollout_is_left_once_the_policy_moved_too_far():
    for limit, epochs in ((0.0, 4), (1e-9, 1)):
        module = make(epochs=4, max_approx_kl=limit, minibatch_size=2)
        metrics = fit(module, prompt_batches(1)).callback_metrics
        assert metrics["train/epochs"] == epochs
    assert metrics["train/approx_kl"] > 1e-9


def test_the_kl_coefficient_adapts_and_is_kept_for_a_resume():
    fixed = make()
    fit(fixed, prompt_batches(1))
    assert fixed.kl_coef.item() == pytest.approx(0.05)
    # the KL to a strange reference is far above the target: +20 % x 4 answers / 40
    module = make(kl_target=0.1, kl_horizon=40)
    metrics = fit(module, prompt_batches(1)).callback_metrics
    assert metrics["train/kl"] > 0.12
    assert metrics["train/kl_coef"].item() == pytest.approx(0.05)  # the one that was used
    assert module.state_dict()["kl_coef"].item() == pytest.approx(0.05 * 1.02)


def test_answers_differ_from_step_to_step_and_from_seed_to_seed():
    ids = []
    for seed in (0, 0, 1):
        module = make(seed=seed, max_steps=2, lr=1e-9)
        found = seen_by(module)
        fit(module, prompt_batches(2))
        ids.append([answer_texts(x.rollout, TOKENIZER) for x in found])
    assert ids[0] == ids[1]
    assert ids[0][0] != ids[0][1]
    assert ids[0][0] != ids[2][0]
