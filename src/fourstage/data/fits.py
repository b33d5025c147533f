"""Whether any record of a stage fits into its token limits: asked before the stages below train.

The first record that fits is the answer, so no file is encoded twice as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fourstage.data.chat import load_chat
from fourstage.data.config import DataConfig
from fourstage.data.datamodule import fit_conversation, fit_pair, some_left
from fourstage.data.preference import load_preference, load_prompts
from fourstage.data.reasoning import load_reasoning
from fourstage.data.records import Chats, Conversation, Pairs, Problem
from fourstage.errors import UserError
from fourstage.tokenizer import Tokenizer

LEAST_PROMPT = 8  # tokens of a prompt whose beginning is cut


def check_records(config: DataConfig, stage: str, settings: Any, tokenizer: Tokenizer) -> None:
    """Raise UserError, as the stage itself would, where its `settings` leave it no record.

    pretrain has no stage below it that would train in vain, and is not asked.
    """
    match stage:
        case "sft":
            check_conversations(load_chat(config), tokenizer, settings.max_tokens)
        case "reward":
            pairs = load_preference(config)
            if pairs is not None:
                check_pairs(pairs, tokenizer, settings.max_tokens)
            elif settings.max_tokens - settings.max_new_tokens < LEAST_PROMPT:
                raise UserError(
                    f"stages.reward.max_new_tokens: {settings.max_new_tokens} tokens leave no room "
                    f"for a prompt in stages.reward.max_tokens={settings.max_tokens}: lower it"
                )
        case "ppo":
            prompts = load_prompts(config).train
            check_prompts(prompts, tokenizer, "stages.ppo", settings.max_prompt_tokens)
        case "grpo":
            problems = load_reasoning(config).train
            check_prompts(problems, tokenizer, "stages.grpo", settings.max_prompt_tokens)


def check_conversations(chats: Chats, tokenizer: Tokenizer, max_tokens: int) -> None:
    """Raise UserError where sft_data would have no row to train or to validate on."""
    for name, side in (("train", chats.train), ("heldout", chats.heldout)):
        some = any(fit_conversation(c.messages, tokenizer, max_tokens)[0] for c in side)
        some_left("data.chat", "stages.sft.max_tokens", name, some, max_tokens)


def check_pairs(pairs: Pairs, tokenizer: Tokenizer, max_tokens: int) -> None:
    """Raise UserError where reward_data would have no row to train or to validate on."""
    for name, side in (("train", pairs.train), ("heldout", pairs.heldout)):
        some = any(fit_pair(pair, tokenizer, max_tokens)[0] for pair in side)
        some_left("data.preference", "stages.reward.max_tokens", name, some, max_tokens)


def check_prompts(
    records: Sequence[Problem | Conversation], tokenizer: Tokenizer, where: str, most: int
) -> None:
    """Raise UserError where prompt_data would leave every prompt out."""
    if not any(len(tokenizer.prompt(r.prompt_messages)) <= most for r in records):
        raise UserError(
            f"{where}.max_prompt_tokens: none of {len(records)} prompts fits into {most} tokens: "
            "raise it or give shorter prompts"
        )
