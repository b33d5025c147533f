"""Stage 4, reasoning fine-tuning by GRPO on problems whose answers a program can check.

Shao et al. 2024, arXiv 2402.03300. No value network: the advantage of an answer is its reward
against the other answers to the same problem. Recipes: dr_grpo (Liu et al. 2025, arXiv 2503.20783),
dapo (Yu et al. 2025, arXiv 2503.14476), gspo (Zheng et al. 2025, arXiv 2507.18071). It departs from
the papers in one exact saving: answers whose advantage is 0 have no gradient without a KL term, and
are then left out of the update.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fourstage import data
from fourstage.batch import PromptBatch, Rollout
from fourstage.data.fits import check_questions
from fourstage.data.verify import Verifiable
from fourstage.errors import UserError
from fourstage.job import StageJob
from fourstage.model import Transformer
from fourstage.parallel.strategies import gathered
from fourstage.rl.ops import KL_ESTIMATORS, clipped_surrogate, kl_k3
from fourstage.rl.rewards import ReasoningReward, reasoning_rewards
from fourstage.sampling.generate import Generation
from fourstage.stages.base import Numbers, check_range
from fourstage.stages.on_policy import Frozen, OnPolicyModule, OnPolicySettings, Totals
from fourstage.stages.prepare import (
    Prepared,
    as_planned,
    heldout_prompts,
    parent_policy,
    prompt_loaders,
)
from fourstage.tokenizer import Tokenizer


class Recipe(NamedTuple):
    """A published loss: three choices, and the numbers that go with them."""

    advantages: str  # of SCALES: how an answer's reward is held against its group's
    ratio: str  # token, or sequence: the geometric mean of an answer's ratios
    reduce: str  # of REDUCTIONS
    clip_low: float = 0.2
    clip_high: float = 0.2
    resample_rounds: int = 0
    overlong_window: int = 0


RECIPES = {
    "grpo": Recipe("std", "token", "answer"),
    "dr_grpo": Recipe("mean", "token", "constant"),
    "dapo": Recipe("std", "token", "token", clip_high=0.28, resample_rounds=2, overlong_window=16),
    "gspo": Recipe("std", "sequence", "answer", clip_low=3e-4, clip_high=4e-4),
}


@dataclass(frozen=True, kw_only=True)
class GRPOSettings(OnPolicySettings):
    """`stages.grpo`; what is None is as the recipe of the loss has it."""

    loss: str  # of RECIPES
    clip_low: float | None
    clip_high: float | None
    group_size: int  # answers to each problem
    kl_coef: float  # beta, on the KL to the policy that the stage started from
    form_weight: float  # reward of an answer that stops and marks one final answer
    # dynamic sampling: groups with equal rewards are answered again, so many times
    resample_rounds: int | None
    overlong_window: int | None  # last tokens before the limit that cost up to 1; 0: none
    advantages: str | None = None
    ratio: Literal["token", "sequence"] | None = None
    reduce: str | None = None

    def __post_init__(self) -> None:
        for name, table in (("loss", RECIPES), ("advantages", SCALES), ("reduce", REDUCTIONS)):
            value = getattr(self, name)
            if value is not None and value not in table:
                raise UserError(f"{name}: expected one of {', '.join(table)}, got {value!r}")
        recipe = RECIPES[self.loss]
        window = min(recipe.overlong_window, self.max_new_tokens)
        for name, value in {**recipe._asdict(), "overlong_window": window}.items():
            # the three choices stay as they were given: they are younger than runs that exist
            if name not in ("advantages", "ratio", "reduce") and getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()
        check_range(self, 2, "group_size")
        check_range(self, 0, "kl_coef", "form_weight", "resample_rounds")
        check_range(self, 0, "overlong_window", most=self.max_new_tokens)


# --- the formulas; G groups of K answers, B = G K answers, A answer tokens


def tied_groups(rewards_GK: Tensor) -> Tensor:
    """bool [G]: all answers earned the same; by rounding their standard deviation may not be 0."""
    return (rewards_GK == rewards_GK[:, :1]).all(1)


def centred(rewards_GK: Tensor) -> Tensor:
    """r - mean in each group."""
    centred_GK = rewards_GK - rewards_GK.mean(1, keepdim=True)
    return centred_GK.masked_fill(tied_groups(rewards_GK)[:, None], 0)


def standardised(rewards_GK: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-4) in each group, unbiased std."""
    return centred(rewards_GK) / (rewards_GK.std(1, keepdim=True) + 1e-4)


SCALES = {"mean": centred, "std": standardised}


def overlong_penalty(length_B: Tensor, max_length: int, window: int) -> Tensor:
    """DAPO eq. 13: 0 up to max - window tokens, then linear, -1 at the limit, float32 [B]."""
    if window == 0:
        return torch.zeros_like(length_B, dtype=torch.float)
    return ((max_length - window) - length_B.float()).div(window).clamp(-1, 0)


