"""Memory and start-up on a large corpus, as `train.py` takes them: does either grow with the text?

    python -m benchmarks.large_text [megabytes=1,2000] [records=1000000] [tokenizer=char]
        [folder=outputs/large_text]

Writes a plain text of each size and a JSON Lines file of so many records, and pre-trains
moe_nano for a few steps on each, twice: the second run finds the tokens on the disk. Memory is the
largest private memory (RssAnon) that all its processes had together; pages of the token files,
which the system can drop, are not in it. Needs Linux. The last line is one JSON object.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.common import REPO, device_name, print_json, print_table, read_arguments, start
from fourstage.errors import UserError

LOOK_EVERY = 0.1  # seconds
RSS = re.compile(r"^RssAnon:\s+(\d+) kB", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Options:
    megabytes: tuple[int, ...] = (1, 2000)
    records: int = 1_000_000
    tokenizer: str = "char"
    folder: str = "outputs/large_text"


class Taken(NamedTuple):
    """What one command took."""

    ready: float  # seconds until the data was ready, which the first step follows
    seconds: float
    mb: float  # largest private memory of all its processes


def paragraphs() -> Iterator[str]:
    """Endless text of words with the frequencies of Zipf's law, the same at each call."""
    draw = random.Random(0)
    letters = "etaoinshrdlu"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(5000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    some = [" ".join(draw.choices(words, weights, k=draw.randint(20, 90))) for _ in range(3000)]
    number = 0
    while True:
        number += 1
        yield f"{draw.choice(some)} {number}."


def write_text(path: Path, megabytes: int) -> None:
    with open(path, "w") as file:
        for paragraph in paragraphs():
            file.write(f"{paragraph}\n\n")
            if file.tell() >= megabytes * 1e6:
                return


def write_records(path: Path, records: int) -> None:
    with open(path, "w") as file:
        for paragraph in islice(paragraphs(), records):
            file.write(json.dumps({"text": paragraph}) + "\n")


def private_mb(pid: int) -> float:
    """Of a process and all below it."""
    try:
        found = RSS.search(Path(f"/proc/{pid}/status").read_text())
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return 0.0
    own = int(found[1]) * 1024 / 1e6 if found else 0.0  # "kB" are KiB
    return own + sum(private_mb(int(child)) for child in children)


def taken(words: list[str], log: Path) -> Taken:
    """Run the command. Raises UserError, with its last line, if it fails."""
    begun = time.monotonic()
    ready, most = 0.0, 0.0
    with open(log, "w") as file:
        process = subprocess.Popen(words, cwd=REPO, stdout=file, stderr=file)
    while process.poll() is None:
        most = max(most, private_mb(process.pid))
        if not ready and "  data: " in log.read_text():
            ready = time.monotonic() - begun
        time.sleep(LOOK_EVERY)
    if process.returncode:
        raise UserError(f"train.py: {(log.read_text().strip().splitlines() or ['no output'])[-1]}")
    return Taken(ready, time.monotonic() - begun, most)


def main(arguments: list[str]) -> None:
    options = read_arguments(Options, arguments)
    if not Path("/proc/self/status").exists():
        raise UserError(
            "this system has no /proc, where the memory of processes is read: needs Linux"
        )
    folder = Path(options.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    outputs = folder / "outputs"
    rows, figures = [], {}
    texts = {f"{size}_mb": (folder / f"{size}.txt", write_text, size) for size in options.megabytes}
    file = folder / "records.jsonl"
    texts[f"{options.records}_records"] = file, write_records, options.records
    for name, (path, write, size) in texts.items():
        write(path, size)
        shutil.rmtree(outputs, ignore_errors=True)
        words = [sys.executable, "train.py", "stage=pretrain", "data=files", "model=moe_nano"]
        words += [f"data.corpus.path='{path}'", f"tokenizer={options.tokenizer}", "logger=none"]
        words += ["evaluation.max_blocks=10", f"outputs={outputs}"]
        for which, steps in (("first", 20), ("again", 21)):  # another run on the same text
            found = taken([*words, f"stages.pretrain.max_steps={steps}"], folder / "log.txt")
            row = [f"{found.ready:.1f}", f"{found.seconds:.1f}", f"{found.mb:,.0f}"]
            rows.append([name, which, *row])
            print(", ".join(rows[-1]), flush=True)
            figures |= {f"{name}_{which}_{key}": value for key, value in found._asdict().items()}
        path.unlink()
    print_table(["text", "run", "data ready, s", "whole command, s", "private memory, MB"], rows)
    print_json("large_text", device_name(torch.device("cpu")), {}, figures)


if __name__ == "__main__":
    start(main)
