"""Rollouts: sampled answers as rows for training, scored by any of the networks.

A rollout is on the CPU; scores are on the device of the network that computes them.

Our own sampler and the trainer agree on log-probabilities to 1e-4 in float32 (there is a test, and
the stages log the difference).
"""

import torch
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
    ids_BT = padded([p + a for p, a in zip(prompts, answers, strict=True)], pad_id)
    logp_BA = torch.zeros(len(prompts), max(map(len, answers)))
    for row, logprobs in enumerate(generation.logprobs or []):
        logp_BA[row, : len(logprobs)] = torch.tensor(logprobs)
    start_B = torch.tensor([len(p) for p in prompts])
    length_B = torch.tensor([len(a) for a in answers])
    inputs_B = start_B + length_B - 1  # the last token predicts nothing
    rank_B = ranks(ids_BT, inputs_B)
    packs = len(Packing(ids_BT, inputs_B, rank_B)) <= MOST_PACKED * ids_BT.numel()
    return Rollout(
        ids=ids_BT,
        start=start_B,
        length=length_B,
        logprobs=logp_BA,
        stopped=torch.tensor(generation.stopped),
        rank=rank_B if packs else None,
    )


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
