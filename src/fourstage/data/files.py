"""Local files to records: .txt, .json, .jsonl and .parquet, with errors that name the line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourstage.errors import UserError

KINDS = ".txt, .json, .jsonl or .parquet"


@dataclass(frozen=True)
class Record:
    """A JSON object or a row, with where it stands, for messages."""

    values: dict[str, Any]
    where: str  # "pairs.jsonl, line 3"


def is_text(path: str) -> bool:
    """True for a plain-text file, which is split by position."""
    return Path(path).suffix.lower() == ".txt"


def read_text(path: str) -> str:
    """The whole file, with line ends as \\n.

    Raises:
        UserError: missing, a folder, empty, or not UTF-8.
    """
    file = _existing(path)
    try:
        text = file.read_text(encoding="utf-8-sig")  # universal newlines; a byte-order mark is cut
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8, "
            f"e.g. iconv -f latin1 -t utf-8"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty: give one with data in it")
    return text


def read_records(path: str) -> list[Record]:
    """The records of a JSON list, JSON lines or a Parquet table.

    Raises:
        UserError: missing, empty or non-UTF-8 file, broken JSON, or another kind of file.
    """
    kind = Path(path).suffix.lower()
    if kind == ".parquet":
        rows = _parquet(path)
    elif kind == ".jsonl":
        rows = _json_lines(path)
    elif kind == ".json":
        rows = _json(path)
    elif kind == ".txt":
        _existing(path)
        raise UserError(f"{path}: plain text has no records: give a .json, .jsonl or .parquet file")
    else:
        _existing(path)
        raise UserError(f"{path}: unknown kind of file: give a {KINDS} file")
    if not rows:
        raise UserError(f"{path}: the file has no records: give one with data in it")
    for row in rows:
        if not isinstance(row.values, dict):
            raise UserError(f"{row.where}: expected an object with named fields")
    return rows


def _existing(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.exists():
        raise UserError(f"{path}: no such file (paths count from the folder of the command)")
    if not file.is_file():
        raise UserError(f"{path or repr(path)}: not a file: give one {KINDS} file")
    return file


def _json_lines(path: str) -> list[Record]:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            rows.append(Record(_parsed(line, where), where))
    return rows


def _json(path: str) -> list[Record]:
    text = read_text(path)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under the name .json, as on the hub
            return _json_lines(path)
        raise UserError(f"{path}, line {error.lineno}: broken JSON ({error.msg})") from None
    except RecursionError:
        raise UserError(f"{path}: lists or objects are nested too deep to be read") from None
    if isinstance(values, dict):
        values = values["data"] if isinstance(values.get("data"), list) else [values]
    if not isinstance(values, list):
        raise UserError(f"{path}: expected a list of objects")
    return [Record(value, f"{path}, record {i}") for i, value in enumerate(values, start=1)]


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON ({error.msg}): fix or remove the line") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deep to be read: fix or remove the line") from None


def _parquet(path: str) -> list[Record]:
    file = _existing(path)
    from datasets import load_dataset, logging  # slow to import
    from pyarrow import ArrowException

    logging.set_verbosity(logging.CRITICAL)  # what is wrong with the file is said below, once
    try:
        # streamed, so that nothing is copied to a cache
        rows = list(load_dataset("parquet", data_files=str(file), split="train", streaming=True))
    except (ArrowException, OSError, ValueError, StopIteration) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable Parquet file ({reason})") from None
    return [Record(row, f"{path}, row {i}") for i, row in enumerate(rows, start=1)]
