"""What a stage costs: every FLOP and token of a training step counted once, over resumes too."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.flop_counter import FlopCounterMode
from torchdata.stateful_dataloader import StatefulDataLoader

from fourstage.batch import TokenBatch
from fourstage.lineage.resume import Checkpointer, ResumeIO
from fourstage.rl.rewards import ReasoningReward
from fourstage.stages import (
    GRPOModule,
    PPOModule,
    PretrainModule,
    RewardModule,
    SFTModule,
    StageModule,
)
from fourstage.stages import grpo as grpo_stage
from fourstage.tracking.callbacks import RouterHealth, StepAxis, StepSeed
from fourstage.tracking.cost import CostMeter, Spent, mfu, peak_flops
from fourstage.tracking.loggers import MetricsCSV
from tests.fakes import one_by_one
from tests.stages.test_grpo import SMALL as GRPO
from tests.stages.test_ppo import SMALL as PPO
from tests.stages.test_reward import pairs
from tests.stages.test_supervised import ragged
from tests.stages.tiny import (
    TINY,
    TOKENIZER,
    as_is,
    distance,
    fit,
    make_policy,
    make_scalar,
    prompt_batches,
    steady,
    weights,
)

LOOP = replace(TINY, expert_path="loop")  # torch counts no grouped product
STAGES = ("pretrain", "sft", "reward", "ppo", "grpo")
ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]]


def build(stage: str, model=LOOP, **changes) -> tuple[StageModule, list[Any]]:
    """A stage and three steps' batches."""
    few = {"max_steps": 3, "micro_batch_size": 3, "lr": 0.02} | changes
    if stage == "reward":
        module = RewardModule(make_scalar(model=model), steady("reward", **few), 0)
        return module, [pairs(4, seed=i) for i in range(3)]
    if stage == "ppo":
        s = steady("ppo", **PPO | few)
        networks = (make_policy(model=model), make_scalar(model=model))
        frozen = (make_policy(7, model), make_scalar(8, model))
        return PPOModule(*networks, *frozen, TOKENIZER, s, 0), prompt_batches(3)
    if stage == "grpo":
        s = steady("grpo", **GRPO | {"kl_coef": 0.1} | few)
        policies = (make_policy(model=model), make_policy(7, model))
        return GRPOModule(*policies, TOKENIZER, s, 0), prompt_batches(3)
    policy, s = make_policy(model=model), steady(stage, **few)
    module = PretrainModule(policy, s, 0, 1, 1) if stage == "pretrain" else SFTModule(policy, s, 0)
    return module, [ragged(5, seed=i) for i in range(3)]


@pytest.fixture(autouse=True)
def judged(monkeypatch):
    def reward(problem, text: str, stopped: bool) -> ReasoningReward:
        return ReasoningReward((sum(map(ord, text)) % 3) / 2, float(stopped))

    monkeypatch.setattr(grpo_stage, "reasoning_rewards", one_by_one(reward))


# --- FLOPs and tokens


@pytest.mark.parametrize("stage", STAGES)
def test_the_flops_of_a_stage_equal_torchs_counter(stage, monkeypatch):
    """Rollouts, reference, reward and value passes, updates: all of them, and nothing else."""
    monkeypatch.setattr("fourstage.model.ops.has_kernels", lambda *_: False)  # it sees torch's only
    module, batches = build(stage, optimizer="adamw")  # Muon's products are the optimizer's
    meter = CostMeter()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        fit(module, batches[:1], callbacks=[meter])
    assert meter.spent.flops == counter.get_total_flops() > 0


def test_validation_counts_for_no_training_step():
    costs = []
    for val in ([], [ragged(3)]):
        module, batches = build("sft")
        meter = CostMeter()
        trainer = fit(module, batches, val, callbacks=[meter], val_check_interval=1)
        costs.append(meter.cost(3, 1))
        assert (meter.spent.eval_seconds > 0) == bool(val)
        assert "speed/tflops" in trainer.callback_metrics
    assert costs[0]["flops"] == costs[1]["flops"]
    assert costs[0]["tokens"] == costs[1]["tokens"] == sum(int(b.valid.sum()) for b in batches)


def test_the_tokens_of_pairs_are_those_of_both_answers():
    module, batches = build("reward")
    meter = CostMeter()
    fit(module, batches, callbacks=[meter])
    assert meter.spent.tokens == sum(int((b.chosen_len + b.rejected_len).sum()) for b in batches)
    assert "tokens_generated" not in meter.cost(3, 1)


