"""Held-out text as the network reads it: bits per character and byte, and what the routers do.

Shape legend: B rows, T tokens, N = B T, L layers, K chosen experts, E experts.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fourstage.batch import padded
from fourstage.data import Tokens
from fourstage.evaluation.suite import Item
from fourstage.model import Transformer
from fourstage.model.moe import Router
from fourstage.rl.ops import token_logprobs
from fourstage.tokenizer import Tokenizer

BLOCK = 256  # tokens of text that are predicted together


@dataclass(frozen=True)
class Block:
    """A stretch of text: ids[0] is given, the others are predicted."""

    id: int | str
    ids: list[int]
    chars: int  # that the predicted ids stand for; <unk> and the ends of documents count as none
    bytes: int  # of these characters in UTF-8


def corpus_blocks(
    tokens: Tokens, tokenizer: Tokenizer, policy: Transformer, at_most: int | None = None
) -> list[Block]:
    """The text end to end, of which each token but the first one is predicted once; or `at_most`
    blocks of it, at equal distances."""
    size = min(BLOCK, policy.config.max_seq_len)
    n = -(-(len(tokens) - 1) // size)
    some = n if at_most is None else min(n, at_most)
    blocks = []
    for number in (i * n // some for i in range(some)):
        ids = tokens.read(number * size, (number + 1) * size + 1)
        sizes = (int(n[ids[1:]].sum()) for n in (tokenizer.characters, tokenizer.bytes))
        blocks.append(Block(number, ids.tolist(), *sizes))
    return blocks


def chat_blocks(chats: Sequence[Any], tokenizer: Tokenizer, policy: Transformer) -> list[Block]:
    """The conversations, truncated to the model's context."""
    size = policy.config.max_seq_len + 1
    ids = (
        tokenizer.chat(chat.messages)[0]
        if chat.messages[-1]["role"] == "assistant"
        else tokenizer.prompt(chat.messages)
        for chat in chats
    )
    return [Block(chat.id, row[:size], 0, 0) for chat, row in zip(chats, ids, strict=True)]


@torch.no_grad()
def text_items(
    policy: Transformer, blocks: list[Block], parent: Transformer | None, unk_id: int | None = None
) -> list[Item]:
    """A corpus item for each block, with the bits of the tokens that aren't unk_id; and a router
    item, if the model has routers."""
    device = next(policy.parameters()).device
    items: list[Item] = []
    for at in range(0, len(blocks), 16):
        some = blocks[at : at + 16]
        ids = padded([block.ids for block in some], -1).to(device)
        inputs_BT, targets_BT = ids[:, :-1].clamp(min=0), ids[:, 1:].clamp(min=0)
        valid_BT = ids[:, 1:] >= 0
        with expert_choices(policy) as chosen:
            hidden_BTD = policy(inputs_BT, valid_BT=valid_BT).hidden_BTD
        known_BT = valid_BT if unk_id is None else valid_BT & (targets_BT != unk_id)
        logp_BT = token_logprobs(policy.logits(hidden_BTD), targets_BT) * known_BT
        bits = (-logp_BT.sum(1) / math.log(2)).tolist()
        items += [
            {
                "set": "corpus",
                "id": block.id,
                "bits": round(bit, 4),
                "chars": block.chars,
                "bytes": block.bytes,
            }
            for block, bit in zip(some, bits, strict=True)
        ]
        if not chosen:
            continue
        load_BLE = expert_loads(chosen, valid_BT, policy.config.num_experts)
        drift: list[Any] = [None] * len(some)
        if parent is not None:
            with expert_choices(parent) as before:
                parent(inputs_BT, valid_BT=valid_BT)
            drift = changed_sets(chosen, before, valid_BT).tolist()
        items += [
            {"set": "router", "id": block.id, "tokens": tokens, "load": load, "drift": changed}
            for block, tokens, load, changed in zip(
                some, valid_BT.sum(1).tolist(), load_BLE.tolist(), drift, strict=True
            )
        ]
    return items


@contextmanager
def expert_choices(policy: Transformer) -> Iterator[list[Tensor]]:
    """Collects the experts [B * T, K] that each router chooses in the context, layer by layer."""
    chosen: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, args, routing: chosen.append(routing.experts_NK))
        for module in policy.modules()
        if isinstance(module, Router)
    ]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


def expert_loads(chosen: list[Tensor], valid_BT: Tensor, num_experts: int) -> Tensor:
    """int64 [B, L, E]: how many valid tokens of each row chose each expert, in each layer."""
    layers = []
    for experts_NK in chosen:
        counts_NE = F.one_hot(experts_NK, num_experts).sum(1) * valid_BT.reshape(-1, 1)
        layers.append(counts_NE.view(*valid_BT.shape, num_experts).sum(1))
    return torch.stack(layers, 1)


def changed_sets(after: list[Tensor], before: list[Tensor], valid_BT: Tensor) -> Tensor:
    """int64 [B, L]: valid tokens of each row whose set of experts differs, in each layer."""
    layers = [
        (a.sort(-1).values != b.sort(-1).values).any(-1).view_as(valid_BT) & valid_BT
        for a, b in zip(after, before, strict=True)
    ]
    return torch.stack(layers, 1).sum(-1)
