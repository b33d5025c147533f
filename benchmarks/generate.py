"""Sampled tokens a second of a rollout, against transformers' generate with the same weights.

    python -m benchmarks.generate [device=cpu|cuda] [batches=1,64,512] [prompts=equal,mixed,groups]
                                  [new_tokens=64] [repeats=3] [model=moe_tiny]

Prompts are text of 40 characters (equal), of 20 to 60 (mixed: padded at the left), or of 40 with 8
answers each (groups: a GRPO rollout). Both sides
sample at temperature 1 from the whole distribution, never stop early and make the same number of
tokens; ours also keeps their log-probabilities. transformers runs each of its experts with its
dynamic and its static cache. First every contestant runs once; of each of transformers' experts the
faster cache goes on, unless it took 1.5 x as long as the fastest. Then greedy answers are compared:
they must be equal, but for ties of rounding (a gap between the two likeliest below 1e-3 nats, or
between the last expert chosen and the next below 2e-6).
On a GPU under bf16 autocast (transformers: weights in bf16), and the greedy answers in fp32.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.common import (
    CHARACTERS,
    Seconds,
    device_name,
    interleave,
    known,
    milliseconds,
    on_device,
    print_json,
    print_table,
    read_arguments,
    reference_ids,
    shipped_model,
    start,
    timed,
)
from fourstage.errors import UserError
from fourstage.model import ModelConfig, Transformer
from fourstage.model.moe import Router, Routing
from fourstage.sampling.generate import Sampling, generate

NEVER = -1  # a stop token that no row can sample
PROMPTS = {"equal": (40, 40, 1), "mixed": (20, 60, 1), "groups": (40, 40, 8)}  # see text_prompts
CACHES = ("dynamic", "static")
SLOWER = 1.5  # times the fastest of transformers' first runs: goes no further
GATHERED = 2**32  # bytes of expert weights that batched_mm may copy for the prompts of one layer
TIE = 1e-3  # nats between the two likeliest tokens
ROUTER_TIE = 2e-6  # between the scores of the last expert chosen and the first one not chosen


@dataclass(frozen=True, kw_only=True)
class Options:
    device: str = "cpu"
    batches: tuple[int, ...] = (1, 64, 512)
    prompts: tuple[str, ...] = ("equal", "mixed", "groups")
    new_tokens: int = 64
    repeats: int = 3
    model: str | None = None


def text_prompts(rows: int, shortest: int, longest: int, copies: int) -> list[list[int]]:
    """Pieces of the reference text, of a length drawn from the range, each so many times."""
    ids, draw = reference_ids(), random.Random(rows)
    found: list[list[int]] = []
    while len(found) < rows:
        at = draw.randrange(len(ids) - longest)
        found += [ids[at : at + draw.randint(shortest, longest)]] * copies
    return found[:rows]


@torch.no_grad()
def balance(model: Transformer, updates: int = 100) -> None:
    """Set the routers' biases as training leaves them: its experts are about equally busy.

    By training's own rule, on the model's own answers, with ever smaller steps.
    """
    if model.config.dense:
        return
    config, prompts = model.config, text_prompts(64, *PROMPTS["equal"])
    sampling = Sampling(max_new_tokens=24, stop_id=NEVER)
    answers = generate(model, prompts, sampling).answer_ids
    ids_BT = torch.tensor(
        [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
        device=model.embedding.weight.device,
    )
    for i in range(updates):
        model.config = replace(config, bias_step=0.03 * 0.95**i)
        model.update_expert_bias(model(ids_BT).router.load_LE)
    model.config = config


class Pair:
    """Our model and transformers', with the same weights."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.ours = Transformer(config, CHARACTERS.vocab_size).eval().to(device)
        balance(self.ours)
        self.theirs = peers.glm4_moe(config, CHARACTERS.vocab_size).eval().to(device)
        peers.copy_weights(self.ours, self.theirs)
        self.ours.records_steps = on_gpu = device.type == "cuda"
        self.fast_theirs = copy.deepcopy(self.theirs).bfloat16() if on_gpu else self.theirs

    def our_answers(self, prompts: list[list[int]], n: int, temperature: float) -> list[list[int]]:
        sampled_on_gpu = temperature > 0 and self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if sampled_on_gpu else nullcontext():
            sampling = Sampling(max_new_tokens=n, stop_id=NEVER, temperature=temperature)
            return generate(self.ours, prompts, sampling).answer_ids

    def their_answers(
        self, prompts: list[list[int]], n: int, temperature: float, experts: str, cache: str
    ) -> Tensor:
        """int64 [B, n], through model.generate."""
        model = self.fast_theirs if temperature > 0 else self.theirs
        model.set_experts_implementation(experts)
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        ids = [[CHARACTERS.pad_id] * pad + p for pad, p in zip(pads, prompts, strict=True)]
        real = [[0] * pad + [1] * (longest - pad) for pad in pads]
        answers = model.generate(
            torch.tensor(ids, device=self.device),
            attention_mask=torch.tensor(real, device=self.device),
            max_new_tokens=n,
            do_sample=temperature > 0,
            **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}),
            use_cache=True,
            cache_implementation=cache,
            pad_token_id=CHARACTERS.pad_id,
            eos_token_id=None,
        )
        return answers[:, longest:]

    def compare_greedy(
        self, prompts: list[list[int]], n: int, experts: str, cache: str
    ) -> tuple[int, int, int]:
        """(equal tokens, all tokens, answers that part at a tie).

        After a token that differs the contexts do, so an answer's tokens count up to there.

        Raises:
            UserError: two answers part where neither the likeliest token nor an expert is a tie.
        """
        ours = torch.tensor(self.our_answers(prompts, n, 0.0))
        theirs = self.their_answers(prompts, n, 0.0, experts, cache).cpu()
        equal = ties = 0
        for prompt, a, b in zip(prompts, ours, theirs, strict=True):
            same = int((a == b).long().cumprod(0).sum())
            equal += same
            if same < n:
                gap, margin = self.gaps([*prompt, *a[:same].tolist()], int(a[same]), int(b[same]))
                if gap > TIE and margin > ROUTER_TIE:
                    raise UserError(f"greedy answers differ where the gap is {gap:.2g} nats")
                ties += 1
        return equal, ours.numel(), ties

    @torch.no_grad()
    def gaps(self, ids: list[int], a: int, b: int) -> tuple[float, float]:
        """By a plain forward of our model: nats between two next tokens, and what the closest of
        all choices of experts was decided by."""
        margins = []

        def note(router: Router, inputs: tuple[Tensor, ...], _: Routing) -> None:
            choice_NE = router.proj(inputs[0]).sigmoid() + router.expert_bias_E
            best = choice_NE.topk(router.top_k + 1).values
            margins.append(float((best[:, -2] - best[:, -1]).min()))

        routers = [m for m in self.ours.modules() if isinstance(m, Router)]
        hooks = [m.register_forward_hook(note) for m in routers if m.top_k < m.proj.out_features]
        hidden_BTD = self.ours(torch.tensor([ids], device=self.device)).hidden_BTD
        for hook in hooks:
            hook.remove()
        logits_V = self.ours.logits(hidden_BTD[0, -1])
        return float((logits_V[a] - logits_V[b]).abs()), min(margins, default=1.0)


