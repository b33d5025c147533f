"""Where the time of a training step or of a rollout's step goes, by kind of operation.

    python -m benchmarks.profile [what=train|decode] [model=moe_tiny] [rows=N] [tokens=N] [steps=5]

train: forward, backward and AdamW on rows x tokens characters (16 x 256). decode: one new token for
each row (512) after a prompt of so many tokens (40). The profiler adds a little to each operation:
read the shares, and `python -m benchmarks.train` and `.generate` for the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.common import (
    CHARACTERS,
    Shape,
    device_name,
    known,
    now,
    on_device,
    print_json,
    print_table,
    read_arguments,
    shipped_model,
    start,
    token_batches,
)
from fourstage.model import ModelConfig, Transformer
from fourstage.sampling.decode import Decoder, KernelSteps
from fourstage.stages.supervised import next_token_nll

KERNEL = "a kernel in C++"  # of a decode step, which is no operation of PyTorch
KINDS = {  # by the beginning of an operation's name, the first that fits
    "kernels in C++": (KERNEL, "fourstage::"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::_grouped_mm"),
    "batched products (attention)": ("aten::bmm", "aten::baddbmm"),
    "attention in one operation": ("aten::_scaled_dot_product",),
    "weighted sums of rows (combining)": ("aten::_embedding_bag",),
    "copies and gathers": ("aten::copy_", "aten::cat", "aten::index", "aten::gather", "aten::sort"),
    "optimizer": ("aten::_fused_adamw", "Optimizer"),
    "elementwise and reductions": ("aten::",),
    "the rest (Python functions, autograd)": ("",),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    what: str = "train"
    model: str = "moe_tiny"
    rows: int | None = None
    tokens: int | None = None
    steps: int = 5


def train_step(config: ModelConfig, rows: int, tokens: int) -> Callable[[], None]:
    model = Transformer(config, CHARACTERS.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    (batch,) = token_batches(Shape(config, CHARACTERS.vocab_size, rows, tokens), 1)

    def step() -> None:
        logits_BTV = model.logits(model(batch.ids).hidden_BTD)
        (next_token_nll(logits_BTV, batch.targets) / batch.targets.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def decode_step(config: ModelConfig, rows: int, tokens: int) -> Callable[[], None]:
    model = Transformer(config, CHARACTERS.vocab_size).eval()
    (batch,) = token_batches(Shape(config, CHARACTERS.vocab_size, rows, tokens), 1)
    decoder = Decoder(model, config.max_seq_len)
    is_kernel = KernelSteps.supports(model)

    def step() -> None:
        nonlocal decoder
        if decoder.length == config.max_seq_len:
            decoder = Decoder(model, config.max_seq_len)
        if decoder.length == 0:
            decoder.prefill(batch.ids)
        with record_function(KERNEL) if is_kernel else nullcontext():
            decoder(batch.ids[:, -1])

    return step


STEPS = {"train": (train_step, 16, 256), "decode": (decode_step, 512, 40)}


def main(arguments: list[str]) -> None:
    options = read_arguments(Options, arguments)
    known("what", [options.what], STEPS)
    device = on_device("cpu")
    make, rows, tokens = STEPS[options.what]
    rows, tokens = options.rows or rows, options.tokens or tokens
    torch.manual_seed(0)
    step = make(shipped_model(options.model), rows, tokens)
    for _ in range(3):
        step()
    begin = now()
    for _ in range(options.steps):
        step()
    seconds = (now() - begin) / options.steps
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(options.steps):
            step()
    spent, calls = Counter(), Counter()
    for event in found.key_averages():
        kind = next(k for k, names in KINDS.items() if event.key.startswith(names))
        spent[kind] += event.self_cpu_time_total / options.steps / 1e3
        calls[kind] += event.count / options.steps
    total = sum(spent.values())
    shape = f"{options.what}: {options.model}, {rows} x {tokens}"
    print(f"\n{shape}: {1e3 * seconds:.1f} ms a step, {total:.1f} ms of operations when profiled")
    lines = [[k, f"{spent[k]:.1f}", f"{spent[k] / total:.0%}", f"{calls[k]:.0f}"] for k in KINDS]
    print_table(["", "ms", "share", "calls"], lines)
    shares = {
        f"share_{kind.split(' (')[0].replace(' ', '_')}": spent[kind] / total for kind in KINDS
    }
    print_json("profile", device_name(device), {}, {"ms": 1e3 * seconds, **shares})


if __name__ == "__main__":
    start(main)
