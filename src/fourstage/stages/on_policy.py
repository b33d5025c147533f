"""What ppo and grpo share: sample answers, then take several optimizer steps on them.

One training_step is one rollout with all its updates, so a checkpoint never falls between a rollout
and its use, and `max_steps` counts rollouts.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fourstage.batch import Rollout, moved
from fourstage.model import Transformer
from fourstage.parallel.strategies import is_sharded
from fourstage.rl.ops import ratio_stats
from fourstage.rl.rollout import answer_logprobs, in_order, joined, pack
from fourstage.sampling.generate import LEAST_TEMPERATURE, Generation, Sampler, Sampling, sampler_of
from fourstage.stages.base import Metrics, Numbers, StageModule, StageSettings, at_least, between
from fourstage.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class OnPolicySettings(StageSettings):
    """The settings of a stage that trains on its own answers; a step is a rollout."""

    max_prompt_tokens: int = at_least(1)  # longer prompts are left out
    max_new_tokens: int = at_least(1)
    temperature: float = at_least(LEAST_TEMPERATURE)  # of the sampler and the log-probabilities
    epochs: int = at_least(1)  # passes over a rollout
    minibatch_size: int = at_least(1)  # answers per optimizer step, over all ranks
    clip_low: float = between(0, 1)
    clip_high: float = at_least(0)
    kl_estimator: Literal["k1", "k2", "k3"]
    max_approx_kl: float = at_least(0)  # drop a rollout once the policy moved this far; 0: never


class Totals(NamedTuple):
    """What a reduction divides by, over a whole optimizer step and all ranks."""

    answers: Tensor
    tokens: Tensor
    max_length: int


class Part(NamedTuple):
    """What a loss sees of some rows of a rollout; all but the rollout are on the device."""

    rollout: Rollout
    at: Tensor  # int64 [b], where the rows are in the whole rollout
    logp: Tensor  # float [b, A], the policy's, with gradient
    old_logp: Tensor  # float [b, A], the sampler's
    mask: Tensor  # bool [b, A]
    totals: Totals


# -> a part's share of the optimizer step's loss; and, [b, A], the log_ratio that is clipped and
# per-token losses whose means are logged
Loss = Callable[[Part], tuple[Tensor, Numbers]]


class OnPolicyModule(StageModule):
    """A policy that learns from its own answers; `reference` is the KL's, and frozen."""

    settings: OnPolicySettings
    group: int = 1  # answers in a row to each prompt
    uses_dropout = False  # the sampler has none, and the ratio compares with the sampler

    def __init__(
        self,
        policy: Transformer,
        reference: Transformer,
        tokenizer: Tokenizer,
        settings: OnPolicySettings,
        seed: int,
        sampler_of: Callable[[Transformer], Sampler] = sampler_of,
    ) -> None:
        """sampler_of: makes the current policy a sampler."""
        super().__init__(settings, seed)
        self.policy = policy
        self.frozen["reference"] = reference.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.sampler_of = sampler_of

    @contextmanager
    def frozen_network(self, name: str) -> Iterator[Any]:
        """A frozen network, moved to the device to stay there; under ZeRO-3 only inside."""
        network = self.frozen[name].to(self.device)
        yield network
        if is_sharded(self.policy):  # a large model: whole networks have to take turns
            network.cpu()

    # --- a rollout

    def answers(
        self, policy: Transformer, prompts: list[list[int]], attempt: int = 0
    ) -> Generation:
        """An answer to each prompt from the full distribution: no top-k, no top-p. A function of
        seed, step, attempt and the prompt's place in the global batch, so that the same is drawn
        on any number of ranks. policy: the stage's own (strategies.gathered)."""
        sampling = Sampling(
            max_new_tokens=self.settings.max_new_tokens,
            stop_id=self.tokenizer.eot_id,
            temperature=self.settings.temperature,
            seed=self.seed * 1_000_003 + self.steps_done * 16 + attempt,
        )
        seeds = sampling.seeds(len(prompts) * self.trainer.world_size)
        whose = torch.arange(len(seeds)).view(-1, self.trainer.world_size, self.group)
        own = whose[:, self.global_rank].flatten().tolist()
        sampling = replace(sampling, row_seeds=[seeds[row] for row in own])
        generation = self.sampler_of(policy)(prompts, sampling)
        if len(generation.answer_ids) != len(prompts) or not all(map(len, generation.answer_ids)):
            raise ValueError("a sampler must answer every prompt, with one token at least")
        self.tokens_generated += sum(map(len, generation.answer_ids))
        return generation

    def rollout(
        self, policy: Transformer, prompts: list[list[int]], generation: Generation
    ) -> Rollout:
        """The answers as rows. Log-probs that the sampler doesn't know are computed here."""
        rollout = pack(prompts, generation, self.tokenizer.pad_id)
        if generation.logprobs is None:
            rollout.logprobs = self.logprobs(policy, rollout).cpu()
        return rollout

    def of_all_ranks(self, rollout: Rollout, *numbers: Tensor) -> tuple[Rollout, list[Tensor]]:
        """The rollout, and numbers of its rows, [B] or [B, A], of all ranks in the order of the
        global batch: minibatches are then the same on any number of ranks."""
        if self.trainer.world_size == 1:
            return rollout, list(numbers)
        found: list[Any] = [None] * self.trainer.world_size
        dist.all_gather_object(found, (rollout, [x.cpu() for x in numbers]))
        rollouts, columns = zip(*found, strict=True)
        whole = joined(rollouts, self.group, self.tokenizer.pad_id)
        return whole, [self.here(in_order(x, self.group)) for x in zip(*columns, strict=True)]

    def logprobs(self, policy: Transformer, rollout: Rollout) -> Tensor:
        """Log-probability of each answer token, without gradient, [B, A]."""
        score = partial(answer_logprobs, policy, temperature=self.settings.temperature)
        return self.in_pieces(score, rollout)

    def reference_logprobs(self, rollout: Rollout) -> Tensor:
        with self.frozen_network("reference") as reference:
            return self.logprobs(reference, rollout)

    @torch.no_grad()
    def in_pieces(self, function: Callable[[Rollout], Tensor], rollout: Rollout) -> Tensor:
        """function(rollout) without gradients, at most micro_batch_size rows at a time."""
        order = self.neighbours(torch.arange(len(rollout.ids)), rollout)
        pieces = order.split(self.settings.micro_batch_size)
        found = torch.cat([function(rollout.rows(piece)) for piece in pieces])
        return torch.empty_like(found).index_copy_(0, moved(order, found.device), found)

    def neighbours(self, rows: Tensor, rollout: Rollout) -> Tensor:
        """The rows in the order in which pieces of them are cheapest: with little padding."""
        length_B = rollout.start + rollout.length
        return rows[length_B[rows].argsort(stable=True)]

    def rollout_stats(self, rollout: Rollout) -> Metrics:
        """What is logged of the answers; entropy is estimated from the tokens drawn, in nats."""
        logp_BA, mask_BA = self.here(rollout.logprobs), self.here(rollout.mask)
        return {
            "entropy": -self.masked_mean(logp_BA, mask_BA),
            "answer_length": rollout.length.float().mean(),
            "stop_rate": rollout.stopped.float().mean(),
        }

    # --- the updates

    def learn(self, rollout: Rollout, loss: Loss, has_gradient_B: Tensor) -> Metrics:
        """Clipped updates on the rollout; returns what the last pass saw of the rows it trained.

        rollout: of all ranks, each of which trains on a part of every minibatch.
        has_gradient_B: bool, the rows whose loss has a gradient.
        """
        s, mask_BA = self.settings, self.here(rollout.mask)
        zeros_BA = torch.zeros_like(self.here(rollout.logprobs))
        stats: Metrics = {}
        for epoch in range(s.epochs):
            trained_B = torch.zeros_like(rollout.stopped)
            seen_BA: dict[str, Tensor] = defaultdict(zeros_BA.clone)
            for index in self.minibatches(rollout, epoch):
                rows = self.rows_with_gradient(index, has_gradient_B)
                piece = partial(self.piece, rollout, rows, loss, self.totals(rollout, index))
                stats["grad_norm"], seen = self.update(piece, len(rows))
                trained_B[rows] = True
                for name, x in seen.items():
                    seen_BA[name][self.here(rows)] = x
                gap_BA = seen_BA.pop("gap")
                if "sampler_gap" not in stats:  # the weights had not moved yet
                    stats["sampler_gap"] = self.max_over_ranks((gap_BA * mask_BA).max())
            # untrained rows have a ratio of 1, which would dilute the means
            trained_BA = mask_BA & self.here(trained_B)[:, None]
            log_ratio_BA, clips = seen_BA.pop("log_ratio"), (s.clip_low, s.clip_high)
            stats |= ratio_stats(log_ratio_BA, trained_BA, *clips, self.masked_mean)
            self.tokens_seen += int(rollout.valid[trained_B].sum())
            if s.max_approx_kl and stats["approx_kl"] > s.max_approx_kl:
                break
        stats["ratio_max"] = self.max_over_ranks(stats["ratio_max"])
        for name, x_BA in seen_BA.items():
            stats[name] = self.sum_over_ranks((x_BA * mask_BA).sum()) / mask_BA.sum()
        return {**stats, "epochs": epoch + 1}

    def minibatches(self, rollout: Rollout, epoch: int) -> Iterator[Tensor]:
        """This rank's rows of each optimizer step of one pass, int64, shuffled by the seed."""
        seed = (self.seed * 1_000_003 + self.steps_done) * 64 + epoch
        order = torch.randperm(len(rollout.ids), generator=torch.Generator().manual_seed(seed))
        for rows in order.split(self.settings.minibatch_size):
            own = rows.chunk(self.trainer.world_size)[self.global_rank]
            yield self.neighbours(own, rollout)

    def rows_with_gradient(self, index: Tensor, has_gradient_B: Tensor) -> Tensor:
        """The rows of a minibatch that move the policy; at least one, so that a step is taken.

        All of them if more than the gradient counts: the router's load, or other ranks, which must
        run the same number of backward passes.
        """
        if self.settings.balance_router or self.trainer.world_size > 1:
            return index
        moving = index[has_gradient_B[index]]
        return moving if len(moving) else index[:1]

    def totals(self, rollout: Rollout, rows: Tensor) -> Totals:
        n = torch.stack([rollout.mask[rows].sum(), torch.tensor(len(rows))])
        n_tokens, n_answers = self.sum_over_ranks(self.here(n))
        return Totals(n_answers, n_tokens, self.settings.max_new_tokens)

    def piece(
        self, rollout: Rollout, rows: Tensor, loss: Loss, totals: Totals, some: slice
    ) -> tuple[Tensor, Numbers]:
        """Some rows' share of the loss; and numbers of each answer token, [b, A]."""
        part, at = rollout.rows(rows[some]), self.here(rows[some])
        logp = answer_logprobs(self.policy, part, self.settings.temperature)
        old_logp, mask = self.here(part.logprobs), self.here(part.mask)
        share, by_token = loss(Part(part, at, logp, old_logp, mask, totals))
        return share, {"gap": (logp - old_logp).abs(), **by_token}
