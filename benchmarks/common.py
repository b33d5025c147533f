"""What the benchmarks share: arguments, shapes, the clock, interleaved repeats, the table.

A contestant is a block: a function of n that does n units of work (after a warm-up of its own where
it needs one) and returns the seconds of each. `interleave` runs a block of every contestant in
turn, as often as there are repeats, so that all of them meet the same state of the machine.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple, TypeVar

import lightning as L
import torch
import yaml
from torch.utils.data import DataLoader

from fourstage.batch import TokenBatch
from fourstage.errors import UserError
from fourstage.ladder import LADDER
from fourstage.model import ModelConfig, Transformer
from fourstage.settings import build
from fourstage.stages import StageModule
from fourstage.stages.pretrain import PretrainModule
from fourstage.tokenizer import Tokenizer

REPO = Path(__file__).parent.parent
CHARACTERS = Tokenizer.char()

Options = TypeVar("Options")
Block = Callable[[int], list[float]]


# --- arguments


def read_arguments(options: type[Options], arguments: Sequence[str]) -> Options:
    """key=value words as an instance of a dataclass; a tuple takes values with commas between.

    Raises:
        UserError: a word that is no key=value, an unknown key, or an impossible value.
    """
    lists = {f.name for f in fields(options) if isinstance(f.default, tuple)}  # type: ignore
    values: dict[str, Any] = {}
    for word in arguments:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"expected key=value, got {word!r}")
        parts = [yaml.safe_load(part) for part in text.split(",")]
        values[key] = parts if key in lists else yaml.safe_load(text)
    read = build(options, values, "")
    for key, value in vars(read).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise UserError(f"{key}: must be at least 1, got {value}")
    return read


def known(key: str, values: Iterable[str], names: Iterable[str]) -> None:
    """Raise UserError unless each value is one of the names."""
    names = list(names)
    for value in values:
        if value not in names:
            raise UserError(f"{key}: no {value!r}; known are {', '.join(names)}")


def on_device(device: str) -> torch.device:
    """The device, or UserError where the machine has none."""
    known("device", [device], ["cpu", "cuda"])
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: PyTorch sees no GPU here; device=cpu measures the processor")
    torch.set_flush_denormal(True)
    return torch.device(device)


def quiet() -> None:
    """Without warnings, and without what Lightning says of every Trainer."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def start(main: Callable[[list[str]], None]) -> None:
    """Run a benchmark's main; what the user did wrong is one line."""
    quiet()
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(sys.modules[main.__module__].__doc__)
        return
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")


# --- shapes


class Shape(NamedTuple):
    """A model and the batch that it trains on."""

    config: ModelConfig
    vocab_size: int
    rows: int
    tokens: int  # a row


def shipped_model(name: str, /, **changes: Any) -> ModelConfig:
    """conf/model/<name>.yaml with changes."""
    path = REPO / "conf" / "model" / f"{name}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise UserError(f"no model {name!r}; known are {', '.join(names)}")
    return ModelConfig(**{**yaml.safe_load(path.read_text()), **changes})


def dense_twin(config: ModelConfig) -> ModelConfig:
    """A dense model that takes as many FLOPs a token, the router's aside."""
    return replace(
        config,
        name=f"{config.name}'s dense twin",
        num_experts=1,
        top_k=1,
        d_expert=config.top_k * config.d_expert + config.d_shared,
        d_shared=0,
        balance="none",
    )


def token_batches(shape: Shape, n: int) -> list[TokenBatch]:
    """n batches of real text, one after the other in the Python language reference.

    A character is a token; where the vocabulary is larger than the characters, two of them are
    (their number modulo the vocabulary), so that the router sees tokens as unequal as a text's.
    """
    ids = torch.tensor(reference_ids())
    if shape.vocab_size > CHARACTERS.vocab_size:
        ids = (ids[0:-1:2] * CHARACTERS.vocab_size + ids[1::2]) % shape.vocab_size
    size = shape.rows * shape.tokens + 1
    found = []
    for i in range(n):
        at = (i * size) % (len(ids) - size)
        part = ids[at : at + size]
        view = (shape.rows, shape.tokens)
        found.append(TokenBatch(part[:-1].view(view).clone(), part[1:].view(view).clone()))
    return found


