"""Stage 1, pre-training: predict the next character of the corpus.

loss = -mean log p(x_t | x_<t), nats per token, over every token of the block
bits per character = summed -log2 p over the held-out text / its characters
"""

import math
from dataclasses import dataclass

from torch import Tensor

from fourstage import data
from fourstage.data.datamodule import pretrain_data
from fourstage.data.fits import check_corpus
from fourstage.job import StageJob
from fourstage.model import Transformer
from fourstage.stages.base import at_least
from fourstage.stages.prepare import Prepared, as_planned, heldout_rows, loader_options
from fourstage.stages.supervised import NextTokenModule, NextTokenSettings
from fourstage.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Settings(NextTokenSettings):
    """`stages.pretrain`"""

    block_size: int = at_least(2)  # tokens per row


def bits_per_char(nll: Tensor, chars: int) -> Tensor:
    """Bits per character, from the summed -log p in nats of a text of `chars` characters."""
    return nll / (chars * math.log(2))


class PretrainModule(NextTokenModule):
    """Trains a fresh Transformer on the fixed blocks of the corpus."""

    def __init__(
        self, policy: Transformer, settings: Settings, seed: int, heldout_chars: int
    ) -> None:
        super().__init__(policy, settings, seed)
        self.heldout_chars = heldout_chars

    def validation_metrics(self, nll: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        # every rank reads the whole split, and nll is summed over them
        bits = bits_per_char(nll / self.trainer.world_size, self.heldout_chars)
        return {**super().validation_metrics(nll, tokens), "val/bits_per_char": bits}


# --- what ladder.py asks for


def prepare(job: StageJob) -> Prepared:
    tokenizer = Tokenizer.from_config(job.tokenizer)
    policy = Transformer(job.model, tokenizer.vocab_size)
    corpus = as_planned(job, data.load_corpus(job.data))
    tokens, length = data.tokenized(corpus, tokenizer, job.outputs), job.settings.block_size
    loaders = pretrain_data(tokens, tokenizer, block_size=length, **loader_options(job))
    notes = loaders.notes
    known = notes["heldout_characters"] - notes["heldout_unknown_characters"]
    module = PretrainModule(policy, job.settings, job.seed, known)
    return Prepared(module, loaders, heldout_rows(loaders), tokenizer)


def check_data(
    config: data.DataConfig, settings: Settings, tokenizer: Tokenizer, max_seq_len: int
) -> list[str]:
    return check_corpus(config, tokenizer, settings.block_size)
