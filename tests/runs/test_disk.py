"""Outputs below a limit: which checkpoints go, in which order, and what never does."""

from __future__ import annotations

import pytest

from fourstage.errors import UserError
from fourstage.lineage.climb import climb
from fourstage.runs.__main__ import main
from fourstage.runs.records import read_record, write_record
from fourstage.runs.store import RunStore
from tests.fakes import FakeTrain, config, own_files
from tests.runs.ladders import MB, add_checkpoint, make_run

LEFT = {"status": "running", "finished": None}


def beat(day: int) -> dict:
    return {"time": f"2026-01-{day:02}T00:00:00+00:00", "host": "node7", "pid": 1}


@pytest.fixture
def store(tmp_path) -> RunStore:
    """Six runs with 1 MB of checkpoints each, and 2 MB of weights and logs."""
    store = RunStore(tmp_path / "outputs")
    make_run(store, "sft", "a", **LEFT, heartbeat=beat(3))
    make_run(store, "sft", "b", **LEFT, heartbeat=beat(2))
    make_run(store, "sft", "c", status="failed", finished=None, heartbeat=beat(4))
    make_run(store, "sft", "d", finished="2026-01-03T00:00:00+00:00")
    make_run(store, "sft", "e", finished="2026-01-02T00:00:00+00:00")
    make_run(store, "sft", "f", **LEFT, heartbeat=beat(1))
    for folder in store.records():
        add_checkpoint(folder, 1)
    (store.folder("sft", "d" * 10) / "model.safetensors").write_bytes(b"\1" * MB)
    (store.outputs / "wandb").mkdir()
    (store.outputs / "wandb" / "log").write_bytes(b"\1" * MB)
    return store


def with_checkpoints(store: RunStore) -> str:
    return "".join(f.name[-1] for f in sorted(store.records()) if (f / "checkpoints").exists())


@pytest.mark.parametrize(
    ("most_mb", "gone"), [(9, ""), (7.5, "b"), (6.5, "ba"), (5.5, "bac"), (4.5, "bace")]
)
def test_the_longest_abandoned_go_first_and_finished_ones_last(store, capsys, most_mb, gone):
    words = ["trim", f"most_gb={most_mb / 1000}", f"outputs={store.outputs}"]
    with store.locked("sft", "f" * 10):  # it is trained now
        main([*words, "dry_run=true"])
        assert with_checkpoints(store) == "abcdef"
        main(words)
    assert with_checkpoints(store) == "".join(c for c in "abcdef" if c not in gone)
    said = capsys.readouterr().out.splitlines()
    would = [line for line in said if line.startswith("would remove")]
    assert [line.split("'s")[0][-1] for line in would] == list(gone)
    assert sum(line.startswith("removed") for line in said) == len(gone)
    for line in would:
        what = "kept checkpoints" if "eeee" in line else "resume state"
        assert line.endswith(f"'s {what} (1.0 MB)")
    assert not (store.outputs / "trash").exists()


def test_what_cannot_be_dropped_is_named(store, capsys) -> None:
    line = r"takes 0.00 GB \(runs 0.00, wandb 0.00\), more than 0.001, and there are no checkpoints"
    for words, verb in ((["dry_run=true"], "would remove"), ([], "removed")):
        with pytest.raises(UserError, match=line):
            main(["trim", "most_gb=0.001", *words, f"outputs={store.outputs}"])
        assert capsys.readouterr().out.count(verb) == 6
        assert with_checkpoints(store) == ("abcdef" if words else "")
    assert len(store.records()) == 6
    assert (store.folder("sft", "d" * 10) / "model.safetensors").exists()
    assert (store.outputs / "wandb" / "log").exists()


def test_a_run_that_is_a_link_is_left_alone(store, tmp_path) -> None:
    folder = store.folder("sft", "b" * 10)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no checkpoints left"):
        main(["trim", "most_gb=0.0001", f"outputs={store.outputs}"])
    assert with_checkpoints(store) == "b"


