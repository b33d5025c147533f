"""A sweep of eight ladders under kills, signals, full disks and other numbers of processes ends as
a calm one does. `CHAOS_SEED=1 pytest -m slow tests/test_chaos.py` draws another chaos."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fourstage.runs.records import Record, read_record
from fourstage.tracking.wandb_log import logs_of
from tests.chaos import REPO, calm, chaos, environment

SEED = int(os.environ.get("CHAOS_SEED", "0"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="/proc, and limits of other processes"),
]


def command(*words: str, outputs: Path) -> str:
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=REPO,
        env=environment(outputs),
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def steps_of(run: Path) -> list[int]:
    with open(run / "metrics.csv", newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def history(outputs: Path, wandb_id: str) -> list[int]:
    """The steps of a W&B run in its offline folders, one after the other, as `wandb sync` goes."""
    found = []
    for folder in (log.parent for log in logs_of(outputs / "wandb", wandb_id)):
        lines = command("wandb", "leet", "inspect", "--json", str(folder), outputs=outputs)
        records = [json.loads(line) for line in lines.splitlines()]
        found += [r["history"]["item"]["_step"] for r in records if r["type"] == "history"]
        ends = [r["exit"] for r in records if r["type"] == "exit"]
        assert len(ends) <= 1, folder  # else `wandb sync` crashes
    return found


def held(outputs: Path) -> list[str]:
    """The locks that a process holds."""
    found = []
    for lock in outputs.rglob("*.lock"):
        with open(lock) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(lock.name)
    return found


def test_a_sweep_in_chaos_ends_as_a_calm_one(tmp_path: Path) -> None:
    quiet, outputs = tmp_path / "calm" / "outputs", tmp_path / "chaos" / "outputs"
    calm(quiet)
    counts, said = chaos(outputs, SEED, print)
    print(counts)
    # not all blows are in time on a fast machine
    assert counts["all"] + counts["one"] + counts["worker"] >= 8
    assert counts["term"] >= 2 and counts["in a save"] >= 1
    assert counts["full disks met"] >= 1 and counts["changes of processes"] >= 2
    before, found, after = said.partition("Traceback")
    assert not found, before[-2000:] + found + after[:8000]

    expected = {run.name: run for run in quiet.glob("runs/*")}
    found = {run.name: run for run in outputs.glob("runs/*")}
    assert len(expected) == 4 * 4 + 8 and set(found) == set(expected)
    records = {name: read_record(run) for name, run in found.items()}
    for name, run in found.items():
        is_elastic = records[name]["config"]["seed"] == 2
        (compare if is_elastic else identical)(run, expected[name])
        assert steps_of(run) == steps_of(expected[name])

    histories(outputs, records)
    listed = json.loads(
        command("fourstage", "runs", "--json", f"outputs={outputs}", outputs=outputs)
    )
    assert {run["name"]: run["status"] for run in listed} == dict.fromkeys(found, "finished")
    command("fourstage", "report", "compare", "stage=grpo", f"outputs={outputs}", outputs=outputs)
    compared = json.loads((outputs / "report" / "compare.json").read_text())
    seeds = {group["label"]: group["seeds"] for group in compared["groups"]}
    assert seeds == dict.fromkeys(("lr=1e-4", "lr=3e-4"), ["0", "1", "2", "3"])
    assert not held(outputs)
    left = [path for run in found.values() for path in run.rglob("*") if path.name[0] == "."]
    assert not left
    assert not list(outputs.glob("trash*")) and not list(outputs.glob("runs/*/checkpoints"))


def identical(run: Path, expected: Path) -> None:
    for name in ("model.safetensors", "eval.json", "samples.jsonl"):
        if (expected / name).exists():  # a reward model has no samples
            assert (run / name).read_bytes() == (expected / name).read_bytes(), (run.name, name)


def compare(run: Path, expected: Path) -> None:
    weights, wanted = (load_file(folder / "model.safetensors") for folder in (run, expected))
    assert set(weights) == set(wanted)
    for name, weight in weights.items():
        says = lambda text, name=name: f"{run.name}, {name}: {text}"  # noqa: E731
        torch.testing.assert_close(weight, wanted[name], rtol=0, atol=1e-4, msg=says)


def histories(outputs: Path, records: dict[str, Record]) -> None:
    """Every run's W&B run has each step once; one that was begun anew has none."""
    ids = {folder.name.split("-")[3] for folder in outputs.glob("wandb/offline-run-*")}
    for name, record in records.items():
        steps = steps_of(outputs / "runs" / name)
        first = [0] if record["stage"] == "pretrain" else []  # the answers of random weights
        assert history(outputs, record["wandb"]) == [*first, *steps, steps[-1] + 1], name
    for left in ids - {record["wandb"] for record in records.values()}:
        assert history(outputs, left) == [], left
