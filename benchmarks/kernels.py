"""A CPU's kernels, one by one, against the same in PyTorch's operations.

    python -m benchmarks.kernels [model=moe_tiny] [rows=16] [tokens=256] [repeats=5]

Forward and backward of each part of a block on rows x tokens (Newton-Schulz: 64 square matrices as
wide as the model), then prompts of 40 tokens and a step after them for 1, 64 and 512 rows.
PyTorch's side is what runs without a compiler. Last a product of 4,096 rows with a weight [2 D, D]
on one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import (
    CHARACTERS,
    Seconds,
    device_name,
    interleave,
    milliseconds,
    on_device,
    print_json,
    print_table,
    read_arguments,
    shipped_model,
    start,
    timed,
)
from fourstage.errors import UserError
from fourstage.model import ModelConfig, Transformer, ops
from fourstage.model.attention import Attention, RMSNorm, rope_angles
from fourstage.model.moe import MoE
from fourstage.optim.muon import orthogonalize
from fourstage.sampling.decode import Decoder

PROMPT = 40  # tokens
MANY = 4096  # rows of a product


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str = "moe_tiny"
    rows: int = 16
    tokens: int = 256
    repeats: int = 5


def without_kernels(step: Callable[[], object]) -> Callable[[], object]:
    def plain() -> object:
        with mock.patch.object(ops, "has_kernels", lambda *_: False):
            return step()

    return plain


def parts(config: ModelConfig, rows: int, tokens: int) -> dict[str, Callable[[], object]]:
    """Forward and backward of what a block is made of."""
    D, x = config.d_model, torch.randn(rows, tokens, config.d_model, requires_grad=True)
    attention, norm, moe = Attention(config), RMSNorm(D, config.norm_eps), MoE(config)
    rope = rope_angles(torch.arange(tokens)[None], config.head_dim, config.rope_theta)
    directions = torch.randn(64, D, D)
    run: dict[str, Callable[[], Tensor]] = {
        "norm": lambda: norm(x),
        "projection of queries, keys and values": lambda: attention.qkv(x),
        "attention with its projections": lambda: attention(x, rope),
        "experts with their router": lambda: moe(x)[0],
    }

    def both(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: forward().sum().backward()

    steps = {name: both(forward) for name, forward in run.items()}
    return steps | {"Newton-Schulz": lambda: orthogonalize(directions)}


def decoding(config: ModelConfig, rows: int) -> dict[str, Callable[[], object]]:
    """The prompts of some rows, and a step after them."""
    model = Transformer(config, CHARACTERS.vocab_size).eval()
    ids = torch.randint(0, CHARACTERS.vocab_size, (rows, PROMPT))
    decoders: dict[bool, Decoder] = {}  # by whether it is one with kernels

    def prompt() -> None:
        decoder = decoders[ops.has_kernels()] = Decoder(model, 2 * PROMPT)
        decoder.prefill(ids)

    def step() -> None:
        decoder = decoders[ops.has_kernels()]
        decoder.length = PROMPT  # the same place again
        decoder(ids[:, 0])

    return {f"prompts of {rows} rows": prompt, f"a step of {rows} rows": step}


def product(d_model: int, repeats: int) -> dict[str, float]:
    """GFLOP/s on one thread: the kernel's and PyTorch's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, weight = torch.randn(MANY, d_model), torch.randn(2 * d_model, d_model)
    contestants = {
        "kernel": timed(lambda: ops.linear(x, weight)),
        "PyTorch": timed(lambda: F.linear(x, weight)),
    }
    found = interleave(contestants, repeats, 10)
    torch.set_num_threads(threads)
    return {name: 4 * MANY * d_model**2 / s.median / 1e9 for name, s in found.items()}


def race(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[Seconds, ...]]:
    """The seconds of each with kernels, and without."""
    found = {}
    for name, step in steps.items():
        both = {"kernels": timed(step), "PyTorch": timed(without_kernels(step))}
        found[name] = tuple(interleave(both, repeats, 3).values())
    return found


def main(arguments: list[str]) -> None:
    options = read_arguments(Options, arguments)
    device = on_device("cpu")
    config = shipped_model(options.model, init_std=0.1)
    if config.dense:
        raise UserError(f"model: {options.model} has no experts; choose another, as model=moe_tiny")
    if not ops.has_kernels(config.d_model, config.head_dim, config.d_expert):
        raise UserError("there are no kernels here: they need g++ and widths that 16 divides")
    torch.manual_seed(0)
    steps = parts(config, options.rows, options.tokens)
    for rows in (1, 64, 512):
        steps |= decoding(config, rows)
    found = race(steps, options.repeats)
    print(f"\n{config.name}: {options.rows} x {options.tokens} tokens")
    table = [
        [name, *map(milliseconds, both), f"{both[1].median / both[0].median:.2f} x"]
        for name, both in found.items()
    ]
    print_table(["", "kernel, ms", "PyTorch, ms", "faster"], table)
    rates = product(config.d_model, options.repeats)
    said = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    print(f"\na product of {MANY:,} rows on one thread, GFLOP/s: {said}")
    ratios = {name.replace(" ", "_"): b.median / a.median for name, (a, b) in found.items()}
    ratios["product"] = rates["kernel"] / rates["PyTorch"]
    print_json("kernels", device_name(device), ratios, {})


if __name__ == "__main__":
    start(main)
