"""What ppo and grpo share: sample answers, then take several optimizer steps on them.

One training_step is one rollout with all its updates, so a checkpoint never falls between a rollout
and its use, and `max_steps` counts rollouts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fourstage.batch import Rollout, moved
from fourstage.model import Transformer
from fourstage.parallel.strategies import is_sharded
from fourstage.rl.ops import ratio_stats
from fourstage.rl.rollout import answer_logprobs, pack
from fourstage.sampling.generate import (
    LEAST_TEMPERATURE,
    Generation,
    Sampler,
    Sampling,
    sampler_of,
)
from fourstage.stages.base import Numbers, StageModule, StageSettings, check_range
from fourstage.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class OnPolicySettings(StageSettings):
    """The settings of a stage that trains on its own answers; a step is a rollout."""

    max_prompt_tokens: int  # longer prompts are left out
    max_new_tokens: int
    temperature: float  # of the sampler; log-probabilities are taken at it too
    epochs: int  # passes over a rollout
    minibatch_size: int  # answers an optimizer step, over all ranks
    clip_low: float
    clip_high: float
    kl_estimator: Literal["k1", "k2", "k3"]
    max_approx_kl: float  # leave a rollout early once the policy moved so far; 0: never

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, "max_prompt_tokens", "max_new_tokens", "epochs", "minibatch_size")
        check_range(self, 0, "max_approx_kl", "clip_high")
        check_range(self, 0, "clip_low", most=1)
        check_range(self, LEAST_TEMPERATURE, "temperature")


class Totals(NamedTuple):
    """What a reduction divides by, over a whole optimizer step and all ranks."""

    answers: Tensor
    tokens: Tensor
    max_length: int


# (some rows of a rollout, their indices, the policy's log-probs [b, A], totals) -> what they add to
# the loss of the optimizer step, and losses of each token [b, A] whose means are logged
Share = Callable[[Rollout, Tensor, Tensor, Totals], tuple[Tensor, Numbers]]


class OnPolicyModule(StageModule):
    """A policy that learns from its own answers; frozen networks are neither trained nor saved."""

    settings: OnPolicySettings
    frozen: Frozen
    uses_dropout = False  # the sampler has none, and the ratio compares with the sampler

    def __init__(
        self,
        policy: Transformer,
        tokenizer: Tokenizer,
        settings: OnPolicySettings,
        seed: int,
        sampler_of: Callable[[Transformer], Sampler] = sampler_of,
    ) -> None:
        """sampler_of: what answers with the policy's present weights."""
        super().__init__(settings, seed)
        self.policy = policy
        self.tokenizer = tokenizer
        self.sampler_of = sampler_of

    def result(self) -> Transformer:
        return self.policy

    def networks(self) -> list[nn.Module]:
        return [*super().networks(), *self.frozen.networks.values()]

    @contextmanager
    def frozen_network(self, name: str) -> Iterator[Any]:
        """A frozen network on the device: from then on, but under ZeRO-3 only for this long."""
        network = self.frozen[name].to(self.device)
        yield network
        if is_sharded(self.policy):  # where a model is large, whole ones have to take turns
            network.cpu()

    def answers(
        self, policy: Transformer, prompts: list[list[int]], attempt: int = 0
    ) -> Generation:
        """An answer to each prompt from the whole distribution (no top-k, no top-p: on-policy).

        The draw is a function of seed, rank, step and attempt. policy: the stage's own, gathered
        (strategies.gathered).
        """
        ranks = self.trainer.world_size
        draw = (self.steps_done * ranks + self.global_rank) * 16 + attempt
        sampling = Sampling(
            max_new_tokens=self.settings.max_new_tokens,
            stop_id=self.tokenizer.eot_id,
            temperature=self.settings.temperature,
            seed=self.seed * 1_000_003 + draw,
        )
        said = self.sampler_of(policy)(prompts, sampling)
        self.tokens_generated += sum(map(len, said.answer_ids))
        return said

    def rollout(self, policy: Transformer, prompts: list[list[int]], said: Generation) -> Rollout:
        """The answers as rows; where the sampler has no log-probs, the policy computes them."""
        rollout = pack(prompts, said, self.tokenizer.pad_id)
        if said.logprobs is None:
            rollout.logprobs = self.logprobs(policy, rollout).cpu()
        return rollout

    def logprobs(self, policy: Transformer, rollout: Rollout) -> Tensor:
        """Log-probability of each answer token, without gradient, [B, A]."""
        score = partial(answer_logprobs, policy, temperature=self.settings.temperature)
        return self.in_pieces(score, rollout)

    @torch.no_grad()
    def in_pieces(self, function: Callable[[Rollout], Tensor], rollout: Rollout) -> Tensor:
        """function(rollout) without gradients, at most micro_batch_size rows at a time."""
        order = self.neighbours(torch.arange(len(rollout.ids)), rollout)
        pieces = order.split(self.settings.micro_batch_size)
        found = torch.cat([function(rollout.rows(piece)) for piece in pieces])
        return torch.empty_like(found).index_copy_(0, moved(order, found.device), found)

    def minibatches(self, rollout: Rollout, epoch: int) -> Iterator[Tensor]:
        """The rows of each optimizer step of one pass, int64, drawn from the seed."""
        generator = torch.Generator().manual_seed(
            (self.seed * 1_000_003 + self.steps_done) * 64 + epoch
        )
        order = torch.randperm(len(rollout.ids), generator=generator)
        size = max(1, self.settings.minibatch_size // self.trainer.world_size)
        for rows in order.split(size):
            yield self.neighbours(rows, rollout)

    def learn(self, rollout: Rollout, share: Share, moves_B: Tensor) -> dict[str, Tensor | float]:
        """Clipped updates on the rollout; returns what the last pass saw of the rows it trained.

        moves_B: bool, the rows whose share has a gradient.
        """
        s = self.settings
        mask_BA, old_logp_BA = self.here(rollout.mask), self.here(rollout.logprobs)
        stats: dict[str, Tensor | float] = {}
        for epoch in range(s.epochs):
            trained_B = torch.zeros_like(rollout.stopped)
            seen_BA: dict[str, Tensor] = defaultdict(partial(torch.zeros_like, old_logp_BA))
            seen_BA["logp"] = old_logp_BA.clone()
            for index in self.minibatches(rollout, epoch):
                rows = self.rows_with_gradient(index, moves_B)
                piece = partial(self.piece, rollout, rows, share, self.totals(rollout, index))
                stats["grad_norm"], seen = self.update(piece, len(rows))
                trained_B[rows] = True
                at = self.here(rows)
                for name, x in seen.items():
                    seen_BA[name][at] = x
                if "sampler_gap" not in stats:  # the weights had not moved yet
                    gap_BA = (seen_BA["logp"] - old_logp_BA).abs() * mask_BA
                    stats["sampler_gap"] = self.max_over_ranks(gap_BA[at].max())
            logp_BA = seen_BA.pop("logp")
            # the other rows have no new log-probs: their ratio of 1 would dilute the means
            trained_BA = mask_BA & self.here(trained_B)[:, None]
            compared_BA = self.compared(logp_BA, old_logp_BA, mask_BA)
            stats |= ratio_stats(
                compared_BA, old_logp_BA, trained_BA, s.clip_low, s.clip_high, self.masked_mean
            )
            self.tokens_seen += int(rollout.valid[trained_B].sum())
            if s.max_approx_kl and stats["approx_kl"] > s.max_approx_kl:
                break
        stats["ratio_max"] = self.max_over_ranks(stats["ratio_max"])
        losses = {name: self.masked_mean(x_BA, mask_BA) for name, x_BA in seen_BA.items()}
        return {**stats, **losses, "epochs": epoch + 1}

    def piece(
        self, rollout: Rollout, rows: Tensor, share: Share, totals: Totals, some: slice
    ) -> tuple[Tensor, Numbers]:
        """The share of some of these rows in the loss of an optimizer step; and numbers of each
        answer token, [b, A]."""
        part, at = rollout.rows(rows[some]), self.here(rows[some])
        logp = answer_logprobs(self.policy, part, self.settings.temperature)
        loss, by_token = share(part, at, logp, totals)
        return loss, {"logp": logp, **by_token}

    def compared(self, logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
        """The log-probs that are compared with the sampler's."""
        return logp

    def sampled_entropy(self, rollout: Rollout) -> Tensor:
        """Nats a token of the policy that answered, estimated from what it drew."""
        return -self.masked_mean(self.here(rollout.logprobs), self.here(rollout.mask))

    def totals(self, rollout: Rollout, rows: Tensor) -> Totals:
        n = torch.stack([rollout.mask[rows].sum(), torch.tensor(len(rows))])
        n_tokens, n_answers = self.sum_over_ranks(self.here(n))
        return Totals(n_answers, n_tokens, self.settings.max_new_tokens)

    def rows_with_gradient(self, index: Tensor, moves_B: Tensor) -> Tensor:
        """The rows of a minibatch that move the policy, one at least for the optimizer's step.

        All of them where more than the gradient counts: the router's load, or other ranks, which
        must take as many backward passes.
        """
        if self.settings.balance_router or self.trainer.world_size > 1:
            return index
        moving = index[moves_B[index]]
        return moving if len(moving) else index[:1]

    def neighbours(self, rows: Tensor, rollout: Rollout) -> Tensor:
        """The rows in an order in which a piece of them costs little: with little padding."""
        length_B = rollout.start + rollout.length
        return rows[length_B[rows].argsort(stable=True)]


class Frozen:
    """Networks that a stage only reads: plain attributes, so that no state_dict holds them."""

    def __init__(self, **networks: nn.Module) -> None:
        self.networks = {name: n.requires_grad_(False).eval() for name, n in networks.items()}

    def __getitem__(self, name: str) -> Any:
        return self.networks[name]
