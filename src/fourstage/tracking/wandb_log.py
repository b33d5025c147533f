"""W&B's logs of offline runs on the disk: what a kill left of them, and up to which step.

A log (`run-<id>.wandb`) holds records in LevelDB's format, and wandb-core writes it in blocks of
32 KiB: a kill loses what it had not written yet, and may leave a part of a record. `wandb sync`
uploads what is whole, says that it failed, and uploads it again the next time.
"""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from glob import escape
from pathlib import Path

from fourstage.errors import UserError
from fourstage.interruptions import disk_full

BLOCK = 32_768
CHUNK = struct.Struct("<IHB")  # checksum, length, kind
FULL, LAST = 1, 4  # kinds that end a record
START = 7  # bytes before the first chunk


def logged_offline(folder: Path, run_id: str) -> int:
    """The last step in the logs of an offline run under W&B's folder, -1 if there is none. Logs
    that a kill left incomplete are mended."""
    return max(map(last_step, mended(folder, run_id)), default=-1)


def mended(folder: Path, run_id: str) -> list[Path]:
    """The logs of an offline run that have records, without what a kill left incomplete."""
    return [log for log in logs_of(folder, run_id) if mend(log)]


def logs_of(folder: Path, run_id: str) -> list[Path]:
    """The offline logs of a run, in their order; a kill may have left a folder without its log.

    W&B appends -1, -2, ... to the name of a folder if there is one of the same second. An id may
    end like that too: then the log inside says whose the folder is.
    """
    name = re.compile(rf"offline-run-(\d{{8}}_\d{{6}})-{re.escape(run_id)}(?:-(\d+))?")
    found = []
    for start in folder.glob(f"offline-run-*-{escape(run_id)}*"):
        log = start / f"run-{run_id}.wandb"
        if match := name.fullmatch(start.name):
            is_empty = match[2] is None and not any(start.glob("run-*.wandb"))
            if log.exists() or is_empty:
                found.append((match[1], int(match[2] or 0), log))
    return [log for *_, log in sorted(found)]


def mend(log: Path) -> bool:
    """Cut a log after its last whole record; one without records goes, with its folder."""
    data = log.read_bytes() if log.exists() else b""
    end = end_of_records(data)
    if end == START:
        shutil.rmtree(log.parent)
        return False
    if end < len(data):
        os.truncate(log, end)
    return True


def end_of_records(data: bytes) -> int:
    """The length in bytes of a log's whole records."""
    end = at = START
    while at + CHUNK.size <= len(data):
        room = BLOCK - at % BLOCK
        if room < CHUNK.size:  # padding
            at += room
            continue
        _, length, kind = CHUNK.unpack_from(data, at)
        at += CHUNK.size + length
        if kind == 0 or at > len(data):
            break
        if kind in (FULL, LAST):
            end = at
    return end


def last_step(log: Path) -> int:
    """The last row's `_step` as W&B's own reader finds it, -1 without a row. Raises UserError."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log.parent)]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        reason = (found.stderr.strip() or f"exit code {found.returncode}").splitlines()[-1]
        raise UserError(
            disk_full(OSError(reason))
            or f"{log}: W&B can't read the log of an earlier start ({reason}): move its folder "
            "away, or take logger=none"
        )
    records = map(json.loads, found.stdout.splitlines())
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    return int(rows[-1]["_step"]) if rows else -1


def mark_sent(folder: Path, run_id: str) -> None:
    """Have `wandb sync` skip the offline logs of a run: their rows go to the server from here."""
    for log in logs_of(folder, run_id):
        log.with_name(f"{log.name}.synced").touch()
