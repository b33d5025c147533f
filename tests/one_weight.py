"""A training of one weight, with all the callbacks around it, in a moment."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from fourstage.lineage.resume import Checkpointer, ResumeIO
from fourstage.tracking.callbacks import Sample, SampleLog, StepAxis, StepSeed
from fourstage.tracking.loggers import MetricsCSV
from tests.device import TRAINER

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
        self.manual_backward((self.weight * batch * torch.rand(1).to(self.device)).sum())
        optimizer.step()
        self.steps_of_this_process.append(batch_idx + 1)
        self.log("train/loss", self.weight.item())

    def validation_step(self, batch, batch_idx) -> None:
        self.log("val/loss", self.weight.sum())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def fit(folder: Path, *extra: Callback, every: int = 3, log_every: int = 1) -> Tiny:
    """Trains, or resumes where folder holds a checkpoint."""
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    resume = checkpoint.exists()
    module = Tiny()
    samples = SampleLog(
        folder / "samples.jsonl",
        lambda: [Sample("p1", "What is an LLM?", f"{module.weight.item():.4f}", True, None)],
        every=5,
        at_start=True,
    )
    trainer = Trainer(
        **TRAINER,
        plugins=[ResumeIO()],
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
