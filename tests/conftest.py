"""For every test: one thread, no denormals, no network, no dashboard; and one trained ladder."""

import os
import shutil
from pathlib import Path

# before torch and its libraries are imported, and for the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch

from tests.device import DEVICE

torch.set_num_threads(1)
torch.set_flush_denormal(True)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU where there is one, else the CPU."""
    return DEVICE


@pytest.fixture(scope="session")
def ladder(tmp_path_factory) -> Path:
    """The outputs of `train.py stage=grpo model=moe_nano debug=fast`: leave them as they are."""
    from fourstage.lineage.climb import climb
    from tests.fakes import QUICK, config

    outputs = tmp_path_factory.mktemp("ladder") / "outputs"
    climb(config(*QUICK, "stage=grpo", f"outputs={outputs}"))
    return outputs


@pytest.fixture
def own_ladder(ladder, tmp_path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(ladder, tmp_path / "ladder")


@pytest.fixture
def nano():
    """moe_nano's config with some values changed."""
    from tests.model.configs import read_config

    return lambda **changes: read_config("moe_nano", **changes)


@pytest.fixture
def build(nano, device):
    """A seeded moe_nano with larger weights, so that what a test changes shows in the output."""
    from fourstage.model import Transformer
    from tests.model.configs import VOCAB

    def build(seed: int = 0, **changes) -> Transformer:
        torch.manual_seed(seed)
        return Transformer(nano(**{"init_std": 0.2, **changes}), VOCAB).to(device)

    return build