def by_answer(loss_BA: Tensor, mask_BA: Tensor, totals: Totals) -> Tensor:
    """Mean over the tokens of an answer, then over answers: a long answer's tokens weigh less."""
    per_answer_B = (loss_BA * mask_BA).sum(1) / mask_BA.sum(1).clamp(min=1)
    return per_answer_B.sum() / totals.answers


def by_constant(loss_BA: Tensor, mask_BA: Tensor, totals: Totals) -> Tensor:
    """Sum over tokens divided by a constant length: no bias towards short or long answers."""
    return (loss_BA * mask_BA).sum() / (totals.answers * totals.max_length)


def by_token(loss_BA: Tensor, mask_BA: Tensor, totals: Totals) -> Tensor:
    """Mean over all tokens of the step: every token weighs the same."""
    return (loss_BA * mask_BA).sum() / totals.tokens


REDUCTIONS = {"answer": by_answer, "constant": by_constant, "token": by_token}


def sequence_logprobs(logp_BA: Tensor, logp_old_BA: Tensor, mask_BA: Tensor) -> Tensor:
    """log-probs for which each token's ratio is the geometric mean of its answer's, [B, A]
    (GSPO eq. 7)."""
    ratio_BA = (logp_BA - logp_old_BA) * mask_BA
    mean_B1 = ratio_BA.sum(1, keepdim=True) / mask_BA.sum(1, keepdim=True).clamp(min=1)
    return (logp_old_BA + mean_B1) * mask_BA


def policy_loss(
    logp_BA: Tensor,
    logp_old_BA: Tensor,
    ref_logp_BA: Tensor | None,
    advantage_B: Tensor,
    settings: GRPOSettings,
    compared_BA: Tensor | None = None,
) -> Tensor:
    """The clipped surrogate plus beta KL per token, [B, A].

    compared: the log-probs that stand over the old ones in the ratio, where it is not logp.
    """
    compared_BA = logp_BA if compared_BA is None else compared_BA
    loss_BA = clipped_surrogate(
        compared_BA, logp_old_BA, advantage_B[:, None], settings.clip_low, settings.clip_high
    )
    if ref_logp_BA is None:
        return loss_BA
    kl_BA = KL_ESTIMATORS[settings.kl_estimator](logp_BA, ref_logp_BA)
    return loss_BA + settings.kl_coef * kl_BA


# --- the stage


@dataclass
class Answers:
    """Groups of answers with what they earned; entry g * K + k is answer k to problem g."""

    said: Generation
    rewards: list[ReasoningReward]
    total_B: Tensor


