"""Stage 1, pre-training: predict the next character of the corpus.

loss = -mean log p(x_t | x_<t), nats per token, over every token of the block
bits per character = summed -log2 p over the held-out text / its characters
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fourstage.model import Transformer
from fourstage.stages.base import check_range
from fourstage.stages.supervised import NextTokenModule, NextTokenSettings


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(NextTokenSettings):
    """`stages.pretrain`"""

    block_size: int  # tokens a row

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 2, "block_size")


def bits_per_char(nll: Tensor, chars: int) -> Tensor:
    """Summed -log p in nats over a text of so many characters, as bits per character."""
    return nll / (chars * math.log(2))


class PretrainModule(NextTokenModule):
    """Trains a fresh Transformer on the fixed blocks of the corpus."""

    Settings = PretrainSettings

    def __init__(
        self, policy: Transformer, settings: PretrainSettings, seed: int, heldout_chars: int
    ) -> None:
        super().__init__(policy, settings, seed)
        self.heldout_chars = heldout_chars

    def validation_metrics(self, nll: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        # every rank reads the whole split, and nll is summed over them
        bits = bits_per_char(nll / self.trainer.world_size, self.heldout_chars)
        return {**super().validation_metrics(nll, tokens), "val/bits_per_char": bits}
