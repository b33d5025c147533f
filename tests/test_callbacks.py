"""Logs, samples and resume state around training steps, on a module of one parameter."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from fourstage.callbacks import (
    Checkpointer,
    PlanProgress,
    Sample,
    SampleLog,
    StepAxis,
    StepSeed,
    step_seed,
    time_left,
)
from fourstage.interruptions import STOPS, Stopped
from fourstage.loggers import MetricsCSV

N_STEPS, VAL_EVERY = 12, 4


class Numbers(IterableDataset):
    """Step-indexed and resumable, as the data module's batches are."""

    step = 0

    def __len__(self) -> int:
        return N_STEPS

    def __iter__(self):
        while self.step < N_STEPS:
            self.step += 1
            yield torch.tensor([float(self.step)])
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class Tiny(LightningModule):
    """Moves one weight by the batch and by torch's randomness."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.steps_of_this_process: list[int] = []
        self.skipped_in_a_row = 0

    def progress(self) -> float:
        return (self.trainer.fit_loop.epoch_loop.batch_progress.total.ready) / N_STEPS

    def training_step(self, batch, batch_idx) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.weight * batch * torch.rand(1)).sum())
        optimizer.step()
        self.steps_of_this_process.append(batch_idx + 1)
        self.log("train/loss", self.weight.item())

    def validation_step(self, batch, batch_idx) -> None:
        self.log("val/loss", self.weight.sum())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class Die(Callback):
    """Raises after a step, as a kill would, or inside a validation."""

    def __init__(self, step: int = 0, in_validation_of: int = 0) -> None:
        self.step, self.in_validation_of = step, in_validation_of

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx + 1 == self.step:
            raise RuntimeError("killed")

    def on_validation_start(self, trainer, module) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        if done == self.in_validation_of:
            raise RuntimeError("killed")


def fit(folder: Path, *extra: Callback, every: int = 3, log_every: int = 1) -> Tiny:
    """Trains, or resumes where folder holds a checkpoint."""
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    resume = checkpoint.exists()
    module = Tiny()
    samples = SampleLog(
        folder / "samples.jsonl",
        lambda: [Sample("p1", "What is an LLM?", f"{module.weight.item():.4f}", True)],
        every=5,
        at_start=True,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=[MetricsCSV(folder / "metrics.csv", resume=resume)],
        callbacks=[
            Checkpointer(checkpoint, every),
            StepAxis(),
            StepSeed(0, "tiny"),
            samples,
            *extra,
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=VAL_EVERY,
        log_every_n_steps=log_every,
        default_root_dir=folder,
    )
    trainer.fit(
        module,
        StatefulDataLoader(Numbers(), batch_size=None),
        DataLoader([torch.zeros(1)], batch_size=None),
        ckpt_path=checkpoint if resume else None,
    )
    return module


def read(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "metrics.csv").read_text())))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Tiny]:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(folder)


def test_metrics_of_a_run(whole) -> None:
    rows = read(whole[0])
    assert [int(row["step"]) for row in rows] == list(range(1, N_STEPS + 1))
    assert list(rows[0])[0] == "step" and "epoch" not in rows[0]
    assert [row["step"] for row in rows if row["val/loss"]] == ["4", "8", "12"]
    assert rows[-1]["val/loss"] == f"{whole[1].weight.item():.9g}" == rows[-1]["train/loss"]


def test_samples_of_a_run(whole) -> None:
    rows = [json.loads(line) for line in (whole[0] / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 5, 10, 12]
    assert list(rows[0]) == ["step", "prompt_id", "prompt", "answer", "stopped"]
    assert rows[-1]["answer"] == f"{whole[1].weight.item():.4f}"


@pytest.mark.parametrize(
    ("die", "every", "first"),
    [
        (Die(step=5), 3, 4),  # between checkpoints
        (Die(step=4), 3, 1),  # before its row and state are in place
        (Die(step=10), 4, 9),  # the checkpoint was saved after a validation
        (Die(in_validation_of=4), 2, 3),  # its step has a checkpoint due
        (Die(in_validation_of=12), 3, 10),  # in the last validation
    ],
)
def test_resume_is_bit_identical_and_loses_no_row(
    tmp_path, whole, die: Die, every: int, first: int
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, die, every=every)
    resumed = fit(tmp_path, every=every)
    assert resumed.steps_of_this_process == list(range(first, N_STEPS + 1))
    assert torch.equal(resumed.weight, whole[1].weight)
    assert read(tmp_path) == read(whole[0])
    assert (tmp_path / "samples.jsonl").read_text() == (whole[0] / "samples.jsonl").read_text()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["last.ckpt"]


class Signal(Callback):
    """A signal arrives before a step, or in the validation after one."""

    def __init__(self, signum: int, step: int = 0, in_validation_of: int = 0) -> None:
        self.signum, self.step, self.in_validation_of = signum, step, in_validation_of

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx + 1 == self.step:
            os.kill(os.getpid(), self.signum)

    def on_validation_start(self, trainer, module) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.in_validation_of:
            os.kill(os.getpid(), self.signum)


@pytest.fixture
def handlers():
    """Whoever handled the signals gets them back when training ends."""
    before = [signal.getsignal(signum) for signum in STOPS]
    yield
    assert [signal.getsignal(signum) for signum in STOPS] == before


@pytest.mark.parametrize(
    ("sent", "done"),
    [
        (Signal(signal.SIGTERM, step=7), 7),
        (Signal(signal.SIGUSR1, step=7), 7),
        (Signal(signal.SIGTERM, step=8), 8),  # a validation follows, and is not lost
        (Signal(signal.SIGUSR1, in_validation_of=4), 4),
    ],
)
def test_a_signal_saves_after_the_step_and_stops(tmp_path, whole, handlers, sent, done) -> None:
    with pytest.raises(Stopped) as caught:
        fit(tmp_path, sent, every=100)
    assert caught.value.code == 128 + sent.signum
    assert caught.value.line == (
        f"{tmp_path.name}, step {done}: stopped by {signal.Signals(sent.signum).name}: "
        f"run the same command again: it goes on from step {done}"
    )
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] == done
    assert torch.equal(fit(tmp_path).weight, whole[1].weight)
    assert read(tmp_path) == read(whole[0])


def test_a_second_signal_does_not_wait(tmp_path, handlers) -> None:
    with pytest.raises(Stopped, match="138"):
        fit(tmp_path, Signal(signal.SIGTERM, step=8), Signal(signal.SIGUSR1, step=8))
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] == 6


def test_the_last_state_is_that_before_the_first_skipped_step(tmp_path) -> None:
    class Skip(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            module.skipped_in_a_row = max(0, batch_idx + 1 - 4)  # from step 5 on

    with pytest.raises(Stopped) as caught:
        fit(tmp_path, Skip(), Signal(signal.SIGTERM, step=9), every=1)
    assert caught.value.line.endswith("it goes on from step 4")


def test_the_end_of_training_is_saved_too(tmp_path) -> None:
    """A kill in the evaluation that follows costs no step."""
    fit(tmp_path, every=5)
    assert fit(tmp_path, every=5).steps_of_this_process == []
    fit(tmp_path / "short", every=1000)  # states are not wanted
    assert not (tmp_path / "short" / "checkpoints" / "last.ckpt").exists()


def test_a_failed_save_leaves_the_old_state(tmp_path, monkeypatch) -> None:
    def full_disk(trainer: Trainer, path: Path) -> None:
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, Die(step=5))
    before = (tmp_path / "checkpoints" / "last.ckpt").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Trainer, "save_checkpoint", full_disk)
        fit(tmp_path)
    assert (tmp_path / "checkpoints" / "last.ckpt").read_bytes() == before
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_step_seed_depends_on_everything() -> None:
    seeds = {
        step_seed(s, g, r, i)
        for s in (0, 1)
        for g in ("sft", "ppo")
        for r in (0, 1)
        for i in (0, 1)
    }
    assert len(seeds) == 16
    assert step_seed(0, "sft", 0, 0) == step_seed(0, "sft", 0, 0)
    torch.manual_seed(max(seeds))  # torch takes them


def test_time_left() -> None:
    assert time_left(130.2, []) == "0:02:10 left"
    text = time_left(60, [("reward", 60.0), ("ppo", None), ("grpo", 3600.0)])
    assert text == "0:01:00 left, 1:02:00 with reward, grpo, then ppo"


def test_progress_in_a_log_file_and_in_a_terminal(tmp_path) -> None:
    for terminal in (False, True):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=200)
        bar = PlanProgress("sft", [("reward", None)], console)
        bar.line_every = 0.0
        fit(tmp_path / str(terminal), bar)
        assert "step 12 · loss" in out.getvalue()
        assert "0:00:00 left, then reward" in out.getvalue()
        assert ("\x1b[" in out.getvalue()) == terminal
