"""Finding, listing, showing and removing runs."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from fourstage.errors import UserError
from fourstage.files import parse_json, read_json, read_jsonl, swap_in, write_atomic, write_json
from fourstage.lineage.climb import climb
from fourstage.runs.__main__ import main
from fourstage.runs.records import read_record, what_is_wrong, write_record
from fourstage.runs.store import RunStore, find_run
from tests.fakes import FakeTrain, config, own_files


@pytest.fixture
def store(tmp_path) -> RunStore:
    """A ladder up to ppo."""
    files = own_files(tmp_path / "files")
    outputs = tmp_path / "outputs"
    tree = config("stage=ppo", f"outputs={outputs}", "model=moe_nano", "logger=none", *files)
    climb(tree, train=FakeTrain())
    return RunStore(outputs)


def add(store: RunStore, stage: str, letter: str, **changes) -> Path:
    """One more run, made by hand."""
    folder = store.folder(stage, letter * 10)
    record = read_record(store.find("pretrain"))
    new = {"id": letter * 10, "stage": stage, "name": folder.name, "parents": {}, **changes}
    record["config"]["stages"] = {stage: {}}
    folder.mkdir()
    write_atomic(folder / "run.json", json.dumps({**record, **new}))
    return folder


def test_a_run_has_four_names(store) -> None:
    sft = store.find("sft")
    run_id = sft.name.split("-")[1]
    for name in (run_id, sft.name, str(sft)):
        assert find_run(store.outputs, name) == sft


def test_a_stage_means_its_latest_finished_run_that_is_no_debug_run(store) -> None:
    first = store.find("sft")
    add(store, "sft", "a", finished="2100-01-01", status="failed")
    add(store, "sft", "b", finished="2100-01-01", debug="fast")
    assert find_run(store.outputs, "sft") == first
    newer = add(store, "sft", "c", finished="2099-01-01")
    assert find_run(store.outputs, "sft") == newer
    debug = add(store, "grpo", "d", debug="fast")
    assert find_run(store.outputs, "grpo") == debug  # there is no other


def test_no_such_run_in_one_line(store, tmp_path) -> None:
    with pytest.raises(UserError, match=r"unknown run 'x': .* has pretrain-[a-z]{10}, sft-"):
        find_run(store.outputs, "x")
    with pytest.raises(UserError, match="has no runs yet"):
        find_run(tmp_path / "nowhere", "x")
    with pytest.raises(UserError, match="no finished grpo run .*python train.py stage=grpo"):
        find_run(store.outputs, "grpo")
    unfinished = add(store, "sft", "e", status="running")
    with pytest.raises(UserError, match="this run is not finished"):
        find_run(store.outputs, unfinished.name)
    for letter in "fghijklm":
        add(store, "sft", letter)
    with pytest.raises(UserError, match=r"and 5 more \(python -m fourstage runs\)"):
        find_run(store.outputs, "x")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"id": "a", "stage": "sft"}'])
def test_a_broken_record_is_named_and_can_be_removed(store, text, capsys) -> None:
    whole = list(store.records())
    broken = add(store, "sft", "b")
    (broken / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"sft-bbbbbbbbbb/run\.json: broken \(.*remove the folder"):
        find_run(store.outputs, broken.name)
    assert list(store.records()) == whole and find_run(store.outputs, "sft") in whole
    main(["list", f"outputs={store.outputs}"])
    shown = capsys.readouterr()
    assert "sft-bbbbbbbbbb/run.json: broken" in shown.err and whole[0].name in shown.out
    main(["rm", broken.name, f"outputs={store.outputs}"])
    assert list(store.records()) == whole and store.broken() == []


def test_where_two_lines_meet_the_policys_counts(store) -> None:
    """A reward model of another ladder: what is compared with sft is the policy's own sft run."""
    own, pretrain = store.find("sft"), read_record(store.find("pretrain"))["id"]
    add(store, "sft", "s", parents={"policy": pretrain})
    add(store, "reward", "r", parents={"policy": "s" * 10})
    parents = {"policy": read_record(own)["id"], "reward": "r" * 10}
    ppo = add(store, "ppo", "p", parents=parents)
    found = store.ancestors(ppo)
    assert (found["sft"], found["reward"].name) == (own, "reward-rrrrrrrrrr")


