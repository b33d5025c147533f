"""What the stages share of what they need to train: networks of their parents, and batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from fourstage import data
from fourstage.batch import PairBatch, TokenBatch
from fourstage.data.datamodule import (
    LoaderPair,
    prompt_data,
)
from fourstage.data.fits import lost_on_reading
from fourstage.errors import UserError
from fourstage.job import StageJob
from fourstage.ladder import LADDER
from fourstage.model import ScalarModel, Transformer
from fourstage.model.weights import load_policy
from fourstage.rl.rollout import fitted_prompt
from fourstage.stages.base import StageModule
from fourstage.tokenizer import Tokenizer

Source = TypeVar("Source", data.Corpus, data.Chats, data.Pairs, data.Problems)

ENDLESS = 10**9  # batches of a run whose budget is a time
PROBE_TOKENS = 512  # on which the router's drift is measured: a step has many more


@dataclass
class Prepared:
    """A stage ready to train: what is trained, and on what."""

    module: StageModule
    loaders: LoaderPair
    heldout_rows: list[list[int]]  # a few, as token ids: the text on which routers are compared
    tokenizer: Tokenizer

    @property
    def result(self) -> Transformer | ScalarModel:
        return self.module.result()


def check_records(
    config: data.DataConfig, stage: str, settings: Any, tokenizer: Tokenizer, max_seq_len: int
) -> list[str]:
    """Warnings of what a stage will not read of its data.

    Raises UserError, as the stage itself would, where that leaves it no record.
    """
    lost = lost_on_reading(config, stage)
    return lost + LADDER[stage].code.check_data(config, settings, tokenizer, max_seq_len)


def loader_options(job: StageJob) -> dict[str, Any]:
    """Each rank makes its own rows of the global batch."""
    world = world_size(job)
    return {
        "batch_size": job.settings.batch_size // world,
        "n_batches": ENDLESS if job.settings.max_time else job.settings.max_steps,
        "seed": job.seed,
        "rank": rank(),
        "world": world,
    }


def rank() -> int:
    """This process' rank; 0 before the processes have met."""
    return getattr(rank_zero_only, "rank", 0) or 0


def say(text: str) -> None:
    """Print on the first rank only."""
    if rank() == 0:
        print(text, flush=True)


def world_size(job: StageJob) -> int:
    """Processes of this job, over all nodes."""
    return job.trainer.devices * job.trainer.num_nodes


def device_of(job: StageJob) -> torch.device:
    """The kind of device that the run trains on, where it is here; on another one the last digits
    of what is computed may differ."""
    kind = "cuda" if job.trainer.accelerator == "gpu" else job.trainer.accelerator
    return torch.device(kind if torch.get_device_module(kind).is_available() else "cpu")


def as_planned(job: StageJob, source: Source) -> Source:
    """A source of the run's data, as it was read; UserError where it is not what the plan read, on
    which the run's id depends."""
    if source.digest != job.digest:
        raise UserError(
            f"data.{LADDER[job.stage].source} has changed since the plan was made: run the "
            "same command again: it plans anew"
        )
    return source


def parent_policy(job: StageJob) -> tuple[Transformer, Tokenizer]:
    policy, tokenizer = load_policy(job.parents["policy"])
    policy.train()
    return policy, tokenizer


def prompt_loaders(job: StageJob, records: Sequence[Any], tokenizer: Tokenizer) -> LoaderPair:
    return prompt_data(
        records,
        tokenizer,
        max_prompt_tokens=job.settings.max_prompt_tokens,
        **loader_options(job),
    )


def heldout_rows(loaders: LoaderPair) -> list[list[int]]:
    """Rows of the middle validation batch, which are of a usual length: some PROBE_TOKENS."""
    batches = loaders.val.dataset
    batch: TokenBatch | PairBatch = batches[len(batches) // 2]
    if isinstance(batch, PairBatch):
        ids_BT, length_B = batch.chosen_ids, batch.chosen_len
    else:
        ids_BT, length_B = batch.ids, batch.valid.sum(1)
    lengths = length_B.tolist()
    return some_rows([ids[:n] for ids, n in zip(ids_BT.tolist(), lengths, strict=True)])


def heldout_prompts(job: StageJob, records: Sequence[Any], tokenizer: Tokenizer) -> list[list[int]]:
    """The first held-out prompts, the beginning of long ones cut off: some PROBE_TOKENS."""
    room = job.settings.max_prompt_tokens
    few = records[:PROBE_TOKENS]  # a prompt has one token at least
    return some_rows([fitted_prompt(tokenizer, record.prompt_messages, room) for record in few])


def some_rows(rows: list[list[int]]) -> list[list[int]]:
    """The first rows that hold PROBE_TOKENS together; the last one is cut."""
    taken, left = [], PROBE_TOKENS
    for row in rows:
        if left > 0:
            taken.append(row[:left])
            left -= len(row)
    return taken