def test_an_interrupted_retraining_counts(store, capsys) -> None:
    folder = store.retrain_folder("sft", "d" * 10)
    made = make_run(store, "sft", "x", id="d" * 10, **LEFT, started="2025-01-01")
    folder.parent.mkdir(parents=True)
    made.rename(folder)
    add_checkpoint(folder, 1)
    main(["trim", "most_gb=0.0085", f"outputs={store.outputs}"])
    assert "removed sft-dddddddddd's resume state (1.0 MB)" in capsys.readouterr().out
    assert with_checkpoints(store) == "abcdef" and (folder / "run.json").exists()


# --- as an option of train.py


@pytest.fixture
def base(tmp_path) -> list[str]:
    files = own_files(tmp_path / "files")
    return [f"outputs={tmp_path}/outputs", "model=moe_nano", "logger=none", *files]


def test_a_stage_makes_room_before_and_after_itself(base, store, capsys) -> None:
    """Weights are 3 MB: one resume state goes before them, and three afterwards."""

    def train(job):
        assert with_checkpoints(store).endswith("abcde"), "before the stage"
        (job.folder / "model.safetensors").write_bytes(b"\1" * 3 * MB)
        return {"steps": 1}

    climb(config(*base, "stage=pretrain", "max_outputs_gb=0.0075"), train=train)
    assert with_checkpoints(store) == "de"
    said = capsys.readouterr().out
    gone = [line.split("'s")[0] for line in said.splitlines() if "outputs took too much" in line]
    assert gone == [f"removed sft-{letter * 10}" for letter in "fbac"] and "warning" not in said


def test_what_this_command_resumes_is_spared(base, store) -> None:
    """Its own state is the longest abandoned one, and goes on."""
    with pytest.raises(RuntimeError):
        climb(config(*base, "stage=pretrain"), train=FakeTrain(fail_in="pretrain", checkpoint=True))
    (mine,) = store.root.glob("pretrain-*")
    write_record(mine, heartbeat={"time": "2000-01-01T00:00:00+00:00"})
    again = FakeTrain()
    climb(config(*base, "stage=pretrain", "max_outputs_gb=0.0025"), train=again)
    assert [job.resume for job in again.jobs] == [True]
    assert with_checkpoints(store) == ""


def test_no_stage_starts_above_the_limit(base, store, capsys) -> None:
    train = FakeTrain()
    with pytest.raises(UserError, match=r"takes 0.00 GB .*more than 0.001, .*raise the limit"):
        climb(config(*base, "stage=sft", "max_outputs_gb=0.001"), train=train)
    assert train.jobs == [] and with_checkpoints(store) == ""
    climb(config(*base, "stage=sft", "max_outputs_gb=0.0026"), train=FakeTrain())
    climb(config(*base, "stage=sft", "max_outputs_gb=0.001"), train=train)
    assert train.jobs == [], "what is finished is found, whatever the limit"


def test_a_stage_that_ends_above_the_limit_warns(base, store, capsys) -> None:
    def train(job):
        (job.folder / "model.safetensors").write_bytes(b"\1" * 9 * MB)
        return {"steps": 1}

    climb(config(*base, "stage=pretrain", "max_outputs_gb=0.0075"), train=train)
    assert "warning: " in (said := capsys.readouterr().out) and "more than 0.0075" in said
    (record,) = [read_record(folder) for folder in store.root.glob("pretrain-*")]
    assert record["status"] == "finished" and "max_outputs_gb" not in record["config"]


@pytest.mark.parametrize("value", ["0", "-1", "much"])
def test_a_limit_that_is_none(base, value) -> None:
    with pytest.raises(UserError, match="max_outputs_gb: "):
        climb(config(*base, "stage=pretrain", f"max_outputs_gb={value}"), train=FakeTrain())
