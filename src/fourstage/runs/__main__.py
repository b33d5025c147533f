"""List, show and remove runs, outputs/runs/<stage>-<id>/.

    python -m fourstage runs [list] [CONDITION...] [sort=KEY] [--json]   runs with their disk use
    python -m fourstage runs show NAME...           a run's record, files, ancestors, descendants
    python -m fourstage runs rm NAME... [dry_run=true] [force=true]   force: ancestors too
    python -m fourstage runs rm CONDITION... [keep_best=N] [by=METRIC] [dry_run=true]
    python -m fourstage runs trim most_gb=N [dry_run=true]   drops checkpoints until outputs fits

For example:

    python -m fourstage runs show sft
    python -m fourstage runs stage=grpo seed=0,1 tag=sweep sort=-goal
    python -m fourstage runs rm debug=true dry_run=true
    python -m fourstage runs rm stage=grpo keep_best=3

NAME is an id, <stage>-<id>, a folder, or a stage's name: its latest finished run (a debug run only
if there is no other). CONDITION is key=value, key=value,value or key!=value: stage, id, status,
debug, tag, parent, model, data, tokenizer, seed, or any setting (stages.grpo.lr=1e-3). rm with
conditions keeps runs that are trained now, and those that others descend from; keep_best=N keeps
each stage's best N, by its own goal or by a metric of eval.json. Needs no PyTorch. outputs=FOLDER.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fourstage.errors import UserError, did_you_mean
from fourstage.interruptions import run_command
from fourstage.runs.disk import GB, MB, droppable, megabytes, parts, too_much, trim
from fourstage.runs.heartbeat import roughly, silence
from fourstage.runs.listing import (
    Better,
    all_but_best,
    entry,
    heirs_first,
    ordered,
    removable,
    selected,
)
from fourstage.runs.records import Record, read_record
from fourstage.runs.store import RunStore
from fourstage.settings import Bounded, at_least, from_arguments, given_once, positive


@dataclass(frozen=True, kw_only=True)
class Outputs(Bounded):
    """The options of every subcommand."""

    outputs: str = "outputs"

    @property
    def store(self) -> RunStore:
        return RunStore(Path(self.outputs))


@dataclass(frozen=True, kw_only=True)
class Listing(Outputs):
    sort: str | None = None
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Removal(Outputs):
    force: bool = False
    keep_best: int | None = at_least(0, default=None)
    by: str | None = None
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class Limit(Outputs):
    most_gb: float = positive()
    dry_run: bool = False


OPTIONS = {"list": Listing, "show": Outputs, "rm": Removal, "trim": Limit}
USAGE = (
    "usage: python -m fourstage runs [list | show NAME... | rm NAME... | rm CONDITION... | "
    "trim most_gb=N] (see --help)"
)


def show_all(options: Listing, conditions: Sequence[str]) -> None:
    """A table, or one JSON array."""
    store = options.store
    runs = selected(store, conditions)
    entries = [entry(folder, record) for folder, record in runs.items()]
    if options.sort is not None:
        entries = ordered(entries, options.sort)
    for line in store.broken():
        print(line, file=sys.stderr)
    if options.json:
        print(json.dumps(entries, indent=1, ensure_ascii=False))
        return
    if not entries:
        none = "no such runs" if conditions else "no runs yet: python train.py stage=pretrain"
        print(f"{store.root} has {none}")
        return
    print_table(entries, {folder.name: record for folder, record in runs.items()})
    sizes = ", ".join(f"{name} {size / MB:.1f} MB" for name, size in parts(store).items())
    print(f"disk use: {sizes}")


def print_table(entries: Sequence[dict[str, Any]], records: dict[str, Record]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    others = ["status", "from", "model", "seed", "debug", "started", "minutes", "step", "MB"]
    others += ["tags"] * any(run["tags"] for run in entries)
    table = Table(Column("run", no_wrap=True), *(Column(name, overflow="fold") for name in others))
    for run in entries:
        cells = [
            run["name"],
            run["status"],
            ", ".join(run["parents"].values()),
            run["model"],
            str(run["seed"]),
            run["debug"] or "",
            run["started"][:16].replace("T", " "),
            f"{run['seconds'] / 60:.1f}",
            progress(run),
            f"{run['bytes'] / MB:.1f}",
            ", ".join(run["tags"]),
        ]
        table.add_row(*cells[: len(others) + 1])
    width = None if sys.stdout.isatty() else 140
    Console(width=width, markup=False, emoji=False).print(table)  # [tags] are shown as they are
    for run in entries:
        if run["status"] == "silent":
            quiet = roughly(silence(records[run["name"]]) or 0)
            pid, host = (run["heartbeat"].get(key, "unknown") for key in ("pid", "host"))
            who = f"process {pid} on {host}"
            print(f"{run['name']}: dead? last sign of life {quiet} ago, from {who}")


def progress(run: dict[str, Any]) -> str:
    """The step that a run has logged, and of how many."""
    if run["step"] is None:
        return ""
    has_more = run["max_steps"] is not None and run["step"] < run["max_steps"]
    return f"{run['step']}/{run['max_steps']}" if has_more else str(run["step"])


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


def remove(store: RunStore, folder: Path, *, force: bool = False, dry_run: bool) -> None:
    """Remove a run, or say so only, with what it takes."""
    what = f"{megabytes(folder)} MB"
    if folder.is_symlink():
        what = f"the link only: its files stay in {folder.readlink()}"
    if not dry_run:
        store.remove(folder, force=force)
    print(f"{'would remove' if dry_run else 'removed'} {folder.name} ({what})")


def remove_named(options: Removal, names: Sequence[str]) -> None:
    """Remove the runs with these names, heirs first, or say which these are. Raises UserError
    before the first goes if one can't."""
    if options.keep_best is not None or options.by is not None:
        raise UserError("keep_best=, by=: only with conditions, such as rm stage=grpo keep_best=3")
    store, found = options.store, dict[str, Path]()
    for name in names:
        path = store.find(name, finished=False)
        folder = path.parent.resolve() / path.name if path.name else path.resolve()
        if folder.name in found:
            raise UserError(f"{name}: {folder.name} is named twice: name each run once")
        found[folder.name] = folder
    for folder in found.values():
        store.check_removable(folder, found, force=options.force)
    named_heirs = {
        folder: [found[heir.name] for heir in store.heirs(folder) if heir.name in found]
        for folder in found.values()
    }
    for folder in heirs_first(named_heirs):
        remove(store, folder, force=options.force, dry_run=options.dry_run)


