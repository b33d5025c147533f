"""Batched sampling with a KV cache: rollouts, sample tables, evaluation and chat all use this.

Prompts are padded at the left. Each row draws from its own random numbers, so what a row says
depends neither on the rows beside it nor on when those end.

Shape legend: B unfinished answers, U rows of the decoder, N its next rows, P prompt tokens,
A answer tokens, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fourstage.errors import UserError
from fourstage.model import Transformer
from fourstage.sampling.decode import Decoder

COMPACT_BELOW = 0.75  # finished rows leave the batch when fewer than this share are unfinished
LEAST_TEMPERATURE = 0.01  # dividing by much less makes logits overflow
MOST_SHARED = 0.5  # rows for each answer, above which every answer gets a row of its own


@dataclass(frozen=True)
class Generation:
    """One entry a prompt, in the order of the prompts."""

    answer_ids: list[list[int]]  # with the stop token where one was sampled
    logprobs: list[list[float]]  # of each answer token, under the distribution it was drawn from
    stopped: list[bool]  # ended by the stop token, not by max_new_tokens


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from logits; temperature 0 takes the likeliest one.

    top_k keeps the k likeliest tokens (0: all), then top_p the smallest set of the likeliest whose
    probability reaches p (Holtzman et al. 2019, arXiv 1904.09751); `forbid` ids are never drawn.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    forbid: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature != 0 and not self.temperature >= LEAST_TEMPERATURE:
            raise UserError(
                f"temperature: must be 0 (greedy) or at least {LEAST_TEMPERATURE}, "
                f"got {self.temperature}"
            )
        if self.top_k < 0:
            raise UserError(f"top_k: must be 0 (all tokens) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: must be above 0 and at most 1, got {self.top_p}")

    def log_probs(self, logits_BV: Tensor) -> Tensor:
        """Log-probabilities [B, V] after temperature and filters (greedy: as if it were 1)."""
        logits_BV = logits_BV.float()
        if self.temperature not in (0, 1):
            logits_BV = logits_BV / self.temperature
        if self.forbid:
            logits_BV = logits_BV.index_fill(
                1, torch.tensor(self.forbid, device=logits_BV.device), -torch.inf
            )
        if self.top_k or self.top_p < 1:
            sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
            if self.top_k:
                sorted_BV[:, self.top_k :] = -torch.inf
            probs_BV = sorted_BV.softmax(-1)
            before_BV = probs_BV.cumsum(-1) - probs_BV
            sorted_BV = sorted_BV.masked_fill(before_BV >= self.top_p, -torch.inf)
            logits_BV = torch.empty_like(logits_BV).scatter_(1, order_BV, sorted_BV)
        return logits_BV.log_softmax(-1)

    def draw(self, log_probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
        """int64 [B]: the token where the cumulated probability passes the row's uniform number."""
        if self.temperature == 0:
            return log_probs_BV.argmax(-1)
        cdf_BV = log_probs_BV.exp().cumsum(-1)
        below_total_B = uniform_B.clamp(max=1 - 2**-20) * cdf_BV[:, -1]
        drawn_B = torch.searchsorted(cdf_BV, below_total_B[:, None], right=True).squeeze(1)
        return drawn_B.clamp(max=cdf_BV.shape[1] - 1)  # past the end where nothing is a number


def generate(
    model: Transformer,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop_id: int,
    pad_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    forbid: tuple[int, ...] = (),
    seed: int = 0,
    row_seeds: list[int] | None = None,
) -> Generation:
    """Answers every prompt with at most max_new_tokens tokens, up to and including stop_id.

    With top_k 0, top_p 1 and nothing forbidden, logprobs are those that a training forward gives
    for logits / temperature. Row i draws with row_seeds[i], else with a seed made of seed and i.

    Raises:
        UserError: a prompt leaves no room for the answer in max_seq_len, or a value out of range.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, forbid=forbid)
    if row_seeds is None:
        row_seeds = [_row_seed(seed, i) for i in range(len(prompts))]
    assert len(row_seeds) == len(prompts), "one seed a prompt"
    steps = _steps(model, prompts, max_new_tokens, stop_id, pad_id, sampling, row_seeds)
    rows, tokens, logprobs = [torch.cat(x).tolist() for x in zip(*steps, strict=True)] or ([],) * 3
    answers: list[list[int]] = [[] for _ in prompts]
    answer_logprobs: list[list[float]] = [[] for _ in prompts]
    for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
        answers[row].append(token)
        answer_logprobs[row].append(logprob)
    return Generation(answers, answer_logprobs, [stop_id in answer for answer in answers])


def stream(
    model: Transformer,
    prompt: list[int],
    *,
    max_new_tokens: int,
    stop_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    forbid: tuple[int, ...] = (),
    seed: int = 0,
) -> Iterator[int]:
    """The answer that generate gives to this prompt alone, token by token; raises as it does."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, forbid=forbid)
    row_seeds = [_row_seed(seed, 0)]
    for _, token, _ in _steps(model, [prompt], max_new_tokens, stop_id, 0, sampling, row_seeds):
        yield token.item()


