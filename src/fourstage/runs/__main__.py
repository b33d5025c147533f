"""List, show and remove runs, outputs/runs/<stage>-<id>/.

    python -m fourstage runs [list]                 all runs with their disk use
    python -m fourstage runs show NAME...           a run's record, files, ancestors, descendants
    python -m fourstage runs rm NAME... [force=true]  removes runs; force: others descend from them

For example:

    python -m fourstage runs show sft

NAME is an id, <stage>-<id>, a folder, or a stage's name: its latest finished run (a debug run only
if there is no other). Other arguments are key=value: outputs=FOLDER. Needs no PyTorch.
"""

import json
import sys
from pathlib import Path

from fourstage.errors import UserError
from fourstage.interruptions import run_command
from fourstage.runs.records import read_record
from fourstage.runs.store import RunStore


def disk_use(path: Path) -> str:
    """What a folder takes on disk, in MB."""
    return f"{sum(file.lstat().st_blocks * 512 for file in path.rglob('*')) / 1e6:.1f}"


def show_all(store: RunStore) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    others = ("status", "from", "model", "seed", "debug", "started", "minutes", "MB")
    table = Table(Column("run", no_wrap=True), *(Column(name, overflow="fold") for name in others))
    for folder, record in store.records().items():
        table.add_row(
            folder.name,
            store.status(record),
            ", ".join(record["parents"].values()),
            record["config"]["model"]["name"],
            str(record["config"]["seed"]),
            record["debug"] or "",
            record["started"][:16].replace("T", " "),
            f"{record['cost']['seconds'] / 60:.1f}",
            disk_use(folder),
        )
    for line in store.broken():
        print(line, file=sys.stderr)
    if not table.row_count:
        print(f"{store.root} has no runs yet: python train.py stage=pretrain")
        return
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    parts = [path for path in sorted(store.outputs.iterdir()) if path.is_dir()]
    print("disk use: " + ", ".join(f"{path.name} {disk_use(path)} MB" for path in parts))


def show(store: RunStore, folder: Path) -> None:
    record = read_record(folder)
    print(json.dumps(record | {"status": store.status(record)}, indent=1, ensure_ascii=False))
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{file.stat().st_size / 1e6:10.3f} MB  {file.relative_to(folder)}")
    for title, folders in {
        "ancestors": store.ancestors(folder).values(),
        "descendants": store.children(record["id"]),
    }.items():
        print(f"{title}: {', '.join(f.name for f in folders) or 'none'}")


def remove(store: RunStore, folder: Path, force: bool) -> None:
    folder = folder.parent.resolve() / folder.name if folder.name else folder.resolve()
    what = f"{disk_use(folder)} MB"
    if folder.is_symlink():
        what = f"the link only: its files stay in {folder.readlink()}"
    store.remove(folder, force=force)
    print(f"removed {folder.name} ({what})")


def main(arguments: list[str]) -> None:
    """Run one command. Raises UserError for an unknown command, run or argument."""
    words = [argument for argument in arguments if "=" not in argument]
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    store = RunStore(Path(options.pop("outputs", "outputs")))
    force = options.pop("force", "false")
    if options:
        wrong = "=".join(options.popitem())
        raise UserError(f"unknown option {wrong!r}: known are outputs=FOLDER, force=true")
    if force not in ("true", "false"):
        raise UserError(f"force: expected true or false, got {force!r}")
    command, *names = words or ["list"]
    if command == "list" and not names:
        show_all(store)
    elif command in ("show", "rm") and names:
        for name in names:
            folder = store.find(name, finished=False)
            show(store, folder) if command == "show" else remove(store, folder, force == "true")
    else:
        raise UserError("usage: python -m fourstage runs [list | show NAME... | rm NAME...]")


if __name__ == "__main__":
    run_command(main)
