"""JSON and JSON Lines: every fault is a ValueError, and a kill loses nothing that was there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fourstage.errors import UserError


def write_json(path: Path, value: Any) -> None:
    """An indented JSON file, atomically. Raises UserError for numbers that are not finite."""
    write_atomic(path, _json(path, value, indent=1) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line; other line separators than a newline may stand in their texts.

    Raises ValueError for what is none.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = [parse_json(line) for line in lines if line]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line without a JSON object")
    return rows


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises OSError, and ValueError for what is no JSON."""
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """json.loads, whose every refusal is a ValueError: too deep, too many digits, NaN."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, atomically. Raises UserError for numbers that are not finite."""
    write_atomic(path, "".join(_json(path, row) + "\n" for row in rows))


def _json(path: Path, value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise UserError(
            f"{path.name}: the model's numbers are not finite: its weights have grown too large: "
            "train with a lower lr"
        ) from None


def write_atomic(path: Path, text: str) -> None:
    """A reader, or a later start after a crash, sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        swap_in(part, path)
    finally:
        part.unlink(missing_ok=True)


def swap_in(new: Path, place: Path) -> None:
    """Move a file or folder to `place`, whose old content goes; a kill loses neither of the two.

    Where a kill may come between a folder's two renames, `undo_swap` has to be called before
    `place` is read again.
    """
    undo_swap(new, place)
    for path in [new, *new.rglob("*")]:
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    if not place.is_dir():  # a rename replaces a file, but not a folder
        os.replace(new, place)
        return
    os.rename(place, set_aside(new))  # of a link to a folder, the link
    os.rename(new, place)
    remove(set_aside(new))


def undo_swap(new: Path, place: Path) -> None:
    """Put the old folder back that `swap_in` set aside before a kill, or remove it at last."""
    old = set_aside(new)
    if not old.exists() and not old.is_symlink():
        return
    if place.exists():
        remove(old)
    else:
        os.rename(old, place)


def exists(path: Path) -> bool:
    """Whether a file or folder is there; none has a name that is too long or holds a NUL."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def clean_up(state: Path) -> None:
    """After a kill: the last good resume state in its place, and none half-written beside it."""
    undo_swap(part_of(state), state)
    remove(part_of(state))


def part_of(state: Path) -> Path:
    """Where the next resume state is written."""
    return state.with_name(".part.ckpt")


def remove(path: Path) -> None:
    """A file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def set_aside(new: Path) -> Path:
    """Where the old folder waits while the new one takes its place."""
    return new.with_name(f"{new.name}.old")
