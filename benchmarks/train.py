"""Training steps a second, against transformers, our dense twin and the matrix products alone.

    python -m benchmarks.train [device=cpu|cuda] [shapes=NAME,NAME] [repeats=5] [steps=2]
                               [rows=N] [compile=true|false]

A step is forward, backward, clipping at 1 and AdamW (fused) on a batch of real next tokens. Ours is
the pretrain stage's own training_step under a real Trainer; transformers' is a plain loop round
its model with its own loss. The limit is the time of the step's matrix products and nothing else
(see `matrix_products`). On a CPU fp32; on a GPU bf16 autocast over fp32 weights, for transformers
also weights in bf16. compile: torch.compile for every model (default: on a GPU); each compiles in
its warm-up, which is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx

from benchmarks import peers
from benchmarks.common import (
    CHARACTERS,
    Block,
    Seconds,
    Shape,
    dense_twin,
    device_name,
    fastest,
    fit,
    interleave,
    known,
    milliseconds,
    on_device,
    pretrain_module,
    print_json,
    print_table,
    read_arguments,
    shipped_model,
    start,
    timed,
    token_batches,
)
from fourstage.batch import TokenBatch
from fourstage.job import check_compiler
from fourstage.model import ModelConfig, Transformer, ops
from fourstage.model.flops import forward_flops, head_flops
from fourstage.tracking.cost import mfu, peak_flops

LIMIT = "matrix products"
OURS = "ours"
PLAIN = "ours without kernels"  # without the CPU's kernels
DENSE = "our dense twin"
BATCHES = 64  # that the contestants go round in


def shapes() -> dict[str, Shape]:
    """By name: the first two for a CPU, the others for a GPU."""
    wide = shipped_model(
        "moe_tiny", name="moe_d256", d_model=256, n_layers=6, head_dim=64, d_expert=256
    )
    return {
        "moe_tiny": Shape(shipped_model("moe_tiny"), CHARACTERS.vocab_size, 16, 256),
        "moe_d256": Shape(wide, 4096, 16, 256),
        "moe_small": Shape(shipped_model("moe_small"), 32768, 32, 1024),
        "moe_medium": Shape(shipped_model("moe_medium"), 32768, 8, 2048),
    }


DEFAULT_SHAPES = {"cpu": ("moe_tiny", "moe_d256"), "cuda": ("moe_small", "moe_medium")}


@dataclass(frozen=True, kw_only=True)
class Options:
    device: str = "cpu"
    shapes: tuple[str, ...] = ()
    repeats: int = 5
    steps: int = 2
    rows: int | None = None
    compile: bool | None = None


# --- the contestants


def our_block(
    model: Transformer,
    shape: Shape,
    batches: Iterator[TokenBatch],
    device: torch.device,
    fuse: bool,
) -> Block:
    """The pretrain stage; the first step of a block makes the optimizer's state and is left out."""
    if fuse:
        model.compile_blocks(dynamic=device.type == "cpu" or None)  # as runner.py does
    module = pretrain_module(model, shape)

    def block(n: int) -> list[float]:
        seconds, _ = fit(module, [next(batches) for _ in range(n + 1)], device)
        return seconds[1:]

    return block


def without_fused(block: Block) -> Block:
    """The same with the gradients that PyTorch derives from the plain expressions."""

    def plain(n: int) -> list[float]:
        with mock.patch.object(ops, "applies", lambda *_: False):
            return block(n)

    return plain


def their_block(
    model: nn.Module, batches: Iterator[TokenBatch], device: torch.device, fuse: bool
) -> Block:
    """A training loop without anything that a user could leave out."""
    model.train().to(device)
    if fuse:
        # a backend of its own: what eager's graph breaks leave would be run for grouped_mm too
        model.compile(backend=partial(compile_fx))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()

    def step(batch: TokenBatch) -> None:
        with autocast:
            loss = model(
                batch.ids, labels=batch.targets, shift_labels=batch.targets, use_cache=False
            ).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def block(n: int) -> list[float]:
        ready = iter([next(batches).to(device) for _ in range(n + 1)])
        return timed(lambda: step(next(ready)))(n + 1)[1:]

    return block


