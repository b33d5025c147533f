"""What a stage costs, under "cost" in run.json, and how well it used its device.

    seconds           wall time of the stage: data, training, evaluation, everything
    train_seconds     of that, inside training steps (including rollouts and their scoring)
    eval_seconds      of that, validation and the held-out suite
    steps             training steps (rollouts in ppo and grpo)
    skipped_steps     optimizer steps that were not taken for want of a finite loss and gradient
    tokens            read by the updates: text, or prompt and answer, without padding, counted
                      each time that an update reads them
    tokens_generated  answer tokens that the policy sampled in training steps (ppo and grpo)
    flops             of the training steps in every network that they run, including backward
                      passes (model/flops.py has the formula)
    tokens_per_s      tokens / train_seconds
    mfu               flops / (train_seconds x peak FLOP/s x devices), if the peak is known
    peak_memory_mib   the most memory that the process held, also in a command's earlier stages
    peak_gpu_memory_mib  the most that PyTorch allocated on one GPU in this stage

Tokens and FLOPs are summed over ranks. Everything but memory adds up over resumes and counts what
led to the weights: steps that a kill lost after the last checkpoint are repeated, and count once.
Not in flops: validation, evaluation, sample tables, the router drift probe, and the pairs that the
reward stage samples before it trains.
"""

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

# Dense 16-bit matrix products (bf16, or fp16 before Ampere; fp32 accumulation), TFLOP/s, from
# NVIDIA's data sheets and architecture white papers (half of the rates that are given with
# sparsity). Lightning's own table has some rates with sparsity, or without tensor cores.
# The first pattern found in the device's name counts.
PEAK_TFLOPS = {
    r"\bB200\b": 2250.0,
    r"\bH[12]00 NVL\b": 835.5,
    r"\bH100 PCIe\b": 756.5,
    r"\bH[12]00\b": 989.5,  # SXM: "NVIDIA H100 80GB HBM3"
    r"\bA100\b": 312.0,
    r"\bA40\b": 149.7,
    r"\bA10\b": 125.0,
    r"\bL40S\b": 362.05,
    r"\bL40\b": 181.05,
    r"\bL4\b": 121.0,
    r"\bRTX 4090$": 165.2,
    r"\bRTX 3090$": 71.0,
    r"\bV100-PCIE\b": 112.0,
    r"\bV100\b": 125.0,
    r"\bT4\b": 65.0,
}


def peak_flops(device: str, precision: str) -> float | None:
    """Peak FLOP/s of one device, known for 16-bit products on the whole GPUs of PEAK_TFLOPS.

    device: what torch.cuda.get_device_name() says, or "cpu"; precision: Lightning's name.
    """
    if not precision.startswith(("16", "bf16")) or "MIG" in device:
        return None
    found = (tflops for pattern, tflops in PEAK_TFLOPS.items() if re.search(pattern, device))
    return next((tflops * 1e12 for tflops in found), None)


def mfu(flops: float, seconds: float, peak: float, devices: int) -> float:
    """Model FLOPs utilisation: achieved over possible FLOP/s (PaLM, arXiv 2204.02311, app. B)."""
    return flops / (seconds * peak * devices)


@dataclass
class Spent:
    """The keys of cost that add up."""

    seconds: float = 0.0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    tokens: int = 0
    tokens_generated: int = 0
    flops: int = 0


class CostMeter(Callback):
    """Adds up what a stage costs, and logs the speed of its steps: speed/step_s (seconds per step),
    speed/tokens_per_s, speed/tflops (of all devices together) and, if one device's `peak` FLOP/s is
    known, speed/mfu."""

    def __init__(self, peak: float | None = None) -> None:
        self.peak = peak
        self.spent = Spent()  # without the seconds of this attempt: see `so_far`
        self.born = time.monotonic()

    def so_far(self) -> Spent:
        """What has been spent until now, including attempts before a resume."""
        return replace(self.spent, seconds=self.spent.seconds + time.monotonic() - self.born)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.so_far())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        mine = asdict(self.spent)  # pretrain evaluates random weights before it resumes
        self.spent = Spent(**{name: value + mine[name] for name, value in state_dict.items()})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.before, self.start = counts_of(pl_module), time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        own = counts_of(pl_module) - self.before
        step = pl_module.sum_over_ranks(own.to(pl_module.device))
        tokens, generated, flops = step.tolist()  # this waits for the device
        seconds = time.perf_counter() - self.start
        self.spent.train_seconds += seconds
        self.spent.tokens += tokens
        self.spent.tokens_generated += generated
        self.spent.flops += flops
        speed = {
            "speed/step_s": seconds,
            "speed/tokens_per_s": tokens / seconds,
            "speed/tflops": flops / seconds / 1e12,
        }
        if self.peak is not None:
            speed["speed/mfu"] = mfu(flops, seconds, self.peak, trainer.world_size)
        self.log_dict(speed)

    def on_validation_start(self, *_: Any) -> None:
        self.validation_start = time.perf_counter()

    def on_validation_end(self, *_: Any) -> None:
        self.spent.eval_seconds += time.perf_counter() - self.validation_start

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Count the time inside as evaluation."""
        start = time.perf_counter()
        yield
        self.spent.eval_seconds += time.perf_counter() - start

    def cost(self, steps: int, devices: int) -> dict[str, float]:
        """The figures of run.json, without the notes on data."""
        spent = self.so_far()
        found: dict[str, float] = {name: round(value, 1) for name, value in asdict(spent).items()}
        found |= {"steps": steps, "peak_memory_mib": peak_memory_mib()}
        if not spent.tokens_generated:
            del found["tokens_generated"]
        if spent.train_seconds:
            found["tokens_per_s"] = round(spent.tokens / spent.train_seconds, 1)
            if self.peak is not None:
                used = mfu(spent.flops, spent.train_seconds, self.peak, devices)
                found["mfu"] = round(used, 5)
        if torch.cuda.is_initialized():
            found["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated() // 2**20
        return found


def counts_of(module: LightningModule) -> torch.Tensor:
    """A stage module's tokens, generated tokens and FLOPs in this process so far; int64 [3]."""
    return torch.tensor([module.tokens_seen, module.tokens_generated, module.flops()])


def peak_memory_mib() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak // (2**20 if sys.platform == "darwin" else 2**10)
