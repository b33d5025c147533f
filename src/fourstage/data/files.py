"""Local files to texts and rows, with errors that name the line.

A source's path is a file, a folder (its files, by name) or a list of these.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from fourstage.errors import UserError
from fourstage.files import exists, expanded

Paths = str | list[str]

LINE = "\n"
CHUNK = 2**20  # bytes that are read at once
PIECE = 2**20  # characters of a document that are handled at once
ROWS = 1024  # of a Parquet file that are read at once

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
    path = expanded(paths)
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
    """The whole file; see text_pieces."""
    return "".join(text_pieces(path))


def text_pieces(path: str) -> Iterator[str]:
    """The file's text as it is read, with line ends as \\n. Raises UserError if it is missing, a
    folder, empty, not text, or not in the encoding that it declares."""
    lines, is_blank = 1, True
    for text in _decoded(path, _chunks(path)):
        if (at := text.find("\0")) >= 0:
            raise UserError(
                f"{path}, line {lines + text.count(LINE, 0, at)}: a NUL character: a binary file, "
                "or text in another encoding (iconv -f utf-16le -t utf-8 makes it UTF-8)"
            )
        lines += text.count(LINE)
        is_blank = is_blank and not text.strip()
        yield text
    if is_blank:
        raise UserError(f"{path}: the file is empty: give one with data in it")


def cut(texts: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """The texts, joined, in pieces of at most `size` characters: cut behind a blank line if there
    is one in the second half, else behind a line, a space, or anywhere."""
    rest = ""
    for text in texts:
        rest += text
        start = 0
        while len(rest) - start > size:
            end = start + size
            ends = (rest.rfind(b, start + size // 2, end) + len(b) for b in ("\n\n", LINE, " "))
            at = next((at for at in ends if at > start + size // 2), end)
            yield rest[start:at]
            start = at
        rest = rest[start:]
    if rest:
        yield rest


def read_rows(paths: Paths, columns: Mapping[str, str] | None = None) -> list[Row]:
    """All rows; see iter_rows."""
    return list(iter_rows(paths, columns))


def iter_rows(paths: Paths, columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """The rows of JSON lists, JSON lines, tables (.csv, .tsv) or Parquet, as they are read; only a
    JSON list is read as a whole.

    columns: {name in the schema: name in the file}. Raises UserError for a missing, empty or
    damaged file, another kind, or a missing column.
    """
    for path in files_of(paths):
        kind = _kind(Path(path))
        if kind == ".txt":
            raise UserError(f"{path}: plain text has no records: give a {kinds(but='.txt')} file")
        if kind not in READERS:
            raise UserError(f"{path}: unknown kind of file: give a {kinds()} file")
        is_empty = True
        for row in READERS[kind](path):
            is_empty = False
            if not isinstance(row.values, dict):
                raise row.error("expected an object with named fields")
            yield _renamed(row, columns) if columns else row
        if is_empty:
            raise UserError(f"{path}: the file has no records: give one with data in it")


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


def _chunks(path: str) -> Iterator[bytes]:
    """The file's bytes, unpacked. Raises UserError if it can't be read or isn't text."""
    (file,) = files_of(path)
    is_first = True
    try:
        with (gzip.open if file.lower().endswith(".gz") else open)(file, "rb") as opened:
            while chunk := opened.read(CHUNK):
                kinds_of = (kind for magic, kind in MAGIC.items() if chunk.startswith(magic))
                if is_first and (kind := next(kinds_of, None)):
                    raise UserError(f"{path}: this is {kind}, not text: give a {kinds()} file")
                is_first = False
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}): get it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _decoded(path: str, chunks: Iterator[bytes]) -> Iterator[str]:
    first = next(chunks, b"")
    encoding = next((name for bom, name in BOMS if first.startswith(bom)), "utf-8")
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), True)
    read = 0  # bytes, this chunk's too
    try:
        for chunk in chain([first], chunks):
            read += len(chunk)
            if text := decoder.decode(chunk):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text
    except UnicodeDecodeError as error:
        guess = "utf-16le" if b"\0" in error.object else "latin1"
        raise UserError(
            f"{path}: not {encoding.removesuffix('-sig').upper()} text (byte "
            f"{read - len(error.object) + error.start}): save it as UTF-8, e.g. iconv -f {guess} "
            "-t utf-8"
        ) from None


def _lines(path: str) -> Iterator[str]:
    """The file's lines, with their ends."""
    rest: list[str] = []
    for text in text_pieces(path):
        first, *others = text.split(LINE)
        rest.append(first)
        for line in others:
            yield "".join(rest) + LINE
            rest = [line]
    yield "".join(rest)


def _json_lines(path: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip("\ufeff \t\n"):
            where = f"{path}, line {number}"
            yield Row(_parsed(line.lstrip("\ufeff"), where), where)


def _json(path: str) -> Iterable[Row]:
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


def _table(path: str) -> Iterator[Row]:
    delimiter = "\t" if _kind(Path(path)) == ".tsv" else ","
    csv.field_size_limit(2**31 - 1)  # an answer may be long
    lines = csv.DictReader(_lines(path), delimiter=delimiter, strict=True)
    try:
        names = list(lines.fieldnames or [])
        if len(names) == 1 and ";" in names[0]:
            what = "separated by semicolons: save with commas, or as .tsv with tabs"
            raise UserError(f"{path}: {what}")
        _named_once(path, names)
        for i, row in enumerate(lines, start=1):
            if None in row or None in row.values():
                what = f"rows of different lengths: give each {len(names)} fields"
                raise UserError(f"{path}, row {i}: {what}")
            yield Row(dict(row), f"{path}, row {i}")
    except csv.Error as error:
        is_open = "end of data" in str(error)
        line = lines.line_num + 1 if is_open else lines.reader.line_num
        why = "a quote is not closed" if is_open else str(error)
        raise UserError(f"{path}, line {line}: not a table ({why})") from None


def _named_once(path: str, names: Sequence[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: two columns are named {', '.join(map(repr, twice))}: rename one")


def _parquet(path: str) -> Iterator[Row]:
    from pyarrow import parquet

    count = 0
    try:
        # opened here: PyArrow and `datasets` read a name as a pattern or a URL
        with open(path, "rb") as file:
            table = parquet.ParquetFile(file)
            _named_once(path, table.schema_arrow.names)
            for batch in table.iter_batches(ROWS):
                for values in batch.to_pylist():
                    count += 1
                    yield Row(values, f"{path}, row {count}")
    except UserError:
        raise
    except Exception as error:  # PyArrow's own, and times that Python can't represent
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise UserError(f"{path}: not a readable Parquet file ({reason})") from None


READERS: dict[str, Callable[[str], Iterable[Row]]] = {
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