# --- the device


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),  # a part of one
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA A10", 125.0),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("Tesla V100-PCIE-16GB", 112.0),
        ("Tesla T4", 65.0),
        ("NVIDIA T400", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device(device, tflops):
    want = None if tflops is None else pytest.approx(tflops * 1e12)
    assert peak_flops(device, "bf16-mixed") == want
    assert peak_flops(device, "16-mixed") == want
    assert peak_flops(device, "32-true") is None


def test_utilisation_by_hand():
    # 6e15 FLOPs in 20 s are 3e14 a second, of the 1e15 that two devices can do
    assert mfu(6e15, 20.0, 5e14, 2) == pytest.approx(0.3)


def test_utilisation_is_logged_where_the_peak_is_known():
    module, batches = build("sft")
    meter = CostMeter(peak=1e12)
    metrics = fit(module, batches, callbacks=[meter]).callback_metrics
    assert metrics["speed/mfu"] == pytest.approx(metrics["speed/tflops"].item())
    spent = meter.spent
    want = spent.flops / spent.train_seconds / 1e12
    assert meter.cost(3, 1)["mfu"] == pytest.approx(want, abs=1e-5)


def test_what_a_finished_stage_reports():
    meter = CostMeter(peak=1e12)
    meter.spent = Spent(100.0, 50.0, 20.0, tokens=1000, tokens_generated=400, flops=4 * 10**12)
    cost = meter.cost(steps=7, devices=2)
    assert cost.pop("seconds") == pytest.approx(100.0, abs=0.2)
    assert cost.pop("peak_memory_mib") > 50
    assert cost == {
        "train_seconds": 50.0,
        "eval_seconds": 20.0,
        "steps": 7,
        "tokens": 1000,
        "tokens_generated": 400,
        "flops": 4 * 10**12,
        "tokens_per_s": 20.0,
        "mfu": 0.04,
    }


# --- resume


class Steps(IterableDataset):
    """Batches that can be resumed, as the data module's."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches, self.step = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        while self.step < len(self.batches):
            self.step += 1
            yield self.batches[self.step - 1]
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class Die(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx + 1 == self.step:
            raise RuntimeError("killed")


def attempt(folder: Path, stage: str, *extra: L.Callback) -> tuple[StageModule, CostMeter]:
    """Six steps that log at every third and save after every second; goes on where it can."""
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    resume = checkpoint.exists()
    module, batches = build(stage, TINY, max_steps=6)
    meter = CostMeter()
    trainer = L.Trainer(
        accelerator="cpu",
        plugins=[ResumeIO()],
        max_epochs=1,
        logger=[MetricsCSV(folder / "metrics.csv", resume=resume)],
        callbacks=[
            StepSeed(0, stage),
            meter,
            StepAxis(),
            RouterHealth(ROWS, every=3),
            Checkpointer(checkpoint, every=2),
            *extra,
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=3,
        default_root_dir=folder,
    )
    loader = StatefulDataLoader(Steps(batches * 2), batch_size=None, collate_fn=as_is)
    val = DataLoader([ragged(3)], batch_size=None, collate_fn=as_is)
    trainer.fit(
        module,
        loader,
        val if stage == "pretrain" else None,
        ckpt_path=checkpoint if resume else None,
        weights_only=True,
    )
    return module, meter


def rows_without_speed(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [
            {k: v for k, v in row.items() if not k.startswith("speed/")}
            for row in csv.DictReader(file)
        ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", ["pretrain", "reward", "ppo"])
def test_a_resumed_run_counts_and_logs_what_an_undisturbed_one_does(stage, tmp_path):
    """It dies between two logs, after a step that no checkpoint has."""
    calm, calm_meter = attempt(tmp_path / "calm", stage)
    with pytest.raises(RuntimeError, match="killed"):
        attempt(tmp_path / "killed", stage, Die(step=6))
    resumed, meter = attempt(tmp_path / "killed", stage)
    assert distance(weights(calm), weights(resumed)) == 0
    rows = rows_without_speed(tmp_path / "calm")
    assert [row["step"] for row in rows] == ["3", "6"]
    assert float(rows[1]["router/drift"]) > 0
    assert rows_without_speed(tmp_path / "killed") == rows
    for name in ("tokens", "tokens_generated", "flops"):
        assert getattr(meter.spent, name) == getattr(calm_meter.spent, name), name
    assert meter.spent.tokens > 0
    assert meter.so_far().seconds > meter.spent.train_seconds > 0


def test_times_before_and_after_a_resume_add_up():
    first, second = CostMeter(), CostMeter()
    first.spent = Spent(seconds=7.0, train_seconds=2.0, eval_seconds=3.0, tokens=5, flops=6)
    second.spent.eval_seconds = 0.5  # random weights, evaluated before the state is read
    second.load_state_dict(first.state_dict())
    spent = second.so_far()
    assert (spent.train_seconds, spent.eval_seconds) == (2.0, 3.5)
    assert (spent.tokens, spent.flops) == (5, 6)
    assert spent.seconds == pytest.approx(7.0, abs=0.2)


def test_a_batch_without_padding_counts_every_token():
    ids = torch.randint(6, 100, (3, 9))
    module, _ = build("pretrain")
    fit(module, [TokenBatch(ids[:, :-1], ids[:, 1:])])
    assert module.tokens_seen == 24
