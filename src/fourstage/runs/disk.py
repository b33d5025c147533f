"""What outputs takes on disk, and keeping it below a limit: checkpoints go first, and only they.

A resume state can be made again by training, and a finished run doesn't need its own. Weights,
records, metrics and evaluations are never removed without being asked for by name.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

from fourstage.errors import UserError
from fourstage.runs.records import Record, read_record
from fourstage.runs.store import RunStore

GB = 1e9
MB = 1e6


def bytes_on_disk(path: Path) -> int:
    """What a file or folder takes; a link to another disk counts if it is `path` itself."""
    total = 0
    for file in (path, *path.rglob("*")):
        try:
            total += file.lstat().st_blocks * 512
        except FileNotFoundError:  # it has just been replaced
            continue
    return total


def megabytes(path: Path) -> str:
    return f"{bytes_on_disk(path) / MB:.1f}"


def parts(store: RunStore) -> dict[str, int]:
    """Folder of outputs -> bytes."""
    if not store.outputs.is_dir():
        return {}
    folders = [path for path in sorted(store.outputs.iterdir()) if path.is_dir()]
    return {path.name: bytes_on_disk(path) for path in folders}


def trim(
    store: RunStore, most: float, *, spared: Collection[Path] = (), dry_run: bool = False
) -> Iterator[str]:
    """Remove checkpoints until outputs takes at most so many bytes; gives a line for each.

    First the resume states of runs that nobody trains, the longest abandoned one first, but for the
    `spared` runs'; then the kept checkpoints of finished runs, the oldest first.
    """
    total = sum(parts(store).values())
    for folder, record in droppable(store, spared):
        if total <= most:
            return
        path = folder / "checkpoints"
        size = bytes_on_disk(path)
        with store.unless_busy(record["id"]) as is_free:
            if not is_free:  # since the list was made
                continue
            if not dry_run:
                store.discard(path)
        total -= size
        what = "kept checkpoints" if record["status"] == "finished" else "resume state"
        where = f"{folder.name}'s {what} ({size / MB:.1f} MB)"
        yield f"would remove {where}" if dry_run else f"removed {where}: outputs took too much"


def droppable(store: RunStore, spared: Collection[Path]) -> list[tuple[Path, Record]]:
    """The runs whose checkpoints may go, in the order in which they go."""
    runs = dict(store.records())
    for path in store.retrain_folder("*", "*").parent.glob("*/run.json"):  # of force=true
        try:
            runs[path.parent] = read_record(path.parent)
        except UserError:
            continue
    found = []
    for folder, record in runs.items():
        status = store.status(record)
        is_used = status in ("running", "silent") or (status != "finished" and folder in spared)
        if (folder / "checkpoints").is_dir() and not (is_used or folder.is_symlink()):
            seen = record.get("heartbeat", {}).get("time", record["started"])
            when = record["finished"] if status == "finished" else seen
            found.append((status == "finished", when, folder, record))
    return [(folder, record) for *_, folder, record in sorted(found, key=lambda x: x[:2])]


def too_much(store: RunStore, most: float, dropped: Collection[Path] = ()) -> str | None:
    """The line for outputs that take more than so many bytes; None if they don't. `dropped`:
    folders that count as gone."""
    sizes = parts(store)
    for path in dropped:
        if path.is_relative_to(store.outputs):
            sizes[path.relative_to(store.outputs).parts[0]] -= bytes_on_disk(path)
    if (total := sum(sizes.values())) <= most:
        return None
    largest = sorted(sizes.items(), key=lambda x: -x[1])
    shares = ", ".join(f"{name} {size / GB:.2f}" for name, size in largest if size >= total / 100)
    return (
        f"{store.outputs} takes {total / GB:.2f} GB ({shares}), more than {most / GB:g}, and there "
        "are no checkpoints left to drop: remove runs (python -m fourstage runs rm --help), or "
        "raise the limit"
    )
