"""Time and memory of a training step as batch, context, experts and model size grow, one at a time.

    python -m benchmarks.scaling [device=cpu|cuda] [axes=batch,context,experts,size] [steps=3]

Each point is a process of its own: the pretrain stage under a Trainer, one step for the optimizer's
state, then `steps` that are timed. Memory on a CPU is the most that the process held, less what it
held before the model was made; on a GPU the most that PyTorch allocated.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.common import (
    CHARACTERS,
    Seconds,
    Shape,
    device_name,
    fit,
    known,
    milliseconds,
    on_device,
    pretrain_module,
    print_json,
    print_table,
    quiet,
    read_arguments,
    shipped_model,
    start,
    token_batches,
)
from fourstage.errors import UserError
from fourstage.model import Transformer
from fourstage.tracking.cost import peak_memory_mib

Points = dict[str, Shape]


@dataclass(frozen=True, kw_only=True)
class Options:
    device: str = "cpu"
    axes: tuple[str, ...] = ("batch", "context", "experts", "size")
    steps: int = 3


class Measured(NamedTuple):
    seconds: Seconds
    mib: float


# --- the points


def axes(device: str) -> dict[str, Points]:
    """By axis, the points from small to large; the rest is as in the base."""
    on_gpu = device == "cuda"
    vocab_size, rows = (32768, 8) if on_gpu else (CHARACTERS.vocab_size, 8)
    config = shipped_model("moe_small" if on_gpu else "moe_tiny", max_seq_len=4096)
    base = Shape(config, vocab_size, rows, 1024 if on_gpu else 256)
    sizes = ("moe_tiny", "moe_small", "moe_medium") if on_gpu else ("moe_nano", "moe_tiny")
    size = {name: base._replace(config=shipped_model(name, max_seq_len=4096)) for name in sizes}
    if not on_gpu:
        wide = replace(config, d_model=256, n_layers=6, head_dim=64, d_expert=256)
        size["d 256 x 6 layers"] = base._replace(config=wide)
    return {
        "batch": {str(n): base._replace(rows=n) for n in (2, 8, 32)},
        "context": {
            str(base.tokens * n // 2): base._replace(tokens=base.tokens * n // 2)
            for n in (1, 2, 4, 8)
        },
        "experts": {
            str(n): base._replace(config=replace(config, num_experts=n)) for n in (4, 8, 32, 128)
        },
        "size": size,
    }


# --- one point


def held_mib(most: bool) -> float:
    """What this process holds, or the most that it held: Linux's own count starts with exec."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return float(peak_memory_mib())
    key = "VmHWM:" if most else "VmRSS:"
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def point(shape: Shape, device: str, steps: int) -> Measured:
    """Train this shape for some steps, in this process."""
    quiet()
    where = on_device(device)
    before = held_mib(most=False)
    torch.manual_seed(0)
    model = Transformer(shape.config, shape.vocab_size)
    module = pretrain_module(model, shape)
    seconds, _ = fit(module, token_batches(shape, steps + 1), where)
    times = seconds[1:]
    mib = held_mib(most=True) - before
    if where.type == "cuda":
        mib = torch.cuda.max_memory_allocated() / 2**20
    return Measured(Seconds(statistics.median(times), min(times), max(times)), mib)


def in_a_process(shape: Shape, device: str, steps: int) -> Measured:
    """The same in a fresh one; UserError where it does not come back."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(point, shape, device, steps).result()
    except (BrokenProcessPool, torch.OutOfMemoryError):
        raise UserError(
            f"{shape.config.name}, {shape.rows} x {shape.tokens} tokens: out of memory; "
            "leave this axis out (axes=)"
        ) from None


# --- the figures


def main(
    arguments: list[str],
    all_axes: Callable[[str], dict[str, Points]] = axes,
    measured: Callable[[Shape, str, int], Measured] = in_a_process,
) -> None:
    options = read_arguments(Options, arguments)
    device = on_device(options.device)
    points = all_axes(options.device)
    known("axes", options.axes, points)
    ratios, figures = {}, {}
    for axis in options.axes:
        rows, speeds = [], {}
        for name, shape in points[axis].items():
            seconds, mib = measured(shape, options.device, options.steps)
            speeds[name] = shape.rows * shape.tokens / seconds.median
            total, active = shape.config.count_params(shape.vocab_size)
            rows.append(
                [
                    name,
                    f"{shape.rows} x {shape.tokens}",
                    f"{total / 1e6:,.2f} M / {active / 1e6:,.2f} M",
                    milliseconds(seconds),
                    f"{speeds[name]:,.0f}",
                    f"{mib:,.0f}",
                ]
            )
            key = f"{axis}_{name.replace(' ', '_')}"
            figures |= {f"{key}_tokens_per_s": speeds[name], f"{key}_mib": mib}
        parameters = "parameters, total / active"
        print_table([axis, "tokens", parameters, "ms a step (min .. max)", "tokens/s", "MiB"], rows)
        first, last = list(speeds)[0], list(speeds)[-1]
        name = f"{axis}_{last}_vs_{first}_tokens_per_s".replace(" ", "_")
        ratios[name] = speeds[last] / speeds[first]
    print_json("scaling", device_name(device), ratios, figures)


if __name__ == "__main__":
    start(main)
