"""Tokens on disk: a corpus is encoded once, and read at random from memory-mapped files.

    outputs/data/<digest>/index.json          what is there
    outputs/data/<digest>/train-00000.bin     token ids in a row, uint16 or uint32
    outputs/data/<digest>/heldout-00000.bin

The digest is of the corpus and the tokenizer, so runs and concurrent jobs share a folder. It gets
its name when it is complete: a kill leaves a part that the next job removes.
"""

import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fourstage.data.corpus import Corpus
from fourstage.data.split import short_hash
from fourstage.errors import UserError
from fourstage.files import locked, read_json, remove, swap_in, write_json
from fourstage.tokenizer import Tokenizer

INDEX, CHECKED = "index.json", "checked.json"
SHARD = 2**27  # tokens in a file, at most
SIDES = ("train", "heldout")
NAME = re.compile("[0-9a-f]{12}")
LINE_EVERY = 30.0  # seconds between lines of progress if the output is not a terminal


@dataclass(frozen=True)
class Tokens:
    """Token ids in a row, in one or more parts, and what of text they stand for."""

    parts: Sequence[np.ndarray]
    characters: int  # of the text
    bytes: int  # of these characters in UTF-8; unknown ones have none
    unknown: int  # tokens that stand for a character that the tokenizer doesn't know

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def read(self, start: int, end: int) -> np.ndarray:
        """int64 [end - start], or as far as there are tokens."""
        found = []
        for part in self.parts:
            if start < len(part) and end > 0:
                found.append(part[max(0, start) : max(0, end)])
            start, end = start - len(part), end - len(part)
        return np.concatenate(found).astype(np.int64) if found else np.empty(0, np.int64)


@dataclass(frozen=True)
class TokenizedCorpus:
    train: Tokens
    heldout: Tokens


def tokenized(corpus: Corpus, tokenizer: Tokenizer, outputs: Path) -> TokenizedCorpus:
    """The corpus as tokens, from outputs/data/, where it is written if it isn't there.

    Another process that wants the same waits. A damaged folder is written again. Raises UserError
    as the corpus's files do.
    """
    store = outputs / "data"
    store.mkdir(parents=True, exist_ok=True)
    folder = store / short_hash(f"{corpus.digest} {tokenizer.digest}")
    with locked(lock(folder), f"the tokens in {folder}"):
        if (why := fault(folder)) is not None:
            if folder.exists():
                print(f"{folder}: {why}: tokenizing again", flush=True)
            write(corpus, tokenizer, folder)
    return open_tokens(folder)


def open_tokens(folder: Path) -> TokenizedCorpus:
    """Maps the files into memory; nothing is read yet."""
    index = read_json(folder / INDEX)

    def side(name: str) -> Tokens:
        files, dtype = index[name]["files"], np.dtype(index["dtype"])
        parts = [np.memmap(folder / file, dtype, mode="r") for file in files]
        return Tokens(parts, *(index[name][what] for what in ("characters", "bytes", "unknown")))

    return TokenizedCorpus(*map(side, SIDES))


# --- writing