def test_ancestors_and_children(store) -> None:
    assert list(store.ancestors(store.find("ppo"))) == ["pretrain", "sft", "reward"]
    names = [f.name.split("-")[0] for f in store.children(read_record(store.find("sft"))["id"])]
    assert names == ["reward", "ppo"]


def test_list(store, capsys) -> None:
    add(store, "sft", "a", status="running", debug="fast")
    busy = add(store, "sft", "b", status="running")
    weights = store.find("pretrain") / "model.safetensors"
    weights.write_bytes(bytes(3_000_000))
    with store.locked(busy.name, "b" * 10):
        main([f"outputs={store.outputs}"])
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if "-" in line}
    assert "interrupted" in lines["sft-" + "a" * 10] and "fast" in lines["sft-" + "a" * 10]
    assert "running" in lines["sft-" + "b" * 10]
    main(["show", "a" * 10, f"outputs={store.outputs}"])
    assert '"status": "interrupted"' in capsys.readouterr().out, "as the list says"
    assert "3.0" in lines[store.find("pretrain").name]
    assert "moe_nano" in lines[store.find("ppo").name]
    main(["list", f"outputs={store.outputs}"])
    assert re.search(r"disk use: locks 0.0 MB, runs 3\.\d MB", capsys.readouterr().out)


def test_every_name_is_whole_in_a_narrow_terminal(store, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    main([f"outputs={store.outputs}"])
    out = capsys.readouterr().out
    assert all(folder.name in out for folder in store.records())


def test_list_of_nothing(tmp_path, capsys) -> None:
    main([f"outputs={tmp_path}"])
    assert "no runs yet" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_show(store, capsys) -> None:
    main(["show", "sft", f"outputs={store.outputs}"])
    out = capsys.readouterr().out
    assert '"stage": "sft"' in out and "model.safetensors" in out
    assert f"ancestors: {store.find('pretrain').name}" in out
    assert f"descendants: {store.find('reward').name}, {store.find('ppo').name}" in out


def test_rm(store, capsys) -> None:
    outputs = f"outputs={store.outputs}"
    sft, ppo = store.find("sft"), store.find("ppo")
    with pytest.raises(UserError, match=f"{sft.name}: reward-.*, ppo-.* descend from it: .*force="):
        main(["rm", "sft", outputs])
    assert sft.exists()
    main(["rm", ppo.name, "reward", outputs])
    assert not ppo.exists() and f"removed {ppo.name}" in capsys.readouterr().out
    main(["rm", "pretrain", "force=true", outputs])
    assert [f.name for f in store.records()] == [sft.name]
    assert {path.name for path in store.outputs.iterdir()} == {"runs", "locks"}
    with store.locked(sft.name, sft.name.split("-")[1]), pytest.raises(UserError, match="training"):
        main(["rm", sft.name, outputs])


def test_rm_takes_no_run_but_the_one_that_is_named(store, tmp_path, monkeypatch) -> None:
    outputs = f"outputs={store.outputs}"
    runs = list(store.records())
    with pytest.raises(UserError, match=r"unknown run '\*'"):
        main(["rm", "*", "force=true", outputs])
    sft = store.find("sft")
    other = f"outputs={tmp_path / 'other'}"
    with pytest.raises(UserError, match=f"{sft}: not a run of .*other: give its own outputs="):
        main(["rm", str(sft), "force=true", other])
    assert list(store.records()) == runs
    renamed = sft.rename(sft.with_name("sft-mine"))  # those that descend from it know its id
    with pytest.raises(UserError, match="sft-mine: reward-.*, ppo-.* descend from it"):
        main(["rm", "sft-mine", outputs])
    monkeypatch.chdir(renamed)
    main(["rm", ".", "force=true", outputs])
    assert not renamed.exists()


def test_wrong_arguments(store) -> None:
    with pytest.raises(UserError, match="unknown word 'delete': known are list, show, rm, trim"):
        main(["delete", "sft"])
    for arguments in (["rm"], ["show"], ["list", "sft"]):
        with pytest.raises(UserError, match="usage: python -m fourstage runs"):
            main(arguments)
    with pytest.raises(UserError, match="unknown option 'output=x': known are outputs"):
        main(["show", "sft", "output=x"])
    with pytest.raises(UserError, match="no run has a setting 'output'"):
        main([f"outputs={store.outputs}", "output=x"])
    with pytest.raises(UserError, match="force: expected true or false, got 'yes'"):
        main(["rm", "sft", "force=yes"])


def test_record_is_merged_and_written_whole(tmp_path, monkeypatch) -> None:
    write_record(tmp_path, status="running", cost={"seconds": 1.0})
    write_record(tmp_path, cost={"tokens": 5})
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored == {"status": "running", "cost": {"seconds": 1.0, "tokens": 5}}

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("os.fsync", full_disk)
        write_record(tmp_path, status="finished")
    assert json.loads((tmp_path / "run.json").read_text()) == stored
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_swap_in_replaces_files_and_folders(tmp_path) -> None:
    for new, place in (("new.txt", "old.txt"), ("new", "old")):
        for name, text in ((new, "new"), (place, "old")):
            path = tmp_path / name
            if not path.suffix:
                path.mkdir()
                path /= "file"
            path.write_text(text)
        swap_in(tmp_path / new, tmp_path / place)
    assert (tmp_path / "old.txt").read_text() == (tmp_path / "old" / "file").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "old.txt"]


