"""Stage 4, reasoning fine-tuning by GRPO on problems whose answers a program can check.

Shao et al. 2024, arXiv 2402.03300. No value network: the advantage of an answer is its reward
against the other answers to the same problem. Variants: dr_grpo (Liu et al. 2025, arXiv 2503.20783)
and dapo (Yu et al. 2025, arXiv 2503.14476). It departs from the papers in one exact saving: answers
whose advantage is 0 have no gradient without a KL term, and are then left out of the update.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from fourstage import data
from fourstage.batch import PromptBatch, Rollout
from fourstage.data.fits import check_questions
from fourstage.job import StageJob
from fourstage.model import Transformer
from fourstage.parallel.strategies import whole
from fourstage.rl.ops import KL_ESTIMATORS, clipped_surrogate, kl_k3
from fourstage.rl.rewards import ReasoningReward, reasoning_rewards
from fourstage.rl.rollout import answer_logprobs, answer_texts
from fourstage.stages.base import check_range
from fourstage.stages.on_policy import Frozen, OnPolicyModule, OnPolicySettings, Totals
from fourstage.stages.prepare import (
    Prepared,
    as_planned,
    heldout_prompts,
    parent_policy,
    prompt_loaders,
)
from fourstage.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class GRPOSettings(OnPolicySettings):
    """`stages.grpo`"""

    loss: Literal["grpo", "dr_grpo", "dapo"]
    group_size: int  # answers to each problem
    kl_coef: float  # beta, on the KL to the policy that the stage started from
    form_weight: float  # reward of an answer that stops and marks one final answer
    resample_rounds: int  # dynamic sampling (dapo): groups with equal rewards are answered again
    overlong_window: int  # last tokens before the limit that cost up to 1 (dapo eq. 13); 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 2, "group_size")
        check_range(self, 0, "kl_coef", "form_weight", "resample_rounds")
        check_range(self, 0, "overlong_window", most=self.max_new_tokens)


# --- the formulas; G groups of K answers, B = G K answers, A answer tokens


def tied_groups(rewards_GK: Tensor) -> Tensor:
    """bool [G]: all answers earned the same; by rounding their standard deviation may not be 0."""
    return (rewards_GK == rewards_GK[:, :1]).all(1)


def group_advantages(rewards_GK: Tensor, scaled: bool) -> Tensor:
    """(r - mean) / (std + 1e-4) in each group, unbiased std; only r - mean if not scaled."""
    centred_GK = rewards_GK - rewards_GK.mean(1, keepdim=True)
    centred_GK = centred_GK.masked_fill(tied_groups(rewards_GK)[:, None], 0)
    if not scaled:
        return centred_GK
    return centred_GK / (rewards_GK.std(1, keepdim=True) + 1e-4)


def overlong_penalty(length_B: Tensor, max_length: int, window: int) -> Tensor:
    """DAPO eq. 13: 0 up to max - window tokens, then linear, -1 at the limit, float32 [B]."""
    if window == 0:
        return torch.zeros_like(length_B, dtype=torch.float)
    return ((max_length - window) - length_B.float()).div(window).clamp(-1, 0)


def reduce_grpo(loss_BA: Tensor, mask_BA: Tensor, totals: Totals) -> Tensor:
    """Mean over the tokens of an answer, then over answers: a long answer's tokens weigh less."""
    per_answer_B = (loss_BA * mask_BA).sum(1) / mask_BA.sum(1).clamp(min=1)
    return per_answer_B.sum() / totals.answers


def reduce_dr_grpo(loss_BA: Tensor, mask_BA: Tensor, totals: Totals) -> Tensor:
    """Sum over tokens divided by a constant length: no bias towards short or long answers."""
    return (loss_BA * mask_BA).sum() / (totals.answers * totals.max_length)


def reduce_dapo(loss_BA: Tensor, mask_BA: Tensor, totals: Totals) -> Tensor:
    """Mean over all tokens of the step: every token weighs the same."""
    return (loss_BA * mask_BA).sum() / totals.tokens


REDUCTIONS = {"grpo": reduce_grpo, "dr_grpo": reduce_dr_grpo, "dapo": reduce_dapo}


def policy_loss(
    logp_BA: Tensor,
    logp_old_BA: Tensor,
    ref_logp_BA: Tensor | None,
    advantage_B: Tensor,
    settings: GRPOSettings,
) -> Tensor:
    """The clipped surrogate plus beta KL per token, [B, A]; reduced by the variant's REDUCTIONS."""
    loss_BA = clipped_surrogate(
        logp_BA, logp_old_BA, advantage_B[:, None], settings.clip_low, settings.clip_high
    )
    if ref_logp_BA is None:
        return loss_BA
    kl_BA = KL_ESTIMATORS[settings.kl_estimator](logp_BA, ref_logp_BA)
    return loss_BA + settings.kl_coef * kl_BA