@torch.no_grad()
def _steps(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_id: int,
    pad_id: int,
    sampling: Sampling,
    row_seeds: list[int],
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per step: the unfinished answers' prompt numbers, new tokens and log-probs, each [B]."""
    longest = max(map(len, prompts), default=0)
    if longest + max_new_tokens > model.config.max_seq_len:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's "
            f"max_seq_len of {model.config.max_seq_len}: shorten the prompt or lower max_new_tokens"
        )
    if not prompts or max_new_tokens < 1:
        return
    assert all(prompts), "an empty prompt"
    uniform_BA = _uniforms(row_seeds, max_new_tokens).to(model.embedding.weight.device)
    was_training = model.training
    model.eval()
    try:
        rows = _Rows(model, prompts, longest + max_new_tokens, pad_id)
        row_B = torch.arange(len(prompts), device=uniform_BA.device)
        for step in range(max_new_tokens):
            log_probs_BV = rows.spread(sampling.log_probs(rows.logits()))
            token_B = sampling.draw(log_probs_BV, uniform_BA[:, step])
            logprob_B = log_probs_BV.gather(1, token_B[:, None]).squeeze(1)
            yield row_B, token_B, logprob_B
            alive_K = (token_B != stop_id).nonzero().squeeze(1)  # a GPU is waited for here
            if len(alive_K) < len(token_B):
                row_B, uniform_BA, token_B = (x[alive_K] for x in (row_B, uniform_BA, token_B))
                rows.leave(alive_K)
            if not len(row_B):
                return
            rows.append(token_B)
    finally:
        model.train(was_training)


class _Rows:
    """The decoder's rows, of which equal answers share one: answers to one prompt until they part.

    place_B: int64, the row of each unfinished answer; is_in_order: they are all rows, one after the
    other. A row that no answer needs stays until it is worth a copy of the others. With prompts of
    one length nothing is masked, and attention may take its faster way. A padded row's positions
    start after its padding: rotary attention sees distances only.
    """

    def __init__(self, model: Transformer, prompts: list[list[int]], capacity: int, pad_id: int):
        """Reads all but the last token of each prompt, which is the first to be appended."""
        device = model.embedding.weight.device
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        self.place_B = torch.tensor([number[tuple(prompt)] for prompt in prompts], device=device)
        self.is_shared = len(number) < len(prompts)
        self.is_in_order = not self.is_shared
        self.ids_U = torch.tensor([prompt[-1] for prompt in number], device=device)
        longest = max(map(len, number))
        pads = [longest - len(prompt) for prompt in number]
        real_US = None
        if any(pads):
            steps = torch.arange(capacity, device=device)
            real_US = steps >= torch.tensor(pads, device=device)[:, None]
        self.decoder = Decoder(model, capacity, real_US, rows=len(prompts))
        if longest > 1:
            ids = [[pad_id] * pad + list(p[:-1]) for pad, p in zip(pads, number, strict=True)]
            self.decoder.prefill(torch.tensor(ids, device=device))

    def logits(self) -> Tensor:
        """[U, V] after the token that was appended last."""
        return self.decoder(self.ids_U)

    def spread(self, x_UV: Tensor) -> Tensor:
        """What a row has, for each of its unfinished answers: [B, V]."""
        return x_UV if self.is_in_order else x_UV[self.place_B]

    def leave(self, alive_K: Tensor) -> None:
        """Only these answers, of B, are unfinished."""
        self.place_B, self.is_in_order = self.place_B[alive_K], False

    def append(self, token_B: Tensor) -> None:
        """A token more for each unfinished answer; those that part get rows of their own."""
        if self.is_in_order:
            self.ids_U = token_B
            return
        rows_N, ids_N, place_B = self.place_B, token_B, None  # the next rows: a row and its token
        have_parted = False
        if self.is_shared:
            n_ids = self.decoder.model.vocab_size
            next_N, place_B = (self.place_B * n_ids + token_B).unique(return_inverse=True)
            rows_N, ids_N = next_N // n_ids, next_N % n_ids
            have_parted = bool((rows_N[1:] == rows_N[:-1]).any())
            self.is_shared = len(next_N) < len(token_B)
            if have_parted and len(next_N) > MOST_SHARED * len(token_B):  # copied once, not often
                rows_N, ids_N, place_B = self.place_B, token_B, None
                self.is_shared = False
        if not have_parted and len(rows_N) >= COMPACT_BELOW * len(self.ids_U):
            self.ids_U = self.ids_U.index_copy(0, rows_N, ids_N)
            return
        self.decoder.keep(rows_N)
        self.ids_U = ids_N
        self.is_in_order = place_B is None
        self.place_B = (
            torch.arange(len(rows_N), device=rows_N.device) if place_B is None else place_B
        )


def _row_seed(seed: int, row: int) -> int:
    return (seed * 1_000_003 + row) % 2**63


def _uniforms(row_seeds: list[int], n: int) -> Tensor:
    """float [B, n] in [0, 1), row i from row_seeds[i] alone; the same on every device."""
    generator = torch.Generator()
    return torch.stack([torch.rand(n, generator=generator.manual_seed(seed)) for seed in row_seeds])
