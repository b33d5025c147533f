import pytest
import torch

from fourstage.model import Transformer
from tests.model.configs import VOCAB, read_config


@pytest.fixture
def nano():
    """moe_nano's config with some values changed."""
    return lambda **changes: read_config("moe_nano", **changes)


@pytest.fixture
def build(nano, device):
    """A seeded moe_nano with larger weights, so that what a test changes shows in the output."""

    def build(seed: int = 0, **changes) -> Transformer:
        torch.manual_seed(seed)
        return Transformer(nano(**{"init_std": 0.2, **changes}), VOCAB).to(device)

    return build
