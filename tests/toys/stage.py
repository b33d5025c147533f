"""A stage that is no part of the project: sft with label smoothing (Szegedy et al. 2015, sec. 7).

Its row is in test_toys.py, its settings are in stage.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fourstage import data
from fourstage.batch import IGNORE, TokenBatch
from fourstage.data.datamodule import sft_data
from fourstage.data.fits import check_chats
from fourstage.job import StageJob
from fourstage.stages.base import between
from fourstage.stages.prepare import (
    Prepared,
    as_planned,
    heldout_rows,
    loader_options,
    parent_policy,
)
from fourstage.stages.sft import Settings as SFTSettings
from fourstage.stages.sft import SFTModule
from fourstage.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Settings(SFTSettings):
    smoothing: float = between(0, 1)


class SmoothModule(SFTModule):
    settings: Settings

    def piece_loss(
        self, batch: TokenBatch, n_targets: Tensor, n_tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss, nll = super().piece_loss(batch, n_targets, n_tokens)
        hidden_BTD = self.policy(batch.ids, valid_BT=batch.valid).hidden_BTD
        logp_BTV = self.policy.logits(hidden_BTD).log_softmax(-1)
        even = -torch.where(batch.targets == IGNORE, 0, logp_BTV.mean(-1)).sum() / n_targets
        return (1 - self.settings.smoothing) * loss + self.settings.smoothing * even, nll


def prepare(job: StageJob) -> Prepared:
    policy, tokenizer = parent_policy(job)
    chats = as_planned(job, data.load_chat(job.data))
    length = job.settings.max_tokens
    loaders = sft_data(
        chats.train, chats.heldout, tokenizer, max_tokens=length, **loader_options(job)
    )
    module = SmoothModule(policy, job.settings, job.seed)
    return Prepared(module, loaders, heldout_rows(loaders, job), tokenizer)


def check_data(
    config: data.DataConfig, settings: Settings, tokenizer: Tokenizer, max_seq_len: int
) -> list[str]:
    return check_chats(config, tokenizer, settings.max_tokens, max_seq_len, "smooth")
