"""What happens around training steps: logs, router health, samples, progress.

`step` means the same everywhere (metrics.csv, samples.jsonl, W&B): `steps_done`, so step 0 is the
state before training.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fourstage.files import read_jsonl, write_jsonl
from fourstage.model import Transformer
from fourstage.model.health import bias_spread, drift, load_health
from fourstage.parallel.strategies import gathered
from fourstage.stages.base import steps_done
from fourstage.tracking.wandb_run import HeldRows

LINE_EVERY = 30.0  # seconds between lines of progress if the output is not a terminal


class StepAxis(Callback):
    """Makes steps_done the x axis of every logger (Lightning would count from 0)."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.log("step", float(steps_done(trainer)))

    on_validation_epoch_end = on_train_batch_end


class StepSeed(Callback):
    """Makes torch's random numbers a function of (seed, stage, rank, step), so that a resumed run
    draws the same ones as an undisturbed run, without a saved generator state."""

    def __init__(self, seed: int, stage: str) -> None:
        self.seed, self.stage = seed, stage

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(step_seed(self.seed, self.stage, trainer.global_rank, batch_idx))


def step_seed(seed: int, stage: str, rank: int, step: int) -> int:
    """63 bits from sha256, so that neighbouring seeds have nothing in common."""
    text = f"{seed} {stage} {rank} {step}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


class RouterHealth(Callback):
    """Logs router/<name> and router/<name>/layer<i> every so many steps, in every stage.

    load_entropy, max_over_mean, dead_experts: of the load of the training forwards since the last
    log, summed over ranks, without padding; bias_spread: of the selection bias (model/health.py).
    drift: on `rows`, held-out token ids, the share of tokens whose set of experts differs from the
    one under the weights that the stage started from: its parent's, or random ones in pretrain.
    router/<name> is the mean over layers, for max_over_mean the largest, for dead_experts the sum.
    A dense model logs nothing.

    The first choice of experts is part of the resume state, so that a resumed run measures drift
    from the same weights.
    """

    def __init__(self, rows: list[list[int]], every: int) -> None:
        self.ids_BT = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        length_B = torch.tensor([len(row) for row in rows])
        self.valid_BT = torch.arange(self.ids_BT.shape[1]) < length_B[:, None]
        self.every = every
        self.load_LE: Tensor | None = None
        self.first_LNK: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = pl_module.transformers()[0]
        if self.first_LNK is None and not network.config.dense:
            self.first_LNK = self.experts(trainer, network)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        load_LE = pl_module.take_load()
        if load_LE is None:
            return
        load_LE = load_LE.cpu()  # as in the resume state
        self.load_LE = load_LE if self.load_LE is None else self.load_LE + load_LE
        if steps_done(trainer) % self.every == 0:
            self.log_dict(self.metrics(trainer, pl_module.transformers()[0]))
            self.load_LE = None

    def metrics(self, trainer: Trainer, network: Transformer) -> dict[str, float]:
        """What is logged, from the load so far and the network as it is."""
        assert self.load_LE is not None and self.first_LNK is not None
        found = {
            **load_health(self.load_LE),
            "bias_spread": bias_spread(network.expert_bias_LE()).cpu(),
            "drift": drift(self.first_LNK, self.experts(trainer, network)),
        }
        over_layers = {"max_over_mean": max, "dead_experts": sum}
        metrics: dict[str, float] = {}
        for name, value_L in found.items():
            values = value_L.tolist()
            metrics[f"router/{name}"] = float(over_layers.get(name, fmean)(values))
            metrics |= {f"router/{name}/layer{i}": float(v) for i, v in enumerate(values)}
        return metrics

    @torch.no_grad()
    def experts(self, trainer: Trainer, network: Transformer) -> Tensor:
        """The experts that each held-out token is sent to, int64 [L, N, K] on the CPU.

        In eval mode and without gradients, so that it adds no load and draws no random numbers.
        """
        was_training = network.training
        network.eval()
        with gathered(network) as here, trainer.precision_plugin.forward_context():
            device = here.embedding.weight.device
            ids_BT, valid_BT = self.ids_BT.to(device), self.valid_BT.to(device)
            router = here(ids_BT, valid_BT=valid_BT).router
        network.train(was_training)
        assert router is not None
        return torch.stack(router.experts)[:, valid_BT.flatten()].cpu()

    def state_dict(self) -> dict[str, Tensor | None]:
        return {"load": self.load_LE, "first": self.first_LNK}

    def load_state_dict(self, state_dict: dict[str, Tensor | None]) -> None:
        self.load_LE, self.first_LNK = state_dict["load"], state_dict["first"]


@dataclass(frozen=True)
class Sample:
    """One answer to one of the fixed prompts that every stage is asked."""

    prompt_id: str
    prompt: str
    answer: str
    stopped: bool
    right: bool | None  # None: nothing says what is right


