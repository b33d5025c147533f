"""Stage 2, instruction fine-tuning: predict the assistant's turns and where they end.

    loss = -mean log p(x_t | x_<t) over the assistant's tokens and their end-of-turn tokens only

The tokenizer's mask makes every other target IGNORE (see Tokenizer.chat, and the golden test).
"""

from dataclasses import dataclass

from fourstage import data
from fourstage.data.datamodule import sft_data
from fourstage.data.fits import check_chats
from fourstage.job import StageJob
from fourstage.stages.base import at_least
from fourstage.stages.prepare import (
    Prepared,
    as_planned,
    heldout_rows,
    loader_options,
    parent_policy,
)
from fourstage.stages.supervised import NextTokenModule, NextTokenSettings
from fourstage.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Settings(NextTokenSettings):
    """`stages.sft`"""

    max_tokens: int = at_least(8)  # longer conversations lose their beginning, or are left out


class SFTModule(NextTokenModule):
    """Trains the pre-trained Transformer on conversations."""


# --- what ladder.py asks for


def prepare(job: StageJob) -> Prepared:
    policy, tokenizer = parent_policy(job)
    chats = as_planned(job, data.load_chat(job.data))
    options = {"max_tokens": job.settings.max_tokens, **loader_options(job)}
    loaders = sft_data(chats.train, chats.heldout, tokenizer, **options)
    module = SFTModule(policy, job.settings, job.seed)
    return Prepared(module, loaders, heldout_rows(loaders, job), tokenizer)


def check_data(
    config: data.DataConfig, settings: Settings, tokenizer: Tokenizer, max_seq_len: int
) -> list[str]:
    return check_chats(config, tokenizer, settings.max_tokens, max_seq_len)