# --- the stage


@dataclass
class Answers:
    """Groups of answers with what they earned; row g * K + k is answer k to problem g."""

    rollout: Rollout
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
    ) -> None:
        super().__init__(policy, tokenizer, settings, seed)
        self.frozen = Frozen(reference=reference)

    def transformers(self) -> list[Transformer]:
        return [self.policy]

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        s = self.settings
        answers = self.collect(batch)
        rewards_GK = answers.total_B.view(-1, s.group_size)
        advantage_B = group_advantages(rewards_GK, scaled=s.loss != "dr_grpo").flatten()
        moves_B, advantage_B = self.moves(advantage_B), self.here(advantage_B)
        ref_logp_BA = self.reference_logprobs(answers.rollout) if s.kl_coef else None

        def share(part: Rollout, at: Tensor, logp: Tensor, totals: Totals) -> tuple[Tensor, dict]:
            reference = None if ref_logp_BA is None else ref_logp_BA[at]
            loss = policy_loss(logp, self.here(part.logprobs), reference, advantage_B[at], s)
            return REDUCTIONS[s.loss](loss, self.here(part.mask), totals), {}

        losses = self.learn(answers.rollout, share, moves_B)
        self.log_answers(answers, losses)

    def reference_logprobs(self, rollout: Rollout) -> Tensor:
        with self.frozen_network("reference") as reference:
            return self.in_pieces(
                lambda part: answer_logprobs(reference, part, self.settings.temperature),
                rollout,
            )

    def collect(self, batch: PromptBatch) -> Answers:
        """A group of answers to each problem; tied groups may be answered again (dapo)."""
        k = self.settings.group_size
        with whole(self.policy) as policy:
            answers = self.answer(policy, batch, attempt=0)
            for attempt in range(1, self.settings.resample_rounds + 1):
                tied = tied_groups(answers.total_B.view(-1, k)).tolist()
                if not any(tied):
                    break
                again = self.answer(policy, batch, attempt)
                answers = choose(answers, again, [t for t in tied for _ in range(k)])
        return answers

    def answer(self, policy: Transformer, batch: PromptBatch, attempt: int) -> Answers:
        s = self.settings
        prompts = [ids for ids in batch.prompt_ids for _ in range(s.group_size)]
        problems = [problem for problem in batch.records for _ in range(s.group_size)]
        rollout = self.sample_answers(policy, prompts, attempt)
        texts = answer_texts(rollout, self.tokenizer)
        rewards = reasoning_rewards(problems, texts, rollout.stopped.tolist())
        total_B = torch.tensor([r.total(s.form_weight) for r in rewards])
        total_B += overlong_penalty(rollout.length, s.max_new_tokens, s.overlong_window)
        return Answers(rollout, rewards, total_B)

    def moves(self, advantage_B: Tensor) -> Tensor:
        """bool [B]: the answers whose loss has a gradient."""
        return (advantage_B != 0) | (self.settings.kl_coef > 0)

    def neighbours(self, rows: Tensor, rollout: Rollout) -> Tensor:
        """A group's answers side by side: their prompt is then computed once (model/packing.py)."""
        return rows.sort().values

    def log_answers(self, answers: Answers, losses: dict[str, Tensor | float]) -> None:
        s, rollout = self.settings, answers.rollout
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
                # estimated from the samples
                "entropy": -self.masked_mean(*map(self.here, (rollout.logprobs, rollout.mask))),
                "answer_length": rollout.length.float().mean(),
                "cut_off": (~rollout.stopped).float().mean(),
                "lr": self.learning_rate(),
            },
        )


def choose(first: Answers, second: Answers, take_second: list[bool]) -> Answers:
    """Row by row the first or the second answers, padded to the longer of the two."""
    n_tokens = max(a.rollout.ids.shape[1] for a in (first, second))
    n_answer = max(a.rollout.logprobs.shape[1] for a in (first, second))
    pick_B = torch.tensor(take_second)

    def widen(a: Rollout) -> Rollout:
        return Rollout(
            ids=pad(a.ids, (0, n_tokens - a.ids.shape[1])),
            start=a.start,
            length=a.length,
            logprobs=pad(a.logprobs, (0, n_answer - a.logprobs.shape[1])),
            stopped=a.stopped,
        )

    def merged(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(pick_B.view(-1, *[1] * (a.ndim - 1)), b, a)

    one, two = widen(first.rollout), widen(second.rollout)
    return Answers(
        rollout=Rollout(
            ids=merged(one.ids, two.ids),
            start=one.start,
            length=merged(one.length, two.length),
            logprobs=merged(one.logprobs, two.logprobs),
            stopped=merged(one.stopped, two.stopped),
        ),
        rewards=[
            b if take else a
            for a, b, take in zip(first.rewards, second.rewards, take_second, strict=True)
        ],
        total_B=merged(first.total_B, second.total_B),
    )


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
