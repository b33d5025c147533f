"""The WANDB_ variables: each means what W&B's users expect, and none makes two stages one run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import wandb

from fourstage.errors import UserError
from fourstage.job import LoggerConfig, StageJob
from fourstage.lineage import runner
from fourstage.lineage.climb import climb
from fourstage.runs.records import read_record, write_record
from fourstage.runs.store import RunStore
from fourstage.tracking.wandb_run import abandon_wandb, open_wandb
from fourstage.tracking.wandb_settings import (
    OURS,
    entity_of,
    hidden,
    labels,
    names,
    project_of,
    wandb_folder,
    wandb_mode,
)
from tests.fakes import FakeTrain, config, own_files


@pytest.fixture(autouse=True)
def no_variables(monkeypatch, tmp_path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb"))


@pytest.fixture
def jobs(tmp_path) -> list[StageJob]:
    """A pretrain run and the sft run that the command named, logged offline."""
    outputs = f"outputs={tmp_path}/outputs"
    tree = config("stage=sft", outputs, "model=moe_nano", *own_files(tmp_path / "files"))
    train = FakeTrain()
    climb(tree, train=train)
    for job in train.jobs:
        job.logger = LoggerConfig(mode="offline")
    return train.jobs


def started(job: StageJob) -> wandb.Run:
    """A stage's W&B run, as it was."""
    held = open_wandb(job)
    abandon_wandb(ValueError())
    return held.run


def test_an_id_is_of_the_stage_that_the_command_names(jobs, monkeypatch, capsys) -> None:
    pretrain, sft = jobs
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert started(pretrain).id != "mine" and started(sft).id == "mine"
    assert read_record(sft.folder)["wandb"] == "mine" == os.environ["WANDB_RUN_ID"]
    # another stage run can't have it, such as the next job of a multirun
    line = f"^WANDB_RUN_ID=mine: the W&B run of {sft.name}: unset it, or take another id$"
    other = sft.folder.with_name("sft-abcdefghij")
    sft.folder, folder = other, sft.folder
    with pytest.raises(UserError, match=line):
        open_wandb(sft)
    # and a run that goes on keeps the one that it has begun
    sft.folder, sft.resume = folder, True
    monkeypatch.setenv("WANDB_RUN_ID", "other")
    assert started(sft).id == "mine"
    line = f"W&B: {sft.name} goes on in its run mine, not in WANDB_RUN_ID=other\n"
    assert capsys.readouterr().out.endswith(line)


@pytest.mark.parametrize("wrong", ["a/b", "a:b", " a", "a?", " "])
def test_an_id_that_wandb_refuses(jobs, monkeypatch, wrong) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", wrong)
    with pytest.raises(UserError, match="^WANDB_RUN_ID: an id has no spaces and none of"):
        names(jobs[1], None)
    assert names(jobs[0], None)["id"] is None


MISTAKES = [
    ("RUN_ID", "x" * 129, "WANDB_RUN_ID: at most 128 characters, got 129"),
    ("RUN_ID", "a/b", "WANDB_RUN_ID: an id has no spaces and none of :;,#?/', got 'a/b'"),
    ("RUN_ID", "taken", "WANDB_RUN_ID=taken: the W&B run of pretrain-"),
    ("RUN_ID", "a\nb", r"WANDB_RUN_ID: has control characters or broken UTF-8: 'a\nb'"),
    ("RUN_ID", "\x1b[1m", r"WANDB_RUN_ID: has control characters or broken UTF-8: '\x1b[1m'"),
    ("RUN_ID", "\udcff", r"WANDB_RUN_ID: has control characters or broken UTF-8: '\udcff'"),
    ("NAME", "\udcff", r"WANDB_NAME: has control characters or broken UTF-8: '\udcff'"),
    ("NOTES", "\udcff", r"WANDB_NOTES: has control characters or broken UTF-8: '\udcff'"),
    ("RESUME", "foo", "WANDB_RESUME: expected one of allow, auto, must, never, got 'foo'"),
    ("SWEEP_ID", " s", "WANDB_SWEEP_ID: an id has no spaces around it, got ' s'"),
    ("TAGS", "a," + "x" * 65, "WANDB_TAGS: a tag has at most 64 characters, got 'xxx"),
    ("PROJECT", "a/b", r"WANDB_PROJECT: at most 128 characters and none of /\#?%:, got 'a/b'"),
]


@pytest.mark.parametrize(("name", "value", "line"), MISTAKES)
def test_a_mistake_is_found_before_anything_trains(
    monkeypatch, tmp_path, name, value, line
) -> None:
    files = own_files(tmp_path / "files")
    words = (f"outputs={tmp_path}/outputs", "model=moe_nano", *files)
    climb(config("stage=pretrain", *words), train=FakeTrain())
    [pretrain] = tmp_path.glob("outputs/runs/pretrain-*")
    write_record(pretrain, wandb="taken")
    monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    train = FakeTrain()
    with pytest.raises(UserError) as error:
        climb(config("stage=grpo", *words), train=train)
    assert str(error.value).startswith(line) and train.jobs == []
    # a run that is there, or W&B switched off: nothing to be refused
    climb(config("stage=pretrain", *words), train=train)
    climb(config("stage=grpo", "logger=none", *words), train=train)
    assert train.stages == ["sft", "reward", "ppo", "grpo"]


