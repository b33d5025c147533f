"""Look at the store of runs, outputs/runs/<stage>-<id>/, and tidy it up.

    python -m fourstage runs [list]                 all runs with their disk use
    python -m fourstage runs show NAME...           one run: record, files, who descends from it
    python -m fourstage runs rm NAME... [force=true]  removes runs; force: others descend from them

For example:

    python -m fourstage runs show sft

NAME is an id, <stage>-<id>, a folder, or a stage's name: its latest finished run (of debug runs
only where there are no others). Other arguments are key=value: outputs=FOLDER. Needs no PyTorch and
answers at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fourstage.errors import UserError
from fourstage.interruptions import run_command
from fourstage.runs.records import read_record
from fourstage.runs.store import RunStore


def disk_use(path: Path) -> int:
    """Bytes on disk under a folder."""
    return sum(file.lstat().st_blocks * 512 for file in path.rglob("*"))


def _list(store: RunStore) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    others = ("status", "from", "model", "seed", "debug", "started", "minutes", "MB")
    columns = (Column(name, overflow="fold") for name in others)
    table = Table(Column("run", no_wrap=True), *columns)
    for folder in store.folders():
        record = read_record(folder)
        table.add_row(
            folder.name,
            store.status(record),
            ", ".join(p for p in record["parents"].values()),
            record["config"]["model"]["name"],
            str(record["config"]["seed"]),
            record["debug"] or "",
            record["started"][:16].replace("T", " "),
            f"{record['cost']['seconds'] / 60:.1f}",
            f"{disk_use(folder) / 1e6:.1f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    for line in store.broken():
        print(line, file=sys.stderr)
    if not table.row_count:
        print(f"{store.root} has no runs yet: python train.py stage=pretrain")
        return
    console.print(table)
    parts = {p.name: disk_use(p) for p in sorted(store.outputs.iterdir()) if p.is_dir()}
    print("disk use: " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in parts.items()))


def _show(store: RunStore, folder: Path) -> None:
    record = read_record(folder)
    print(json.dumps(record | {"status": store.status(record)}, indent=1, ensure_ascii=False))
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{file.stat().st_size / 1e6:10.3f} MB  {file.relative_to(folder)}")
    for title, folders in {
        "ancestors": list(store.ancestors(folder).values()),
        "descendants": store.children(record["id"]),
    }.items():
        print(f"{title}: {', '.join(f.name for f in folders) or 'none'}")


def main(arguments: list[str]) -> None:
    """Run one command. Raises UserError for an unknown command, run or argument."""
    options = {"outputs": "outputs", "force": "false"}
    words = []
    for argument in arguments:
        key, is_option, value = argument.partition("=")
        if not is_option:
            words.append(argument)
        elif key in options:
            options[key] = value
        else:
            raise UserError(f"unknown option {argument!r}: known are outputs=FOLDER, force=true")
    if options["force"] not in ("true", "false"):
        raise UserError(f"force: expected true or false, got {options['force']!r}")
    store = RunStore(Path(options["outputs"]))
    command, *names = words or ["list"]
    if command == "list" and not names:
        _list(store)
    elif command == "show" and names:
        for name in names:
            _show(store, store.find(name, finished=False))
    elif command == "rm" and names:
        for name in names:
            folder = store.find(name, finished=False)
            folder = folder.parent.resolve() / folder.name if folder.name else folder.resolve()
            target = folder.readlink() if folder.is_symlink() else None
            size = f"{disk_use(folder) / 1e6:.1f} MB"
            store.remove(folder, force=options["force"] == "true")
            what = f"the link only: its files stay in {target}" if target else size
            print(f"removed {folder.name} ({what})")
    else:
        raise UserError("usage: python -m fourstage runs [list | show NAME... | rm NAME...]")


if __name__ == "__main__":
    run_command(main)
