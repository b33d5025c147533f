"""Settings, the learning rate, and one optimizer step, which all stages share."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Timer

from fourstage.batch import TokenBatch
from fourstage.errors import UserError
from fourstage.ladder import LADDER
from fourstage.settings import build
from fourstage.stages import PretrainModule, SFTModule, grpo
from fourstage.stages.base import learning_rate_factor, parameter_groups
from tests.device import REPEATED, close, repeated
from tests.fakes import one_by_one
from tests.stages import matrix
from tests.stages.test_grpo import reward_by_text
from tests.stages.tiny import (
    STAGES,
    distance,
    fit,
    make_policy,
    make_scalar,
    settings,
    shipped,
    steady,
    use_sgd,
    weights,
)

FILES = sorted(path.stem for path in STAGES.glob("*.yaml"))


def token_batches(n: int, rows: int = 2, tokens: int = 6) -> list[TokenBatch]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 100, (n, rows, tokens + 1), generator=generator)
    return [TokenBatch(i[:, :-1], i[:, 1:]) for i in ids]


# --- settings


def test_the_kl_coefficient_of_ppo_stays_above_0():
    assert settings("ppo", kl_target=6.0, kl_horizon=13, batch_size=64).kl_horizon == 13
    with pytest.raises(UserError, match="kl_horizon: must be above 0.2 x batch_size = 12.8, got 1"):
        settings("ppo", kl_target=6.0, kl_horizon=12, batch_size=64)
    assert settings("ppo", kl_target=0.0, kl_horizon=1).kl_horizon == 1, "nothing adapts"


def test_every_shipped_file_builds():
    assert set(LADDER) < set(FILES)
    for name in FILES:
        assert isinstance(settings(name), LADDER[name.split("_")[0]].code.Settings)
    assert settings("grpo_dapo").loss == "dapo"
    assert settings("grpo_dr").loss == "dr_grpo"


EVERY_STAGE = [
    ("max_steps", 0, "must be at least 1, got 0"),  # it would count as a finished run
    ("max_steps", -2, "must be at least 1, got -2"),
    ("max_steps", -1, "-1 means no limit and needs a max_time=DD:HH:MM:SS"),
    ("max_steps", 1.5, "expected a whole number, got 1.5"),
    ("max_time", "2 minutes", "expected DD:HH:MM:SS such as 00:00:02:00, got '2 minutes'"),
    ("max_time", "00:02:00", "expected DD:HH:MM:SS such as 00:00:02:00, got '00:02:00'"),
    ("max_time", "00:00:00:00", "must be above 0, got '00:00:00:00'"),
    ("batch_size", 0, "must be at least 1, got 0"),
    ("batch_size", "abc", "expected a whole number, got 'abc'"),
    ("micro_batch_size", 0, "must be at least 1, got 0"),
    ("lr", 0.0, "must be above 0, got 0.0"),
    ("lr", -1e-3, "must be above 0, got -0.001"),
    ("lr", float("inf"), "expected a finite number, got inf"),
    ("min_lr", -0.1, "must be between 0 and 1, got -0.1"),
    ("min_lr", 1.1, "must be between 0 and 1, got 1.1"),
    ("warmup", -0.1, "must be between 0 and 1, got -0.1"),
    ("warmup", 100, "must be between 0 and 1, got 100.0"),
    ("weight_decay", -0.1, "must be at least 0, got -0.1"),
    ("beta1", 1.0, "must be below 1, got 1.0"),
    ("beta1", -0.5, "must be between 0 and 1, got -0.5"),
    ("beta2", 1.0, "must be below 1, got 1.0"),
    ("clip_norm", -1.0, "must be at least 0, got -1.0"),
    ("balance_router", 1, "expected true or false, got 1"),
    ("freeze_router", 1, "expected true or false, got 1"),
    ("val_every", -1, "must be at least 0, got -1"),
    ("log_every", 0, "must be at least 1, got 0"),
    ("sample_every", -1, "must be at least 0, got -1"),
    ("checkpoint_every", 0, "must be at least 1, got 0"),
    ("max_skipped", 0, "must be at least 1, got 0"),
    ("optimizer", "sgd", "expected one of adamw, muon, got 'sgd'"),
    ("parent", 3, "expected text or null, got 3"),
]
ON_POLICY = [
    ("max_prompt_tokens", 0, "must be at least 1, got 0"),
    ("max_new_tokens", 0, "must be at least 1, got 0"),
    ("temperature", 0.0, "must be at least 0.01, got 0.0"),
    ("temperature", 1e-40, "must be at least 0.01, got 1e-40"),
    ("epochs", 0, "must be at least 1, got 0"),
    ("minibatch_size", 0, "must be at least 1, got 0"),
    ("clip_low", -0.1, "must be between 0 and 1, got -0.1"),
    ("clip_low", 1.5, "must be between 0 and 1, got 1.5"),
    ("clip_high", -0.1, "must be at least 0, got -0.1"),
    ("kl_estimator", "k4", "expected one of k1, k2, k3, got 'k4'"),
    ("max_approx_kl", -1.0, "must be at least 0, got -1.0"),
    ("kl_coef", -0.1, "must be at least 0, got -0.1"),
]
ONE_STAGE = {
    "pretrain": [("block_size", 1, "must be at least 2, got 1")],
    "sft": [("max_tokens", 7, "must be at least 8, got 7")],
    "reward": [
        ("max_tokens", 7, "must be at least 8, got 7"),
        ("margin", -1.0, "must be at least 0, got -1.0"),
        ("centre_coef", -1.0, "must be at least 0, got -1.0"),
        ("pairs_per_prompt", 0, "must be at least 1, got 0"),
        ("max_new_tokens", 0, "must be at least 1, got 0"),
        ("temperature", 0.0, "must be at least 0.01, got 0.0"),
    ],
    "ppo": [
        *ON_POLICY,
        ("reward_parent", 3, "expected text or null, got 3"),
        ("kl_target", -1.0, "must be at least 0, got -1.0"),
        ("kl_horizon", 0, "must be above 0, got 0"),
        ("missing_eos_penalty", -1.0, "must be at least 0, got -1.0"),
        ("gamma", 1.1, "must be between 0 and 1, got 1.1"),
        ("gae_lambda", -0.1, "must be between 0 and 1, got -0.1"),
        ("value_clip", 0.0, "must be above 0, got 0.0"),
        ("value_coef", -0.1, "must be at least 0, got -0.1"),
    ],
    "grpo": [
        *ON_POLICY,
        ("loss", "ppo", "expected one of grpo, dr_grpo, dapo, gspo, got 'ppo'"),
        ("advantages", "none", "expected one of mean, std, got 'none'"),
        ("ratio", "word", "expected one of token, sequence, got 'word'"),
        ("reduce", "mean", "expected one of answer, constant, token, got 'mean'"),
        ("group_size", 1, "must be at least 2, got 1"),
        ("form_weight", -0.1, "must be at least 0, got -0.1"),
        ("resample_rounds", -1, "must be at least 0, got -1"),
        ("overlong_window", -1, "must be between 0 and 64, got -1"),
        ("overlong_window", 65, "must be between 0 and 64, got 65"),
    ],
}
PINNED = {"max_time": None, "max_steps": 10}
BAD = [(stage, *case) for stage in LADDER for case in (*EVERY_STAGE, *ONE_STAGE[stage])]


def values(stage: str) -> dict:
    """Good values; those on which a message depends do not follow the shipped files."""
    pinned = PINNED | ({"max_new_tokens": 64, "overlong_window": 0} if stage == "grpo" else {})
    return shipped(stage) | pinned


@pytest.mark.parametrize(("stage", "key", "value", "message"), BAD)
def test_a_bad_value_is_one_line_that_names_its_key(stage, key, value, message):
    with pytest.raises(UserError) as error:
        build(LADDER[stage].code.Settings, {**values(stage), key: value}, f"stages.{stage}")
    assert str(error.value) == f"stages.{stage}.{key}: {message}"


@pytest.mark.parametrize("stage", LADDER)
def test_every_number_of_every_stage_has_a_bad_value_above(stage):
    tried = {key for key, _, _ in (*EVERY_STAGE, *ONE_STAGE[stage])}
    assert tried == set(shipped(stage))


def test_a_time_replaces_the_steps():
    timed = settings("pretrain", max_steps=-1, max_time="01:02:03:04")
    assert timed.seconds == ((24 + 2) * 60 + 3) * 60 + 4
    assert settings("pretrain", max_time=None).seconds is None


# --- the learning rate


@pytest.mark.parametrize(
    ("progress", "factor"),
    [
        (0.0, 0.0),
        (0.05, 0.25),
        (0.2, 1.0),  # the warm-up is over
        (0.6, 0.55),  # half-way down: 0.1 + 0.9 / 2
        (0.4, 0.1 + 0.9 * 0.8535534),  # a quarter: (1 + cos 45 degrees) / 2
        (1.0, 0.1),
        (1.5, 0.1),  # past the end
    ],
)
def test_warm_up_then_cosine(progress, factor):
    assert learning_rate_factor(progress, 0.2, 0.1) == pytest.approx(factor, abs=1e-6)


def test_no_warm_up_no_decay_and_nothing_but_warm_up():
    assert learning_rate_factor(0.0, 0.0, 0.5) == 1.0
    assert {learning_rate_factor(p / 10, 0.0, 1.0) for p in range(11)} == {1.0}
    assert [learning_rate_factor(p, 1.0, 0.0) for p in (0.25, 0.5, 1.0)] == [0.25, 0.5, 1.0]


class Rates(PretrainModule):
    """Keeps the learning rate of every step."""

    def training_step(self, batch, batch_idx):
        lr = self.optimizers().param_groups[0]["lr"]
        self.rates = [*getattr(self, "rates", []), lr]
        super().training_step(batch, batch_idx)


def test_the_learning_rate_follows_the_steps():
    s = settings("pretrain", max_steps=4, lr=0.01, warmup=0.5, min_lr=0.0)
    module = Rates(make_policy(), s, 0, 1, 1)
    trainer = fit(module, token_batches(4))
    # progress 1/4, 2/4, 3/4 and 1: half of the warm-up, its end, half of the cosine, its end
    assert module.rates == pytest.approx([0.005, 0.01, 0.005, 0.0])
    assert module.steps_done == 4
    assert trainer.callback_metrics["train/lr"] == 0.0
    assert module.tokens_seen == 4 * 12


def test_the_learning_rate_follows_the_clock(monkeypatch):
    """A batch takes 25 of 100 seconds; the fifth is never begun."""
    seconds = [0.0]
    monkeypatch.setattr(Timer, "time_elapsed", lambda self, stage="train": seconds[0])

    class Slow(Rates):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            seconds[0] += 25.0

    s = settings("pretrain", max_steps=-1, max_time="00:00:01:40", lr=0.01, warmup=0.5, min_lr=0.0)
    module = Slow(make_policy(), s, 0, 1, 1)
    fit(module, token_batches(10), max_time=s.max_time)
    assert module.rates == pytest.approx([0.0, 0.005, 0.01, 0.005])


@pytest.mark.parametrize(("elapsed", "progress"), [(0.0, 0.0), (25.0, 0.25), (300.0, 1.0)])
def test_progress_by_the_clock_ends_at_one(elapsed, progress):
    class Clock(Timer):
        def time_elapsed(self, stage: str = "train") -> float:
            return elapsed

    module = PretrainModule(make_policy(), settings("pretrain", max_time="00:00:01:40"), 0, 1, 1)
    alone = SimpleNamespace(broadcast=lambda value: value)
    clock = Clock(duration="00:00:01:40")
    module.trainer = SimpleNamespace(callbacks=[clock], strategy=alone)
    assert module.progress() == progress


def test_ranks_take_the_learning_rate_of_the_first_ones_clock():
    module = PretrainModule(make_policy(), settings("pretrain", max_time="00:00:01:40"), 0, 1, 1)
    other = SimpleNamespace(broadcast=lambda value: 0.75)  # what rank 0 says
    clock = Timer(duration="00:00:01:40")
    module.trainer = SimpleNamespace(callbacks=[clock], strategy=other)
    assert module.progress() == 0.75


# --- one optimizer step


def test_weight_decay_is_for_matrices():
    scalar = make_scalar()
    decayed, plain = parameter_groups(scalar, 0.3)
    names = {id(p): name for name, p in scalar.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    of = [[names[id(p)] for p in group["params"]] for group in (decayed, plain)]
    assert sorted(of[0] + of[1]) == sorted(names.values())  # each once
    assert "backbone.embedding.weight" in of[1]
    assert all("norm" in name or "embedding" in name for name in of[1])
    assert {"head.weight", "backbone.blocks.0.mlp.experts.down_EFD"} <= set(of[0])


def gradient_step(monkeypatch, clip_norm: float):
    """How far one plain gradient step moved all weights together, and the logged norm."""
    use_sgd(monkeypatch)
    module = SFTModule(make_policy(), steady("sft", lr=1.0, max_steps=1, clip_norm=clip_norm), 0)
    before = weights(module.policy)
    trainer = fit(module, token_batches(1))
    after = weights(module.policy)
    moved = [(after[n] - before[n]).square().sum() for n in before if "expert_bias" not in n]
    return torch.stack(moved).sum().sqrt().item(), trainer.callback_metrics["train/grad_norm"]


def test_the_gradient_is_clipped_as_a_whole(monkeypatch):
    free, norm = gradient_step(monkeypatch, clip_norm=0.0)
    assert free == pytest.approx(norm.item(), rel=1e-4)  # 0: no clipping
    assert free > 0.5
    clipped, logged = gradient_step(monkeypatch, clip_norm=0.25)
    assert clipped == pytest.approx(0.25, rel=1e-4)
    assert logged == norm  # the norm before clipping


def test_a_step_starts_without_the_last_steps_gradient(monkeypatch):
    """Two steps of one run equal two runs of one step."""
    use_sgd(monkeypatch)
    one, two = token_batches(2)
    together, apart = make_policy(), make_policy()
    s = steady("sft", lr=0.1, max_steps=2)
    fit(SFTModule(together, s, 0), [one, two])
    for batch in (one, two):
        fit(SFTModule(apart, s, 0), [batch])
    assert distance(weights(together), weights(apart)) <= REPEATED


class Poisoned(SFTModule):
    """Its loss is no number, or its gradient, in the steps that `bad` names (from 1)."""

    def __init__(self, policy, settings, bad: dict[int, str]) -> None:
        super().__init__(policy, settings, 0)
        self.bad = bad

    def piece_loss(self, batch, n_targets, n_tokens):
        loss, nll = super().piece_loss(batch, n_targets, n_tokens)
        kind = self.bad.get(self.steps_done + 1)
        if kind == "gradient":  # of a finite loss: d sqrt(x) / dx at 0
            loss = loss + (self.policy.norm.weight[0] * 0).sqrt()
        elif kind == "loss":  # of finite gradients
            loss = loss + math.inf
        return loss, nll


def without(step: int, batches: list) -> list:
    return batches[: step - 1] + batches[step:]


@pytest.mark.parametrize("kind", ["gradient", "loss"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(kind):
    """The weights, the optimizer and the routers' biases are those of a run without its batch."""
    s, batches = steady("sft", lr=0.01, max_steps=4, balance_router=True), token_batches(4)
    module = Poisoned(make_policy(), s, {2: kind})
    trainer = fit(module, batches)
    assert (module.skipped_steps, module.skipped_in_a_row) == (1, 0)
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    expected = Poisoned(make_policy(), s, {})
    other = fit(expected, without(2, batches))
    assert distance(weights(module), weights(expected)) <= REPEATED
    states = [t.optimizers[0].state_dict()["state"] for t in (trainer, other)]
    assert states[0].keys() == states[1].keys()
    for one, two in zip(states[0].values(), states[1].values(), strict=True):
        for name in two:
            repeated(one[name], two[name])


