"""What each stage needs to train: its networks, from its parents, and its batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from fourstage import data
from fourstage.batch import PairBatch, TokenBatch
from fourstage.data.datamodule import (
    LoaderPair,
    pretrain_data,
    prompt_data,
    reward_data,
    sft_data,
)
from fourstage.errors import UserError
from fourstage.files import read_jsonl, write_jsonl
from fourstage.job import StageJob
from fourstage.model import ScalarModel, Transformer
from fourstage.model.weights import load_policy, load_scalar
from fourstage.rl.rewards import true_score
from fourstage.rl.rollout import fitted_prompt
from fourstage.runs.records import write_record
from fourstage.stages import (
    GRPOModule,
    PPOModule,
    PretrainModule,
    RewardModule,
    SFTModule,
    StageModule,
)
from fourstage.stages.reward import sample_pairs
from fourstage.tokenizer import Tokenizer

Source = TypeVar("Source", data.Corpus, data.Chats, data.Pairs, data.Problems)

ENDLESS = 10**9  # batches of a run whose budget is a time
WAIT = 0.2  # seconds between two looks for what the first process writes
PROBE_TOKENS = 512  # on which the router's drift is measured: a step has many more
PAIR_FILES = ("pairs.jsonl", "pairs_heldout.jsonl")  # train and held-out side


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


def _loader_options(job: StageJob) -> dict[str, Any]:
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
            f"data.{data.source_of_stage[job.stage]} has changed since the plan was made: run the "
            "same command again: it plans anew"
        )
    return source


def parent_policy(job: StageJob) -> tuple[Transformer, Tokenizer]:
    policy, tokenizer = load_policy(job.parents["policy"])
    policy.train()
    return policy, tokenizer


def prepare_pretrain(job: StageJob) -> Prepared:
    tokenizer = Tokenizer.from_config(job.tokenizer)
    policy = Transformer(job.model, tokenizer.vocab_size)
    corpus = as_planned(job, data.load_corpus(job.data))
    loaders = pretrain_data(
        corpus, tokenizer, block_size=job.settings.block_size, **_loader_options(job)
    )
    notes = loaders.notes
    known = notes["heldout_characters"] - notes["heldout_unknown_characters"]
    module = PretrainModule(policy, job.settings, job.seed, known)
    return Prepared(module, loaders, heldout_rows(loaders), tokenizer)


def prepare_sft(job: StageJob) -> Prepared:
    policy, tokenizer = parent_policy(job)
    chats = as_planned(job, data.load_chat(job.data))
    loaders = sft_data(
        chats.train,
        chats.heldout,
        tokenizer,
        max_tokens=job.settings.max_tokens,
        **_loader_options(job),
    )
    module = SFTModule(policy, job.settings, job.seed)
    return Prepared(module, loaders, heldout_rows(loaders), tokenizer)


def prepare_reward(job: StageJob) -> Prepared:
    policy, tokenizer = parent_policy(job)
    stored = data.load_preference(job.data)
    pairs = as_planned(job, stored) if stored else sampled_pairs(job, policy, tokenizer)
    loaders = reward_data(
        pairs.train,
        pairs.heldout,
        tokenizer,
        max_tokens=job.settings.max_tokens,
        **_loader_options(job),
    )
    reward = ScalarModel(policy)
    module = RewardModule(reward, job.settings, job.seed)
    return Prepared(module, loaders, heldout_rows(loaders), tokenizer)


def sampled_pairs(job: StageJob, policy: Transformer, tokenizer: Tokenizer) -> data.Pairs:
    """The pairs of data=embedded: two answers of the sft policy, one preferred by the hidden rule.

    Sampled once and kept as pairs.jsonl and pairs_heldout.jsonl, which a resumed run reads.
    """
    prompts = as_planned(job, data.load_prompts(job.data))
    if rank() > 0:  # the first one samples, before the processes meet
        for name in PAIR_FILES:
            while not (job.folder / name).exists():  # it ends with it: lineage/ranks.py
                time.sleep(WAIT)
        return stored_pairs(job.folder)
    policy.to(device_of(job))
    for draw, (name, records) in enumerate(
        zip(PAIR_FILES, (prompts.train, prompts.heldout), strict=True)
    ):
        path = job.folder / name
        if path.exists():
            continue
        say(f"  sampling two answers to each of {len(records):,} prompts for {name}")
        room = job.settings.max_tokens - job.settings.max_new_tokens
        ids = [fitted_prompt(tokenizer, record.prompt_messages, room) for record in records]
        seed = 2 * job.seed + draw
        rows, skipped = sample_pairs(policy, tokenizer, ids, true_score, job.settings, seed)
        say(f"  {len(rows):,} pairs; skipped because both answers score the same: {skipped:,}")
        if not rows:
            raise UserError(
                f"{name}: both answers to each of {len(records):,} prompts score the same: sample "
                "more of them (stages.reward.pairs_per_prompt) or longer ones "
                "(stages.reward.max_new_tokens)"
            )
        write_record(job.folder, sampled_pairs={name: {"kept": len(rows), "tied": skipped}})
        write_jsonl(path, ({**r, "prompt": records[r["prompt"]].prompt_messages} for r in rows))
    policy.cpu()  # where training takes it from
    return stored_pairs(job.folder)


def stored_pairs(folder: Path) -> data.Pairs:
    """The pairs that a reward run sampled."""
    sides = []
    for name in PAIR_FILES:
        rows = read_jsonl(folder / name)
        sides.append(
            [
                data.Pair(r["prompt"], r["chosen"], r["rejected"], tuple(r.get("unfinished", ())))
                for r in rows
            ]
        )
    return data.Pairs(*sides, digest="", notes={})


def prepare_ppo(job: StageJob) -> Prepared:
    policy, tokenizer = parent_policy(job)
    reward, _ = load_scalar(job.parents["reward"])
    module = PPOModule(
        policy,
        value=deepcopy(reward).train(),
        reference=deepcopy(policy),
        reward=reward,
        tokenizer=tokenizer,
        settings=job.settings,
        seed=job.seed,
        judge=true_score if job.data.has_hidden_rule else None,
    )
    prompts = as_planned(job, data.load_prompts(job.data))
    loaders = prompt_loaders(job, prompts.train, tokenizer)
    rows = heldout_prompts(job, prompts.heldout, tokenizer)
    return Prepared(module, loaders, rows, tokenizer)


def prepare_grpo(job: StageJob) -> Prepared:
    policy, tokenizer = parent_policy(job)
    problems = as_planned(job, data.load_reasoning(job.data))
    module = GRPOModule(policy, deepcopy(policy), tokenizer, job.settings, job.seed)
    loaders = prompt_loaders(job, problems.train, tokenizer)
    rows = heldout_prompts(job, problems.heldout, tokenizer)
    return Prepared(module, loaders, rows, tokenizer)


def prompt_loaders(job: StageJob, records: Sequence[Any], tokenizer: Tokenizer) -> LoaderPair:
    return prompt_data(
        records,
        tokenizer,
        max_prompt_tokens=job.settings.max_prompt_tokens,
        **_loader_options(job),
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


PREPARE: dict[str, Callable[[StageJob], Prepared]] = {
    "pretrain": prepare_pretrain,
    "sft": prepare_sft,
    "reward": prepare_reward,
    "ppo": prepare_ppo,
    "grpo": prepare_grpo,
}
