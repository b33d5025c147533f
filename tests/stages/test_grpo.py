"""GRPO: the formulas and reductions by hand, and what one rollout of groups does."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from types import SimpleNamespace

import pytest
import torch

from fourstage.rl.rewards import ReasoningReward
from fourstage.rl.rollout import answer_logprobs, answer_texts
from fourstage.sampling.generate import Generation, sampler_of
from fourstage.stages import GRPOModule, on_policy
from fourstage.stages import grpo as stage
from fourstage.stages.grpo import (
    RECIPES,
    REDUCTIONS,
    SCALES,
    Answers,
    choose,
    overlong_penalty,
    policy_loss,
    sequence_logprobs,
    tied_groups,
)
from fourstage.stages.on_policy import Totals
from tests.device import ROUNDING
from tests.fakes import one_by_one
from tests.stages.tiny import (
    TINY,
    TOKENIZER,
    biases,
    distance,
    fit,
    make_policy,
    prompt_batches,
    settings,
    steady,
    use_sgd,
    weights,
    without_logprobs,
)

T = torch.tensor
SMALL = {
    "max_new_tokens": 8,
    "max_prompt_tokens": 20,
    "group_size": 4,
    "minibatch_size": 8,
    "micro_batch_size": 8,
    "batch_size": 4,
    "max_steps": 1,
    "lr": 0.01,
    "temperature": 1.0,
    "epochs": 1,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "kl_estimator": "k3",
    "kl_coef": 0.0,
    "max_approx_kl": 0.0,
    "form_weight": 0.1,
    "resample_rounds": 0,
    "overlong_window": 0,
    "balance_router": False,
}


def close(got: torch.Tensor, want, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got, T(want), atol=atol, rtol=1e-5)


# --- advantages and penalties


def test_group_advantages_by_hand():
    rewards = T([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [3.0, 1.0, 1.0, 1.0]])
    # unbiased: sqrt(4 x 0.25 / 3) = 0.5773503, and sqrt((2.25 + 3 x 0.25) / 3) = 1
    a, b = 0.5 / 0.5774503, 0.5 / 1.0001
    close(SCALES["std"](rewards), [[a, -a, -a, a], [0.0] * 4, [3 * b, -b, -b, -b]])
    close(
        SCALES["mean"](rewards),
        [[0.5, -0.5, -0.5, 0.5], [0.0] * 4, [1.5, -0.5, -0.5, -0.5]],
    )


@pytest.mark.parametrize("scale", SCALES)
def test_a_tied_group_has_no_advantage_at_all(scale):
    """The float32 mean of eight times 0.1 is not 0.1."""
    rewards = T([[0.1] * 8, [0.7] * 8, [1.1] * 8])
    assert (rewards.mean(1) != rewards[:, 0]).any()
    assert (SCALES[scale](rewards) == 0).all()


def test_the_eps_of_group_advantages():
    got = SCALES["std"](T([[2e-4, 0.0]]))  # std is sqrt(2) x 1e-4
    close(got, [[1 / (2**0.5 + 1), -1 / (2**0.5 + 1)]], atol=1e-5)


def test_overlong_penalty_at_the_corners_of_dapo_eq_13():
    length = T([1, 79, 80, 81, 90, 99, 100, 130])
    want = [0.0, 0.0, 0.0, -0.05, -0.5, -0.95, -1.0, -1.0]
    close(overlong_penalty(length, max_length=100, window=20), want)
    close(overlong_penalty(length, max_length=100, window=0), [0.0] * 8)


# --- the loss


def test_policy_loss_by_hand():
    s = steady("grpo", **SMALL | {"kl_coef": 0.5, "clip_high": 0.28})
    old = T([[log(0.5), log(0.5)], [log(0.5), log(0.5)]])
    logp = old + T([[log(1.5), log(1.1)], [log(0.5), log(1.5)]])
    advantage = T([2.0, -1.0])
    surrogate = [[-2.56, -2.2], [0.8, 1.5]]
    close(policy_loss(logp, old, None, advantage, s), surrogate)
    k3 = [[exp(x) - x - 1 for x in row] for row in (old - logp).tolist()]  # the reference is old
    want = [
        [a + 0.5 * k for a, k in zip(*rows, strict=True)]
        for rows in zip(surrogate, k3, strict=True)
    ]
    close(policy_loss(logp, old, old, advantage, s), want)


MASK = torch.arange(4) < T([[2], [4]])
LOSS = T([[1.0, 1.0, 50.0, 50.0], [2.0, 2.0, 2.0, 4.0]])  # 50: padding


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("answer", (1.0 + 2.5) / 2),  # a mean of means
        ("token", (2.0 + 10.0) / 6),  # every token alike
        ("constant", (2.0 + 10.0) / (2 * 8)),  # by a constant length
    ],
)
def test_reductions_of_a_whole_batch(name, want):
    totals = Totals(answers=T(2), tokens=T(6), max_length=8)
    assert REDUCTIONS[name](LOSS, MASK, totals).item() == pytest.approx(want)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_divide_by_the_whole_step_so_that_pieces_add_up(name):
    reduce, totals = REDUCTIONS[name], Totals(answers=T(2), tokens=T(6), max_length=8)
    whole = reduce(LOSS, MASK, totals)
    pieces = sum(reduce(LOSS[i : i + 1], MASK[i : i + 1], totals) for i in range(2))
    assert pieces.item() == pytest.approx(whole.item())
    wider = [torch.nn.functional.pad(x, (0, 3)) for x in (LOSS, MASK)]
    assert reduce(*wider, totals).item() == pytest.approx(whole.item())
    larger = Totals(answers=T(4), tokens=T(12), max_length=8)  # with another rank's rows
    assert reduce(LOSS, MASK, larger).item() == pytest.approx(whole.item() / 2)


def test_one_update_a_rollout_has_ratio_one_and_yet_a_gradient():
    s = steady("grpo", **SMALL)
    logp = T([[-1.0, -2.0, 0.0, 0.0], [-0.5, -1.5, -2.5, -3.0]], requires_grad=True)
    advantage = SCALES["std"](T([[1.0, 0.0]])).flatten()
    loss = policy_loss(logp, logp.detach(), None, advantage, s)
    a = 0.5 / (0.5**0.5 + 1e-4)
    close(loss.detach(), [[-a] * 4, [a] * 4])  # -A times a ratio of exactly 1
    totals = Totals(answers=T(2), tokens=T(6), max_length=8)
    values = {name: reduce(loss, MASK, totals) for name, reduce in REDUCTIONS.items()}
    assert values["answer"].item() == pytest.approx(0.0, abs=1e-7)
    assert values["token"].item() == pytest.approx(-(2 * a - 4 * a) / 6)
    (gradient,) = torch.autograd.grad(values["answer"], logp)
    close(gradient, [[-a / 4, -a / 4, 0.0, 0.0], [a / 8] * 4])
    loss = policy_loss(logp, logp.detach(), None, advantage, s)
    (gradient,) = torch.autograd.grad(REDUCTIONS["token"](loss, MASK, totals), logp)
    close(gradient, [[-a / 6, -a / 6, 0.0, 0.0], [a / 6] * 4])


def test_the_ratio_of_an_answer_is_the_geometric_mean_of_its_tokens():
    old = T([[-1.0, -2.0, 0.0, 0.0], [-0.5, -1.5, -2.5, -3.0]])
    logp = T([[-0.8, -2.4, 0.0, 0.0], [-0.5, -1.1, -2.4, -2.7]], requires_grad=True)
    got = sequence_logprobs(logp, old, MASK)
    close(got.detach(), [[-1.1, -2.1, 0.0, 0.0], [-0.3, -1.3, -2.3, -2.8]])  # old - 0.1, + 0.2
    (gradient,) = torch.autograd.grad((got * MASK).sum(), logp)
    close(gradient, MASK.float().tolist())


RECIPE = ("clip_low", "clip_high", "resample_rounds", "overlong_window", "kl_coef")


@pytest.mark.parametrize(
    ("loss", "numbers"),
    [
        ("grpo", (0.2, 0.2, 0, 0, 0.2)),
        ("dr_grpo", (0.2, 0.2, 0, 0, 0)),
        ("dapo", (0.2, 0.28, 2, 16, 0)),
        ("gspo", (3e-4, 4e-4, 0, 0, 0)),
    ],
)
def test_a_loss_is_its_whole_recipe_and_each_part_can_be_set(loss, numbers):
    s = settings("grpo", loss=loss)
    assert tuple(getattr(s, name) for name in RECIPE) == numbers
    for name in RECIPE:
        assert getattr(settings("grpo", loss=loss, **{name: 1}), name) == 1
    assert s.recipe == RECIPES[loss]
    assert s.advantages is s.ratio is s.reduce is None, "set, they would rename existing runs"
    choices = {"advantages": "mean", "ratio": "sequence", "reduce": "token"}
    assert settings("grpo", loss=loss, **choices).recipe == RECIPES[loss]._replace(**choices)
    if loss == "dapo":
        assert s == settings("grpo_dapo")
        assert settings("grpo", loss=loss, max_new_tokens=9).overlong_window == 9


# --- dynamic sampling


def some_answers(texts: list[str], totals: list[float], seed: float = 0.0) -> Answers:
    ids = [TOKENIZER.encode(text) for text in texts]
    logprobs = [[-1.0 - seed] * len(i) for i in ids]
    generation = Generation(ids, logprobs, [len(i) < 4 for i in ids])
    return Answers(generation, [ReasoningReward(t, 0.0) for t in totals], T(totals))


def test_choose_takes_answer_by_answer():
    first = some_answers(["a", "b", "c", "d"], [0.0, 0.0, 1.0, 0.0])
    second = some_answers(["long one", "e", "f", "even longer"], [1.0, 0.5, 0.0, 0.0], seed=1.0)
    takes_second = torch.tensor([True, True, False, False])
    got = choose(first, second, takes_second)
    assert list(map(TOKENIZER.decode, got.generation.answer_ids)) == ["long one", "e", "c", "d"]
    assert got.generation.logprobs == [[-2.0] * 8, [-2.0], [-1.0], [-1.0]]
    assert got.generation.stopped == [False, True, True, True]
    assert got.total_B.tolist() == [1.0, 0.5, 1.0, 0.0]
    assert [r.correct for r in got.rewards] == [1.0, 0.5, 1.0, 0.0]
    assert choose(second, first, ~takes_second).generation == got.generation


def test_equal_rewards_are_a_tie_whatever_their_rounding():
    """0.1, the reward of the form alone, is the commonest tie."""
    rewards_GK = torch.tensor([[0.1] * 8, [0.1] * 7 + [1.1], [1.1] * 8, [0.0] * 8])
    assert rewards_GK[0].std() > 0, "what makes it a question"
    assert tied_groups(rewards_GK).tolist() == [True, False, True, True]


class Rounds(GRPOModule):
    """Every round of answers has the listed totals; counts the rounds."""

    def answers(self, policy, prompts, attempt: int = 0) -> int:
        self.rounds = [*getattr(self, "rounds", []), attempt]
        return attempt

    def judged(self, problems, attempt: int) -> Answers:
        return some_answers([str(attempt)] * 4, self.totals[attempt], seed=float(attempt))


@pytest.mark.parametrize(
    ("totals", "rounds", "texts"),
    [
        ([[1.0, 0.0, 0.0, 1.0]], [0], "0000"),  # nothing tied: no second round
        ([[1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]], [0, 1], "1100"),
        # the second group stays tied: it gives up after two more rounds
        ([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], [0, 1, 2], "1122"),
    ],
)
def test_dynamic_sampling_answers_tied_groups_again(totals, rounds, texts):
    policy = make_policy()
    s = steady("grpo", **SMALL | {"group_size": 2, "resample_rounds": 2})
    module = Rounds(policy, policy, TOKENIZER, s, 0)
    module.totals = totals
    batch = prompt_batches(1)[0]
    got = module.collect(policy, batch.prompt_ids, batch.records)
    assert module.rounds == rounds
    assert "".join(map(TOKENIZER.decode, got.generation.answer_ids)) == texts


# --- the stage


def reward_by_text(problem, text: str, stopped: bool) -> ReasoningReward:
    """Something that differs within a group, and is tied in some groups."""
    return ReasoningReward((sum(map(ord, text)) % 3) / 2, float(stopped))


@pytest.fixture(autouse=True)
def judged(monkeypatch):
    monkeypatch.setattr(stage, "reasoning_rewards", one_by_one(reward_by_text))


def make(loss: str = "grpo", model=TINY, seed: int = 0, **changes) -> GRPOModule:
    reference = make_policy(seed=7, model=model)
    sampler = {"sampler_of": changes.pop("sampler_of", sampler_of)}
    s = steady("grpo", **{**SMALL, "loss": loss, **changes})
    return GRPOModule(make_policy(model=model), reference, TOKENIZER, s, seed, **sampler)


def seen_by(module: GRPOModule) -> list[SimpleNamespace]:
    """The module's groups of answers with their rollout, once it has been trained."""
    found, log = [], module.log_answers

    def keep(rollout, answers, losses):
        found.append(SimpleNamespace(rollout=rollout, **vars(answers)))
        log(rollout, answers, losses)

    module.log_answers = keep
    return found