def matrix_products(shape: Shape, device: torch.device) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(a, b, how often) for a @ b: all matrix products of one step, as few and large as can be.

    Forward: query, key and value as one product, attention as two batched ones in which each query
    meets T / 2 keys (the half that is not masked), output, router, gate and up as one for each
    expert, down, each expert with N K / E tokens, the shared expert, head; for each of these its
    two gradients. A flash attention's second product of queries and keys is not counted.
    """
    c, dtype = shape.config, torch.bfloat16 if device.type == "cuda" else torch.float32
    N = shape.rows * shape.tokens

    def forward_and_backward(*sizes: int, times: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        *batch, n, d_in, d_out = sizes
        x = torch.randn(*batch, n, d_in, device=device, dtype=dtype)
        w = torch.randn(*batch, d_out, d_in, device=device, dtype=dtype)
        grad = torch.randn(*batch, n, d_out, device=device, dtype=dtype)
        yield x, w.mT, times
        yield grad, w, times
        yield grad.mT, x, times

    L, D, C, H, T = c.n_layers, c.d_model, c.head_dim, c.n_heads, shape.tokens
    yield from forward_and_backward(N, D, C * (H + 2 * c.n_kv_heads), times=L)
    yield from forward_and_backward(shape.rows * H, T, C, T // 2, times=L)
    yield from forward_and_backward(shape.rows * H, T, T // 2, C, times=L)
    yield from forward_and_backward(N, H * C, D, times=L)
    mlps = [(N * c.top_k // c.num_experts, c.d_expert, c.num_experts)]
    if c.d_shared:
        mlps.append((N, c.d_shared, 1))
    if not c.dense:
        yield from forward_and_backward(N, D, c.num_experts, times=L)
    for tokens, width, experts in mlps:
        yield from forward_and_backward(tokens, D, 2 * width, times=L * experts)
        yield from forward_and_backward(tokens, width, D, times=L * experts)
    yield from forward_and_backward(N, D, shape.vocab_size, times=1)


def limit_block(shape: Shape, device: torch.device) -> Block:
    """One product after the other, into memory that is there already."""
    products = [
        (torch.bmm if a.ndim == 3 else torch.mm, a, b, a @ b, times)
        for a, b, times in matrix_products(shape, device)
    ]

    def step() -> None:
        for multiply, a, b, out, times in products:
            for _ in range(times):
                multiply(a, b, out=out)

    return timed(step)


def contestants(shape: Shape, device: torch.device, fuse: bool) -> dict[str, Block]:
    """Ours and transformers' (where it is the same function, with our weights)."""
    batches = token_batches(shape, BATCHES)

    def again() -> Iterator[TokenBatch]:
        while True:
            yield from batches

    def made(config: ModelConfig) -> Transformer:
        torch.manual_seed(0)
        return Transformer(config, shape.vocab_size)

    config = shape.config
    blocks = {OURS: our_block(made(config), shape, again(), device, fuse)}
    if device.type == "cpu" and not fuse:
        blocks[PLAIN] = without_fused(our_block(made(config), shape, again(), device, fuse))
    for name in ("eager", "grouped_mm"):
        glm4 = peers.glm4_moe(config, shape.vocab_size)
        peers.copy_weights(made(config), glm4)
        models = {f"glm4_moe_{name}": glm4}
        if not config.d_shared:
            models[f"qwen3_moe_{name}"] = peers.qwen3_moe(config, shape.vocab_size)
        if device.type == "cuda":
            halves = peers.glm4_moe(config, shape.vocab_size).bfloat16()
            models[f"glm4_moe_{name}_bf16_weights"] = halves
        for key, model in models.items():
            model.set_experts_implementation(name)
            blocks[f"transformers_{key}"] = their_block(model, again(), device, fuse)
    blocks[DENSE] = our_block(made(dense_twin(config)), shape, again(), device, fuse)
    blocks[LIMIT] = limit_block(shape, device)
    return blocks