def write(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    """Encode both sides into a folder, which appears when it is complete."""
    for left in folder.parent.glob(f".{folder.name}.part*"):  # of a killed process
        remove(left)
    part = folder.with_name(f".{folder.name}.part")
    part.mkdir()
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    try:
        total = corpus.train.characters + corpus.heldout.characters
        bar = Told("tokenizing", total)
        index: dict[str, Any] = {"dtype": dtype.name, "corpus": corpus.digest, "text": corpus.text}
        index |= {"tokenizer": tokenizer.digest, "vocab_size": tokenizer.vocab_size}
        with bar:
            for name, documents in zip(SIDES, (corpus.train, corpus.heldout), strict=True):
                most = corpus.train.config.corpus.max_tokens if name == "train" else None
                encoded = at_most(filter(len, documents.encoded(tokenizer)), most)
                index[name] = write_side(part, name, encoded, dtype, tokenizer, bar)
        corpus.check_unchanged()
        write_json(part / INDEX, index)
        swap_in(part, folder)
    finally:
        remove(part)
    write_json(folder / CHECKED, stamps(folder, index))


def at_most(encoded: Iterator[np.ndarray], most: int | None) -> Iterator[np.ndarray]:
    """The first `most` tokens."""
    for ids in encoded:
        if most is not None:
            ids, most = ids[:most], most - len(ids)
        yield ids
        if most is not None and most <= 0:
            return


def write_side(
    folder: Path,
    name: str,
    encoded: Iterator[np.ndarray],
    dtype: np.dtype,
    tokenizer: Tokenizer,
    bar: "Told",
) -> dict[str, Any]:
    """Files of at most SHARD tokens, and their entry in the index: {"files": {name: sha256}, and
    counts of tokens, characters, bytes and unknown characters}."""
    files: dict[str, str] = {}
    counts = Counter[str]()
    has_unknown = tokenizer.unk_id is not None
    rest = np.empty(0, np.uint32)
    while True:
        path = folder / f"{name}-{len(files):05}.bin"
        digest, left = hashlib.sha256(), SHARD
        with open(path, "wb") as file:
            while left:
                if not len(rest):
                    rest = next(encoded, rest)
                    if not len(rest):
                        break
                    unknown = int((rest == tokenizer.unk_id).sum()) if has_unknown else 0
                    characters = int(tokenizer.characters[rest].sum()) + unknown
                    n_bytes = int(tokenizer.bytes[rest].sum())
                    counts.update(characters=characters, bytes=n_bytes, unknown=unknown)
                    bar.advance(characters)
                some, rest = rest[:left], rest[left:]
                content = some.astype(dtype).tobytes()
                file.write(content)
                digest.update(content)
                counts["tokens"] += len(some)
                left -= len(some)
        if left == SHARD and files:  # nothing was left for it
            path.unlink()
        else:
            files[path.name] = digest.hexdigest()
        if left:
            names = ("tokens", "characters", "bytes", "unknown")
            return {"files": files, **{name: counts[name] for name in names}}


class Told:
    """A progress bar with a rate; plain lines in a log file, for what takes long."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.start = self.told = time.monotonic()
        self.console = Console(stderr=True)
        texts = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
        self.bar = Progress(texts[0], BarColumn(), texts[1], console=self.console, transient=True)

    def __enter__(self) -> "Told":
        if self.console.is_terminal:
            self.task = self.bar.add_task(self.what, total=self.total, note="")
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.bar.stop()
        seconds = time.monotonic() - self.start
        if seconds > 2:
            self.console.print(f"{self.what}: {self.note()}", highlight=False)

    def note(self) -> str:
        rate = self.done / 1e6 / max(1e-9, time.monotonic() - self.start)
        return f"{self.done / 1e6:,.1f} of {self.total / 1e6:,.1f} M characters, {rate:.1f} M/s"

    def advance(self, characters: int) -> None:
        self.done += characters
        if self.console.is_terminal:
            self.bar.update(self.task, completed=self.done, note=self.note())
        elif time.monotonic() - self.told > LINE_EVERY:
            self.told = time.monotonic()
            self.console.print(f"{self.what}: {self.note()}", highlight=False)


# --- checking and removing


def folders(outputs: Path) -> list[Path]:
    """All of outputs/data/ that hold or should hold tokens."""
    return sorted(path for path in (outputs / "data").glob("*") if NAME.fullmatch(path.name))


def lock(folder: Path) -> FileLock:
    """Held while a folder is written, checked or removed."""
    return FileLock(folder.with_name(f".{folder.name}.lock"))


def remove_tokens(folder: Path) -> None:
    """Remove a folder at once; who reads it goes on. Raises UserError if it is being written."""
    try:
        with lock(folder).acquire(timeout=0):
            gone = folder.with_name(f".{folder.name}.part-removed")
            os.rename(folder, gone)
            remove(gone)
    except Timeout:
        raise UserError(f"{folder.name}: a process writes or checks it now: wait for it") from None


def fault(folder: Path, compare: bool = False) -> str | None:
    """Why a folder can't be used; None if it can. Its checksums are compared if a file isn't the
    one that was written or compared here before, or if asked to."""
    try:
        index = read_json(folder / INDEX)
        sums = {name: digest for side in SIDES for name, digest in index[side]["files"].items()}
        now = stamps(folder, index)
        size = np.dtype(index["dtype"]).itemsize
        sizes = {side: size * index[side]["tokens"] for side in SIDES}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"not complete ({error})"
    for side, written in sizes.items():
        if sum(now[name][0] for name in index[side]["files"]) != written:
            return f"the {side} files are not of the size that was written"
    before = {}
    if not compare:
        with suppress(OSError, ValueError, TypeError):
            before = dict(read_json(folder / CHECKED))
    for name, digest in sums.items():
        if before.get(name) != now[name]:
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} is damaged"
    if before != now:
        with suppress(OSError, UserError):  # another's folder
            write_json(folder / CHECKED, now)
    return None


def stamps(folder: Path, index: dict[str, Any]) -> dict[str, list[int]]:
    """[size, time of change, inode] of each file."""
    names = [name for side in SIDES for name in index[side]["files"]]
    stats = {name: os.stat(folder / name) for name in names}
    return {name: [s.st_size, s.st_mtime_ns, s.st_ino] for name, s in stats.items()}
