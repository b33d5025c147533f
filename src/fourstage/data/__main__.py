"""Tokenized corpora, outputs/data/<digest>/, which runs on the same text share.

    python -m fourstage data [list]        all of them, with their disk use
    python -m fourstage data check         compares every file with its checksum
    python -m fourstage data rm NAME...    removes some; `all` removes all

For example:

    python -m fourstage data rm all

What is removed is written again by the next run that needs it. Other arguments are key=value:
outputs=FOLDER. Needs no PyTorch.
"""

import sys
from pathlib import Path

from fourstage.data.shards import INDEX, fault, folders, remove_tokens
from fourstage.errors import UserError, did_you_mean
from fourstage.files import read_json
from fourstage.interruptions import run_command
from fourstage.runs.store import RunStore


def show_all(outputs: Path) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    others = ("text", "train tokens", "held out", "tokenizer", "MB", "pretrain runs")
    table = Table(Column("name", no_wrap=True), *(Column(name, overflow="fold") for name in others))
    records = RunStore(outputs).records().values()
    for folder in folders(outputs):
        try:
            index = read_json(folder / INDEX)
            runs = [r["id"] for r in records if r.get("data", {}).get("digest") == index["corpus"]]
            row = (
                index["text"],
                f"{index['train']['tokens']:,}",
                f"{index['heldout']['tokens']:,}",
                f"{index['vocab_size']:,} tokens",
                f"{disk_use(folder) / 1e6:.1f}",
                ", ".join(runs),
            )
        except (OSError, ValueError, KeyError, TypeError):
            row = ("not complete",)
        table.add_row(folder.name, *row)
    if not table.row_count:
        print(f"{outputs / 'data'} has no tokens yet: pretrain writes them")
        return
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def disk_use(folder: Path) -> int:
    """Bytes."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def check(outputs: Path) -> None:
    """Raises UserError if a folder is damaged."""
    bad = []
    for folder in folders(outputs):
        why = fault(folder, compare=True)
        print(f"{folder.name}: {why or 'as it was written'}")
        bad += [folder.name] if why else []
    if bad:
        raise UserError(
            f"{', '.join(bad)}: remove what is damaged: it is written again when needed"
        )


def remove(outputs: Path, names: list[str]) -> None:
    """Raises UserError for an unknown name."""
    known = {folder.name: folder for folder in folders(outputs)}
    if names == ["all"]:
        names = list(known)
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) if known else "there are none"
            raise UserError(f"{outputs / 'data'} has no {name[:40]!r}: {hint}")
    for name in names:
        remove_tokens(known[name])
        print(f"removed {name}")


def main(arguments: list[str]) -> None:
    """Run one command. Raises UserError for an unknown command, name or argument."""
    words = [argument for argument in arguments if "=" not in argument]
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    outputs = Path(options.pop("outputs", "outputs"))
    if options:
        wrong = "=".join(options.popitem())
        raise UserError(f"unknown option {wrong!r}: known is outputs=FOLDER")
    command, *names = words or ["list"]
    if command in ("list", "check") and not names:
        (show_all if command == "list" else check)(outputs)
    elif command == "rm" and names:
        remove(outputs, names)
    else:
        raise UserError("usage: python -m fourstage data [list | check | rm NAME...]")


if __name__ == "__main__":
    run_command(main)