@pytest.mark.parametrize("value", ["a" * 128, "run 7", "läuft", "a.b"])
def test_an_id_that_wandb_takes(jobs, monkeypatch, value) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", value)
    monkeypatch.setenv("WANDB_NOTES", "two\nlines")
    run = started(jobs[1])
    assert (run.id, run.notes) == (value, "two\nlines")


def test_what_only_wandb_finds_comes_before_the_stage_does_anything(jobs, monkeypatch) -> None:
    """In each job of a multirun: W&B would keep what it has read before the mistake."""
    wandb.teardown()
    monkeypatch.setenv("WANDB_BASE_URL", "x")
    monkeypatch.setattr(runner, "check_fetched", lambda job: pytest.fail("too late"))
    for job in jobs:
        with pytest.raises(UserError, match=f"^{job.name}: WANDB_BASE_URL: .*, got 'x': correct"):
            runner.train_stage(job)


def test_a_name_is_of_the_stage_that_the_command_names(jobs, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_NAME", "my try")
    assert [started(job).name for job in jobs] == [jobs[0].name, "my try"]


def test_labels_are_of_every_stage(jobs, monkeypatch) -> None:
    assert labels("abc", "sft", ["sft"]) == {
        "group": "abc",
        "job_type": "sft",
        "tags": ["sft"],
        "notes": None,
    }
    for name in ("RUN_GROUP", "JOB_TYPE", "NOTES"):
        monkeypatch.setenv(f"WANDB_{name}", f"my {name}")
    monkeypatch.setenv("WANDB_TAGS", "one, two,,sft")
    for run in map(started, jobs):
        assert (run.group, run.job_type, run.notes) == ("my RUN_GROUP", "my JOB_TYPE", "my NOTES")
        assert {"one", "two", "sft"} <= set(run.tags) and len(set(run.tags)) == len(run.tags)


def test_project_and_entity(jobs, monkeypatch) -> None:
    typed = LoggerConfig(project="typed", entity="us")
    assert (project_of(LoggerConfig()), entity_of(LoggerConfig())) == ("fourstage", None)
    assert started(jobs[0]).project == "fourstage"
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_ENTITY", "them")
    assert (project_of(LoggerConfig()), entity_of(LoggerConfig())) == ("theirs", "them")
    assert (project_of(typed), entity_of(typed)) == ("typed", "us")
    run = started(jobs[1])
    assert (run.project, run.entity) == ("theirs", "them")
    assert config("stage=sft")["logger"]["project"] is None  # nothing is typed


@pytest.mark.parametrize(
    ("variables", "mode", "expected"),
    [
        ({"DISABLED": "true"}, "auto", "disabled"),
        ({"DISABLED": "1", "MODE": "online"}, "auto", "disabled"),
        ({"DISABLED": "false", "MODE": "offline"}, "auto", "offline"),
        ({"DISABLED": "", "MODE": "offline"}, "auto", "offline"),
        ({"DISABLED": "true"}, "offline", "offline"),  # typed
        ({"MODE": "disabled"}, "auto", "disabled"),
        ({"MODE": "online"}, "offline", "offline"),
    ],
)
def test_disabled_and_mode(monkeypatch, variables, mode, expected) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert wandb_mode(LoggerConfig(mode=mode))[0] == expected


def test_dir(jobs, monkeypatch, tmp_path) -> None:
    assert wandb_folder(Path("x")) == Path("x").resolve() / "wandb"
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "logs"))
    run = started(jobs[1])
    assert Path(run.dir).parents[1] == tmp_path / "logs" / "wandb" == wandb_folder(jobs[1].outputs)


def test_resume(jobs, monkeypatch) -> None:
    pretrain, sft = jobs
    for value, asked in (("allow", None), ("auto", None), ("must", "must"), ("never", "never")):
        monkeypatch.setenv("WANDB_RESUME", value)
        assert names(sft, None)["resume"] == asked
        assert names(sft, "abc")["resume"] is None  # a stage that goes on goes on
        assert names(pretrain, None)["resume"] is None
    monkeypatch.setenv("WANDB_RESUME", "maybe")
    line = "^WANDB_RESUME: expected one of allow, auto, must, never, got 'maybe'$"
    with pytest.raises(UserError, match=line):
        names(sft, None)


def test_a_sweep_is_of_the_stage_that_the_command_names(jobs, monkeypatch) -> None:
    """W&B itself would ignore our project and id in a sweep, for ancestors too."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "swp")
    monkeypatch.setenv("WANDB_RUN_ID", "trial")
    first, last = map(started, jobs)
    assert (first.sweep_id, first.project) == (None, "fourstage")
    assert (last.sweep_id, last.id, last.project) == ("swp", "trial", "fourstage")
    # a trial that finds a run begun by another trial doesn't put that one into the sweep again
    assert names(jobs[1], "abc")["sweep_id"] is None
    assert names(jobs[1], "trial")["sweep_id"] == "swp"


def test_variables_are_hidden_from_wandb_only(monkeypatch) -> None:
    for name in OURS:
        monkeypatch.setenv(name, "x")
    with hidden():
        assert not set(OURS) & set(os.environ)
    assert all(os.environ[name] == "x" for name in OURS)
    with pytest.raises(ValueError), hidden():
        raise ValueError
    assert all(os.environ[name] == "x" for name in OURS)


def test_the_store_has_the_ids(jobs) -> None:
    ids = [started(job).id for job in jobs]
    records = RunStore(jobs[0].outputs).records().values()
    assert [record["wandb"] for record in records] == ids and len(set(ids)) == 2