# --- damaged records

DAMAGE: list[tuple[str, Any, str]] = [
    ("cost", {}, "it has no cost.seconds"),
    ("cost", None, "cost is 'None'"),
    ("cost.seconds", "5", "cost.seconds is '5'"),
    ("cost.seconds", True, "cost.seconds is 'True'"),
    ("git", None, "git is 'None'"),
    ("git.commit", 5, "git.commit is '5'"),
    ("config", [], "config is '[]'"),
    ("config.model", {}, "it has no config.model.name"),
    ("config.seed", "0", "config.seed is '0'"),
    ("config.stages", {}, "it has no config.stages.sft"),
    ("parents", [], "parents is '[]'"),
    ("parents.policy", "../../x", "'../../x' is not a run id"),
    ("parents.policy", None, "'None' is not a run id"),
    ("id", "../../x", "'../../x' is not a run id, which is ten letters a to z"),
    ("group", "ABC", "'ABC' is not a run id"),
    ("status", None, "status is 'None'"),
    ("started", 5, "started is '5'"),
    ("finished", None, "it has no finished"),
    ("data", "x", "data is 'x'"),
    ("threads", "2", "threads is '2'"),
    ("debug", False, "debug is 'False'"),
]


def changed(record: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    record = copy.deepcopy(record)
    *path, last = key.split(".")
    place = record
    for name in path:
        place = place[name]
    place[last] = value
    return record


@pytest.mark.parametrize(("key", "value", "what"), DAMAGE)
def test_a_damaged_record_is_named_and_nothing_else_suffers(
    store, key, value, what, capsys
) -> None:
    folder = store.find("sft")
    record = read_record(folder)
    assert what_is_wrong(record) is None
    (folder / "run.json").write_text(json.dumps(changed(record, key, value)))
    with pytest.raises(UserError, match=re.escape(what)):
        read_record(folder)
    main([f"outputs={store.outputs}"])
    said = capsys.readouterr()
    assert what in said.err and "pretrain-" in said.out and folder.name not in said.out
    assert store.find("pretrain") and store.find("ppo")
    main(["rm", folder.name, "force=true", f"outputs={store.outputs}"])
    assert not folder.exists() and not list(store.outputs.glob("../x*"))


def test_a_run_of_an_unknown_stage_is_named_and_left_alone(store, capsys) -> None:
    folder = store.root / "distill-abcdefghij"
    folder.mkdir()
    record = {**read_record(store.find("sft")), "stage": "distill", "id": "abcdefghij"}
    write_json(folder / "run.json", record)
    main([f"outputs={store.outputs}"])
    said = capsys.readouterr()
    assert "distill-abcdefghij: of a stage that is not known here (distill)" in said.err
    assert store.find("sft") and folder.exists()


@pytest.mark.parametrize(
    "text", ['{"a": ' + "9" * 5000 + "}", "[" * 100_000, '{"a": NaN}', "{", "\x00"]
)
def test_json_that_is_none(tmp_path, text) -> None:
    with pytest.raises(ValueError):
        parse_json(text)
    for name, read in (("run.json", read_json), ("a.jsonl", read_jsonl)):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError):
            read(tmp_path / name)
    with pytest.raises(UserError, match="run.json: broken") as caught:
        read_record(tmp_path)
    assert "\n" not in str(caught.value)


