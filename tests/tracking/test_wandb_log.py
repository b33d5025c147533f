"""W&B's offline logs, cut anywhere as a kill does, read back with W&B's own reader."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from wandb.sdk import wandb_init

from fourstage.errors import UserError
from fourstage.tracking.wandb_core import end_core
from fourstage.tracking.wandb_log import (
    BLOCK,
    START,
    end_of_records,
    last_step,
    logged_offline,
    logs_of,
    mark_sent,
    mend,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The log of a run with 300 rows, which takes several blocks."""
    folder = tmp_path_factory.mktemp("offline")
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    run = wandb.init(id="abc", project="p", mode="offline", dir=folder, settings=settings)
    for step in range(300):
        run.log({"x": step, "text": "y" * step}, step=step, commit=True)
    run.finish()
    [log] = folder.glob("wandb/offline-run-*-abc/run-abc.wandb")
    return log


def read(log: Path) -> tuple[list[int], str]:
    """The steps that W&B's reader finds, and what it says of the file's end."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log.parent)]
    found = subprocess.run(command, capture_output=True, text=True)
    records = map(json.loads, found.stdout.splitlines())
    steps = [r["history"]["item"]["_step"] for r in records if r["type"] == "history"]
    return steps, found.stderr


def cut(whole: Path, folder: Path, length: int, day: int = 1, suffix: str = "") -> Path:
    log = folder / f"offline-run-2026010{day}_000000-abc{suffix}" / whole.name
    log.parent.mkdir(parents=True)
    log.write_bytes(whole.read_bytes()[:length])
    return log


def test_a_whole_log_stays_as_it_is(whole, tmp_path) -> None:
    data = whole.read_bytes()
    assert len(data) > 3 * BLOCK and end_of_records(data) == len(data)
    log = cut(whole, tmp_path, len(data))
    assert mend(log) and log.read_bytes() == data and last_step(log) == 299


@pytest.mark.parametrize("length", [2000, BLOCK - 3, BLOCK, BLOCK + 5, 2 * BLOCK + 8, 70_000])
def test_a_log_ends_with_its_last_whole_record(whole, tmp_path, length) -> None:
    log = cut(whole, tmp_path, length)
    steps, said = read(log)
    assert "incomplete" in said
    assert mend(log) and log.stat().st_size <= length
    assert read(log) == (steps, "")
    assert last_step(log) == (steps[-1] if steps else -1)


@pytest.mark.parametrize("length", [0, START, START + 6, 40])
def test_a_log_without_records_goes(whole, tmp_path, length) -> None:
    log = cut(whole, tmp_path, length)
    assert not mend(log) and not log.parent.exists()


def test_the_last_step_of_all_starts(whole, tmp_path) -> None:
    assert logged_offline(tmp_path, "abc") == -1
    log = cut(whole, tmp_path, 50_000)
    step = read(log)[0][-1]
    cut(whole, tmp_path, START, day=2)
    cut(whole, tmp_path, START, day=3).unlink()  # a kill came before the log was made
    other = tmp_path / "offline-run-20260101_000000-x-abc"
    other.mkdir()  # of the run x-abc, which may be about to make it
    assert logged_offline(tmp_path, "abc") == step > 0
    assert logged_offline(tmp_path, "ab") == logged_offline(tmp_path, "*") == -1
    assert {path.name for path in tmp_path.iterdir()} == {log.parent.name, other.name}
    mark_sent(tmp_path, "abc")
    assert log.with_name("run-abc.wandb.synced").exists()


def test_two_starts_in_one_second(whole, tmp_path) -> None:
    """W&B appends -1, -2 to the second folder's name; so may an id end."""
    days = [(2, ""), (1, "-2"), (1, "-10"), (1, ""), (1, "-1")]
    logs = [cut(whole, tmp_path, 50_000, *day) for day in days]
    ordered = [logs[i] for i in (3, 4, 1, 2, 0)]
    for name in ("abc-3", "abc-x", "abc-1-1"):
        (tmp_path / f"offline-run-20260101_000000-{name}").mkdir()
    other = tmp_path / "offline-run-20260101_000000-abc-4" / "run-abc-4.wandb"
    other.parent.mkdir()
    other.touch()
    assert logs_of(tmp_path, "abc") == ordered
    assert logs_of(tmp_path, "abc-4") == [other]
    # no log yet, and perhaps abc's; but those of abc are abc's, not to be removed
    assert [log.parent.name[-5:] for log in logs_of(tmp_path, "abc-3")] == ["abc-3"]
    assert logs_of(tmp_path, "abc-1") == logs_of(tmp_path, "abc-10") == []
    mark_sent(tmp_path, "abc")
    assert len(list(tmp_path.glob("*/*.synced"))) == len(logs)


def test_a_second_start_in_the_same_second_counts(tmp_path, monkeypatch) -> None:
    """As W&B itself names its folder."""
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    monkeypatch.setattr(wandb_init, "time", SimpleNamespace(time=lambda: 1_800_000_000.0))
    for step in (0, 1):
        run = wandb.init(id="abc", project="p", mode="offline", dir=tmp_path, settings=settings)
        run.log({"x": step}, step=step)
        run.finish()
    end_core()  # which closes a log only after finish() has returned
    names = sorted(path.name.split("-abc")[1] for path in tmp_path.glob("wandb/offline-run-*"))
    assert names == ["", "-1"]
    assert logged_offline(tmp_path / "wandb", "abc") == 1


def test_a_reader_without_room_for_temporary_files(whole, tmp_path, monkeypatch) -> None:
    log = cut(whole, tmp_path, 50_000)
    said = "Traceback\nFileNotFoundError: [Errno 2] No usable temporary directory found in ['/tmp']"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(UserError, match="^no folder for temporary files: free space, or set"):
        last_step(log)


def test_a_log_that_cannot_be_read(whole, tmp_path) -> None:
    log = cut(whole, tmp_path, 50_000)
    data = bytearray(log.read_bytes())
    data[:3] = b"???"
    log.write_bytes(data)
    with pytest.raises(UserError, match="W&B can't read the log of an earlier start"):
        logged_offline(tmp_path, "abc")
    shutil.rmtree(log.parent)