def gathered_bytes(config: ModelConfig, prompts: list[list[int]]) -> int:
    """What batched_mm copies in one layer's forward of the prompts: an expert for each choice."""
    positions = len(prompts) * max(map(len, prompts))
    return positions * config.top_k * 2 * config.d_expert * config.d_model * 4


def race(
    pair: Pair, prompts: list[list[int]], options: Options
) -> tuple[dict[str, Seconds], dict[str, str]]:
    """The seconds of each contestant, "ours" first, and what is to be said of some."""
    n = options.new_tokens
    steps: dict[str, Callable[[], object]] = {"ours": lambda: pair.our_answers(prompts, n, 1.0)}
    notes = {}
    first: dict[str, float] = {}
    for experts in peers.EXPERTS:
        gathered = gathered_bytes(pair.ours.config, prompts)
        if experts == "batched_mm" and gathered > GATHERED:
            print(f"left out: batched_mm would copy {gathered / 2**30:.1f} GiB of experts a layer")
            continue
        for cache in CACHES:

            def step(experts: str = experts, cache: str = cache) -> object:
                return pair.their_answers(prompts, n, 1.0, experts, cache)

            name = f"{experts} {cache}"
            steps[name] = step
            if pair.device.type == "cuda":
                step()  # a static cache compiles
            (first[name],) = timed(step)(1)
            if first[name] > 2 * SLOWER * min(first.values()):
                break  # no cache will save it
    best = min(first.values())
    raced = {"ours": timed(steps["ours"])}
    found = {}
    for experts in dict.fromkeys(name.split()[0] for name in first):
        quicker = min((name for name in first if name.startswith(experts)), key=first.__getitem__)
        if first[quicker] <= SLOWER * best:
            raced[quicker] = timed(steps[quicker])
        else:
            found[quicker] = Seconds(*[first[quicker]] * 3)
            notes[quicker] = "one run"
    return interleave(raced, options.repeats, 1) | found, notes


