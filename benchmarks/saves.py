"""Time and memory of saving a resume state, beside one file of all tensors, as Lightning writes it.

    python -m benchmarks.saves [model=moe_small] [optimizer=muon] [repeats=5] [folder=outputs/saves]

The pretrain stage takes one step of one short row, and then saves in both ways in turn; each save
is synced to the disk. Memory is what a process of its own held at most in its first save, less what
it held before. The last line is one JSON object; its ratio is the time of one file over ours.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

from benchmarks.common import (
    CHARACTERS,
    Seconds,
    Shape,
    device_name,
    interleave,
    print_json,
    print_table,
    quiet,
    read_arguments,
    shipped_model,
    stage_settings,
    start,
    timed,
    token_batches,
)
from benchmarks.scaling import held_mib
from fourstage.files import remove, swap_in
from fourstage.lineage.resume import ResumeIO
from fourstage.model import Transformer
from fourstage.parallel.state import write_tensors
from fourstage.stages.pretrain import PretrainModule

KINDS = ("the state", "one file")


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str = "moe_small"
    optimizer: str = "muon"
    repeats: int = 5
    folder: str = "outputs/saves"


def trained(options: Options) -> L.Trainer:
    """A Trainer after one step, with the optimizer's states."""
    quiet()
    shape = Shape(shipped_model(options.model), CHARACTERS.vocab_size, 1, 32)
    settings = stage_settings(
        "pretrain", optimizer=options.optimizer, batch_size=1, micro_batch_size=1, block_size=32
    )
    model = Transformer(shape.config, shape.vocab_size)
    trainer = L.Trainer(
        accelerator="cpu",
        plugins=[ResumeIO()],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(token_batches(shape, 1), batch_size=None, collate_fn=lambda batch: batch)
    trainer.fit(PretrainModule(model, settings, 0, 1, 1), loader)
    return trainer


def saves(trainer: L.Trainer, folder: Path) -> dict[str, Callable[[], None]]:
    """Both ways to save; the state as Checkpointer does."""

    def state() -> None:
        part = folder / ".part"
        part.mkdir(parents=True, exist_ok=True)
        write_tensors(trainer, part, "")
        trainer.save_checkpoint(part)
        swap_in(part, folder / "state")

    def one_file() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".part.ckpt", "wb") as file:
            torch.save(trainer._checkpoint_connector.dump_checkpoint(False), file)
        swap_in(folder / ".part.ckpt", folder / "file.ckpt")

    return dict(zip(KINDS, (state, one_file), strict=True))


def first_save(options: Options, kind: str) -> float:
    """MiB that the first save added to the most that this process held."""
    trainer = trained(options)
    Path("/proc/self/clear_refs").write_text("5")  # forget the most so far (man 5 proc)
    before = held_mib(most=False)
    saves(trainer, Path(options.folder))[kind]()
    return held_mib(most=True) - before


def size_mb(path: Path) -> float:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) / 1e6


def main(arguments: list[str]) -> None:
    options = read_arguments(Options, arguments)
    folder = Path(options.folder).resolve()
    options = Options(**{**vars(options), "folder": str(folder)})
    try:
        trainer = trained(options)
        blocks = {kind: timed(save) for kind, save in saves(trainer, folder).items()}
        found: dict[str, Seconds] = interleave(blocks, options.repeats, 1)
        sizes = [size_mb(folder / name) for name in ("state", "file.ckpt")]
        del trainer, blocks
        memory = {}
        for kind in KINDS:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                memory[kind] = pool.submit(first_save, options, kind).result()
    finally:
        remove(folder)
    rows = [
        [kind, *(f"{x:.2f}" for x in found[kind]), f"{size:,.0f}", f"{memory[kind]:,.0f}"]
        for kind, size in zip(KINDS, sizes, strict=True)
    ]
    print(f"{options.model}, {options.optimizer}, {options.repeats} saves of each, in turn")
    print_table(["", "median s", "least", "most", "MB", "memory added, MiB"], rows)
    ours, theirs = (found[kind].median for kind in KINDS)
    figures = {"seconds": ours, "file_seconds": theirs, "added_mib": memory[KINDS[0]]}
    ratios = {f"{options.model}_vs_one_file": theirs / ours}
    print_json("saves", device_name(torch.device("cpu")), ratios, figures)


if __name__ == "__main__":
    start(main)