class GRPOModule(OnPolicyModule):
    """Trains the policy on groups of its own answers; the starting policy is the KL's reference."""

    settings: GRPOSettings

    def __init__(
        self,
        policy: Transformer,
        reference: Transformer,
        tokenizer: Tokenizer,
        settings: GRPOSettings,
        seed: int,
        **more: Any,
    ) -> None:
        """more: as OnPolicyModule takes it."""
        super().__init__(policy, tokenizer, settings, seed, **more)
        self.frozen = Frozen(reference=reference)

    def transformers(self) -> list[Transformer]:
        return [self.policy]

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        s = self.settings
        prompts = [ids for ids in batch.prompt_ids for _ in range(s.group_size)]
        with gathered(self.policy) as policy:
            answers = self.collect(policy, prompts, batch.records)
            rollout = self.rollout(policy, prompts, answers.said)
        rewards_GK = answers.total_B.view(-1, s.group_size)
        advantage_B = SCALES[self.choice("advantages")](rewards_GK).flatten()
        moves_B, advantage_B = self.moves(advantage_B), self.here(advantage_B)
        ref_logp_BA = self.reference_logprobs(rollout) if s.kl_coef else None

        def share(
            part: Rollout, at: Tensor, logp: Tensor, totals: Totals
        ) -> tuple[Tensor, Numbers]:
            reference = None if ref_logp_BA is None else ref_logp_BA[at]
            old_logp, mask = self.here(part.logprobs), self.here(part.mask)
            compared = self.compared(logp, old_logp, mask)
            loss = policy_loss(logp, old_logp, reference, advantage_B[at], s, compared)
            return REDUCTIONS[self.choice("reduce")](loss, mask, totals), {}

        losses = self.learn(rollout, share, moves_B)
        self.log_answers(rollout, answers, losses)

    def reference_logprobs(self, rollout: Rollout) -> Tensor:
        with self.frozen_network("reference") as reference:
            return self.logprobs(reference, rollout)

    def collect(
        self, policy: Transformer, prompts: list[list[int]], problems: list[Verifiable]
    ) -> Answers:
        """A group of answers to each problem; tied groups may be answered again (dapo)."""
        k = self.settings.group_size
        each = [problem for problem in problems for _ in range(k)]
        answers = self.judged(each, self.answers(policy, prompts))
        for attempt in range(1, self.settings.resample_rounds + 1):
            tied_B = tied_groups(answers.total_B.view(-1, k)).repeat_interleave(k)
            if not tied_B.any():
                break
            again = self.judged(each, self.answers(policy, prompts, attempt))
            answers = choose(answers, again, tied_B)
        return answers

    def judged(self, problems: list[Verifiable], said: Generation) -> Answers:
        s = self.settings
        texts = [self.tokenizer.decode(ids) for ids in said.answer_ids]
        rewards = reasoning_rewards(problems, texts, said.stopped)
        total_B = torch.tensor([r.total(s.form_weight) for r in rewards])
        length_B = torch.tensor([len(ids) for ids in said.answer_ids])
        total_B += overlong_penalty(length_B, s.max_new_tokens, s.overlong_window)
        return Answers(said, rewards, total_B)

    def choice(self, name: str) -> str:
        """One of the loss' three choices."""
        return getattr(self.settings, name) or getattr(RECIPES[self.settings.loss], name)

    def compared(self, logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
        is_of_answers = self.choice("ratio") == "sequence"
        return sequence_logprobs(logp, old_logp, mask) if is_of_answers else logp

    def moves(self, advantage_B: Tensor) -> Tensor:
        """bool [B]: the answers whose loss has a gradient."""
        return (advantage_B != 0) | (self.settings.kl_coef > 0)

    def neighbours(self, rows: Tensor, rollout: Rollout) -> Tensor:
        """A group's answers side by side: their prompt is then computed once (model/packing.py)."""
        return rows.sort().values

    def log_answers(
        self, rollout: Rollout, answers: Answers, losses: dict[str, Tensor | float]
    ) -> None:
        s = self.settings
        first_G = torch.arange(0, len(rollout.ids), s.group_size)
        firsts = rollout.rows(first_G)  # an answer a group is enough for the logged KL
        ref_logp_GA = self.reference_logprobs(firsts)
        kl_GA = kl_k3(self.here(firsts.logprobs), ref_logp_GA)
        kl = self.masked_mean(kl_GA, self.here(firsts.mask))
        total_GK = answers.total_B.view(-1, s.group_size)
        correct_GK = torch.tensor([r.correct for r in answers.rewards]).view(-1, s.group_size)
        form = sum(r.form for r in answers.rewards) / len(answers.rewards)
        self.record(
            "train",
            {
                **losses,
                "reward": total_GK.mean(),
                "reward_std": total_GK.std(1).mean(),
                "reward_correct": correct_GK.mean(),
                "reward_form": form,
                "zero_spread": tied_groups(total_GK).float().mean(),
                "pass_at_1": (correct_GK == 1).float().mean(),
                f"pass_at_{s.group_size}": (correct_GK == 1).any(1).float().mean(),
                "kl": kl,  # nats a token, to the policy that the stage started from
                "entropy": self.sampled_entropy(rollout),
                "answer_length": rollout.length.float().mean(),
                "stop_rate": rollout.stopped.float().mean(),
                "lr": self.learning_rate(),
            },
        )


def choose(first: Answers, second: Answers, takes_second_B: Tensor) -> Answers:
    """Answer by answer the first or the second."""

    def merged(one: list[Any], two: list[Any]) -> list[Any]:
        return [b if t else a for a, b, t in zip(one, two, takes_second_B.tolist(), strict=True)]

    a, b = first.said, second.said
    logprobs = None if a.logprobs is None else merged(a.logprobs, b.logprobs)
    said = Generation(merged(a.answer_ids, b.answer_ids), logprobs, merged(a.stopped, b.stopped))
    total_B = torch.where(takes_second_B, second.total_B, first.total_B)
    return Answers(said, merged(first.rewards, second.rewards), total_B)


# --- what it needs, by the names that ladder.py knows

Settings = GRPOSettings


def prepare(job: StageJob) -> Prepared:
    policy, tokenizer = parent_policy(job)
    problems = as_planned(job, data.load_reasoning(job.data))
    module = GRPOModule(policy, deepcopy(policy), tokenizer, job.settings, job.seed)
    loaders = prompt_loaders(job, problems.train, tokenizer)
    rows = heldout_prompts(job, problems.heldout, tokenizer)
    return Prepared(module, loaders, rows, tokenizer)


def check_data(
    config: data.DataConfig, settings: GRPOSettings, tokenizer: Tokenizer, max_seq_len: int
) -> list[str]:
    """Warnings; UserError where no data would be left."""
    problems = data.load_reasoning(config).train
    return check_questions("grpo", problems, settings, tokenizer, max_seq_len)