@pytest.mark.parametrize(
    ("loss", "kl_coef", "lr"),
    [*((name, 0.0, 0.1) for name in RECIPES), ("dapo", 0.2, 1e-3)],
)
def test_one_piece_of_eight_answers_equals_eight_of_one(monkeypatch, loss, kl_coef, lr):
    use_sgd(monkeypatch)
    results = []
    for micro in (8, 1):
        module = make(loss, micro_batch_size=micro, kl_coef=kl_coef, max_steps=2, lr=lr)
        found = seen_by(module)
        metrics = fit(module, prompt_batches(2)).callback_metrics
        results.append((weights(module), metrics))
    assert len(set(found[0].rollout.length.tolist())) > 2
    (whole, metrics), (pieces, others) = results
    assert distance(weights(make()), whole) > 1e-3
    assert distance(whole, pieces) < ROUNDING
    same = {n: pytest.approx(x.item(), abs=2e-4) for n, x in metrics.items()}
    assert {name: x.item() for name, x in others.items()} == same


@pytest.mark.parametrize("name", RECIPES)
def test_two_passes_are_the_gradients_of_the_loss_written_out(monkeypatch, name):
    """On one unpadded row after the other; both passes compare with the sampler's policy."""
    use_sgd(monkeypatch)
    module = make(name, minibatch_size=16, epochs=2, lr=0.1, clip_high=0.28)
    found = seen_by(module)
    policy = make_policy()
    metrics = fit(module, prompt_batches(1)).callback_metrics
    assert metrics["train/clip_high"] + metrics["train/clip_low"] > 0.05
    (a,) = found
    r, reward = a.rollout, a.total_B.view(4, 4)
    advantage = reward - reward.mean(1, keepdim=True)
    if name != "dr_grpo":
        advantage = advantage / (reward.std(1, keepdim=True) + 1e-4)
    parameters = list(policy.parameters())
    for _ in range(2):
        loss = torch.zeros(())
        for row, (start, n) in enumerate(zip(r.start.tolist(), r.length.tolist(), strict=True)):
            ids = r.ids[row, : start + n]
            logp = policy.logits(policy(ids[None]).hidden_BTD)[0].log_softmax(-1)
            logp = logp[torch.arange(start - 1, start + n - 1), ids[start:]]
            log_ratio, good = logp - r.logprobs[row, :n], advantage.flatten()[row]
            ratio = (log_ratio.mean().expand(n) if name == "gspo" else log_ratio).exp()
            surrogate = torch.minimum(ratio * good, ratio.clamp(0.8, 1.28) * good)
            share = {"dapo": int(r.length.sum()), "dr_grpo": 16 * 8}.get(name, 16 * n)
            loss = loss - surrogate.sum() / share
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, gradient in zip(parameters, gradients, strict=True):
                p -= 0.1 * gradient
    for p, q in zip(parameters, module.policy.parameters(), strict=True):
        torch.testing.assert_close(q, p, atol=ROUNDING, rtol=1e-5)


