"""Time and memory of `python -m fourstage export`, the whole command.

    python -m benchmarks.export [model=moe_small] [formats=hf,gguf] [folder=outputs/export]

Makes a run with random weights of the model and exports it once in each format and number format.
Memory is the largest resident size of the process, pages of the mapped weights and PyTorch itself
included, also as a share of the model's size in float32. The last line is one JSON object.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import (
    CHARACTERS,
    REPO,
    device_name,
    print_json,
    print_table,
    read_arguments,
    shipped_model,
    start,
)
from fourstage.errors import UserError
from fourstage.model import ModelConfig, Transformer
from fourstage.model.weights import save_weights

RUN_ID = "exportable"
MEASURE = """\
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)"""


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str = "moe_small"
    formats: tuple[str, ...] = ("hf", "gguf")
    folder: str = "outputs/export"


def make_run(outputs: Path, model: ModelConfig) -> int:
    """A finished run with random weights; returns how many bytes they take in float32."""
    folder = outputs / "runs" / f"sft-{RUN_ID}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    network = Transformer(model, CHARACTERS.vocab_size)
    save_weights(folder, network, CHARACTERS)
    config = {"seed": 0, "model": {"name": model.name}, "stages": {"sft": {}}}
    record = {"id": RUN_ID, "stage": "sft", "parents": {}, "debug": None, "group": RUN_ID}
    record |= {"status": "finished", "started": "2026-01-01", "finished": "2026-01-02"}
    text = json.dumps({**record, "config": config, "cost": {"seconds": 0.0}})
    (folder / "run.json").write_text(text, encoding="utf-8")
    return sum(x.nbytes for x in network.parameters())


def taken(words: list[str]) -> tuple[float, float]:
    """Seconds and the largest resident size in bytes of a command. Raises UserError if it fails."""
    begun = time.monotonic()
    # a small process in between, as a new process inherits the size of the one that started it
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *words], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise UserError(f"{' '.join(words)}: exit code {done.returncode}")
    return time.monotonic() - begun, int(done.stdout.splitlines()[-1]) * 1024


def main(arguments: list[str]) -> None:
    options = read_arguments(Options, arguments)
    outputs = Path(options.folder).resolve()
    size = make_run(outputs, shipped_model(options.model))
    rows, figures = [], {"model_mb": size / 1e6}
    for form in options.formats:
        for dtype in ("float32", "bfloat16"):
            to = outputs / f"{form}-{dtype}"
            words = [sys.executable, "-m", "fourstage", "export", f"run={RUN_ID}", f"to={to}"]
            words += [f"format={form}", f"dtype={dtype}", "force=true", f"outputs={outputs}"]
            seconds, memory = taken(words)
            written = sum(path.stat().st_size for path in to.iterdir())
            shutil.rmtree(to)
            rows.append([form, dtype, f"{seconds:.1f}", f"{memory / 1e6:,.0f}"])
            rows[-1] += [f"{memory / size:.2f}", f"{written / 1e6:,.0f}"]
            name = f"{form}_{dtype}"
            figures |= {f"{name}_seconds": seconds, f"{name}_memory_per_size": memory / size}
    shutil.rmtree(outputs / "runs")
    print_table(["format", "dtype", "s", "memory, MB", "of the model", "written, MB"], rows)
    print_json("export", device_name(torch.device("cpu")), {}, figures)


if __name__ == "__main__":
    start(main)
