"""Stage 3b, preference fine-tuning by PPO against the learned reward model.

    r_t  = -kl_coef KL_t, plus the reward model's score at the last token   token_rewards
    A_t  = sum_l (gamma lambda)^l delta_{t+l}, then whitened; R = A + V     gae, whiten
    loss = mean_t max(-A_t ratio_t, -A_t clip(ratio_t))                     clipped_surrogate
         + value_coef mean_t 0.5 max((V_t - R_t)^2, (clipped V_t - R_t)^2)  clipped_value_loss

Schulman et al. 2017, arXiv 1707.06347; the details follow Huang et al. 2024, arXiv 2403.17031.
Unlike theirs, every mean is over answer tokens only, and the advantages are whitened over the
rollouts of all ranks. What ppo and grpo share is in rl/ops.py and on_policy.py.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fourstage import data
from fourstage.batch import PromptBatch, Rollout
from fourstage.data.fits import check_questions
from fourstage.errors import UserError
from fourstage.job import StageJob
from fourstage.model import ScalarModel, Transformer
from fourstage.model.weights import load_scalar
from fourstage.parallel.strategies import gathered
from fourstage.rl.ops import KL_ESTIMATORS, clipped_surrogate, moments, whiten
from fourstage.rl.rewards import true_score
from fourstage.rl.rollout import answer_texts, answer_values, final_scores
from fourstage.stages.base import Metrics, Numbers, at_least, between, positive
from fourstage.stages.on_policy import OnPolicyModule, OnPolicySettings, Part
from fourstage.stages.prepare import Prepared, as_planned, parent_policy, prepare_prompts
from fourstage.tokenizer import Tokenizer

MOST_ERROR = 0.2  # largest relative error of the KL that one step corrects


@dataclass(frozen=True, kw_only=True)
class Settings(OnPolicySettings):
    """`stages.ppo`"""

    reward_parent: str | None  # a reward run; null: the reward model of the sft parent
    kl_coef: float = at_least(0)
    kl_target: float = at_least(0)  # above 0: kl_coef adapts towards this KL per answer
    kl_horizon: int = positive()  # answers over which it adapts
    missing_eos_penalty: float = at_least(0)
    gamma: float = between(0, 1)
    gae_lambda: float = between(0, 1)
    value_clip: float = positive()
    value_coef: float = at_least(0)

    def __post_init__(self) -> None:
        super().__post_init__()
        least = MOST_ERROR * self.batch_size
        if self.kl_target and self.kl_horizon <= least:
            raise UserError(
                f"kl_horizon: must be above {MOST_ERROR} x batch_size = {least:g}, "
                f"got {self.kl_horizon}: a single step could make kl_coef negative"
            )


# --- the formulas; B answers, A answer tokens


def token_rewards(
    score_B: Tensor, kl_BA: Tensor, length_B: Tensor, kl_coef: Tensor | float
) -> Tensor:
    """-kl_coef x kl at every answer token, plus the score at the last one, float32 [B, A]."""
    steps = torch.arange(kl_BA.shape[1], device=kl_BA.device)
    mask_BA = steps < length_B[:, None]
    is_last_BA = steps == length_B[:, None] - 1
    return -kl_coef * kl_BA * mask_BA + score_B[:, None] * is_last_BA


def gae(
    rewards_BA: Tensor, values_BA: Tensor, mask_BA: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16).

    delta_t = r_t + gamma V_{t+1} - V_t with V = 0 after the answer, and
    A_t = delta_t + gamma lam A_{t+1}. Returns the advantages and the returns A + V, both [B, A]
    and 0 after the answer.
    """
    values_BA = values_BA * mask_BA
    advantages_BA = torch.zeros_like(rewards_BA)
    next_advantage_B = next_value_B = torch.zeros_like(rewards_BA[:, 0])
    for t in reversed(range(rewards_BA.shape[1])):
        delta_B = rewards_BA[:, t] + gamma * next_value_B - values_BA[:, t]
        next_advantage_B = (delta_B + gamma * lam * next_advantage_B) * mask_BA[:, t]
        next_value_B = values_BA[:, t]
        advantages_BA[:, t] = next_advantage_B
    return advantages_BA, advantages_BA + values_BA


