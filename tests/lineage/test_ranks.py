"""Several processes: one plan per job, and locks between jobs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fourstage.errors import UserError
from fourstage.lineage import ranks
from fourstage.lineage.climb import climb
from fourstage.lineage.ranks import Ranks
from fourstage.runs.records import read_record, write_record
from fourstage.runs.store import RunStore
from tests.fakes import FakeTrain, config, ids, run


def test_two_processes_train_a_shared_ancestor_once(base, capsys) -> None:
    class Slow(FakeTrain):
        def __call__(self, job):
            started.set()
            assert may_finish.wait(10)
            return super().__call__(job)

    started, may_finish = threading.Event(), threading.Event()
    tree = config(*base, "stage=pretrain")
    slow, second = Slow(), FakeTrain()
    one = threading.Thread(target=climb, args=(tree,), kwargs={"train": slow})
    two = threading.Thread(target=climb, args=(tree,), kwargs={"train": second})
    one.start()
    assert started.wait(10)
    two.start()
    out = ""
    while "waiting for pretrain-" not in out:
        out += capsys.readouterr().out
        assert two.is_alive()
    may_finish.set()
    one.join(10)
    two.join(10)
    assert slow.stages == ["pretrain"] and second.stages == []


@pytest.fixture
def launch(base, tmp_path, monkeypatch) -> Path:
    """What is left of a launch whose first rank trained up to sft: the files of its first job."""
    monkeypatch.setattr(Ranks, "_key", "launch")
    monkeypatch.setattr(Ranks, "_jobs", iter([1, 0]))
    monkeypatch.setattr(Ranks, "_parent", os.getppid(), raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    run([*base], "sft", FakeTrain())
    monkeypatch.setenv("LOCAL_RANK", "1")  # from here on
    return tmp_path / "outputs" / "locks" / "launch.0.decisions"


@contextmanager
def holding(lock: Path) -> Iterator[None]:
    """What the first process of a launch does while it lives."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def unfinish(outputs: Path, stage: str) -> str:
    """Make a run one that still has to be trained; its id."""
    folder = RunStore(outputs).find(stage)
    write_record(folder, status="running")
    return read_record(folder)["id"]


def test_other_ranks_follow_the_first(base, tmp_path, launch) -> None:
    sft = unfinish(tmp_path / "outputs", "sft")
    follower = FakeTrain()
    launch.write_text(json.dumps({sft: "resume"}))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    with holding(launch.with_suffix(".lock")):
        run(base, "sft", follower)
    assert [(job.stage, job.resume) for job in follower.jobs] == [("sft", True)]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}


def test_other_ranks_need_nobody_where_nothing_is_to_do(base, launch) -> None:
    assert run(base, "sft").stages == []


def test_decisions_of_an_earlier_launch_do_not_count(base, tmp_path, launch, monkeypatch) -> None:
    launch.write_text(json.dumps({unfinish(tmp_path / "outputs", "sft"): "train"}))
    monkeypatch.setattr(ranks, "PATIENCE", 0.5)
    with pytest.raises(UserError, match="no word from the first process of this job in 0 s: do"):
        run(base, "sft")


def test_a_parent_that_died_before_its_child_began(base, tmp_path, launch, monkeypatch) -> None:
    unfinish(tmp_path / "outputs", "sft")
    monkeypatch.setattr(Ranks, "_parent", 99999999)
    with pytest.raises(UserError, match="the first process of this job has ended"):
        run(base, "sft")


@pytest.mark.parametrize("left", ["failed", "killed", "finished"])
def test_the_first_rank_ends_while_another_waits(base, tmp_path, launch, left) -> None:
    sft = unfinish(tmp_path / "outputs", "sft")
    launch.write_text("{}")
    held = holding(launch.with_suffix(".lock"))
    held.__enter__()

    def end() -> None:
        if left == "failed":
            launch.write_text(json.dumps({"end": "failed"}))
        elif left == "finished":
            launch.unlink()
        held.__exit__(None, None, None)  # as the system does for a killed process

    timer = threading.Timer(0.5, end)
    timer.start()
    if left == "finished":  # by then another job had trained it
        assert run(base, "sft").stages == []
    else:
        with pytest.raises(UserError, match="the first process of this job has ended"):
            run(base, "sft")
    timer.join()
    assert read_record(RunStore(tmp_path / "outputs").find(sft, finished=False))["id"] == sft


def test_the_first_rank_tells_what_it_does_and_that_it_failed(base, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Ranks, "_key", "launch")
    monkeypatch.setattr(Ranks, "_jobs", iter([0, 1]))
    run(base, "pretrain")
    with pytest.raises(RuntimeError):
        run(base, "sft", FakeTrain("sft"))
    told = json.loads((tmp_path / "outputs" / "locks" / "launch.1.decisions").read_text())
    assert told == {ids(base, "sft")["sft"]: "train", "end": "failed"}


def test_a_second_job_of_one_name_is_refused(base, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Ranks, "_key", "launch")
    monkeypatch.setattr(Ranks, "_jobs", iter([0]))
    monkeypatch.setattr(ranks, "PATIENCE", 0.1)
    (tmp_path / "outputs" / "locks").mkdir(parents=True)
    with (
        holding(tmp_path / "outputs" / "locks" / "launch.0.lock"),
        pytest.raises(UserError, match="held by another job of this name: .* another --rdzv-id"),
    ):
        run(base, "pretrain")


def test_a_file_system_without_locks(base, launch, tmp_path, monkeypatch) -> None:
    def flock(file, kind) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    sft = unfinish(tmp_path / "outputs", "sft")
    launch.write_text(json.dumps({sft: "train"}))
    launch.with_suffix(".lock").touch()
    assert Ranks(tmp_path / "outputs").wait_for(sft) == "train"
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(Ranks, "_jobs", iter([0]))
    with Ranks(tmp_path / "outputs").job():
        pass


TORCHRUN = {
    "LOCAL_RANK": "0",
    "TORCHELASTIC_RUN_ID": "a",
    "MASTER_ADDR": "b",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RESTART_COUNT": "0",
}


@pytest.mark.parametrize(
    ("env", "first", "key"),
    [
        ({}, True, "[0-9a-f]{16}"),
        ({"LOCAL_RANK": "1", "FOURSTAGE_JOB": "77"}, False, "77"),
        ({"NODE_RANK": "1", "FOURSTAGE_JOB": "77"}, False, "77"),
        ({"RANK": "8", **TORCHRUN}, False, "a-b-1-0"),
        ({"RANK": "0", **TORCHRUN}, True, "a-b-1-0"),
        ({"SLURM_PROCID": "2", "SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0"}, False, "5-0"),
    ],
)
def test_ranks_of_every_launcher(tmp_path, monkeypatch, env, first, key) -> None:
    names = "RANK NODE_RANK SLURM_PROCID SLURM_JOB_ID SLURM_STEP_ID FOURSTAGE_JOB"
    monkeypatch.setenv("FOURSTAGE_PARENT", "5")
    for name in [*names.split(), *TORCHRUN]:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Ranks, "_key", None)
    monkeypatch.setattr(Ranks, "_parent", None, raising=False)
    found = Ranks(tmp_path)
    assert found.is_first is first and re.fullmatch(key, Ranks._key)
    is_child_of_lightning = env == {"LOCAL_RANK": "1", "FOURSTAGE_JOB": "77"}
    assert Ranks._parent == (5 if is_child_of_lightning else os.getppid())
    assert os.environ["FOURSTAGE_PARENT"] == str(os.getpid())