@pytest.mark.parametrize("loss", RECIPES)
def test_leaving_out_answers_without_advantage_is_exact(monkeypatch, loss):
    """Two of the four groups are tied in every rollout."""
    use_sgd(monkeypatch)

    def half_tied(problem: int, text: str, stopped: bool) -> ReasoningReward:
        return ReasoningReward(1.0, 1.0) if problem < 2 else reward_by_text(problem, text, stopped)

    monkeypatch.setattr(stage, "reasoning_rewards", one_by_one(half_tied))
    rows = []
    kept = GRPOModule.rows_with_gradient

    def counted(self, index, has_gradient_B):
        rows.append((len(kept(self, index, has_gradient_B)), len(index)))
        return kept(self, index, has_gradient_B)

    results = []
    for rule in (counted, lambda self, index, has_gradient_B: index):
        monkeypatch.setattr(GRPOModule, "rows_with_gradient", rule)
        module = make(loss, max_steps=2, epochs=2, lr=0.1, seed=2)
        fit(module, prompt_batches(2))
        results.append(weights(module))
    assert sum(some for some, _ in rows) <= sum(every for _, every in rows) / 2
    assert distance(weights(make()), results[0]) > 1e-3
    assert distance(*results) < ROUNDING


def test_how_far_the_policy_moved_is_measured_on_the_answers_it_was_trained_on(monkeypatch):
    """Others keep the ratio 1: here the groups of two problems are tied."""

    def half_tied(problem: int, text: str, stopped: bool) -> ReasoningReward:
        return ReasoningReward(1.0, 1.0) if problem < 2 else reward_by_text(problem, text, stopped)

    monkeypatch.setattr(stage, "reasoning_rewards", one_by_one(half_tied))
    masks, stats = [], on_policy.ratio_stats

    def keep(log_ratio, mask, *clips):
        masks.append(mask)
        return stats(log_ratio, mask, *clips)

    monkeypatch.setattr(on_policy, "ratio_stats", keep)
    module = make(epochs=2, minibatch_size=16, seed=2)
    found = seen_by(module)
    fit(module, prompt_batches(1))
    (a,) = found
    has_gradient_B = SCALES["std"](a.total_B.view(4, 4)).flatten() != 0
    assert 0 < has_gradient_B.sum() <= 8
    for mask in masks:
        assert mask.tolist() == (a.rollout.mask & has_gradient_B[:, None]).tolist()
    tokens_B = (a.rollout.start + a.rollout.length) * has_gradient_B
    assert module.tokens_seen == 2 * tokens_B.sum()
    assert module.tokens_generated == a.rollout.length.sum()


