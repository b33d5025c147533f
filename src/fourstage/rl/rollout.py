"""Rollouts: sample answers, re-pack them for training, score them with any of the networks.

A rollout is on the CPU; scores are where the network is that gives them.

The sampler and the trainer are the same network code, so their log-probabilities agree
(a test holds them to 1e-4 in float32, and the stages log the difference).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fourstage.batch import Rollout, moved
from fourstage.errors import UserError
from fourstage.model import ScalarModel, Transformer
from fourstage.model.packing import Packing, Take
from fourstage.rl.ops import token_logprobs
from fourstage.sampling.generate import generate
from fourstage.tokenizer import Tokenizer

ROWS_AT_ONCE = 512  # the KV cache of more rows would not fit a laptop's memory
MOST_PACKED = 0.9  # of all places distinct tokens: above it packing saves less than it costs
SEED_STEP = 1_000_003  # rows of one rollout; each draws from its own seed, whatever the batch


def fitted_prompt(tokenizer: Tokenizer, messages: list[dict[str, str]], room: int) -> list[int]:
    """The prompt's ids, without its beginning where it is longer than `room` tokens."""
    ids = tokenizer.prompt(messages)
    if len(ids) <= room:
        return ids
    shorter = tokenizer.shorten(ids, room, keep=2)
    if shorter is None:
        raise UserError(f"no room for a prompt in {room} tokens: lower max_new_tokens")
    return shorter


@torch.no_grad()
def sample(
    policy: Transformer,
    prompts: list[list[int]],
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Rollout:
    """One answer to each prompt, from the whole distribution (no top-k, no top-p: on-policy)."""
    texts: list[list[int]] = []
    logprobs: list[list[float]] = []
    stopped: list[bool] = []
    for at in range(0, len(prompts), ROWS_AT_ONCE):
        some = prompts[at : at + ROWS_AT_ONCE]
        answers = generate(
            policy,
            some,
            max_new_tokens=max_new_tokens,
            stop_id=tokenizer.eot_id,
            pad_id=tokenizer.pad_id,
            temperature=temperature,
            row_seeds=[(seed * SEED_STEP + at + row) % 2**63 for row in range(len(some))],
        )
        texts += answers.answer_ids
        logprobs += answers.logprobs
        stopped += answers.stopped
    return pack(prompts, texts, logprobs, stopped, tokenizer.pad_id)


def pack(
    prompts: list[list[int]],
    answers: list[list[int]],
    logprobs: list[list[float]],
    stopped: list[bool],
    pad_id: int,
) -> Rollout:
    """Right-padded rows prompt + answer from ragged lists."""
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    n_answer = max(len(a) for a in answers)
    ids_BT = torch.full((len(prompts), longest), pad_id)
    logp_BA = torch.zeros(len(prompts), n_answer)
    for row, (prompt, answer, logp) in enumerate(zip(prompts, answers, logprobs, strict=True)):
        ids_BT[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        logp_BA[row, : len(answer)] = torch.tensor(logp)
    return Rollout(
        ids=ids_BT,
        start=torch.tensor([len(p) for p in prompts]),
        length=torch.tensor([len(a) for a in answers]),
        logprobs=logp_BA,
        stopped=torch.tensor(stopped),
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
    packing = Packing(rollout.ids, rollout.start + rollout.length - 1)
    if len(packing) <= MOST_PACKED * rollout.ids.numel():
        at_BA = packing.place_BT.gather(1, rollout.predict_at)
        hidden_ND = policy(packing.to(device)).hidden_BTD[0]
    else:
        B, T = rollout.inputs.shape
        at_BA = rollout.predict_at + torch.arange(0, B * T, T)[:, None]
        is_input_BT = moved(rollout.is_input, device)
        hidden_ND = policy(moved(rollout.inputs, device), valid_BT=is_input_BT).hidden_BTD.flatten(
            0, 1
        )
    at_M = moved(at_BA.flatten()[rollout.places], device)
    return policy.logits(Take(at_M, len(hidden_ND))(hidden_ND))


def answer_logprobs(policy: Transformer, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Log-probability of each answer token, float32 [B, A], 0 where mask is False.

    With gradient where that is enabled.
    """
    ids_M = moved(rollout.answer_ids.flatten()[rollout.places], device_of(policy))
    return _as_rows(token_logprobs(answer_logits(policy, rollout), ids_M, temperature), rollout)


def _as_rows(x_M: Tensor, rollout: Rollout) -> Tensor:
    """One number an answer token -> [B, A], 0 where mask is False."""
    places_M = moved(rollout.places, x_M.device)
    flat = x_M.new_zeros(rollout.logprobs.numel()).index_copy(0, places_M, x_M)
    return flat.view(rollout.logprobs.shape)


def answer_values(network: ScalarModel, rollout: Rollout) -> Tensor:
    """The value before each answer token, float32 [B, A]: V(s_a), s_a = prompt + a tokens."""
    device = device_of(network)
    is_input_BT = moved(rollout.is_input, device)
    values_BT = network(moved(rollout.inputs, device), valid_BT=is_input_BT).float()
    return values_BT.gather(1, moved(rollout.predict_at, device))


def final_scores(network: ScalarModel, rollout: Rollout) -> Tensor:
    """The reward model's score, read at the last real token of each row, float32 [B]."""
    device = device_of(network)
    values_BT = network(moved(rollout.ids, device), valid_BT=moved(rollout.valid, device)).float()
    last_B = moved(rollout.start + rollout.length - 1, device)
    return values_BT.gather(1, last_B[:, None]).squeeze(1)
