"""CPU processes for DeepSpeed's strategy, which refuses all but CUDA devices."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CUDAAccelerator


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
