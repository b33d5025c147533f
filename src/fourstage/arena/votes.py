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
from typing import Any, Literal

from filelock import FileLock

from fourstage.errors import UserError
from fourstage.files import parse_json, write_atomic
from fourstage.settings import build

Choice = Literal["left", "right", "tie", "both_bad"]
Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Side:
    """An answer. run: <stage>-<id>, or "random"; stopped: it ended by itself."""

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
    """The file of votes. Several processes may have it open."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, vote: Vote) -> None:
        """Append a vote; when this returns, it is on the disk. Raises OSError if it can't be."""
        line = json.dumps(vote.row, ensure_ascii=False).encode() + b"\n"
        with self._locked():
            is_new = not self.path.exists()
            with open(self.path, "ab") as file:
                whole = _end_of_lines(self.path)
                file.truncate(whole)  # a crash in mid-line left a part of one, which never counted
                try:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:  # a full disk
                    file.truncate(whole)
                    raise
            if is_new:
                _sync_folder(self.path.parent)

    def undo(self, vote_id: str) -> bool:
        """Take a vote back; returns whether it was there."""
        with self._locked():
            lines = self._lines()
            kept = [line for line in lines if _id_of(line) != vote_id]
            if len(kept) == len(lines):
                return False
            write_atomic(self.path, "".join(f"{line}\n" for line in kept))
            return True

    def read(self) -> tuple[list[Vote], int]:
        """All votes, in the order in which they were cast, and how many lines are none."""
        votes, broken = [], 0
        for line in self._lines():
            try:
                votes.append(Vote.of_row(parse_json(line)))
            except ValueError:
                broken += 1
        return votes, broken

    def _lines(self) -> list[str]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return [line for line in text.split("\n")[:-1] if line.strip()]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock")):
            yield


def _end_of_lines(path: Path) -> int:
    """Bytes up to the last newline."""
    return path.read_bytes().rfind(b"\n") + 1


def _id_of(line: str) -> str | None:
    try:
        return Vote.of_row(parse_json(line)).id
    except ValueError:
        return None


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
