"""Trains the stages on one or more CPU processes and keeps what each process saw.

`python -m tests.stages.matrix TRAINER RANKS STEPS FOLDER STAGE...` writes STAGE-RANK.pt: the loss
of every optimizer step over all ranks, the metrics of every training step, the weights at the end.
In ppo and grpo the answers are fixed; the stage "sampled" is grpo with its own sampler, which
answers tied groups once more, and "skipped" is sft with two steps whose loss or gradient is not
finite on the last rank. A stage of which the name ends in _muon has that optimizer, one in _bf16
that precision, and one in _large takes its vocabulary for a large one, with the logits of a few
tokens at a time.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from fourstage.job import TrainerConfig
from fourstage.model import Transformer
from fourstage.parallel import strategies
from fourstage.sampling.generate import Generation, Sampling
from fourstage.stages import (
    GRPOModule,
    PPOModule,
    PretrainModule,
    RewardModule,
    SFTModule,
    StageModule,
    grpo,
    supervised,
)
from tests.cpu_as_cuda import let_deepspeed_use_cpus, on_cpus
from tests.fakes import one_by_one
from tests.parallel.test_ranks import Shards
from tests.stages import test_grpo, test_ppo
from tests.stages.test_reward import pairs
from tests.stages.test_supervised import ragged
from tests.stages.tiny import (
    TINY,
    TOKENIZER,
    make_policy,
    make_scalar,
    prompt_batches,
    settings,
    weights,
)

STAGES = ("pretrain", "sft", "reward", "ppo", "grpo", "tied")  # tied: sft of another model
MUON = ("pretrain_muon", "tied_muon", "ppo_muon")
LARGE = ("pretrain_large", "tied_large")
# clipping, weight decay, warm-up and the router's bias are all at work
SHARED = {"lr": 0.003, "micro_batch_size": 2, "clip_norm": 0.5, "weight_decay": 0.1, "warmup": 0.3}


def make(stage: str, steps: int) -> tuple[StageModule, list[Any]]:
    """A stage of the tiny model, and batches of eight rows (of four prompts in ppo and grpo)."""
    shared = {**SHARED, "max_steps": steps, "max_time": None}
    shared["optimizer"] = "muon" if stage.endswith("_muon") else "adamw"
    for special in ("_muon", "_bf16", "_large"):
        stage = stage.removesuffix(special)
    if stage == "pretrain":
        module = PretrainModule(make_policy(), settings(stage, **shared), 0, 10, 10)
        return module, [ragged(8, seed=step) for step in range(steps)]
    if stage in ("sft", "tied", "skipped"):
        policy = tied_policy() if stage == "tied" else make_policy()
        module = SFTModule(policy, settings("sft", **shared), 0)
        return module, [ragged(8, seed=step) for step in range(steps)]
    if stage == "reward":
        module = RewardModule(make_scalar(), settings(stage, **shared), 0)
        return module, [pairs(8, seed=step) for step in range(steps)]
    if stage == "ppo":
        own = {"minibatch_size": 2, "balance_router": True, "kl_target": 1.0}
        s = settings(stage, **{**test_ppo.SMALL, **shared, **own})
        networks = {"value": make_scalar(3), "reference": make_policy(4), "reward": make_scalar(5)}
        module = PPOModule(
            make_policy(),
            **networks,
            tokenizer=TOKENIZER,
            settings=s,
            seed=0,
            sampler_of=lambda policy: fixed_answers,
        )
        return module, prompt_batches(steps)
    changes = {**test_grpo.SMALL, **shared, "balance_router": True, "epochs": 2, "kl_coef": 0.1}
    if stage == "sampled":
        changes["resample_rounds"] = 2
    s = settings("grpo", **changes)
    sampler = {} if stage == "sampled" else {"sampler_of": lambda policy: fixed_answers}
    module = GRPOModule(make_policy(), make_policy(7), TOKENIZER, s, 0, **sampler)
    return module, prompt_batches(steps)


def tied_policy() -> Transformer:
    """Its head reads the embedding's weight; it has a shared expert, and no query-key norm.

    Two shares of three blocks end inside a matrix.
    """
    torch.manual_seed(1)
    shape = replace(TINY, tie_embeddings=True, d_shared=16, qk_norm=False, n_layers=3)
    return Transformer(shape, TOKENIZER.vocab_size)


def fixed_answers(prompts: list[list[int]], sampling: Sampling) -> Generation:
    """Answers that depend on the prompt, its place in its group and the step; not on the rank."""
    answers = []
    for row, prompt in enumerate(prompts):
        draw = 100 * len(prompt) + 10 * prompts[:row].count(prompt) + Keep.step
        generator = torch.Generator().manual_seed(draw)
        length = 1 + draw * 7 % 8
        answers.append(torch.randint(6, 100, (length,), generator=generator).tolist())
    return Generation(answers, None, [len(answer) % 2 == 0 for answer in answers])


def spoilt(share: torch.Tensor, step: int) -> torch.Tensor:
    """In the third step an infinite loss, in the fifth a finite one whose gradient is no number."""
    if step == 2:
        return share + torch.inf
    return share + (0 * share).sqrt() if step == 4 else share


class Keep(L.Callback):
    """What happened in a stage; the loss is added up where a share of it is computed."""

    step = 0

    def __init__(self, path: Path, spoils: bool = False) -> None:
        self.path, self.spoils = path, spoils
        self.losses: list[float] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        signal.alarm(90)  # ranks that wait for each other end here
        update = module.update

        def summed(piece: Any, n_rows: int) -> torch.Tensor:
            total = torch.zeros((), device=module.device)

            def counted(rows: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                share, numbers = piece(rows)
                if self.spoils and module.global_rank == trainer.world_size - 1:
                    share = spoilt(share, Keep.step)
                total.add_(share.detach())
                return share, numbers

            norm_and_seen = update(counted, n_rows)
            self.losses.append(module.sum_over_ranks(total).item())
            return norm_and_seen

        module.update = summed

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        Keep.step += 1
        self.metrics.append({k: v.item() for k, v in trainer.callback_metrics.items()})

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        signal.alarm(0)  # or it would end the tests that train in their own process

    def save(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        found = {"losses": self.losses, "metrics": self.metrics, "weights": weights(module)}
        torch.save(found, f"{self.path}-{trainer.global_rank}.pt")


def train(name: str, ranks: int, steps: int, folder: Path, stage: str) -> None:
    Keep.step = 0
    module, batches = make(stage, steps)
    precision: Any = "bf16-mixed" if stage.endswith("_bf16") else "32-true"
    where = TrainerConfig(accelerator="cpu", devices=ranks, strategy=name, precision=precision)
    options = strategies.trainer_options(where, module.settings.clip_norm)
    if name in strategies.ZERO:
        on_cpus(options)
    keep = Keep(folder / stage, spoils=stage.startswith("skipped"))
    trainer = L.Trainer(
        **options,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[keep],
    )
    trainer.fit(module, datamodule=Shards(batches, trims=stage in LARGE))
    keep.save(trainer, module)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    trainer_name, n_ranks, n_steps, path, *names = sys.argv[1:]
    grpo.reasoning_rewards = one_by_one(test_grpo.reward_by_text)
    if trainer_name in strategies.ZERO:
        let_deepspeed_use_cpus()
    for stage_name in names:
        large, at_once = (0, 11) if stage_name in LARGE else (4096, 8192)
        supervised.LARGE_VOCABULARY, supervised.LOGITS_AT_ONCE = large, at_once
        train(trainer_name, int(n_ranks), int(n_steps), Path(path), stage_name)
