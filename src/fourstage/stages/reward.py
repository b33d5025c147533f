"""Stage 3a, the reward model: learn which of two answers a human prefers.

    p(chosen > rejected) = sigmoid(r_chosen - r_rejected)
    loss = -mean log p(chosen > rejected)                    bradley_terry_loss

Bradley-Terry (Stiennon et al. 2020, arXiv 2009.01325), r read at the last real token of prompt +
answer.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric

from fourstage import data
from fourstage.batch import PairBatch
from fourstage.data.datamodule import reward_data
from fourstage.data.fits import check_preferences
from fourstage.errors import UserError
from fourstage.files import read_jsonl, write_jsonl
from fourstage.job import StageJob
from fourstage.model import ScalarModel, Transformer
from fourstage.rl.rewards import RULE_VERSION, true_score
from fourstage.rl.rollout import fitted_prompt
from fourstage.runs.records import write_record
from fourstage.sampling.generate import LEAST_TEMPERATURE, Sampler, Sampling, sampler_of
from fourstage.stages.base import Numbers, StageModule, StageSettings, at_least
from fourstage.stages.prepare import (
    Prepared,
    as_planned,
    device_of,
    heldout_rows,
    loader_options,
    parent_policy,
    rank,
    say,
)
from fourstage.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Settings(StageSettings):
    """`stages.reward`"""

    max_tokens: int = at_least(8)  # of prompt and answer; longer prompts lose their beginning
    margin: float = at_least(0)
    centre_coef: float = at_least(0)
    # for data=embedded, which samples its pairs from the sft parent:
    pairs_per_prompt: int = at_least(1)
    max_new_tokens: int = at_least(1)
    temperature: float = at_least(LEAST_TEMPERATURE)


def bradley_terry_loss(
    chosen_B: Tensor, rejected_B: Tensor, margin: float = 0.0, centre_coef: float = 0.0
) -> Tensor:
    """Per-pair loss, float32 [B]: -logsigmoid(r_c - r_r - margin) + c (r_c + r_r)^2.

    The second term keeps the rewards around 0 (Eisenstein et al. 2023, arXiv 2312.09244).
    """
    loss_B = -F.logsigmoid(chosen_B - rejected_B - margin)
    return loss_B + centre_coef * (chosen_B + rejected_B).square()


class RewardModule(StageModule):
    """Trains a ScalarModel that starts from the sft weights on PairBatch rows."""

    uses_dropout = False  # two scores are compared (Stiennon et al. 2020)

    def __init__(self, reward: ScalarModel, settings: Settings, seed: int) -> None:
        super().__init__(settings, seed)
        self.reward = reward
        self.val_accuracy, self.val_nll = MeanMetric(), MeanMetric()

    def result(self) -> ScalarModel:
        return self.reward

    def score_pairs(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Scores of the chosen and of the rejected answers, each [B]."""
        chosen_B = self.reward.last(batch.chosen_ids, batch.chosen_len)
        return chosen_B, self.reward.last(batch.rejected_ids, batch.rejected_len)

    def training_step(self, batch: PairBatch, batch_idx: int) -> None:
        s = self.settings
        n_pairs = len(batch.chosen_len) * self.trainer.world_size

        def piece(rows: slice) -> tuple[Tensor, Numbers]:
            chosen_B, rejected_B = self.score_pairs(batch.rows(rows))
            loss_B = bradley_terry_loss(chosen_B, rejected_B, s.margin, s.centre_coef)
            return loss_B.sum() / n_pairs, {"chosen": chosen_B, "rejected": rejected_B}

        norm, seen = self.update(piece, len(batch.chosen_len))
        chosen_B, rejected_B = seen["chosen"], seen["rejected"]
        metrics = {
            "loss": bradley_terry_loss(chosen_B, rejected_B, s.margin, s.centre_coef).mean(),
            "accuracy": (chosen_B > rejected_B).float().mean(),
            "margin": (chosen_B - rejected_B).mean(),
            "reward_min": -self.max_over_ranks(-torch.minimum(chosen_B, rejected_B).min()),
            "reward_mean": (chosen_B + rejected_B).mean() / 2,
            "reward_max": self.max_over_ranks(torch.maximum(chosen_B, rejected_B).max()),
            "grad_norm": norm,
        }
        self.log_step(metrics, tokens=batch.chosen_len.sum() + batch.rejected_len.sum())

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        chosen_B, rejected_B = self.score_pairs(batch)
        self.val_accuracy.update((chosen_B > rejected_B).float())
        self.val_nll.update(bradley_terry_loss(chosen_B, rejected_B))
        # not "val/loss", which is nats per token everywhere
        self.log_dict({"val/accuracy": self.val_accuracy, "val/pair_nll": self.val_nll})


# --- pairs of the policy's own answers, labelled by the hidden rule

