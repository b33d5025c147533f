"""Stage 2, instruction fine-tuning: predict the assistant's turns and where they end.

loss = -mean log p(x_t | x_<t) over the assistant's tokens and their end-of-turn tokens only:
the tokenizer's mask makes every other target IGNORE (see Tokenizer.chat, and the golden test).
"""

from __future__ import annotations

from dataclasses import dataclass

from fourstage.stages.base import check_range
from fourstage.stages.supervised import NextTokenModule, NextTokenSettings


@dataclass(frozen=True, kw_only=True)
class SFTSettings(NextTokenSettings):
    """`stages.sft`"""

    max_tokens: int  # longer conversations are cut

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 8, "max_tokens")


class SFTModule(NextTokenModule):
    """Trains the pre-trained Transformer on conversations."""

    Settings = SFTSettings
