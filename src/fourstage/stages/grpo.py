"""Stage 4, reasoning fine-tuning by GRPO on problems whose answers a program can check.

    A    = (r - mean) / std of the rewards of a group's answers      SCALES
    loss = mean max(-A ratio_t, -A clip(ratio_t)) + kl_coef KL_t     policy_loss, REDUCTIONS

Shao et al. 2024, arXiv 2402.03300. No value network: an answer's advantage is its reward relative
to the other answers to the same problem. Recipes: dr_grpo (Liu et al. 2025, arXiv 2503.20783),
dapo (Yu et al. 2025, arXiv 2503.14476), gspo (Zheng et al. 2025, arXiv 2507.18071). Unlike the
papers, answers with advantage 0 are left out of the update if there is no KL term: they have no
gradient, so this is exact.
"""

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
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
from fourstage.rl.ops import KL_ESTIMATORS, clipped_surrogate
from fourstage.rl.rewards import ReasoningReward, reasoning_rewards
from fourstage.sampling.generate import Generation
from fourstage.stages.base import Metrics, Numbers, at_least, between
from fourstage.stages.on_policy import OnPolicyModule, OnPolicySettings, Part, Totals
from fourstage.stages.prepare import Prepared, as_planned, parent_policy, prepare_prompts
from fourstage.tokenizer import Tokenizer


class Recipe(NamedTuple):
    """A published loss: three choices, and the numbers that go with them."""

    advantages: str  # of SCALES: how an answer's reward is compared with its group's
    ratio: str  # token, or sequence: the geometric mean of an answer's ratios
    reduce: str  # of REDUCTIONS
    clip_low: float = 0.2
    clip_high: float = 0.2
    resample_rounds: int = 0
    overlong_window: int = 0
    kl_coef: float = 0.0


RECIPES = {
    "grpo": Recipe("std", "token", "answer", kl_coef=0.2),  # the paper has 0.04
    "dr_grpo": Recipe("mean", "token", "constant"),
    "dapo": Recipe("std", "token", "token", clip_high=0.28, resample_rounds=2, overlong_window=16),
    "gspo": Recipe("std", "sequence", "answer", clip_low=3e-4, clip_high=4e-4),
}


@dataclass(frozen=True, kw_only=True)
class Settings(OnPolicySettings):
    """`stages.grpo`; None: the recipe's value."""

    loss: str  # of RECIPES
    clip_low: float | None = between(0, 1)
    clip_high: float | None = at_least(0)
    group_size: int = at_least(2)  # answers to each problem
    kl_coef: float | None = at_least(0)  # beta, on the KL to the policy that it started from
    form_weight: float = at_least(0)  # reward of an answer that stops and marks one final answer
    resample_rounds: int | None = at_least(0)  # times that tied groups are answered again
    overlong_window: int | None  # last tokens before the limit that cost up to 1; 0: none
    advantages: str | None = None
    ratio: Literal["token", "sequence"] | None = None
    reduce: str | None = None

    def __post_init__(self) -> None:
        for name, table in (("loss", RECIPES), ("advantages", SCALES), ("reduce", REDUCTIONS)):
            value = getattr(self, name)
            if value is not None and value not in table:
                raise UserError(f"{name}: expected one of {', '.join(table)}, got {value!r}")
        for name in ("advantages", "ratio", "reduce"):  # said or not, it is the same run
            if getattr(self, name) == getattr(RECIPES[self.loss], name):
                object.__setattr__(self, name, None)
        recipe = self.recipe
        for name in ("clip_low", "clip_high", "resample_rounds", "overlong_window", "kl_coef"):
            object.__setattr__(self, name, getattr(recipe, name))
        super().__post_init__()
        if not 0 <= self.overlong_window <= self.max_new_tokens:
            raise UserError(
                f"overlong_window: must be between 0 and {self.max_new_tokens}, "
                f"got {self.overlong_window}"
            )

    @property
    def recipe(self) -> Recipe:
        """The loss's recipe, with the parts that were set replaced."""
        recipe = RECIPES[self.loss]
        recipe = recipe._replace(overlong_window=min(recipe.overlong_window, self.max_new_tokens))
        own = {name: getattr(self, name) for name in Recipe._fields}
        return recipe._replace(**{name: x for name, x in own.items() if x is not None})


# --- the formulas; G groups of K answers, B = G K answers, A answer tokens


def tied_groups(rewards_GK: Tensor) -> Tensor:
    """bool [G]: all rewards are equal; rounding may still give a non-zero standard deviation."""
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
    settings: Settings,
    compared_BA: Tensor | None = None,
) -> Tensor:
    """The clipped surrogate plus beta KL per token, [B, A].

    compared_BA: the new log-probs in the ratio, if they are not logp_BA.
    """
    compared_BA = logp_BA if compared_BA is None else compared_BA
    loss_BA = clipped_surrogate(
        compared_BA, logp_old_BA, advantage_B[:, None], settings.clip_low, settings.clip_high
    )
    if ref_logp_BA is None:
        return loss_BA
    kl_BA = KL_ESTIMATORS[settings.kl_estimator](logp_BA, ref_logp_BA)
    return loss_BA + settings.kl_coef * kl_BA


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