def measure(pair: Pair, batch: int, kind: str, options: Options) -> tuple[dict, dict]:
    """The table of one batch; its ratios and figures."""
    prompts = text_prompts(batch, *PROMPTS[kind])
    shape = f"{pair.ours.config.name}_batch{batch}_{kind}"
    print(f"\n{shape}: {batch} prompts, {options.new_tokens} new tokens each")
    found, notes = race(pair, prompts, options)
    tokens, ours = batch * options.new_tokens, found["ours"].median
    rows, figures, ratios = [], {}, {}
    for name, seconds in found.items():
        who = "ours" if name == "ours" else f"transformers {name}"
        rate = f"{tokens / seconds.median:,.0f}"
        faster = f"{seconds.median / ours:.2f} x"
        rows.append([who, milliseconds(seconds), rate, faster, notes.get(name, "")])
        figures[f"{shape}_{who.replace(' ', '_')}_tokens_per_s"] = tokens / seconds.median
        if name != "ours":
            ratios[f"{shape}_vs_transformers_{name.split()[0]}"] = seconds.median / ours
    print_table(["", "ms (min .. max)", "tokens/s", "ours is", ""], rows)
    ratios[f"{shape}_vs_transformers_best"] = min(ratios.values())
    best = min((name for name in found if name != "ours"), key=lambda name: found[name].median)
    equal, total, ties = pair.compare_greedy(prompts, options.new_tokens, *best.split())
    print(f"greedy answers: {equal:,} of {total:,} tokens equal, {ties} answers part at a tie")
    figures[f"{shape}_greedy_equal_share"] = equal / total
    figures[f"{shape}_greedy_ties"] = ties
    return ratios, figures


def main(arguments: list[str]) -> None:
    options = read_arguments(Options, arguments)
    device = on_device(options.device)
    known("prompts", options.prompts, PROMPTS)
    if min(options.batches) < 1:
        raise UserError(f"batches: must be at least 1, got {min(options.batches)}")
    name = options.model or ("moe_tiny" if device.type == "cpu" else "moe_small")
    pair = Pair(shipped_model(name, init_std=0.1), device)  # opinionated: few ties
    ratios, figures = {}, {}
    for batch in options.batches:
        for kind in options.prompts:
            if batch == 1 and kind != options.prompts[0]:
                continue  # one prompt is never padded, nor a group
            more_ratios, more_figures = measure(pair, batch, kind, options)
            ratios |= more_ratios
            figures |= more_figures
    print_json("generate", device_name(device), ratios, figures)


if __name__ == "__main__":
    start(main)
