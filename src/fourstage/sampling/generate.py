"""Batched sampling with a KV cache, used by rollouts, sample tables, evaluation and chat.

Prompts are padded at the left. An answer has its own random numbers, whatever else is in the batch.

Shape legend: B unfinished answers, K those that go on, U rows of the decoder, N its next rows,
A answer tokens, S positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fourstage.errors import UserError
from fourstage.model import Transformer
from fourstage.sampling.decode import Decoder

ROWS_AT_ONCE = 512  # more rows' KV cache would not fit in a laptop's memory
COMPACT_BELOW = 0.75  # drop finished rows once less than this share is unfinished
LEAST_TEMPERATURE = 0.01  # logits overflow when divided by much less
MOST_SHARED = 0.5  # rows per answer above which every answer gets a row of its own


@dataclass(frozen=True)
class Generation:
    """One entry per prompt, in their order."""

    answer_ids: list[list[int]]  # including the stop token where one was sampled
    # of each answer token, under the distribution it was drawn from; None where the sampler doesn't
    # know our network's, which is then asked for them
    logprobs: list[list[float]] | None
    stopped: list[bool]  # ended by the stop token, not by max_new_tokens


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn: at most max_new_tokens tokens, up to and including stop_id.

    Temperature 0 takes the most likely token. top_k keeps the k most likely (0: all), then top_p
    the smallest set of the most likely whose probability reaches p (Holtzman et al. 2019, arXiv
    1904.09751); `forbid` ids are never drawn. Row i draws with row_seeds[i], by default derived
    from seed and i. Raises UserError for a value out of range.
    """

    max_new_tokens: int
    stop_id: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    forbid: tuple[int, ...] = ()
    seed: int = 0
    row_seeds: Sequence[int] | None = None

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

    def seeds(self, n: int) -> Sequence[int]:
        """One per row."""
        if self.row_seeds is None:
            return [(self.seed * 1_000_003 + row) % 2**63 for row in range(n)]
        assert len(self.row_seeds) == n, "one seed per prompt"
        return self.row_seeds

    def log_probs(self, logits_BV: Tensor) -> Tensor:
        """Log-probabilities [B, V] after temperature and filters (greedy: as if it were 1)."""
        logits_BV = logits_BV.float()
        if self.temperature not in (0, 1):
            logits_BV = logits_BV / self.temperature
        if self.forbid:
            forbidden = torch.tensor(self.forbid, device=logits_BV.device)
            logits_BV = logits_BV.index_fill(1, forbidden, -torch.inf)
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
        """int64 [B]: the token where the cumulative probability passes the row's uniform number."""
        if self.temperature == 0:
            return log_probs_BV.argmax(-1)
        cdf_BV = log_probs_BV.exp().cumsum(-1)
        below_total_B = uniform_B.clamp(max=1 - 2**-20) * cdf_BV[:, -1]
        drawn_B = torch.searchsorted(cdf_BV, below_total_B[:, None], right=True).squeeze(1)
        return drawn_B.clamp(max=cdf_BV.shape[1] - 1)  # NaN logits make searchsorted return V


Sampler = Callable[[list[list[int]], Sampling], Generation]


def generate(model: Transformer, prompts: list[list[int]], sampling: Sampling) -> Generation:
    """Answers every prompt.

    With top_k 0, top_p 1 and nothing forbidden, logprobs are those of a training forward's
    logits / temperature. Raises UserError where prompt and answer exceed max_seq_len.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    seeds = sampling.seeds(len(prompts))
    for at in range(0, len(prompts), ROWS_AT_ONCE):
        some = slice(at, at + ROWS_AT_ONCE)
        steps = _steps(model, prompts[some], replace(sampling, row_seeds=seeds[some]))
        columns = [torch.cat(x).tolist() for x in zip(*steps, strict=True)]
        for row, token, logprob in zip(*columns, strict=True):
            answers[at + row].append(token)
            logprobs[at + row].append(logprob)
    return Generation(answers, logprobs, [sampling.stop_id in answer for answer in answers])


def sampler_of(model: Transformer) -> Sampler:
    return partial(generate, model)


def stream(model: Transformer, prompt: list[int], sampling: Sampling) -> Iterator[int]:
    """What generate answers to this prompt alone, token by token; raises as it does."""
    return (token for token, _ in stream_logprobs(model, prompt, sampling))


def stream_logprobs(
    model: Transformer, prompt: list[int], sampling: Sampling
) -> Iterator[tuple[int, float]]:
    """The same with each token's log-probability, under the distribution that it is drawn from."""
    for _, token, logprob in _steps(model, [prompt], sampling):
        yield token.item(), logprob.item()


