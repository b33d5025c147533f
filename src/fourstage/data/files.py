"""Local files to texts and rows, with errors that name the line.

A source's path is a file, a folder (its files, by name) or a list of these.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourstage.errors import UserError
from fourstage.files import exists

Paths = str | list[str]

BOMS = (  # the longer ones first: UTF-32's begins as UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
MAGIC = {
    b"\x1f\x8b": "gzip (name it .gz)",
    b"PK\x03\x04": "a zip archive, as .docx and .xlsx are",
    b"PAR1": "Parquet (name it .parquet)",
    b"%PDF": "PDF",
}


@dataclass(frozen=True)
class Row:
    """A JSON object or a table's row, where it is, and which of its fields were read."""

    values: dict[str, Any]
    where: str  # "pairs.jsonl, line 3"
    read: set[str] = field(default_factory=set)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str) -> Any:
        """The field, None if it is missing; it counts as read."""
        self.read.add(name)
        return self.values.get(name)

    def unread(self) -> list[str]:
        """The fields that hold something and were not read."""
        empty = (None, "", [], {})
        return [n for n, value in self.values.items() if n not in self.read and value not in empty]

    def error(self, message: str) -> UserError:
        return UserError(f"{self.where}: {message}")


def files_of(paths: Paths) -> list[str]:
    """The files that a path names. Raises UserError for none, a special file, or none known."""
    if isinstance(paths, list):
        if not paths:
            raise UserError("an empty list of files: name one")
        return [file for path in paths for file in files_of(path)]
    path = Path(paths)
    with suppress(RuntimeError):  # ~ without a home folder
        path = path.expanduser()
    if not paths or not exists(path):
        where = paths[:200] or repr(paths)
        raise UserError(f"{where}: no such file (paths count from the folder of the command)")
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"{paths}: not a file: give one {kinds()} file")
        return [str(path)]
    found = sorted(file for file in path.iterdir() if _kind(file) in READERS and file.is_file())
    if not found:
        raise UserError(f"{paths}: a folder without a {kinds()} file")
    return [str(file) for file in found]


def is_text(paths: Paths) -> bool:
    """True for plain text, which is split by position. Raises as files_of, and UserError for texts
    and records in one list."""
    texts = [_kind(Path(file)) == ".txt" for file in files_of(paths)]
    if any(texts) and not all(texts):
        raise UserError(f"{paths}: .txt files and files of records: give the one or the other")
    return texts[0]


def read_text(path: str) -> str:
    """The whole file, with line ends as \\n. Raises UserError if it is missing, a folder, empty,
    not text, or not in the encoding that it declares."""
    text = _decoded(path, _bytes(path)).replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise UserError(f"{path}: the file is empty: give one with data in it")
    if (at := text.find("\0")) >= 0:
        line = text.count("\n", 0, at) + 1
        raise UserError(
            f"{path}, line {line}: a NUL character: a binary file, or text in another encoding "
            "(iconv -f utf-16le -t utf-8 makes it UTF-8)"
        )
    return text


def read_rows(paths: Paths, columns: Mapping[str, str] | None = None) -> list[Row]:
    """The rows of JSON lists, JSON lines, tables (.csv, .tsv) or Parquet.

    columns: {name in the schema: name in the file}. Raises UserError for a missing, empty or
    damaged file, another kind, or a missing column.
    """
    rows: list[Row] = []
    for path in files_of(paths):
        kind = _kind(Path(path))
        if kind == ".txt":
            raise UserError(f"{path}: plain text has no records: give a {kinds(but='.txt')} file")
        if kind not in READERS:
            raise UserError(f"{path}: unknown kind of file: give a {kinds()} file")
        found = READERS[kind](path)
        if not found:
            raise UserError(f"{path}: the file has no records: give one with data in it")
        rows += found
    for row in rows:
        if not isinstance(row.values, dict):
            raise row.error("expected an object with named fields")
    return [_renamed(row, columns) for row in rows] if columns else rows


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    for name, own in columns.items():
        if own not in row:
            has = ", ".join(list(row.values)[:8])
            raise row.error(f"no field {own!r} for {name}: it has {has}")
    rest = {name: v for name, v in row.values.items() if name not in columns.values()}
    renamed = {name: row.values[own] for name, own in columns.items()}
    return Row({**rest, **renamed}, row.where)


