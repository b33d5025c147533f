"""Stage 1, pre-training: predict the next token of the corpus.

loss = -mean log p(x_t | x_<t), nats per token, over every token of the block
bits per character = summed -log2 p over the held-out text / its characters
bits per byte      = the same / its bytes in UTF-8
"""

import math
from dataclasses import dataclass

from torch import Tensor

from fourstage import data
from fourstage.data.datamodule import LoaderPair, pretrain_data
from fourstage.data.fits import check_corpus
from fourstage.data.vocabulary import tokenizer_of
from fourstage.job import StageJob
from fourstage.model import Transformer
from fourstage.stages.base import at_least
from fourstage.stages.prepare import (
    Prepared,
    as_planned,
    heldout_rows,
    loader_options,
    start_policy,
)
from fourstage.stages.supervised import NextTokenModule, NextTokenSettings
from fourstage.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Settings(NextTokenSettings):
    """`stages.pretrain`"""

    block_size: int = at_least(2)  # tokens per row


def bits_per(nll: Tensor, size: int) -> Tensor:
    """Bits per character or byte, from the summed -log p in nats of a text of `size` of them."""
    return nll / (size * math.log(2))


class PretrainModule(NextTokenModule):
    """Trains a Transformer, fresh or from a checkpoint, on the fixed blocks of the corpus."""

    def __init__(
        self,
        policy: Transformer,
        settings: Settings,
        seed: int,
        heldout_chars: int,
        heldout_bytes: int,
    ) -> None:
        super().__init__(policy, settings, seed)
        self.heldout = {"char": heldout_chars, "byte": heldout_bytes}

    def validation_metrics(self, nll: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        # every rank reads the whole split, and nll is summed over them
        own = nll / self.trainer.world_size
        bits = {f"val/bits_per_{what}": bits_per(own, n) for what, n in self.heldout.items()}
        return super().validation_metrics(nll, tokens) | bits


# --- what ladder.py asks for


def prepare(job: StageJob) -> Prepared:
    tokenizer = tokenizer_of(job.tokenizer, job.data, job.outputs)
    policy = start_policy(job, tokenizer.vocab_size)
    if job.settings.as_is:
        module = PretrainModule(policy, job.settings, job.seed, 0, 0)
        return Prepared(module, LoaderPair([], None), [], tokenizer)
    corpus = as_planned(job, data.load_corpus(job.data))
    tokens, length = data.tokenized(corpus, tokenizer, job.outputs), job.settings.block_size
    loaders = pretrain_data(tokens, tokenizer, block_size=length, **loader_options(job))
    notes = loaders.notes
    known = notes["heldout_characters"] - notes["heldout_unknown_characters"]
    module = PretrainModule(policy, job.settings, job.seed, known, notes["heldout_bytes"])
    return Prepared(module, loaders, heldout_rows(loaders, job), tokenizer)


def check_data(
    config: data.DataConfig, settings: Settings, tokenizer: Tokenizer, max_seq_len: int
) -> list[str]:
    return check_corpus(config, tokenizer, settings.block_size)