def clipped_value_loss(
    values: Tensor, values_old: Tensor, returns: Tensor, value_clip: float
) -> Tensor:
    """Per-token 0.5 max((V - R)^2, (V_old + clip(V - V_old, +-c) - R)^2), [B, A]."""
    clipped = values_old + (values - values_old).clamp(-value_clip, value_clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def explained_variance(error_moments: Tensor, return_moments: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over answer tokens: 1 is a perfect value network, 0 a constant.

    From the `moments` of R - V and of R, summed over ranks.
    """
    error, of_returns = (
        (squares / count - (total / count).square()).clamp(min=0)
        for count, total, squares in (error_moments, return_moments)
    )
    return 1 - error / of_returns.clamp(min=1e-8)


def adapted_kl_coef(coef: Tensor, kl: Tensor, target: float, n: int, horizon: int) -> Tensor:
    """coef (1 + clip(kl / target - 1, +-MOST_ERROR) n / horizon) (arXiv 1909.08593, eq. in 2.2).

    A NaN KL leaves it unchanged: the updates of its rollout are skipped too.
    """
    error = (kl / target - 1).nan_to_num(0.0).clamp(-MOST_ERROR, MOST_ERROR)
    return coef * (1 + error * n / horizon)


# --- the stage


@dataclass
class Experience:
    """A rollout with everything that PPO derives from it, fixed while the policy learns."""

    rollout: Rollout
    score_B: Tensor  # the reward model's, before the penalty
    kl_BA: Tensor  # k1 per token, to the reference
    values_BA: Tensor
    advantages_BA: Tensor  # whitened
    returns_BA: Tensor


class PPOModule(OnPolicyModule):
    """Trains the policy and a value network; the reward model and the sft reference are frozen.

    The value network starts from the reward model (Ouyang et al. 2022, arXiv 2203.02155).
    `true_score` is the hidden rule, if the data has one: (the prompt's record, answer, stopped) ->
    its score, which is logged and never trained on.
    """

    settings: Settings

    def __init__(
        self,
        policy: Transformer,
        value: ScalarModel,
        reference: Transformer,
        reward: ScalarModel,
        tokenizer: Tokenizer,
        settings: Settings,
        seed: int,
        true_score: Callable[[Any, str, bool], float] | None = None,
        **more: Any,
    ) -> None:
        """more: OnPolicyModule's."""
        super().__init__(policy, reference, tokenizer, settings, seed, **more)
        self.value = value
        self.frozen["reward"] = reward.requires_grad_(False).eval()
        self.true_score = true_score
        self.register_buffer("kl_coef", torch.tensor(settings.kl_coef))

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        s = self.settings
        x = self.collect(batch.prompt_ids)
        rollout, numbers = self.of_all_ranks(x.rollout, x.values_BA, x.advantages_BA, x.returns_BA)
        has_gradient_B = torch.ones_like(rollout.stopped)
        losses = self.learn(rollout, partial(self.loss, *numbers), has_gradient_B)
        self.log_experience(x, losses, batch)
        if s.kl_target > 0:
            kl = self.sum_over_ranks(x.kl_BA.sum(1).mean()) / self.trainer.world_size
            n = len(batch.prompt_ids) * self.trainer.world_size
            self.kl_coef = adapted_kl_coef(self.kl_coef, kl, s.kl_target, n, s.kl_horizon)

    def collect(self, prompts: list[list[int]]) -> Experience:
        """The policy's answers, their scores, and the advantage of every token."""
        s = self.settings
        with gathered(self.policy) as policy:
            rollout = self.rollout(policy, prompts, self.answers(policy, prompts))
        with gathered(self.value) as value:
            values_BA = self.in_pieces(partial(answer_values, value), rollout)
        ref_logp_BA = self.reference_logprobs(rollout)
        with self.frozen_network("reward") as reward:
            score_B = self.in_pieces(partial(final_scores, reward), rollout)
        mask_BA, logp_BA = self.here(rollout.mask), self.here(rollout.logprobs)

        penalised_B = score_B - s.missing_eos_penalty * ~self.here(rollout.stopped)
        kl_BA = KL_ESTIMATORS[s.kl_estimator](logp_BA, ref_logp_BA) * mask_BA
        rewards_BA = token_rewards(penalised_B, kl_BA, self.here(rollout.length), self.kl_coef)
        advantages_BA, returns_BA = gae(rewards_BA, values_BA, mask_BA, s.gamma, s.gae_lambda)
        return Experience(
            rollout=rollout,
            score_B=score_B,
            kl_BA=KL_ESTIMATORS["k1"](logp_BA, ref_logp_BA) * mask_BA,
            values_BA=values_BA,
            advantages_BA=whiten(advantages_BA, self.moments(advantages_BA, rollout)) * mask_BA,
            returns_BA=returns_BA,
        )

    def moments(self, x_BA: Tensor, rollout: Rollout) -> Tensor:
        """Over the answer tokens of all ranks."""
        return self.sum_over_ranks(moments(x_BA.flatten()[self.here(rollout.places)]))

    def loss(
        self, values_BA: Tensor, advantages_BA: Tensor, returns_BA: Tensor, part: Part
    ) -> tuple[Tensor, Numbers]:
        """A part's share of both networks' loss, and what is logged of each token."""
        s, at = self.settings, part.at
        policy_loss = clipped_surrogate(
            part.logp, part.old_logp, advantages_BA[at], s.clip_low, s.clip_high
        )
        values = answer_values(self.value, part.rollout)
        value_loss = clipped_value_loss(values, values_BA[at], returns_BA[at], s.value_clip)
        loss = (policy_loss + s.value_coef * value_loss) * part.mask
        log_ratio = part.logp - part.old_logp
        by_token = {"log_ratio": log_ratio, "policy_loss": policy_loss, "value_loss": value_loss}
        return loss.sum() / part.totals.tokens, by_token

    def log_experience(self, x: Experience, losses: Metrics, batch: PromptBatch) -> None:
        error_BA = x.returns_BA - x.values_BA
        both = (self.moments(what, x.rollout) for what in (error_BA, x.returns_BA))
        metrics: Metrics = {
            **losses,
            "score": x.score_B.mean(),
            "kl": x.kl_BA.sum(1).mean(),  # nats per answer
            "kl_coef": self.kl_coef,
            "explained_variance": explained_variance(*both),
            **self.rollout_stats(x.rollout),
        }
        if self.true_score is not None:
            texts, stopped = answer_texts(x.rollout, self.tokenizer), x.rollout.stopped.tolist()
            metrics["true_score"] = sum(map(self.true_score, batch.records, texts, stopped)) / len(
                texts
            )
        self.log_step(metrics)


# --- what ladder.py asks for


def prepare(job: StageJob) -> Prepared:
    policy, tokenizer = parent_policy(job)
    reward, _ = load_scalar(job.parents["reward"])
    value, reference = deepcopy(reward).train(), deepcopy(policy)

    def judge(record: data.Conversation, answer: str, stopped: bool) -> float:
        return true_score(answer, stopped, record.references)

    networks = policy, value, reference, reward
    module = PPOModule(
        *networks, tokenizer, job.settings, job.seed, judge if job.data.has_hidden_rule else None
    )
    return prepare_prompts(job, module, as_planned(job, data.load_prompts(job.data)))


def check_data(
    config: data.DataConfig, settings: Settings, tokenizer: Tokenizer, max_seq_len: int
) -> list[str]:
    prompts = data.load_prompts(config).train
    return check_questions("ppo", prompts, settings, tokenizer, max_seq_len)
