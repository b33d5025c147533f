"""JSON and JSON Lines: every fault is a ValueError, and a kill loses no old content."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fourstage.errors import UserError


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises OSError, or ValueError if it is not JSON."""
    return parse_json(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """One JSON object per line, ended by newlines only. Raises OSError, ValueError."""
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = [parse_json(line) for line in lines if line]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line without a JSON object")
    return rows


def parse_json(text: str) -> Any:
    """json.loads that also raises ValueError for deep nesting and NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deep") from None


def write_json(path: Path, value: Any) -> None:
    """An indented JSON file, atomically. Raises UserError for numbers that are not finite."""
    write_atomic(path, _json(path, value, indent=1))


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object per line, atomically. Raises UserError for numbers that are not finite."""
    write_atomic(path, "".join(_json(path, row) for row in rows))


def _json(path: Path, value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:
        raise UserError(
            f"{path.name}: the model's numbers are not finite: its weights have grown too large: "
            "train with a lower lr"
        ) from None


def write_atomic(path: Path, content: str | bytes) -> None:
    """Readers, also after a crash, see the old file or the new one, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content if isinstance(content, bytes) else content.encode())
        swap_in(part, path)
    finally:
        part.unlink(missing_ok=True)


def swap_in(new: Path, place: Path) -> None:
    """Move a file or folder to `place` and remove what was there; a kill loses neither of the two.

    A kill may come between the two renames of a folder: call `undo_swap` before reading `place`.
    """
    undo_swap(new, place)
    for path in [new, *new.rglob("*")]:
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    if not place.is_dir():  # a rename replaces a file, but not a folder
        os.replace(new, place)
        return
    os.rename(place, set_aside(new))  # if it is a link to a folder, the link
    os.rename(new, place)
    remove(set_aside(new))


def undo_swap(new: Path, place: Path) -> None:
    """After a kill: put back the old folder that `swap_in` set aside, or finish removing it."""
    old = set_aside(new)
    if place.exists():
        remove(old)
    elif old.exists() or old.is_symlink():
        os.rename(old, place)


def set_aside(new: Path) -> Path:
    """Where the old folder waits while the new one takes its place."""
    return new.with_name(f"{new.name}.old")


def clean_up(state: Path) -> None:
    """After a kill: the last good resume state in its place, and no half-written one beside it."""
    undo_swap(part_of(state), state)
    remove(part_of(state))


def remove_parts(folder: Path) -> None:
    """After a kill: remove what `write_atomic` was writing there. Nobody may be writing there."""
    for part in folder.glob(".*.*"):
        if part.suffix[1:].isdecimal():
            part.unlink(missing_ok=True)


def part_of(state: Path) -> Path:
    """Where the next resume state is written."""
    return state.with_name(".part.ckpt")


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def expanded(path: str) -> Path:
    """With the home folder for ~, if there is one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


@contextmanager
def locked(lock: FileLock, what: str, doing: str = "writing") -> Iterator[None]:
    """Hold a lock; says what it waits for, if another process has it."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for {what}, which another process is {doing}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def exists(path: Path) -> bool:
    """Whether a file or folder is there; False for names that are too long or hold a NUL."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def user_cache() -> Path:
    """The folder of what can be made again, such as compiled kernels."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "fourstage"