# --- the stage


@dataclass
class Answers:
    """Groups of answers with what they earned; entry g * K + k is answer k to problem g."""

    generation: Generation
    rewards: list[ReasoningReward]
    total_B: Tensor


class GRPOModule(OnPolicyModule):
    """Trains the policy on groups of its own answers; the starting policy is the KL's reference."""

    settings: Settings

    @property
    def group(self) -> int:
        return self.settings.group_size

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        s = self.settings
        prompts = [ids for ids in batch.prompt_ids for _ in range(s.group_size)]
        with gathered(self.policy) as policy:
            answers = self.collect(policy, prompts, batch.records)
            rollout = self.rollout(policy, prompts, answers.generation)
        scale = SCALES[s.recipe.advantages]
        advantage_B = scale(answers.total_B.view(-1, s.group_size)).flatten()
        ref_logp = [self.reference_logprobs(rollout)] if s.kl_coef else []
        whole, (advantage_B, *ref_logp) = self.of_all_ranks(rollout, advantage_B, *ref_logp)
        has_gradient_B = (advantage_B.cpu() != 0) | (s.kl_coef > 0)
        loss = partial(self.loss, self.here(advantage_B), ref_logp[0] if ref_logp else None)
        losses = self.learn(whole, loss, has_gradient_B)
        self.log_answers(rollout, answers, losses)

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

    def judged(self, problems: list[Verifiable], generation: Generation) -> Answers:
        s = self.settings
        texts = [self.tokenizer.decode(ids) for ids in generation.answer_ids]
        rewards = reasoning_rewards(problems, texts, generation.stopped)
        total_B = torch.tensor([r.total(s.form_weight) for r in rewards])
        length_B = torch.tensor([len(ids) for ids in generation.answer_ids])
        total_B += overlong_penalty(length_B, s.max_new_tokens, s.overlong_window)
        return Answers(generation, rewards, total_B)

    def loss(
        self, advantage_B: Tensor, ref_logp_BA: Tensor | None, part: Part
    ) -> tuple[Tensor, Numbers]:
        """A part's share of the loss."""
        s, at, compared = self.settings, part.at, part.logp
        if s.recipe.ratio == "sequence":
            compared = sequence_logprobs(part.logp, part.old_logp, part.mask)
        reference = None if ref_logp_BA is None else ref_logp_BA[at]
        loss = policy_loss(part.logp, part.old_logp, reference, advantage_B[at], s, compared)
        by_token = {"log_ratio": compared - part.old_logp}
        return REDUCTIONS[s.recipe.reduce](loss, part.mask, part.totals), by_token

    def neighbours(self, rows: Tensor, rollout: Rollout) -> Tensor:
        """A group's answers side by side, so that their prompt is computed once (packing.py)."""
        return rows.sort().values

    def log_answers(self, rollout: Rollout, answers: Answers, losses: Metrics) -> None:
        k = self.settings.group_size
        firsts = rollout.rows(torch.arange(0, len(rollout.ids), k))  # enough for the logged KL
        kl_GA = KL_ESTIMATORS["k3"](self.here(firsts.logprobs), self.reference_logprobs(firsts))
        total_GK = answers.total_B.view(-1, k)
        correct_GK = torch.tensor([r.correct for r in answers.rewards]).view(-1, k)
        metrics = {
            **losses,
            "reward": total_GK.mean(),
            "reward_std": total_GK.std(1).mean(),
            "reward_correct": correct_GK.mean(),
            "reward_form": sum(r.form for r in answers.rewards) / len(answers.rewards),
            "zero_spread": tied_groups(total_GK).float().mean(),
            "pass_at_1": (correct_GK == 1).float().mean(),
            f"pass_at_{k}": (correct_GK == 1).any(1).float().mean(),
            "kl": self.masked_mean(kl_GA, self.here(firsts.mask)),  # nats per token, to the start
            **self.rollout_stats(rollout),
        }
        self.log_step(metrics)


def choose(first: Answers, second: Answers, takes_second_B: Tensor) -> Answers:
    """Answer by answer the first or the second."""

    def merged(one: list[Any], two: list[Any]) -> list[Any]:
        return [b if t else a for a, b, t in zip(one, two, takes_second_B.tolist(), strict=True)]

    a, b = first.generation, second.generation
    generation = Generation(
        merged(a.answer_ids, b.answer_ids),
        None if a.logprobs is None else merged(a.logprobs, b.logprobs),
        merged(a.stopped, b.stopped),
    )
    total_B = torch.where(takes_second_B, second.total_B, first.total_B)
    return Answers(generation, merged(first.rewards, second.rewards), total_B)


# --- what ladder.py asks for


def prepare(job: StageJob) -> Prepared:
    policy, tokenizer = parent_policy(job)
    problems = as_planned(job, data.load_reasoning(job.data))
    module = GRPOModule(policy, deepcopy(policy), tokenizer, job.settings, job.seed)
    return prepare_prompts(job, module, problems)


def check_data(
    config: data.DataConfig, settings: Settings, tokenizer: Tokenizer, max_seq_len: int
) -> list[str]:
    problems = data.load_reasoning(config).train
    return check_questions("grpo", problems, settings, tokenizer, max_seq_len)