def test_answers_are_left_out_only_where_nothing_but_their_gradient_counts():
    def kept(index: list[int], ranks: int = 1, **changes) -> list[int]:
        module = make(**changes)
        module.trainer = SimpleNamespace(world_size=ranks)
        has_gradient_B = T([False, True, True, False])
        return module.rows_with_gradient(T(index), has_gradient_B).tolist()

    assert kept([3, 0, 2]) == [2]
    assert kept([3, 0]) == [3]  # one at least: the optimizer takes its step
    assert kept([3, 0, 2], balance_router=True) == [3, 0, 2]  # they are load
    # every backward pass waits for the other ranks, which may have more of them
    assert kept([3, 0, 2], ranks=2) == [3, 0, 2]


@pytest.mark.parametrize("loss", RECIPES)
def test_tied_groups_leave_the_weights_alone(monkeypatch, loss):
    monkeypatch.setattr(
        stage, "reasoning_rewards", one_by_one(lambda *_: ReasoningReward(1.0, 1.0))
    )
    module = make(loss, max_steps=2, epochs=2, resample_rounds=1, clip_norm=1.0)
    before = weights(module)
    metrics = fit(module, prompt_batches(2)).callback_metrics
    assert distance(before, weights(module)) == 0
    assert metrics["train/zero_spread"] == 1
    assert metrics["train/grad_norm"] == 0


