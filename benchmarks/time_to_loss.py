"""Validation loss against wall-clock on a text file, as `train.py` reaches it.

    python -m benchmarks.time_to_loss FILE [seconds=120] [seeds=0] [val_every=0]
        [variants=moe_tiny+adamw,moe_tiny+muon,dense_tiny+adamw,dense_tiny+muon] [KEY.KEY=VALUE ...]

A variant is a model config, or one with an optimizer. Each is trained by

    python train.py stage=pretrain data=files data.corpus.path=FILE stages.pretrain.max_time=...

in a process of its own, one after the other, and further overrides (keys with a dot) go to all.
Loss is nats per character over the held-out last 10 % of the file. The budget is train.py's clock:
it starts with the first step; start-up, the evaluation of the random weights and the last
validation are outside it, a validation on the way (val_every, in steps) is inside. The schedule of
the learning rate follows the clock, so that several `seconds` are several runs.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.common import (
    REPO,
    device_name,
    known,
    print_json,
    print_table,
    read_arguments,
    shipped_model,
    start,
)
from fourstage.errors import UserError

LR = {"adamw": 0.002, "muon": 0.004}  # each optimizer's best of three (docs/LOG.md)
USAGE = "python -m benchmarks.time_to_loss FILE [seconds=120] [seeds=0] [variants=NAME,NAME]"


@dataclass(frozen=True, kw_only=True)
class Options:
    seconds: tuple[int, ...] = (120,)
    seeds: tuple[int, ...] = (0,)
    val_every: int | None = None
    variants: tuple[str, ...] = (
        "moe_tiny+adamw",
        "moe_tiny+muon",
        "dense_tiny+adamw",
        "dense_tiny+muon",
    )


class Point(NamedTuple):
    step: int
    seconds: float  # of training steps alone
    loss: float


class Curve(NamedTuple):
    """One training: what it validated, the final weights last, and how fast it was."""

    points: list[Point]
    steps: int
    tokens_per_s: float


def overrides_of(variant: str) -> list[str]:
    """What a variant adds to the command.

    Raises:
        UserError: no such model or optimizer.
    """
    model, plus, optimizer = variant.partition("+")
    shipped_model(model)
    if not plus:
        return [f"model={model}"]
    known("variants", [optimizer], LR)
    chosen = {"optimizer": optimizer, "lr": LR[optimizer]}
    return [f"model={model}", *(f"stages.pretrain.{k}={v}" for k, v in chosen.items())]


def command(text: Path, seconds: int, options: Options, outputs: Path) -> list[str]:
    """train.py with a time budget and its own outputs, but for the variant and the seed."""
    clock = f"{seconds // 86400:02}:{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}"
    quoted = str(text).replace("\\", "\\\\").replace('"', '\\"')
    return [
        *(sys.executable, "train.py", "stage=pretrain", "data=files"),
        f'data.corpus.path="{quoted}"',
        f"stages.pretrain.max_time={clock}:{seconds % 60:02}",
        f"stages.pretrain.val_every={options.val_every or 0}",
        *("logger=none", "evaluation.max_blocks=10", f"outputs={outputs}"),
    ]


def train(words: list[str], outputs: Path) -> Curve:
    """Run the command and read what it left under the outputs folder.

    Raises:
        UserError: train.py failed; with its last line.
    """
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no output"]
        raise UserError(f"train.py: {lines[-1]}")
    (folder,) = (outputs / "runs").iterdir()
    return read_curve(folder)


def read_curve(folder: Path) -> Curve:
    """The curve of a finished pretrain run."""
    cost = json.loads((folder / "run.json").read_text())["cost"]
    a_step = cost["train_seconds"] / cost["steps"]
    with open(folder / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
    points = [Point(int(r["step"]), int(r["step"]) * a_step, float(r["val/loss"])) for r in rows]
    return Curve(points, cost["steps"], cost["tokens_per_s"])


def print_curve(name: str, curve: Curve) -> None:
    points = ", ".join(f"{p.loss:.3f} at {p.seconds:.0f} s" for p in curve.points)
    print(f"{name}: {points} ({curve.steps} steps, {curve.tokens_per_s:,.0f} tokens/s)", flush=True)


def print_finals(losses: dict[str, list[float]]) -> tuple[dict[str, float], dict[str, float]]:
    """The table of final losses; ratios of each MoE to the dense twins, and figures."""
    medians = {name: statistics.median(values) for name, values in losses.items()}
    print_table(
        ["", "nats per character (min .. max)", "seeds"],
        [
            [name, f"{medians[name]:.3f} ({min(v):.3f} .. {max(v):.3f})", str(len(v))]
            for name, v in losses.items()
        ],
    )
    ratios = {}
    for name, loss in medians.items():
        twin = name.replace("moe_", "dense_", 1)
        if twin != name and twin in medians:
            ratios[f"{name}_vs_{twin}"] = medians[twin] / loss
    return ratios, {f"{name}_loss": loss for name, loss in medians.items()}


def main(arguments: list[str]) -> None:
    if not arguments or "=" in arguments[0]:
        raise UserError(f"which text file? {USAGE}")
    text, words = Path(arguments[0]).resolve(), arguments[1:]
    if not text.is_file():
        raise UserError(f"{text}: no such file")
    extra = [word for word in words if "." in word.partition("=")[0]]
    options = read_arguments(Options, [word for word in words if word not in extra])
    if min(options.seconds) < 1:
        raise UserError(f"seconds: must be at least 1, got {min(options.seconds)}")
    variants = {variant: overrides_of(variant) for variant in options.variants}
    losses: dict[str, list[float]] = {}
    for seed in options.seeds:
        for seconds in options.seconds:
            for variant, added in variants.items():
                with tempfile.TemporaryDirectory() as outputs:
                    words = command(text, seconds, options, Path(outputs))
                    curve = train([*words, *added, f"seed={seed}", *extra], Path(outputs))
                name = f"{variant}_{seconds}s"
                print_curve(f"{name}, seed {seed}", curve)
                losses.setdefault(name, []).append(curve.points[-1].loss)
    ratios, figures = print_finals(losses)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print_json("time_to_loss", device_name(device), ratios, figures)


if __name__ == "__main__":
    start(main)
