"""Runs made by hand: a record and a few bytes, no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fourstage.files import write_json
from fourstage.runs.store import RunStore

MB = 1_000_000


def make_run(store: RunStore, stage: str, letter: str, **changes: Any) -> Path:
    """A finished run of the id letter * 10; `lr` is a setting, `goal` its metrics."""
    goal, lr = changes.pop("goal", None), changes.pop("lr", 0.001)
    folder = store.folder(stage, letter * 10)
    record = {
        "id": letter * 10,
        "stage": stage,
        "name": folder.name,
        "parents": {},
        "group": "a" * 10,
        "status": "finished",
        "debug": None,
        "started": f"2026-01-01T09:{ord(letter) - ord('a'):02}:00.000+00:00",
        "finished": "2026-01-01T10:00:00.000+00:00",
        "cost": {"seconds": 61.5},
        "config": {"seed": 0, "model": {"name": "moe_nano"}, "stages": {stage: {"lr": lr}}},
    }
    write_json(folder / "run.json", {**record, **changes})
    if goal is not None:
        metrics = {name: {"value": value, "n": 9} for name, value in goal.items()}
        write_json(folder / "eval.json", {"suite": "6", "seed": 0, "metrics": metrics})
    return folder


def add_checkpoint(folder: Path, megabytes: int) -> None:
    """A resume state of so many MB that are really on the disk."""
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"\1" * (megabytes * MB))
