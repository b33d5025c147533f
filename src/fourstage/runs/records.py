"""A run's record: run.json in its folder, the only file that says what a run is."""

import fcntl
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING
from pathlib import Path
from types import NoneType
from typing import Any

from fourstage.errors import UserError
from fourstage.files import read_json, write_json
from fourstage.ladder import LADDER

PATIENCE = 10.0  # seconds to wait for another writer of a record
_WRITING = threading.Lock()  # a lock on a file is no help against a thread where there is none

Record = dict[str, Any]
RUN_ID = re.compile("[a-z]{10}")
# key -> type; a key with a question mark may be missing
TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("parents", "data?", "git?", "versions?", "start?", "cost"), dict),
    **dict.fromkeys(("config", "config.model", "config.stages"), dict),
    **{f"config.{name}?": dict for name in ("data", "tokenizer", "trainer", "evaluation")},
    **dict.fromkeys(("id", "stage", "group", "status", "started", "config.model.name"), str),
    **dict.fromkeys(("debug", "finished?", "git.commit?"), (str, NoneType)),
    **{f"start.{key}?": str for key in ("name", "folder", "digest")},
    **{"tags?": list, "heartbeat?": dict, "heartbeat.pid?": int},
    **dict.fromkeys(("heartbeat.time?", "heartbeat.host?"), str),
    **dict.fromkeys(("threads?", "config.seed"), int),
    **dict.fromkeys(("cost.seconds", "cost.train_seconds?", "cost.eval_seconds?"), (int, float)),
}


def read_record(folder: Path) -> Record:
    """A run's run.json. Raises UserError if it is missing, broken, or of an unknown stage."""
    record = _stored(folder)
    if wrong := what_is_wrong(record):
        path = folder / "run.json"
        raise UserError(f"{path}: broken ({wrong}): remove the folder and train again")
    if record["stage"] not in LADDER:
        raise UserError(f"{folder}: of a stage that is not known here ({record['stage'][:40]})")
    return record


def start_name(record: Record) -> str:
    """What the row is called that a first stage starts from: "random", or a checkpoint's name."""
    name = record.get("start", {}).get("name", "random")
    return f"{name} (checkpoint)" if name in LADDER else name


def what_is_wrong(record: Record) -> str | None:
    """The first key of a record that is missing, has the wrong type, or makes no sense."""
    for key, kind in TYPES.items():
        name = key.rstrip("?")
        value: Any = record
        for part in name.split("."):
            value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
        if value is MISSING and name == key:
            return f"it has no {name}"
        if value is not MISSING and (not isinstance(value, kind) or isinstance(value, bool)):
            return f"{name} is {str(value)[:40]!r}"
    for run_id in (record["id"], record["group"], *record["parents"].values()):
        if not isinstance(run_id, str) or not RUN_ID.fullmatch(run_id):  # it names files
            return f"{str(run_id)[:40]!r} is not a run id, which is ten letters a to z"
    if record["id"] in record["parents"].values():
        return "it is its own parent"
    for tag in record.get("tags", ()):
        if not isinstance(tag, str):
            return f"the tag {str(tag)[:40]!r} is no text"
    stage = record["stage"]
    if stage in LADDER and not isinstance(record["config"]["stages"].get(stage), dict):
        return f"it has no config.stages.{stage}"
    if record["status"] == "finished" and not isinstance(record.get("finished"), str):
        return "it has no finished"
    return None


def _stored(folder: Path) -> Record:
    """The JSON object in run.json, not checked any further."""
    path = folder / "run.json"
    try:
        record = read_json(path)
        if not isinstance(record, dict):
            raise ValueError("no JSON object")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: not a run (it has no run.json)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: broken ({error}): remove the folder and train again") from None
    return record


def write_record(folder: Path, **changes: Any) -> None:
    """Merge the changes into run.json, a dict key by key."""

    def merge(record: Record) -> None:
        for key, value in changes.items():
            if isinstance(value, dict) and isinstance(record.get(key), dict):
                value = {**record[key], **value}
            record[key] = value

    change_record(folder, merge)


def add_tags(folder: Path, tags: Sequence[str]) -> None:
    """Add tags to a run, those that it has first."""

    def add(record: Record) -> None:
        record["tags"] = list(dict.fromkeys((*record.get("tags", ()), *tags)))

    if tags and not set(tags) <= set(_stored(folder).get("tags", ())):
        change_record(folder, add)


def change_record(folder: Path, change: Callable[[Record], None]) -> None:
    """Read run.json, change it and write it. Nobody else's change in between is lost: the
    heartbeat's thread writes it too, and a command that adds a tag."""
    with _WRITING, _alone(folder):
        record = _stored(folder) if (folder / "run.json").exists() else {}
        change(record)
        write_json(folder / "run.json", record)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder itself, which leaves no file behind; without it after some seconds
    or where there are no such locks, as a change that is lost is better than a run that stops."""
    descriptor = None
    with suppress(OSError):  # the folder is about to be made
        descriptor = os.open(folder, os.O_RDONLY)
    if descriptor is None:
        yield
        return
    try:
        end = time.monotonic() + PATIENCE
        while not _flock(descriptor) and time.monotonic() < end:
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _flock(descriptor: int) -> bool:
    """Whether there is nothing to wait for: it is locked now, or can't be."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that has no locks, or none for folders
        return True
    return True
