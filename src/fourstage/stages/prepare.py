"""What the stages share of getting ready to train: their parents' networks, and batches."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from fourstage import data
from fourstage.batch import PairBatch, TokenBatch
from fourstage.data.datamodule import LoaderPair, prompt_data
from fourstage.data.fits import lost_on_reading
from fourstage.data.vocabulary import tokenizer_of, waits
from fourstage.errors import UserError
from fourstage.exchange.checkpoint import digest, load_checkpoint
from fourstage.job import StageJob
from fourstage.ladder import LADDER
from fourstage.model import ScalarModel, Transformer
from fourstage.model.weights import load_policy
from fourstage.rl.rollout import fitted_prompt
from fourstage.stages.base import StageModule
from fourstage.stages.on_policy import OnPolicyModule
from fourstage.tokenizer import Tokenizer

Source = TypeVar("Source", data.Corpus, data.Chats, data.Pairs, data.Problems)

ENDLESS = 10**9  # batches of a run whose budget is a time
PROBE_TOKENS = 512  # for measuring the router's drift: far fewer than in a step


@dataclass
class Prepared:
    """A stage ready to train: what is trained, and on what."""

    module: StageModule
    loaders: LoaderPair
    heldout_rows: list[list[int]]  # a few, as token ids, for measuring the router's drift
    tokenizer: Tokenizer

    @property
    def result(self) -> Transformer | ScalarModel:
        return self.module.result()


def check_records(
    config: data.DataConfig, stage: str, settings: Any, tokenizer: Tokenizer, max_seq_len: int
) -> list[str]:
    """Warnings about data that a stage will not use; UserError if that leaves it no record."""
    lost = lost_on_reading(config, stage)
    return lost + LADDER[stage].code.check_data(config, settings, tokenizer, max_seq_len)


def check_fetched(job: StageJob) -> None:
    """`check_records` for data that the plan couldn't read, as it is on the hub."""
    fetched = data.waits(job.data, job.stage) or waits(job.tokenizer, job.data)
    if fetched and not job.settings.as_is:
        tokenizer, room = tokenizer_of_run(job), job.model.max_seq_len
        for line in check_records(job.data, job.stage, job.settings, tokenizer, room):
            say(f"warning: {line}")


def tokenizer_of_run(job: StageJob) -> Tokenizer:
    """The parent's, or what the config says."""
    if "policy" in job.parents:
        return Tokenizer.load(job.parents["policy"])
    return tokenizer_of(job.tokenizer, job.data, job.outputs)


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
    """This process's rank; 0 before the processes have met."""
    return rank_zero_only.rank


@rank_zero_only
def say(text: str) -> None:
    print(text, flush=True)


def world_size(job: StageJob) -> int:
    return job.trainer.processes


def device_of(job: StageJob) -> torch.device:
    """The kind of device that the run trains on, if this machine has one, else the CPU. Results on
    another kind may differ in the last digits."""
    kind = "cuda" if job.trainer.accelerator == "gpu" else job.trainer.accelerator
    return torch.device(kind if torch.get_device_module(kind).is_available() else "cpu")


def as_planned(job: StageJob, source: Source) -> Source:
    """The run's data; UserError if it is not what the plan read, on which the run's id depends."""
    waits = data.waits(job.data, job.stage)
    if (data.digest(job.data, job.stage) if waits else source.digest) != job.digest:
        raise UserError(
            f"data.{LADDER[job.stage].source} has changed since the plan was made: run the "
            "same command again to make a new plan"
        )
    return source


def sums_of(outputs: Path) -> Path:
    """Where the checksums of checkpoints are kept."""
    return outputs / "data" / "checkpoints"


def start_policy(job: StageJob, vocab_size: int) -> Transformer:
    """What the first stage starts from: a checkpoint, or weights drawn by torch's generator."""
    if job.start is None:
        return Transformer(job.model, vocab_size)
    if digest(job.start.folder, sums_of(job.outputs)) != job.start.digest:
        raise UserError(
            f"{job.start.folder} has changed since the run was planned: run the same command again "
            "to make a new plan"
        )
    return load_checkpoint(job.start.folder, job.model, vocab_size)


def parent_policy(job: StageJob) -> tuple[Transformer, Tokenizer]:
    policy, tokenizer = load_policy(job.parents["policy"])
    return policy.train(), tokenizer


def prepare_prompts(job: StageJob, module: OnPolicyModule, source: Source) -> Prepared:
    """A stage that answers prompts; its held-out rows are prompts, truncated on the left."""
    tokenizer, room = module.tokenizer, job.settings.max_prompt_tokens
    loaders = prompt_data(source.train, tokenizer, max_prompt_tokens=room, **loader_options(job))
    few = source.heldout[:PROBE_TOKENS]  # a prompt has at least one token
    rows = [fitted_prompt(tokenizer, record.prompt_messages, room) for record in few]
    return Prepared(module, loaders, some_rows(rows), tokenizer)


def heldout_rows(loaders: LoaderPair, job: StageJob) -> list[list[int]]:
    """PROBE_TOKENS tokens of the middle validation batch, whose rows are of a usual length. They
    are the same on any number of ranks: R ranks cut the batch of one into R smaller ones."""
    batches, world = loaders.val.dataset, world_size(job)
    middle = -(-len(batches) // world) // 2 * world
    rows: list[list[int]] = []
    for at in range(middle, min(middle + world, len(batches))):
        batch: TokenBatch | PairBatch = batches[at]
        if isinstance(batch, PairBatch):
            ids_BT, length_B = batch.chosen_ids, batch.chosen_len
        else:
            ids_BT, length_B = batch.ids, batch.valid.sum(1)
        both = zip(ids_BT.tolist(), length_B.tolist(), strict=True)
        rows += [ids[:length] for ids, length in both]
    return some_rows(rows)


def some_rows(rows: list[list[int]]) -> list[list[int]]:
    """The first rows that hold PROBE_TOKENS together; the last one is truncated."""
    taken, left = [], PROBE_TOKENS
    for row in rows:
        if left > 0:
            taken.append(row[:left])
            left -= len(row)
    return taken