def test_numbers_that_are_not_finite_are_not_written(tmp_path) -> None:
    write_json(tmp_path / "a.json", {"a": 1.5})
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="a.json: the model's numbers are not finite"):
            write_json(tmp_path / "a.json", {"a": [value]})
    assert read_json(tmp_path / "a.json") == {"a": 1.5}


# --- links and locks


def test_rm_of_a_link_leaves_what_it_stands_for(store, tmp_path, capsys) -> None:
    folder = store.find("ppo")
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    main(["rm", "ppo", f"outputs={store.outputs}"])
    assert "the link only: its files stay in " in capsys.readouterr().out
    assert not folder.is_symlink() and (tmp_path / "elsewhere" / "run.json").exists()


def other_disk(monkeypatch, tmp_path) -> None:
    """Renames between outputs/ and elsewhere/ fail, as between two disks."""
    rename = os.rename

    def across(old, new) -> None:
        sides = {"elsewhere" in str(Path(path).resolve()) for path in (old, Path(new).parent)}
        if len(sides) > 1:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(old, new)

    monkeypatch.setattr(os, "rename", across)


def test_runs_on_another_disk(store, tmp_path, monkeypatch) -> None:
    """outputs/runs is a link: rm, and force=true, which came to its end and failed then."""
    disk = tmp_path / "elsewhere"
    disk.mkdir()
    store.root.rename(disk / "runs")
    store.root.symlink_to(disk / "runs")
    other_disk(monkeypatch, tmp_path)
    main(["rm", "ppo", f"outputs={store.outputs}"])
    files = own_files(tmp_path / "files")
    tree = config("stage=sft", f"outputs={store.outputs}", "model=moe_nano", "logger=none", *files)
    before = (store.find("sft") / "model.safetensors").read_text()
    again = FakeTrain()
    again.jobs += [None, None]  # so that its weights are other ones
    climb({**tree, "force": True}, train=again)
    assert (store.find("sft") / "model.safetensors").read_text() != before


def test_force_replaces_a_link_and_not_what_it_stands_for(store, tmp_path) -> None:
    folder = store.find("sft")
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    kept = (tmp_path / "elsewhere" / "run.json").read_text()
    files = own_files(tmp_path / "files")
    tree = config("stage=sft", f"outputs={store.outputs}", "model=moe_nano", "logger=none", *files)
    climb({**tree, "force": True}, train=FakeTrain())
    assert not folder.is_symlink() and read_record(folder)["status"] == "finished"
    assert (tmp_path / "elsewhere" / "run.json").read_text() == kept


def test_no_lock_stays(store) -> None:
    assert not list((store.outputs / "locks").iterdir())
    with store.locked("sft-a", "a" * 10):
        assert store.is_busy("a" * 10)
    assert not store.is_busy("a" * 10)
    assert not list((store.outputs / "locks").iterdir())


def test_no_lock_outside_of_outputs(store) -> None:
    with pytest.raises(AssertionError):
        store.is_busy("../../x")
    for name in ("../../x", "x" * 5000, "a\0b"):
        with pytest.raises(UserError, match="unknown run '"):
            store.find(name)
