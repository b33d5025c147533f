"""A run that is looked after: its sign of life, and what is said of one that has none."""

from __future__ import annotations

import shutil
import threading
import time
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fourstage.errors import UserError
from fourstage.files import read_json
from fourstage.runs.__main__ import main
from fourstage.runs.heartbeat import beating, roughly, sign_of_life, silence
from fourstage.runs.records import add_tags, read_record, what_is_wrong, write_record
from fourstage.runs.store import RunStore
from tests.runs.ladders import make_run


@pytest.fixture
def store(tmp_path) -> RunStore:
    return RunStore(tmp_path)


def ago(seconds: float, host: str = "") -> dict[str, Any]:
    """A sign of life of so many seconds ago."""
    then = datetime.now(UTC) - timedelta(seconds=seconds)
    own = sign_of_life()
    return {**own, "time": then.isoformat(timespec="seconds"), "host": host or own["host"]}


def until(happens) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def test_a_run_has_a_sign_of_life_while_it_trains(store) -> None:
    folder = make_run(store, "sft", "b", status="running")

    def seen() -> Any:
        return read_record(folder).get("heartbeat")

    with beating(folder, every=0.01):
        until(seen)
        first = seen()
        write_record(folder, heartbeat={"time": "2026-01-01T00:00:00+00:00"})
        until(lambda: seen()["time"] >= first["time"])
    assert set(first) == {"time", "host", "pid"} and what_is_wrong(read_record(folder)) is None
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_it_ends_with_the_training_and_brings_back_no_folder(store, monkeypatch) -> None:
    folder = make_run(store, "sft", "b", status="running")
    wrote = threading.Event()

    def full(*_: Any, **__: Any) -> None:
        wrote.set()
        raise OSError(28, "No space left on device")

    with pytest.raises(KeyboardInterrupt), beating(folder, every=0.01):
        with monkeypatch.context() as patch:
            patch.setattr("fourstage.runs.heartbeat.write_record", full)
            assert wrote.wait(60)  # a full disk ends nothing
        until(lambda: "heartbeat" in read_record(folder))
        (folder / "run.json").unlink()
        shutil.rmtree(folder)
        time.sleep(0.1)
        raise KeyboardInterrupt
    assert not folder.exists()


def test_writers_at_once_lose_nothing(tmp_path) -> None:
    """Each of six threads makes twenty changes of its own."""
    write_record(tmp_path, status="running")

    def write(name: str) -> None:
        for i in range(20):
            write_record(tmp_path, **{name: {str(i): i}})
            add_tags(tmp_path, [f"{name}{i}"])

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stored = read_json(tmp_path / "run.json")
    assert all(stored[name] == {str(i): i for i in range(20)} for name in "abcdef")
    assert sorted(stored["tags"]) == sorted(f"{name}{i}" for name in "abcdef" for i in range(20))
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"], "no lock is left behind"


HOUR = 3600.0


@pytest.mark.parametrize(
    ("seconds", "host", "is_locked", "status"),
    [
        (None, "", True, "running"),  # of an older release
        (None, "", False, "interrupted"),
        (0, "", True, "running"),
        (0, "", False, "interrupted"),  # kill -9 a moment ago
        (3 * HOUR, "", True, "silent"),  # SIGSTOP; or a lock file of a dead machine
        (3 * HOUR, "", False, "interrupted"),
        (60, "node7", False, "running"),  # its lock doesn't reach here
        (-300, "node7", False, "running"),  # its clock is fast
        (300, "node7", False, "running"),  # or slow
        (-660, "node7", False, "interrupted"),  # or wrong: it could go on for a year
        (-660, "node7", True, "running"),
        (3 * HOUR, "node7", False, "interrupted"),
    ],
)
def test_what_a_lock_and_a_sign_of_life_say(store, seconds, host, is_locked, status) -> None:
    more = {} if seconds is None else {"heartbeat": ago(seconds, host)}
    folder = make_run(store, "sft", "b", status="running", **more)
    with store.locked(folder.name, "b" * 10) if is_locked else nullcontext():
        assert store.status(read_record(folder)) == status


@pytest.mark.parametrize(
    ("then", "status"),
    [
        ("yesterday", "running"),
        ("2026-01-01T00:00:00", "silent"),
        ("0001-01-01T00:00:00+01:00", "running"),  # before the first year in UTC
    ],
)
def test_a_time_that_is_none_or_has_no_zone(store, then, status) -> None:
    folder = make_run(store, "sft", "b", status="running", heartbeat={"time": then})
    with store.locked(folder.name, "b" * 10):
        assert store.status(read_record(folder)) == status


def test_a_finished_run_is_finished_however_old_its_sign_of_life(store) -> None:
    folder = make_run(store, "sft", "b", heartbeat=ago(1e6))
    assert store.status(read_record(folder)) == "finished"
    main(["rm", folder.name, f"outputs={store.outputs}"])
    assert not folder.exists()


def test_a_silent_run_is_shown_with_who_had_it(store, capsys) -> None:
    folder = make_run(store, "sft", "b", status="running", heartbeat=ago(3 * HOUR, "node7"))
    outputs = f"outputs={store.outputs}"
    with store.locked(folder.name, "b" * 10):
        main([outputs])
        said = capsys.readouterr().out
        main(["show", "b" * 10, outputs])
        with pytest.raises(UserError, match=r"gives no sign of life holds its lock: .*rm .*\.lock"):
            main(["rm", folder.name, outputs])
    pid = sign_of_life()["pid"]
    assert f"{folder.name}: dead? last sign of life 3 h ago, from process {pid} on node7" in said
    assert '"status": "silent"' in capsys.readouterr().out


def test_a_silent_run_that_does_not_say_who_had_it(store, capsys) -> None:
    time = ago(3 * HOUR)["time"]
    folder = make_run(store, "sft", "b", status="running", heartbeat={"time": time})
    with store.locked(folder.name, "b" * 10):
        main([f"outputs={store.outputs}"])
    assert "3 h ago, from process unknown on unknown" in capsys.readouterr().out


def test_a_run_of_another_machine_is_not_removed(store) -> None:
    folder = make_run(store, "sft", "b", status="running", heartbeat=ago(60, "node7"))
    with pytest.raises(UserError, match="a process is training it now"):
        main(["rm", folder.name, f"outputs={store.outputs}"])
    write_record(folder, heartbeat=ago(HOUR, "node7"))
    main(["rm", folder.name, f"outputs={store.outputs}"])
    assert not folder.exists()


def test_silence_and_its_words() -> None:
    assert 59 < silence({"heartbeat": ago(60)}) < 70
    assert -600 < silence({"heartbeat": ago(-590)}) < -580
    assert silence({"heartbeat": ago(-660)}) is None
    assert silence({}) is None and silence({"heartbeat": {"time": ""}}) is None
    said = [roughly(seconds) for seconds in (5, 119, 120, 7199, 7200, 172_799, 172_800)]
    assert said == ["5 s", "119 s", "2 min", "120 min", "2 h", "48 h", "2 days"]


@pytest.mark.parametrize("heartbeat", [5, {"time": 5}, {"host": None}, {"pid": "1"}])
def test_a_damaged_sign_of_life_is_named(store, heartbeat, tmp_path: Path) -> None:
    folder = make_run(store, "sft", "b", heartbeat=heartbeat)
    with pytest.raises(UserError, match=r"run\.json: broken \(heartbeat"):
        read_record(folder)
