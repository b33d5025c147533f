"""A run's sign of life: run.json says every half minute which process is still there.

It tells what a lock can't: of a process on another machine that shares the folder, and of one that
is stopped but not dead. It is written by a thread, so a training that hangs has it too.
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fourstage.errors import UserError
from fourstage.runs.records import Record, write_record

BEAT = 30.0  # seconds from one to the next
SILENT = 600.0  # seconds that are too many even if clocks differ and a disk is slow


@contextmanager
def beating(folder: Path, every: float = BEAT) -> Iterator[None]:
    """Refresh the heartbeat of the run in a folder."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(every):
            with suppress(OSError, UserError):  # a full disk; a removed folder, which stays away
                if (folder / "run.json").exists():
                    write_record(folder, heartbeat=sign_of_life())

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def sign_of_life() -> dict[str, Any]:
    """What run.json keeps."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"time": now, "host": socket.gethostname(), "pid": os.getpid()}


def is_elsewhere(record: Record) -> bool:
    """Whether the last sign of life came from another machine."""
    return record.get("heartbeat", {}).get("host", socket.gethostname()) != socket.gethostname()


def silence(record: Record) -> float | None:
    """Seconds since the last sign of life, negative if the other clock is fast; None if there was
    none, or none that can be true: from more than SILENT seconds in the future."""
    try:
        last = datetime.fromisoformat(record["heartbeat"]["time"]).astimezone(UTC)
    except (KeyError, ValueError, OverflowError):  # the last: the year 1, in another zone
        return None
    seconds = (datetime.now(UTC) - last).total_seconds()
    return None if seconds < -SILENT else seconds


def roughly(seconds: float) -> str:
    """A time for readers: 3 h."""
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