@cache
def reference_ids() -> list[int]:
    return CHARACTERS.encode("\n".join(topics.values()))


# --- stages under a real Trainer


def stage_settings(stage: str, **changes: Any) -> Any:
    """conf/stages/<stage>.yaml with changes."""
    values = yaml.safe_load((REPO / "conf" / "stages" / f"{stage}.yaml").read_text())
    return build(LADDER[stage].code.Settings, {**values, **changes}, f"stages.{stage}")


def pretrain_module(model: Transformer, shape: Shape) -> PretrainModule:
    """The pretrain stage at a constant learning rate, a batch in one forward."""
    settings = stage_settings(
        "pretrain",
        optimizer="adamw",
        lr=2e-3,
        batch_size=shape.rows,
        micro_batch_size=shape.rows,
        block_size=shape.tokens,
        warmup=0.0,
        min_lr=1.0,
        weight_decay=0.0,
    )
    return PretrainModule(model, settings, seed=0, heldout_chars=1, heldout_bytes=1)


class Stopwatch(L.Callback):
    """Seconds of each training step, hooks of the module included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = now()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(now() - self.start)


def fit(
    module: StageModule, batches: Sequence[Any], device: torch.device
) -> tuple[list[float], dict[str, float]]:
    """Train on these batches with Lightning; the seconds of each step, what the last one logged."""
    gc.collect()  # the former Trainer's optimizer, or new memory would be fetched page by page
    stopwatch = Stopwatch()
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if device.type == "cuda" else "32-true",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[stopwatch],
    )
    loader = DataLoader(list(batches), batch_size=None, collate_fn=lambda batch: batch)
    trainer.fit(module, loader)
    return stopwatch.seconds, {key: float(x) for key, x in trainer.logged_metrics.items()}


# --- time


def now() -> float:
    """Seconds, after all that the GPU was told to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(step: Callable[[], Any]) -> Block:
    """The block that calls a function n times."""

    def block(n: int) -> list[float]:
        marks = [now()]
        for _ in range(n):
            step()
            marks.append(now())
        return [b - a for a, b in itertools.pairwise(marks)]

    return block


class Seconds(NamedTuple):
    """A unit of work, in seconds."""

    median: float
    least: float
    most: float


def interleave(contestants: dict[str, Block], repeats: int, n: int) -> dict[str, Seconds]:
    """Each contestant's block of n, all of them in turn, `repeats` times after one warm-up."""
    for block in contestants.values():
        block(1)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, block in contestants.items():
            seconds[name] += block(n)
    return {name: Seconds(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def fastest(found: dict[str, Seconds], prefix: str) -> str:
    """The name with this prefix that has the least median."""
    return min((n for n in found if n.startswith(prefix)), key=lambda n: found[n].median)


# --- what is printed


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A Markdown table: the first column to the left, the others to the right."""
    print(f"\n| {' | '.join(header)} |")
    print(f"| --- |{' ---: |' * (len(header) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def milliseconds(seconds: Seconds) -> str:
    """median (least .. most)"""
    median, least, most = (1e3 * s for s in seconds)
    return f"{median:,.1f} ({least:,.1f} .. {most:,.1f})"


def print_json(
    benchmark: str, device: str, ratios: dict[str, float], figures: dict[str, float]
) -> None:
    """The last line of every benchmark."""

    def rounded(values: dict[str, float]) -> dict[str, float]:
        return {name: float(f"{value:.5g}") for name, value in values.items()}

    line = {"benchmark": benchmark, "device": device}
    print(json.dumps(line | {"ratios": rounded(ratios), "figures": rounded(figures)}))