def _kind(path: Path) -> str:
    """.jsonl for a.jsonl, A.JSONL and a.jsonl.gz."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == ".gz" else suffix


def _bytes(path: str) -> bytes:
    (file,) = files_of(path)
    try:
        content = Path(file).read_bytes()
        if file.lower().endswith(".gz"):
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}): get it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    for magic, kind in MAGIC.items():
        if content.startswith(magic) and _kind(Path(file)) != ".parquet":
            raise UserError(f"{path}: this is {kind}, not text: give a {kinds()} file")
    return content


def _decoded(path: str, content: bytes) -> str:
    encoding = next((name for bom, name in BOMS if content.startswith(bom)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        guess = "utf-16le" if b"\0" in content else "latin1"
        raise UserError(
            f"{path}: not {encoding.removesuffix('-sig').upper()} text (byte {error.start}): save "
            f"it as UTF-8, e.g. iconv -f {guess} -t utf-8"
        ) from None


def _json_lines(path: str) -> list[Row]:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip("\ufeff \t"):
            where = f"{path}, line {number}"
            rows.append(Row(_parsed(line.lstrip("\ufeff"), where), where))
    return rows


def _json(path: str) -> list[Row]:
    text = read_text(path)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under the name .json, as on the hub
            return _json_lines(path)
        raise UserError(f"{path}, line {error.lineno}: broken JSON ({error.msg})") from None
    except (RecursionError, ValueError):
        values = _parsed(text, path)
    if isinstance(values, dict):
        values = values["data"] if isinstance(values.get("data"), list) else _rows(values)
    if not isinstance(values, list):
        raise UserError(f"{path}: expected a list of objects")
    return [Row(value, f"{path}, record {i}") for i, value in enumerate(values, start=1)]


def _rows(table: dict[str, Any]) -> list[dict[str, Any]]:
    """{name: column of plain values} as rows; anything else is one record."""
    columns = list(table.values())
    is_table = len({len(c) if isinstance(c, list) else -1 for c in columns}) == 1 and all(
        isinstance(c, list) and c and not isinstance(c[0], dict) for c in columns
    )
    if not is_table:
        return [table]
    return [dict(zip(table, row, strict=True)) for row in zip(*columns, strict=True)]


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON ({error.msg}): fix or remove the line") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deep: fix or remove the line") from None
    except ValueError:  # Python's limit of 4,300 digits
        raise UserError(f"{where}: a number of too many digits: fix or remove the line") from None


def _table(path: str) -> list[Row]:
    delimiter = "\t" if _kind(Path(path)) == ".tsv" else ","
    csv.field_size_limit(2**31 - 1)  # an answer may be long
    lines = csv.DictReader(io.StringIO(read_text(path)), delimiter=delimiter, strict=True)
    try:
        names = list(lines.fieldnames or [])
        rows = [dict(row) for row in lines]
    except csv.Error as error:
        is_open = "end of data" in str(error)
        line = lines.line_num + 1 if is_open else lines.reader.line_num
        why = "a quote is not closed" if is_open else str(error)
        raise UserError(f"{path}, line {line}: not a table ({why})") from None
    if len(names) == 1 and ";" in names[0]:
        raise UserError(f"{path}: separated by semicolons: save with commas, or as .tsv with tabs")
    _named_once(path, names)
    for i, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            what = f"rows of different lengths: give each {len(names)} fields"
            raise UserError(f"{path}, row {i}: {what}")
    return [Row(row, f"{path}, row {i}") for i, row in enumerate(rows, start=1)]


def _named_once(path: str, names: Sequence[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: two columns are named {', '.join(map(repr, twice))}: rename one")


def _parquet(path: str) -> list[Row]:
    from pyarrow import parquet

    try:
        # opened here: PyArrow and `datasets` read a name as a pattern or a URL
        with open(path, "rb") as file:
            table = parquet.ParquetFile(file)
            _named_once(path, table.schema_arrow.names)
            rows = [row for batch in table.iter_batches() for row in batch.to_pylist()]
    except UserError:
        raise
    except Exception as error:  # PyArrow's own, and times that Python can't represent
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise UserError(f"{path}: not a readable Parquet file ({reason})") from None
    return [Row(row, f"{path}, row {i}") for i, row in enumerate(rows, start=1)]


READERS: dict[str, Callable[[str], list[Row]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
    ".csv": _table,
    ".tsv": _table,
    ".txt": _json_lines,  # by read_text: text has no records
}


def kinds(but: str = "") -> str:
    """ ".json, .jsonl or .parquet" """
    names = [kind for kind in READERS if kind != but]
    return f"{', '.join(names[:-1])} or {names[-1]}"