def test_a_kl_to_the_start_pulls_even_tied_groups(monkeypatch):
    monkeypatch.setattr(
        stage, "reasoning_rewards", one_by_one(lambda *_: ReasoningReward(1.0, 1.0))
    )
    module = make(kl_coef=0.5, lr=1e-3)
    before = weights(module)
    found = seen_by(module)
    fit(module, prompt_batches(1))
    assert distance(before, weights(module)) > 1e-4
    rollout = found[0].rollout
    assert module.tokens_seen == (rollout.start + rollout.length).sum(), "none is left out"
    with torch.no_grad():
        reference = answer_logprobs(make_policy(seed=7), rollout)
        kl = [
            (answer_logprobs(policy, rollout) - reference)[rollout.mask].square().mean()
            for policy in (make_policy(), module.policy)
        ]
    assert kl[1] < kl[0]


@pytest.mark.parametrize("loss", RECIPES)
def test_a_sampler_without_log_probs_trains_alike(monkeypatch, loss):
    use_sgd(monkeypatch)
    results = []
    for sampler in (sampler_of, without_logprobs):
        module = make(loss, sampler_of=sampler, temperature=0.7, max_steps=2, epochs=2)
        metrics = fit(module, prompt_batches(2)).callback_metrics
        results.append((weights(module), {k: v.item() for k, v in metrics.items()}))
    (want, metrics), (found, others) = results
    assert (learned := distance(weights(make()), want)) > 1e-3
    assert distance(want, found) < 1e-3 * learned
    assert others == {name: pytest.approx(x, abs=2e-4) for name, x in metrics.items()}