PAIRS_VERSION = 2  # of how pairs are sampled and stored; 1 didn't keep which answers were truncated
PAIR_FILES = ("pairs.jsonl", "pairs_heldout.jsonl")  # train and held-out side
WAIT = 0.2  # seconds between the other ranks' looks at what rank 0 writes


def sample_pairs(
    sampler: Sampler,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    score: Callable[[int, str, bool], float],
    settings: Settings,
    seed: int,
) -> tuple[list[dict[str, Any]], int]:
    """Make preference pairs as a human labeller would see them: two answers, one preferred.

    Each prompt is answered twice, `pairs_per_prompt` times over; a pair of equal score (of the
    prompt's index, the answer, and whether it stopped) is sampled once more, then skipped. Returns
    rows {"prompt": index, "chosen", "rejected"}, with "unfinished": [side, ...] if an answer was
    truncated, and the number of skipped pairs.
    """
    wanted = [index for index in range(len(prompts)) for _ in range(settings.pairs_per_prompt)]
    rows: list[dict[str, Any]] = []
    for attempt in range(2):
        if not wanted:
            break
        sampling = Sampling(
            max_new_tokens=settings.max_new_tokens,
            stop_id=tokenizer.eot_id,
            temperature=settings.temperature,
            seed=2 * seed + attempt,
        )
        asked = [index for index in wanted for _ in range(2)]
        generation = sampler([prompts[index] for index in asked], sampling)
        texts = map(tokenizer.decode, generation.answer_ids)
        answers = [
            (score(index, text, stopped), text, stopped)
            for index, text, stopped in zip(asked, texts, generation.stopped, strict=True)
        ]
        tied = []
        for index, *pair in zip(wanted, answers[::2], answers[1::2], strict=True):
            (low, rejected, rejected_stopped), (high, chosen, chosen_stopped) = sorted(pair)
            if low == high:
                tied.append(index)
                continue
            row = {"prompt": index, "chosen": chosen, "rejected": rejected}
            sides = {"chosen": chosen_stopped, "rejected": rejected_stopped}
            if unfinished := [side for side, stopped in sides.items() if not stopped]:
                row["unfinished"] = unfinished
            rows.append(row)
        wanted = tied
    return rows, len(wanted)


def sampled_pairs(job: StageJob, policy: Transformer, tokenizer: Tokenizer) -> data.Pairs:
    """The pairs of data=embedded: two answers of the sft policy, one preferred by the hidden rule.

    Rank 0 samples them, before the processes meet, into PAIR_FILES: the other ranks read these, and
    so does a resumed run.
    """
    s, prompts = job.settings, as_planned(job, data.load_prompts(job.data))
    sides = zip(PAIR_FILES, (prompts.train, prompts.heldout), strict=True)
    for draw, (name, records) in enumerate(sides):
        path = job.folder / name
        while rank() > 0 and not path.exists():  # if rank 0 ends, so does this: lineage/ranks.py
            time.sleep(WAIT)
        if path.exists():
            continue
        say(f"  sampling two answers to each of {len(records):,} prompts for {name}")

        def score(index: int, answer: str, stopped: bool, of: Any = records) -> float:
            return true_score(answer, stopped, of[index].references)

        room = s.max_tokens - s.max_new_tokens
        ids = [fitted_prompt(tokenizer, record.prompt_messages, room) for record in records]
        sampler, seed = sampler_of(policy.to(device_of(job))), 2 * job.seed + draw
        rows, skipped = sample_pairs(sampler, tokenizer, ids, score, s, seed)
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
    train, heldout = (
        [
            data.Pair(r["prompt"], r["chosen"], r["rejected"], tuple(r.get("unfinished", ())))
            for r in read_jsonl(folder / name)
        ]
        for name in PAIR_FILES
    )
    return data.Pairs(train, heldout, digest="", notes={})


# --- what ladder.py asks for


def prepare(job: StageJob) -> Prepared:
    policy, tokenizer = parent_policy(job)
    stored = data.load_preference(job.data)
    pairs = as_planned(job, stored) if stored else sampled_pairs(job, policy, tokenizer)
    options = {"max_tokens": job.settings.max_tokens, **loader_options(job)}
    loaders = reward_data(pairs.train, pairs.heldout, tokenizer, **options)
    module = RewardModule(ScalarModel(policy), job.settings, job.seed)
    return Prepared(module, loaders, heldout_rows(loaders, job), tokenizer)


def check_data(
    config: data.DataConfig, settings: Settings, tokenizer: Tokenizer, max_seq_len: int
) -> list[str]:
    lengths = settings.max_tokens, settings.max_new_tokens
    return check_preferences(config, tokenizer, *lengths, max_seq_len)


def identity(config: data.DataConfig) -> dict[str, Any]:
    """What else decides the sampled pairs, as part of the run's id."""
    return {"pairs": [PAIRS_VERSION, RULE_VERSION]} if config.has_hidden_rule else {}