@torch.no_grad()
def _steps(
    model: Transformer, prompts: list[list[int]], sampling: Sampling
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per step: the unfinished answers' numbers, new tokens and log-probs, each [B]."""
    max_new_tokens = sampling.max_new_tokens
    longest = max(map(len, prompts), default=0)
    if longest + max_new_tokens > model.config.max_seq_len:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's "
            f"max_seq_len of {model.config.max_seq_len}: shorten the prompt or lower max_new_tokens"
        )
    if not prompts or max_new_tokens < 1:
        return
    assert all(prompts), "an empty prompt"
    uniform_BA = _uniforms(sampling.seeds(len(prompts)), max_new_tokens)
    uniform_BA = uniform_BA.to(model.embedding.weight.device)
    was_training = model.training
    model.eval()
    try:
        rows = _Rows(model, prompts, longest + max_new_tokens)
        row_B = torch.arange(len(prompts), device=uniform_BA.device)
        for step in range(max_new_tokens):
            log_probs_BV = rows.log_probs(sampling)
            token_B = sampling.draw(log_probs_BV, uniform_BA[:, step])
            logprob_B = log_probs_BV.gather(1, token_B[:, None]).squeeze(1)
            yield row_B, token_B, logprob_B
            alive_K = (token_B != sampling.stop_id).nonzero().squeeze(1)  # waits for the GPU
            if len(alive_K) < len(token_B):
                row_B, uniform_BA, token_B = (x[alive_K] for x in (row_B, uniform_BA, token_B))
                rows.leave(alive_K)
            if not len(row_B):
                return
            rows.append(token_B)
    finally:
        model.train(was_training)


class _Rows:
    """The decoder's rows; answers to the same prompt share a row until they differ.

    place_B: int64, the row of each unfinished answer; None where answer i is in row i. A row that
    no answer needs stays until copying the others pays off. Prompts of equal length need no mask,
    which makes attention faster. Padding shifts a row's positions, which changes nothing: rotary
    attention depends on distances only.
    """

    def __init__(self, model: Transformer, prompts: list[list[int]], capacity: int):
        """Prefills all but the last token of each prompt, which the first step takes."""
        device = model.embedding.weight.device
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        self.is_shared = len(number) < len(prompts)
        self.place_B: Tensor | None = None
        if self.is_shared:
            places = [number[tuple(prompt)] for prompt in prompts]
            self.place_B = torch.tensor(places, device=device)
        self.ids_U = torch.tensor([prompt[-1] for prompt in number], device=device)
        longest = max(map(len, number))
        pads = [longest - len(prompt) for prompt in number]
        pads_U = torch.tensor(pads, device=device)
        places_S = torch.arange(capacity, device=device)
        real_US = places_S >= pads_U[:, None] if any(pads) else None
        self.decoder = Decoder(model, capacity, real_US, rows=len(prompts))
        if longest > 1:
            ids = [[0] * pad + list(p[:-1]) for pad, p in zip(pads, number, strict=True)]
            self.decoder.prefill(torch.tensor(ids, device=device))

    def log_probs(self, sampling: Sampling) -> Tensor:
        """[B, V], of the token after the last appended one."""
        log_probs_UV = sampling.log_probs(self.decoder(self.ids_U))
        return log_probs_UV if self.place_B is None else log_probs_UV[self.place_B]

    def leave(self, alive_K: Tensor) -> None:
        """Keep only these answers; the others have finished."""
        self.place_B = alive_K if self.place_B is None else self.place_B[alive_K]

    def append(self, token_B: Tensor) -> None:
        """One more token per unfinished answer; answers that now differ get rows of their own."""
        if self.place_B is None:
            self.ids_U = token_B
            return
        rows_N, ids_N, place_B = self.place_B, token_B, None  # the next rows: old row, new token
        have_parted = False
        if self.is_shared:
            n_ids = self.decoder.model.vocab_size
            next_N, place_B = (self.place_B * n_ids + token_B).unique(return_inverse=True)
            rows_N, ids_N = next_N // n_ids, next_N % n_ids
            have_parted = bool((rows_N[1:] == rows_N[:-1]).any())
            self.is_shared = len(next_N) < len(token_B)
            if have_parted and len(next_N) > MOST_SHARED * len(token_B):  # one copy, not several
                rows_N, ids_N, place_B = self.place_B, token_B, None
                self.is_shared = False
        if not have_parted and len(rows_N) >= COMPACT_BELOW * len(self.ids_U):
            self.ids_U = self.ids_U.index_copy(0, rows_N, ids_N)
            return
        self.decoder.keep(rows_N)
        self.ids_U, self.place_B = ids_N, place_B


def _uniforms(row_seeds: Sequence[int], n: int) -> Tensor:
    """float [B, n] in [0, 1): row i from row_seeds[i] alone, the same on every device."""
    generator = torch.Generator()
    return torch.stack([torch.rand(n, generator=generator.manual_seed(seed)) for seed in row_seeds])