# --- the figures


def step_flops(shape: Shape, keys: int) -> int:
    """FLOPs of a step's matrix products with so many keys a query (model/flops.py)."""
    N = shape.rows * shape.tokens
    c = shape.config
    return 3 * (forward_flops(c, N, keys) + head_flops(c.d_model, shape.vocab_size, N))


def ratios_of(name: str, found: dict[str, Seconds]) -> dict[str, float]:
    """Higher is better for us: their seconds over ours."""
    ours = found[OURS].median
    theirs = {n: s for n, s in found.items() if n.startswith("transformers_")}
    ratios = {f"{name}_vs_{n}": s.median / ours for n, s in theirs.items()}
    ratios[f"{name}_vs_transformers_best"] = min(s.median for s in theirs.values()) / ours
    ratios[f"{name}_vs_dense_twin"] = found[DENSE].median / ours
    ratios[f"{name}_of_matmul_limit"] = found[LIMIT].median / ours
    return ratios


def measure(
    name: str, shape: Shape, options: Options, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """The table of one shape; its ratios and figures."""
    fuse = device.type == "cuda" if options.compile is None else options.compile
    if fuse and device.type == "cpu":
        check_compiler("compile")
    if fuse:  # a model after the other; past the limit one would run uncompiled
        torch._dynamo.config.recompile_limit = 64
    found = interleave(contestants(shape, device, fuse), options.repeats, options.steps)
    tokens = shape.rows * shape.tokens
    peak = peak_flops(device_name(device), "bf16" if device.type == "cuda" else "32")
    limit_flops = step_flops(shape, shape.tokens // 2)
    print(
        f"\n{name}: {shape.rows} x {shape.tokens} tokens, vocabulary {shape.vocab_size:,}; "
        f"{options.repeats} x {options.steps} steps each; the matrix products "
        f"({limit_flops / 1e9:,.1f} GFLOP) ran at "
        f"{limit_flops / found[LIMIT].median / 1e9:,.0f} GFLOP/s"
    )
    header = ["", "ms a step (min .. max)", "tokens/s", "ours is", *(["MFU"] if peak else [])]
    rows, figures = [], {}
    for who, seconds in found.items():
        row = [
            who,
            milliseconds(seconds),
            f"{tokens / seconds.median:,.0f}",
            f"{seconds.median / found[OURS].median:.2f} x",
        ]
        figures[f"{name}_{who.replace(' ', '_')}_tokens_per_s"] = tokens / seconds.median
        if peak:
            share = mfu(step_flops(shape, shape.tokens), seconds.median, peak, 1)
            row.append(f"{100 * share:.1f} %")
            figures[f"{name}_{who.replace(' ', '_')}_mfu"] = share
        rows.append(row)
    print_table(header, rows)
    print(f"transformers' fastest: {fastest(found, 'transformers_')}")
    return ratios_of(name, found), figures


def main(arguments: list[str], known_shapes: Callable[[], dict[str, Shape]] = shapes) -> None:
    options = read_arguments(Options, arguments)
    device = on_device(options.device)
    every = known_shapes()
    names = options.shapes or DEFAULT_SHAPES[options.device]
    known("shapes", names, every)
    ratios, figures = {}, {}
    for name in names:
        shape = every[name]
        if options.rows:
            shape = shape._replace(rows=options.rows)
        more_ratios, more_figures = measure(name, shape, options, device)
        ratios |= more_ratios
        figures |= more_figures
    print_json("train", device_name(device), ratios, figures)


if __name__ == "__main__":
    start(main)
