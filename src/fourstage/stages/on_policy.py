"""What ppo and grpo share: sample answers, then take several optimizer steps on them.

One training_step is one rollout with all its updates, so a checkpoint never falls between a rollout
and its use, and `max_steps` counts rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fourstage.batch import Rollout
from fourstage.generate import LEAST_TEMPERATURE
from fourstage.model import Transformer
from fourstage.rl.rollout import sample
from fourstage.stages.base import StageModule, StageSettings, check_range
from fourstage.strategies import is_spread
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


class OnPolicyModule(StageModule):
    """A policy that learns from its own answers; frozen networks are neither trained nor saved."""

    settings: OnPolicySettings
    frozen: Frozen
    uses_dropout = False  # the sampler has none, and the ratio compares with the sampler

    def __init__(
        self, policy: Transformer, tokenizer: Tokenizer, settings: OnPolicySettings, seed: int
    ) -> None:
        super().__init__(settings, seed)
        self.policy = policy
        self.tokenizer = tokenizer

    def result(self) -> Transformer:
        return self.policy

    def networks(self) -> list[nn.Module]:
        return [*super().networks(), *self.frozen.networks.values()]

    @contextmanager
    def frozen_network(self, name: str) -> Iterator[Any]:
        """A frozen network on the device: from then on, but under ZeRO-3 only for this long."""
        network = self.frozen[name].to(self.device)
        yield network
        if is_spread(self.policy):  # where a model is large, whole ones have to take turns
            network.cpu()

    def sample_answers(
        self, policy: Transformer, prompts: list[list[int]], attempt: int = 0
    ) -> Rollout:
        """An answer to each prompt; the draw is a function of seed, rank, step and attempt.

        policy: the stage's own, whole (strategies.whole).
        """
        ranks = self.trainer.world_size
        draw = (self.steps_done * ranks + self.global_rank) * 16 + attempt
        rollout = sample(
            policy,
            prompts,
            self.tokenizer,
            max_new_tokens=self.settings.max_new_tokens,
            temperature=self.settings.temperature,
            seed=self.seed * 1_000_003 + draw,
        )
        self.tokens_generated += int(rollout.length.sum())
        return rollout

    @torch.no_grad()
    def in_pieces(self, function: Callable[[Rollout], Tensor], rollout: Rollout) -> Tensor:
        """function(rollout) without gradients, at most micro_batch_size rows at a time."""
        order = self.neighbours(torch.arange(len(rollout.ids), device=self.device), rollout)
        pieces = order.split(self.settings.micro_batch_size)
        found = torch.cat([function(rollout.rows(piece)) for piece in pieces])
        return torch.empty_like(found).index_copy_(0, order, found)

    def minibatches(self, rollout: Rollout, epoch: int) -> Iterator[Tensor]:
        """The rows of each optimizer step of one pass, int64, drawn from the seed."""
        generator = torch.Generator().manual_seed(
            (self.seed * 1_000_003 + self.steps_done) * 64 + epoch
        )
        order = torch.randperm(len(rollout.ids), generator=generator).to(self.device)
        size = max(1, self.settings.minibatch_size // self.trainer.world_size)
        for rows in order.split(size):
            yield self.neighbours(rows, rollout)

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
