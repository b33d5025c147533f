"""The shipped model configs, with some values changed."""

from pathlib import Path

import torch.nn.functional as F
import yaml
from torch import Tensor

from fourstage.model import ModelConfig
from fourstage.model.cache import LayerCache

CONFIGS = Path(__file__).parents[2] / "conf" / "model"
VOCAB = 50


def read_config(name: str, **changes) -> ModelConfig:
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return ModelConfig(**{**values, **changes})


def countable_attention(monkeypatch) -> None:
    """Decode attention as two products: torch's FLOP counter sees no weighted sums of rows."""

    def attend(self: LayerCache, q: Tensor, S: int, mask: Tensor | None = None) -> Tensor:
        k, v = self.k[:, :, :S], self.v[:, :, :S]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)

    monkeypatch.setattr(LayerCache, "attend", attend)
