"""Two processes (DDP over gloo) take the step that one takes on all rows. Slow: real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from fourstage.batch import PairBatch, PromptBatch, TokenBatch
from fourstage.rl.rewards import ReasoningReward
from fourstage.stages import GRPOModule, RewardModule, SFTModule
from fourstage.stages import grpo as grpo_stage
from fourstage.stages.base import StageModule
from fourstage.tracking.callbacks import RouterHealth
from fourstage.tracking.cost import CostMeter
from tests.fakes import one_by_one
from tests.stages.test_grpo import SMALL, reward_by_text
from tests.stages.test_reward import pairs
from tests.stages.test_supervised import ragged
from tests.stages.tiny import (
    TOKENIZER,
    as_is,
    distance,
    make_policy,
    make_scalar,
    prompt_batches,
    steady,
    weights,
    with_balance,
)

ROOT = Path(__file__).parents[2]
SHARED = {"lr": 0.1, "max_steps": 2, "micro_batch_size": 2}


def weights_after(stage: str, ranks: int, folder: Path) -> list[dict[str, torch.Tensor]]:
    """Every rank's final weights; the processes are started from a fresh one."""
    command = [sys.executable, "-m", __spec__.name, stage, str(ranks), str(folder)]
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(folder / f"{stage}-{ranks}-{rank}.pt") for rank in range(ranks)]


def logged(stage: str, ranks: int, folder: Path) -> list[dict[str, float]]:
    """What every rank counted and said of its routers, after `weights_after`."""
    paths = [folder / f"{stage}-{ranks}-{rank}.json" for rank in range(ranks)]
    return [json.loads(path.read_text()) for path in paths]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_two_ranks_of_four_rows_equal_one_of_eight(stage, tmp_path):
    (alone,) = weights_after(stage, 1, tmp_path)
    first, second = weights_after(stage, 2, tmp_path)
    assert distance(first, second) == 0
    assert distance(alone, first) < 1e-6
    (one,), two = logged(stage, 1, tmp_path), logged(stage, 2, tmp_path)
    assert one["tokens"] > 0 and one["flops"] > 0 and one["router/max_over_mean"] > 1
    for rank in two:
        assert rank == pytest.approx(one, rel=1e-4)
    start = weights({"sft": make_policy, "reward": make_scalar}[stage]())
    assert distance(start, {name.split(".", 1)[1]: w for name, w in alone.items()}) > 1e-2


@pytest.mark.slow
def test_ranks_with_more_and_fewer_tied_groups_stay_in_step(tmp_path):
    """Rank 0 has one tied group of two, rank 1 has none: neither waits for ever."""
    first, second = weights_after("grpo", 2, tmp_path)
    assert distance(first, second) == 0


# --- what the processes run


class Shards(L.LightningDataModule):
    """Rank r of w reads the rows r::w of every batch, trimmed to the longest of them or not."""

    def __init__(self, batches: list, trims: bool = False) -> None:
        super().__init__()
        self.batches, self.trims = batches, trims

    def train_dataloader(self) -> DataLoader:
        own = slice(self.trainer.global_rank, None, self.trainer.world_size)
        shards = [shard(b, own) for b in self.batches]
        shards = [trimmed(b) for b in shards] if self.trims else shards
        return DataLoader(shards, batch_size=None, collate_fn=as_is)


def shard(batch: TokenBatch | PairBatch | PromptBatch, own: slice):
    if isinstance(batch, PairBatch):
        return batch.rows(own)
    return type(batch)(*(rows[own] for rows in vars(batch).values()))


def trimmed(batch: TokenBatch) -> TokenBatch:
    longest = int(batch.valid.sum(1).max())
    return TokenBatch(batch.ids[:, :longest], batch.targets[:, :longest])


class Save(L.Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        signal.alarm(60)  # ranks that wait for each other end here

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        torch.save(weights(module), f"{self.path}-{trainer.global_rank}.pt")
        found = {k: v.item() for k, v in trainer.callback_metrics.items() if "router/" in k}
        meters = [c for c in trainer.callbacks if isinstance(c, CostMeter)]
        found |= {"tokens": meters[0].spent.tokens, "flops": meters[0].spent.flops}
        Path(f"{self.path}-{trainer.global_rank}.json").write_text(json.dumps(found))


def sgd(self: StageModule) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], self.settings.lr)


def first_group_tied(problem: int, text: str, stopped: bool) -> ReasoningReward:
    return ReasoningReward(1.0, 1.0) if problem == 0 else reward_by_text(problem, text, stopped)


def main(stage: str, ranks: int, folder: str) -> None:
    StageModule.configure_optimizers = sgd
    grpo_stage.reasoning_rewards = one_by_one(first_group_tied)
    if stage == "sft":
        policy = make_policy(model=with_balance("bias", z_loss_coef=0.5))
        module = SFTModule(policy, steady("sft", **SHARED, balance_router=True), 0)
        batches = [ragged(8)] * 2
    elif stage == "reward":
        module = RewardModule(make_scalar(), steady("reward", **SHARED), 0)
        batches = [pairs(8)] * 2
    else:
        s = steady("grpo", **SMALL | SHARED)
        module = GRPOModule(make_policy(), make_policy(), TOKENIZER, s, 0)
        batches = prompt_batches(2)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp_fork" if ranks > 1 else "auto",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[
            CostMeter(),
            RouterHealth([[5, 6, 7, 8]], every=1),
            Save(f"{folder}/{stage}-{ranks}"),
        ],
    )
    trainer.fit(module, datamodule=Shards(batches))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