def test_too_many_skipped_steps_in_a_row_end_the_run_in_one_line():
    s = steady("sft", lr=0.01, max_steps=9, max_skipped=3)
    bad = dict.fromkeys((2, 3, 5, 6, 7), "gradient")  # 4 is well again
    module = Poisoned(make_policy(), s, bad)
    message = (
        "step 7: 3 optimizer steps in a row had no finite loss and gradient: "
        "lower lr (0.01), which starts a new run; or run the same command again, which resumes "
        "from the last checkpoint, with a higher max_skipped"
    )
    with pytest.raises(UserError) as error:
        fit(module, token_batches(9))
    assert str(error.value) == message
    assert module.skipped_steps == 5


def test_the_count_of_skipped_steps_is_part_of_the_resume_state():
    module = Poisoned(make_policy(), steady("sft", max_steps=1), {})
    module.skipped_steps = 7
    checkpoint: dict = {}
    module.on_save_checkpoint(checkpoint)
    resumed = Poisoned(make_policy(), steady("sft", max_steps=1), {})
    resumed.on_load_checkpoint(checkpoint)
    assert resumed.skipped_steps == 7


# --- a frozen router


@pytest.mark.parametrize("stage", [*matrix.STAGES, *matrix.MUON, "sampled"])
def test_a_frozen_router_keeps_its_weights_and_the_others_get_their_gradients(stage, monkeypatch):
    """One plain step on one minibatch without clipping: what else moves, moves as it would."""
    monkeypatch.setattr(grpo, "reasoning_rewards", one_by_one(reward_by_text))
    found = []
    for freeze in (False, True):
        matrix.Keep.step = 0
        changes = {"freeze_router": freeze, "clip_norm": 0.0, "minibatch_size": 16, "epochs": 1}
        module, batches = matrix.make(stage, 1)
        known = {key: value for key, value in changes.items() if hasattr(module.settings, key)}
        module.settings = replace(module.settings, **known)
        before = weights(module)
        fit(module, batches)
        found.append(weights(module))
    free, frozen = found
    routers = {name for name in before if ".router.proj." in name}
    assert routers
    for name in before:
        if name in routers:
            assert torch.equal(frozen[name], before[name]) and not torch.equal(
                free[name], before[name]
            )
        else:
            close(frozen[name], free[name])
