"""Votes on two answers, in outputs/arena/votes.jsonl: each is on the disk before it counts.

A vote is a line that `data.preference.path` reads as it is:

    {"prompt": TEXT or messages, "chosen": TEXT, "rejected": TEXT, "unfinished": [...],
     "arena": {"id", "voted", "choice", "left": SIDE, "right": SIDE}}

Without a winner, chosen and rejected are null, and the reward stage leaves the line out and counts
it. A SIDE says who gave the answer, and how it was drawn.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from filelock import FileLock

from fourstage.errors import UserError
from fourstage.files import parse_json, write_atomic
from fourstage.settings import build

Choice = Literal["left", "right", "tie", "both_bad"]
Message = dict[str, str]
CHUNK = 2**16  # bytes that are read at once


@dataclass(frozen=True, kw_only=True)
class Side:
    """An answer. run: as a Contestant's; stopped: it ended by itself."""

    run: str
    answer: str
    stopped: bool
    seed: int
    temperature: float
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Vote:
    """voted: UTC, ISO 8601."""

    id: str
    voted: str
    prompt: str | list[Message]
    choice: Choice
    left: Side
    right: Side

    @property
    def row(self) -> dict[str, Any]:
        """The line in the file."""
        chosen = rejected = None
        if self.choice in ("left", "right"):
            sides = (self.left, self.right)
            chosen, rejected = sides if self.choice == "left" else reversed(sides)
        answers = {"chosen": chosen, "rejected": rejected}
        arena = asdict(self)
        return {
            "prompt": arena.pop("prompt"),
            **{name: side and side.answer for name, side in answers.items()},
            "unfinished": [name for name, side in answers.items() if side and not side.stopped],
            "arena": arena,
        }

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> "Vote":
        """Raises UserError for another kind of line."""
        if not isinstance(row, dict) or not isinstance(row.get("arena"), dict):
            raise UserError("no vote of the arena")
        return build(cls, {"prompt": row.get("prompt"), **row["arena"]}, "")


class Votes:
    """The file of votes. Several processes may have it open, and people may edit it: lines that are
    no votes stay as they are."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, vote: Vote) -> None:
        """Append a vote; when this returns, it is on the disk. Raises OSError if it can't be, and
        leaves the file as it was."""
        # of half a surrogate pair, the escape is JSON's own
        line = json.dumps(vote.row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        with self._locked() as path, open(path, "a+b", buffering=0) as file:
            size, whole = file.seek(0, os.SEEK_END), _end_of_lines(file)
            file.seek(whole)
            if (rest := file.read()) and not _is_half(rest):  # somebody's editor ends no line
                line, whole = b"\n" + line, size
            try:
                file.truncate(whole)
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
                for folder in (path.parent, path.parent.parent):
                    _sync_folder(folder)
            except OSError:  # a full disk
                file.truncate(whole)
                raise

    def undo(self, vote_id: str) -> bool:
        """Take a vote back; returns whether it was there. Raises OSError if it can't be."""
        with self._locked() as path:
            lines = _lines(path)
            kept = [line for line in lines if not _is_vote(line, vote_id)]
            if len(kept) == len(lines):
                return False
            write_atomic(path, b"".join(line.removesuffix(b"\n") + b"\n" for line in kept))
            _sync_folder(path.parent)
            return True

    def read(self) -> tuple[list[Vote], int]:
        """All votes, in the order in which they were cast, and how many lines are none."""
        found = [_vote_of(line) for line in _lines(self.path) if line.strip()]
        votes = [vote for vote in found if vote is not None]
        return votes, len(found) - len(votes)

    @contextmanager
    def _locked(self) -> Iterator[Path]:
        """The file that is meant, if `path` is a link, while nobody else writes it."""
        path = self.path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            yield path


def _end_of_lines(file: BinaryIO) -> int:
    """Bytes up to the last newline, searched for from the end."""
    at = file.seek(0, os.SEEK_END)
    while at:
        start = max(0, at - CHUNK)
        file.seek(start)
        if (found := file.read(at - start).rfind(b"\n")) >= 0:
            return start + found + 1
        at = start
    return 0


def _lines(path: Path) -> list[bytes]:
    """With their ends; without half a line that a crash left."""
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [line + b"\n" for line in lines] + [last] * (last != b"" and not _is_half(last))


def _is_half(line: bytes) -> bool:
    """Whether a line without an end is what a crash left of a vote, which never counted. After a
    power cut it may be zeros."""
    try:
        parse_json(line.decode())
    except ValueError:
        return line.startswith((b"{", b"\0"))
    return False


def _vote_of(line: bytes) -> Vote | None:
    try:
        return Vote.of_row(parse_json(line.decode("utf-8-sig")))
    except ValueError:
        return None


def _is_vote(line: bytes, vote_id: str) -> bool:
    if vote_id.encode() not in line:  # most lines, and much faster than parsing them
        return False
    vote = _vote_of(line)
    return vote is not None and vote.id == vote_id


def _sync_folder(folder: Path) -> None:
    """So that a new file's name is on the disk too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def wins(votes: Sequence[Vote]) -> dict[tuple[str, str], float]:
    """(run, other run) -> votes that the first won against the second; half of one for a tie, or
    for two bad answers. Votes between two answers of one run don't count."""
    found: dict[tuple[str, str], float] = {}
    for vote in votes:
        left, right = vote.left.run, vote.right.run
        if left == right:
            continue
        share = {"left": 1.0, "right": 0.0}.get(vote.choice, 0.5)
        for pair, x in (((left, right), share), ((right, left), 1 - share)):
            found[pair] = found.get(pair, 0.0) + x
    return found