def test_good_answers_become_likelier_and_bad_ones_less(monkeypatch):
    """One small step; each answer's change in log-probability follows its advantage."""
    use_sgd(monkeypatch)
    module = make(lr=1e-3, minibatch_size=16)
    found = seen_by(module)
    fit(module, prompt_batches(1))
    (answers,) = found
    r = answers.rollout
    advantage = SCALES["std"](answers.total_B.view(-1, 4)).flatten()
    change = (answer_logprobs(module.policy, r) * r.mask).sum(1) - r.logprobs.sum(1)
    good, bad = change[advantage > 0].mean(), change[advantage < 0].mean()
    assert good > 0 > bad
    assert (change * advantage).sum() > 1e-3


def test_the_reference_is_frozen_and_not_saved():
    module = make(kl_coef=0.1, epochs=2)
    reference = module.frozen["reference"]
    before = weights(reference)
    fit(module, prompt_batches(1))
    assert distance(before, weights(reference)) == 0
    assert not any(p.requires_grad or p.grad is not None for p in reference.parameters())
    assert {name.split(".")[0] for name in module.state_dict()} == {"policy"}
    assert not any(bias.any() for bias in biases(module).values())


def test_what_an_answer_earns():
    """The verifier's share, the form at its weight, and the cost of the last tokens."""
    module = make("dapo", form_weight=0.25, overlong_window=4)
    found = seen_by(module)
    fit(module, prompt_batches(1))
    (a,) = found
    assert len(a.rewards) == 16
    assert [row.tolist() for row in a.rollout.start.view(4, 4)] == [[n] * 4 for n in (5, 13, 8, 10)]
    texts = answer_texts(a.rollout, TOKENIZER)
    rows = zip(texts, a.rollout.stopped.tolist(), a.rollout.length.tolist(), strict=True)
    for got, (text, stopped, length) in zip(a.total_B.tolist(), rows, strict=True):
        correct = (sum(map(ord, text)) % 3) / 2
        late = min(1.0, max(0.0, (length - 4) / 4))  # of 8 tokens the last 4
        assert got == pytest.approx(correct + 0.25 * stopped - late)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_log_of_a_rollout(temperature):
    module = make(temperature=temperature, model=replace(TINY, dropout=0.2))
    found = seen_by(module)
    metrics = {k: v.item() for k, v in fit(module, prompt_batches(1)).callback_metrics.items()}
    (a,) = found
    total = a.total_B.view(4, 4)
    correct = T([r.correct for r in a.rewards]).view(4, 4)
    want = {
        "reward": total.mean(),
        "reward_std": total.std(1).mean(),
        "reward_correct": correct.mean(),
        "reward_form": a.rollout.stopped.float().mean(),
        "zero_spread": (total == total[:, :1]).all(1).float().mean(),
        "pass_at_1": (correct == 1).float().mean(),
        "pass_at_4": (correct == 1).any(1).float().mean(),
        "answer_length": a.rollout.length.float().mean(),
        "stop_rate": a.rollout.stopped.float().mean(),
        "entropy": -a.rollout.logprobs.sum() / a.rollout.length.sum(),
    }
    for name, value in want.items():
        assert metrics[f"train/{name}"] == pytest.approx(value.item(), abs=1e-5), name
    assert 0 <= metrics["train/sampler_gap"] < 1e-4  # sampler and trainer agree, dropout or not
    wanted = "approx_kl clip_high clip_low ratio_mean ratio_max kl grad_norm lr epochs"
    assert {f"train/{name}" for name in wanted.split()} <= set(metrics)


def test_a_rollout_is_left_once_the_policy_moved_too_far():
    for limit, epochs in ((0.0, 4), (1e-9, 1)):
        metrics = fit(make(epochs=4, max_approx_kl=limit), prompt_batches(1)).callback_metrics
        assert metrics["train/epochs"] == epochs


def test_naming_what_the_recipe_has_is_the_same_run():
    named = settings("grpo", loss="dapo", advantages="std", ratio="token", reduce="token")
    assert named.hashed() == settings("grpo", loss="dapo").hashed()
    assert settings("grpo", loss="dapo", reduce="answer").hashed() != named.hashed()


@pytest.mark.parametrize("answers", [[[7], []], [[7]]], ids=["an empty one", "too few"])
def test_a_sampler_that_answers_with_nothing_is_refused(answers):
    module = make(sampler_of=lambda _: lambda *_: Generation(answers, None, [True] * len(answers)))
    with pytest.raises(ValueError, match="answer every prompt, with one token at least"):
        fit(module, prompt_batches(1))
