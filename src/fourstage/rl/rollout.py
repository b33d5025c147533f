"""Rollouts: sampled answers as rows for training, scored by any of the networks.

A rollout is on the CPU; scores are on the device of the network that computes them.

Our own sampler and the trainer agree on log-probabilities to 1e-4 in float32 (there is a test, and
the stages log the difference).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourstage.batch import Rollout, moved, padded
from fourstage.errors import UserError
from fourstage.model import ScalarModel, Transformer
from fourstage.model.packing import Packing, Take, ranks
from fourstage.rl.ops import token_logprobs
from fourstage.sampling.generate import Generation
from fourstage.tokenizer import Tokenizer

MOST_PACKED = 0.9  # packed tokens per unpacked one: above this, packing costs more than it saves


def fitted_prompt(tokenizer: Tokenizer, messages: list[dict[str, str]], room: int) -> list[int]:
    """The prompt's ids, truncated on the left to `room` tokens."""
    ids = tokenizer.prompt(messages)
    if len(ids) <= room:
        return ids
    shorter = tokenizer.shorten(ids, room)
    if shorter is None:
        raise UserError(f"no room for a prompt in {room} tokens: lower max_new_tokens")
    return shorter


def pack(prompts: list[list[int]], generation: Generation, pad_id: int) -> Rollout:
    """Right-padded rows prompt + answer; log-probs that the sampler doesn't know are 0."""
    answers = generation.answer_ids
    logp_BA = torch.zeros(len(prompts), max(map(len, answers)))
    for row, logprobs in enumerate(generation.logprobs or []):
        logp_BA[row, : len(logprobs)] = torch.tensor(logprobs)
    return ranked(
        Rollout(
            ids=padded([p + a for p, a in zip(prompts, answers, strict=True)], pad_id),
            start=torch.tensor([len(p) for p in prompts]),
            length=torch.tensor([len(a) for a in answers]),
            logprobs=logp_BA,
            stopped=torch.tensor(generation.stopped),
        )
    )


def ranked(rollout: Rollout) -> Rollout:
    """The same with the ranks for Packing, if packing pays off."""
    inputs_B = rollout.start + rollout.length - 1  # the last token predicts nothing
    rank_B = ranks(rollout.ids, inputs_B)
    packs = len(Packing(rollout.ids, inputs_B, rank_B)) <= MOST_PACKED * rollout.ids.numel()
    return replace(rollout, rank=rank_B if packs else None)


def joined(rollouts: Sequence[Rollout], group: int, pad_id: int) -> Rollout:
    """The rollouts of all ranks as one, in the order of the global batch (see `in_order`)."""
    columns: dict[str, Tensor] = {}
    for name in ("ids", "start", "length", "logprobs", "stopped"):
        parts = [getattr(rollout, name) for rollout in rollouts]
        columns[name] = in_order(parts, group, pad_id if name == "ids" else 0)
    return ranked(Rollout(**columns))


def in_order(parts: Sequence[Tensor], group: int, fill: int = 0) -> Tensor:
    """Numbers [b, ...] of each rank's rows, as [B, ...] in the order of the global batch, of which
    rank r of R has the prompts r, r + R, r + 2R, ..., each with `group` answers in a row."""
    width = max(x.shape[-1] for x in parts)
    if parts[0].ndim == 2:
        parts = [F.pad(x, (0, width - x.shape[1]), value=fill) for x in parts]
    by_prompt = [x.view(-1, group, *x.shape[1:]) for x in parts]
    return torch.stack(by_prompt, dim=1).flatten(0, 2)


def answer_texts(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """The answers as text, without the end token."""
    rows = zip(rollout.ids.tolist(), rollout.start.tolist(), rollout.length.tolist(), strict=True)
    return [tokenizer.decode(ids[start : start + length]) for ids, start, length in rows]


def device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def answer_logits(policy: Transformer, rollout: Rollout) -> Tensor:
    """Logits [M, V] that predict the answer tokens, M = rollout.mask.sum()."""
    device = device_of(policy)
    if rollout.rank is not None:
        packing = Packing(rollout.ids, rollout.start + rollout.length - 1, rollout.rank)
        at_BA = packing.place_BT.gather(1, rollout.predict_at)
        hidden_ND = policy(packing.to(device)).hidden_BTD[0]
    else:
        B, T = rollout.inputs.shape
        at_BA = rollout.predict_at + torch.arange(0, B * T, T)[:, None]
        is_input_BT = moved(rollout.is_input, device)
        hidden_BTD = policy(moved(rollout.inputs, device), valid_BT=is_input_BT).hidden_BTD
        hidden_ND = hidden_BTD.flatten(0, 1)
    at_M = moved(at_BA.flatten()[rollout.places], device)
    return policy.logits(Take(at_M, len(hidden_ND))(hidden_ND))


def answer_logprobs(policy: Transformer, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Log-probability of each answer token, float32 [B, A], 0 where mask is False."""
    device, places_M = device_of(policy), rollout.places
    ids_M = moved(rollout.answer_ids.flatten()[places_M], device)
    logp_M = token_logprobs(answer_logits(policy, rollout), ids_M, temperature)
    flat = logp_M.new_zeros(rollout.logprobs.numel())
    return flat.index_copy(0, moved(places_M, device), logp_M).view(rollout.logprobs.shape)


def answer_values(network: ScalarModel, rollout: Rollout) -> Tensor:
    """The value before each answer token, float32 [B, A]: V(s_a), s_a = prompt + a tokens."""
    device = device_of(network)
    is_input_BT = moved(rollout.is_input, device)
    values_BT = network(moved(rollout.inputs, device), valid_BT=is_input_BT).float()
    return values_BT.gather(1, moved(rollout.predict_at, device))


def final_scores(network: ScalarModel, rollout: Rollout) -> Tensor:
    """The reward model's score, read at the last real token of each row, float32 [B]."""
    device = device_of(network)
    return network.last(moved(rollout.ids, device), moved(rollout.start + rollout.length, device))