def remove_matching(options: Removal, conditions: Sequence[str], better: dict[str, Better]) -> None:
    """Remove the runs for which the conditions hold, or say which these are."""
    if options.by is not None and options.keep_best is None:
        raise UserError("by= needs keep_best=N: how many runs of each stage stay")
    store, all_runs = options.store, options.store.records()
    runs, alone = selected(store, conditions), []
    if options.keep_best is not None:
        runs, alone = all_but_best(runs, options.keep_best, options.by, better)
    order, kept = removable(runs, all_runs)
    sizes = {folder: megabytes(folder) for folder in order}
    for folder in order:
        remove(store, folder, dry_run=options.dry_run)
    for line in (*kept, *alone):
        print(line)
    verb = "would remove" if options.dry_run else "removed"
    total = sum(map(float, sizes.values()))
    print(f"{verb} {len(order)} run{'s' * (len(order) != 1)}, {total:.1f} MB")


def trim_outputs(options: Limit) -> None:
    """Drop checkpoints, or say which. Raises UserError if that isn't enough."""
    store, most = options.store, options.most_gb * GB
    would_go = [f / "checkpoints" for f, _ in droppable(store, ())] if options.dry_run else []
    for line in trim(store, most, dry_run=options.dry_run):
        print(line)
    if line := too_much(store, most, would_go):
        raise UserError(line)
    print(f"{store.outputs} takes {sum(parts(store).values()) / GB:.2f} GB")


def main(arguments: list[str]) -> None:
    """Run one command. Raises UserError for an unknown command, run, condition or option."""
    words = ["json=true" if argument == "--json" else argument for argument in arguments]
    command, *names = [word for word in words if "=" not in word] or ["list"]
    if command not in OPTIONS:
        hint = did_you_mean(command, [*OPTIONS, "--json"])
        raise UserError(f"unknown word {command!r}: {hint} (see --help)")
    kind = OPTIONS[command]
    if kind is not Listing and "--json" in arguments:
        raise UserError("--json: only the list has it: python -m fourstage runs --json")
    known = {field.name for field in fields(kind)}
    settings = [word for word in words if "=" in word]
    own = [s for s in settings if s.partition("=")[0] in known]
    given_once(own)
    options = from_arguments(kind, own)
    conditions = [s for s in settings if s.partition("=")[0] not in known]
    if conditions and command in ("show", "trim"):
        raise UserError(f"unknown option {conditions[0]!r}: known are {', '.join(sorted(known))}")
    store = options.store
    if isinstance(options, Listing) and not names:
        show_all(options, conditions)
    elif isinstance(options, Limit) and not names:
        trim_outputs(options)
    elif isinstance(options, Removal) and conditions and not names:
        if options.force:
            raise UserError("force=true: only with NAME: rm with conditions keeps ancestors")
        from fourstage.evaluation.suite import DEFINITIONS

        better = {name: one.better for name, one in DEFINITIONS.items()}
        if options.by is not None:
            better |= {options.by: better.get(options.by.partition("/")[0])}  # key/TASK
        remove_matching(options, conditions, better)
    elif command in ("show", "rm") and names and not conditions:
        if isinstance(options, Removal):
            remove_named(options, names)
        else:
            for name in names:
                show(store, store.find(name, finished=False))
    elif not names:
        raise UserError(f"{command}: which runs? {USAGE}")
    else:
        raise UserError(f"{command}: {names[0]!r} has no place here; {USAGE}")


if __name__ == "__main__":
    run_command(main)
