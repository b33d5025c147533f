"""Rollouts: sample answers, re-pack them for training, score them with any of the networks.

The sampler and the trainer are the same network code, so their log-probabilities agree
(a test holds them to 1e-4 in float32, and the stages log the difference).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourstage.batch import Rollout
from fourstage.errors import UserError
from fourstage.generate import generate
from fourstage.model import ScalarModel, Transformer
from fourstage.model.packing import Packing, Take
from fourstage.rl.ops import token_entropy, token_logprobs
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
    device = next(policy.parameters()).device
    return pack(prompts, texts, logprobs, stopped, tokenizer.pad_id).to(device)


def pack(
    prompts: list[list[int]],
    answers: list[list[int]],
    logprobs: list[list[float]],
    stopped: list[bool],
    pad_id: int,
) -> Rollout:
    """Right-padded rows prompt + answer from ragged lists, on the CPU."""
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


def answer_logits(policy: Transformer, rollout: Rollout, places_M: Tensor) -> Tensor:
    """Logits [M, V] that predict the answer tokens at these places of [B * A]."""
    packing = Packing(rollout.ids, rollout.start + rollout.length - 1)
    if len(packing) <= MOST_PACKED * rollout.ids.numel():
        hidden_ND = policy(packing).hidden_BTD[0]
        at_BA = packing.place_BT.gather(1, rollout.predict_at)
    else:
        hidden_BTD = policy(rollout.inputs, valid_BT=rollout.is_input).hidden_BTD
        hidden_ND = hidden_BTD.flatten(0, 1)
        B, T, _ = hidden_BTD.shape
        at_BA = rollout.predict_at + torch.arange(0, B * T, T, device=hidden_ND.device)[:, None]
    return policy.logits(Take(at_BA.flatten()[places_M], len(hidden_ND))(hidden_ND))


def answer_places(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """The mask of the answer tokens [B, A], and where in [B * A] it is True, int64 [M]: a GPU is
    waited for once, not each time that something is indexed by the mask."""
    return rollout.mask, rollout.mask.flatten().nonzero().squeeze(1)


def answer_logprobs(policy: Transformer, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Log-probability of each answer token, float32 [B, A], 0 where mask is False.

    With gradient where that is enabled.
    """
    mask_BA, places_M = answer_places(rollout)
    logits_MV = answer_logits(policy, rollout, places_M)
    logp_M = token_logprobs(logits_MV, rollout.answer_ids.flatten()[places_M], temperature)
    return logp_M.new_zeros(mask_BA.shape).masked_scatter(mask_BA, logp_M)


def answer_entropies(policy: Transformer, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of what predicts each answer token, as `answer_logprobs`."""
    mask_BA, places_M = answer_places(rollout)
    entropy_M = token_entropy(answer_logits(policy, rollout, places_M), temperature)
    return entropy_M.new_zeros(mask_BA.shape).masked_scatter(mask_BA, entropy_M)


def answer_values(network: ScalarModel, rollout: Rollout) -> Tensor:
    """The value before each answer token, float32 [B, A]: V(s_a), s_a = prompt + a tokens."""
    values_BT = network(rollout.inputs, valid_BT=rollout.is_input).float()
    return values_BT.gather(1, rollout.predict_at)


def final_scores(network: ScalarModel, rollout: Rollout) -> Tensor:
    """The reward model's score, read at the last real token of each row, float32 [B]."""
    values_BT = network(rollout.ids, valid_BT=rollout.valid).float()
    last_B = rollout.start + rollout.length - 1
    return values_BT.gather(1, last_B[:, None]).squeeze(1)
