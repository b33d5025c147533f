"""CPU processes for DeepSpeed's strategy, which refuses all but CUDA devices."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CUDAAccelerator

from fourstage.job import TrainerConfig
from fourstage.parallel import strategies


class CPUAsCUDA(CUDAAccelerator):
    """What the Trainer takes for CUDA devices are CPU processes."""

    def setup_device(self, device: torch.device) -> None:
        assert device.type == "cpu"

    def setup(self, trainer: L.Trainer) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return list(range(int(devices)))

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("cpu", i) for i in devices]

    @staticmethod
    def is_available() -> bool:
        return True


def on_cpus(options: dict[str, Any]) -> None:
    """Changes ZeRO's options for a Trainer; ZeRO-3 would keep the weights of a small model."""
    options["accelerator"] = CPUAsCUDA()
    options["plugins"][0].device = "cpu"
    options["strategy"].config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


def let_deepspeed_use_cpus() -> None:
    """To be called before anything of DeepSpeed is set up; gloo is its backend then."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled


def let_zero_use_cpus() -> None:
    """The same for all that trains in this process, with one thread, on CPUs whatever is there."""
    torch.set_num_threads(1)
    let_deepspeed_use_cpus()
    trainer_options = strategies.trainer_options

    def cpu_options(where: TrainerConfig, clip_norm: float) -> dict[str, Any]:
        options = trainer_options(where, clip_norm)
        if where.strategy in strategies.ZERO:
            on_cpus(options)
        return options

    def resolved(self: TrainerConfig) -> TrainerConfig:
        return replace(self, accelerator="cpu", precision="32-true")

    strategies.trainer_options = cpu_options
    TrainerConfig.resolved = resolved