class SampleLog(Callback):
    """Appends the answers of `sample()` to samples.jsonl, and logs them as a table to W&B.

    Every `every` steps (0: never) and after the last one; with `at_start`, before the first one.
    """

    def __init__(
        self, path: Path, sample: Callable[[], list[Sample]], *, every: int, at_start: bool = False
    ) -> None:
        self.path, self.sample, self.every, self.at_start = path, sample, every, at_start
        self.rows: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = steps_done(trainer)
        if trainer.is_global_zero:
            if done and self.path.exists():
                kept = [row for row in read_jsonl(self.path) if row["step"] <= done]
                # files of earlier versions have no "right"
                self.rows = [{**row, "right": row.get("right")} for row in kept]
            write_jsonl(self.path, self.rows)
            self.hold(trainer, self.rows)
        if self.at_start and done == 0:
            self.take(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.every and steps_done(trainer) % self.every == 0:
            self.take(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_there = bool(self.rows) and self.rows[-1]["step"] == steps_done(trainer)
        if not trainer.strategy.broadcast(is_there):  # after a resume only rank zero has rows
            self.take(trainer)

    def take(self, trainer: Trainer) -> None:
        """Sample on every rank (a sharded network needs all of them), write on rank zero."""
        step = steps_done(trainer)
        new = [{"step": step, **asdict(sample)} for sample in self.sample()]
        self.rows += new
        if trainer.is_global_zero:
            write_jsonl(self.path, self.rows)
            self.hold(trainer, new)

    def hold(self, trainer: Trainer, rows: list[dict[str, Any]]) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, HeldRows):
                logger.hold_samples(rows)


@contextmanager
def telling(name: str, console: Console | None = None) -> Iterator[Callable[[str], None]]:
    """Shows what an evaluation is doing, as it says itself: in a terminal with the time elapsed, in
    a log file as a line at the start and every LINE_EVERY seconds."""
    console = console or Console(stderr=True)
    start, printed = time.monotonic(), -math.inf
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    bar = Progress(*columns, console=console, transient=True, refresh_per_second=2)
    task = bar.add_task(f"{name}: evaluating", total=None)

    def tell(what: str) -> None:
        nonlocal printed
        bar.update(task, description=f"{name}: evaluating: {what}")
        now = time.monotonic()
        if not console.is_terminal and now - printed > LINE_EVERY:
            printed = now
            console.print(f"{name}: evaluating: {what}", highlight=False, soft_wrap=True)

    with bar if console.is_terminal else nullcontext():
        yield tell
    took = clock(time.monotonic() - start)
    console.print(f"{name}: evaluated in {took}", highlight=False, soft_wrap=True)


class PlanProgress(Callback):
    """A progress bar with the time left in training and in the plan; plain lines in a log file.
    `later`: the stages still to train after this one, with their estimates in seconds."""

    shown = ("train/loss", "train/accuracy", "train/score", "train/reward", "train/pass_at_1")
    line_every = LINE_EVERY

    def __init__(
        self, stage: str, later: list[tuple[str, float | None]], console: Console | None = None
    ) -> None:
        self.stage, self.later = stage, later
        self.console = console or Console(stderr=True)
        self.bar: Progress | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = self.printed = time.monotonic()
        self.share_before = pl_module.progress()  # of the budget
        if self.console.is_terminal and trainer.is_global_zero:
            texts = TextColumn("{task.description:8}"), TextColumn("{task.fields[note]}")
            columns = texts[0], BarColumn(), texts[1]
            # W&B keeps the console's output, each frame of the bar too
            self.bar = Progress(*columns, console=self.console, refresh_per_second=2)
            self.task = self.bar.add_task(self.stage, total=1.0, note="")
            self.bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        share = min(1.0, pl_module.progress())
        elapsed = time.monotonic() - self.started
        left = elapsed / max(share - self.share_before, 1e-9) * (1 - share)
        metrics = trainer.logged_metrics
        figures = [f"{n.split('/')[-1]} {metrics[n]:.3f}" for n in self.shown if n in metrics]
        note = " · ".join([f"step {steps_done(trainer)}", *figures, time_left(left, self.later)])
        if self.bar is not None:
            self.bar.update(self.task, completed=share, note=note)
        elif trainer.is_global_zero and time.monotonic() - self.printed > self.line_every:
            self.printed = time.monotonic()
            self.console.print(f"{self.stage}: {note}", highlight=False, soft_wrap=True)

    def on_train_end(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    on_exception = on_train_end


def time_left(seconds: float, later: list[tuple[str, float | None]]) -> str:
    """Such as "0:02:10 left before the evaluation, 0:09:00 with sft, then ppo" (no estimate)."""
    text = f"{clock(seconds)} left before the evaluation"
    known = {stage: estimate for stage, estimate in later if estimate is not None}
    if known:
        text += f", {clock(seconds + sum(known.values()))} with {', '.join(known)}"
    if unknown := [stage for stage, _ in later if stage not in known]:
        text += f", then {', '.join(unknown)}"
    return text


def clock(seconds: float) -> str:
    """H:MM:SS; from a day on "1 day, 2:03:04"."""
    return str(timedelta(seconds=round(seconds)))
