"""The store of runs: outputs/runs/<stage>-<id>/."""

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from fourstage.errors import UserError
from fourstage.files import exists, locked
from fourstage.ladder import LADDER, place, stages
from fourstage.runs.heartbeat import SILENT, is_elsewhere, silence
from fourstage.runs.records import RUN_ID, Record, read_record

Status = Literal["found", "resume", "train"]


class RunStore:
    """Finds, locks and removes runs. Only `outputs` is given; folders are made when needed."""

    def __init__(self, outputs: Path) -> None:
        self.outputs = outputs
        self.root = outputs / "runs"

    def folder(self, stage: str, run_id: str) -> Path:
        return self.root / f"{stage}-{run_id}"

    def retrain_folder(self, stage: str, run_id: str) -> Path:
        """Where force=true trains a run again, until it takes the old one's place."""
        return self.beside / "retrain" / f"{stage}-{run_id}"

    @property
    def beside(self) -> Path:
        """The folder of `root` on its own disk, which may be another one if `root` is a link."""
        return self.root.resolve().parent if self.root.is_symlink() else self.outputs

    def records(self) -> dict[Path, Record]:
        """Folder -> record of every readable run, finished or not, by stage and start."""
        found = {path.parent: _read(path.parent) for path in self.root.glob("*/run.json")}
        readable = {f: record for f, record in found.items() if not isinstance(record, str)}
        return dict(sorted(readable.items(), key=lambda x: (place(x[1]["stage"]), x[1]["started"])))

    def status(self, record: Record) -> str:
        """What run.json says; but of a run that is "running" there, "interrupted" if no process
        has it any more, and "silent" if one holds its lock and gives no sign of life.

        A lock may not reach as far as the folder, so one of another machine counts too.
        """
        if record["status"] != "running":
            return record["status"]
        quiet = silence(record)
        is_silent = quiet is not None and quiet > SILENT
        if self.is_busy(record["id"]):
            return "silent" if is_silent else "running"
        is_there = quiet is not None and not is_silent and is_elsewhere(record)
        return "running" if is_there else "interrupted"

    def broken(self) -> list[str]:
        """What is wrong with each run whose record cannot be read."""
        found = (_read(path.parent) for path in sorted(self.root.glob("*/run.json")))
        return [record for record in found if isinstance(record, str)]

    def find(self, name: str, *, finished: bool = True) -> Path:
        """The folder of a run: by id, <stage>-<id>, folder, or stage (its latest finished run; a
        debug run only if there is no other). Raises UserError if there is none."""
        if name in LADDER:
            return self._latest(name)
        for folder in (self.root / name, *self.root.glob(f"*-{escape(name)}"), Path(name)):
            if name and exists(folder / "run.json"):
                if finished and read_record(folder)["status"] != "finished":
                    raise UserError(f"{folder.name}: this run is not finished")
                return folder
        names = [folder.name for folder in self.records()]
        if len(names) > 8:
            names[8:] = [f"and {len(names) - 8} more (python -m fourstage runs)"]
        known = ", ".join(names) or "no runs yet"
        raise UserError(f"unknown run {name[:200]!r}: {self.root} has {known}")

    def _latest(self, stage: str) -> Path:
        finished = {f: r for f, r in self.records().items() if r["status"] == "finished"}
        runs = {f: r for f, r in finished.items() if r["stage"] == stage}
        if not runs:
            raise UserError(
                f"no finished {stage} run in {self.root}: train one: python train.py stage={stage}"
            )
        return max(runs, key=lambda f: (runs[f]["debug"] is None, runs[f]["finished"]))

    def ancestors(self, folder: Path) -> dict[str, Path]:
        """stage -> folder of every readable run that `folder` descends from. If two are of one
        stage, the one in the policy's line counts."""
        found: dict[str, Path] = {}
        for parent in read_record(folder)["parents"].values():
            for path in folder.parent.glob(f"*-{parent}"):
                record = _read(path)
                if not isinstance(record, str):
                    found = {**self.ancestors(path), record["stage"]: path, **found}
        return {stage: found[stage] for stage in stages() if stage in found}

    def children(self, run_id: str) -> list[Path]:
        """The runs that start directly from this one."""
        return [f for f, r in self.records().items() if run_id in r["parents"].values()]

    def heirs(self, folder: Path) -> list[Path]:
        """The runs that start directly from the one in a folder, whose record may be broken."""
        return self.children(_id(folder))

    def is_busy(self, run_id: str) -> bool:
        """Whether a process is training it now."""
        with self.unless_busy(run_id) as is_free:
            return not is_free

    @contextmanager
    def unless_busy(self, run_id: str) -> Iterator[bool]:
        """Hold a run's lock if nobody has it; gives whether it does."""
        lock = self._lock(run_id)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    @contextmanager
    def locked(self, name: str, run_id: str) -> Iterator[None]:
        """Hold a run's lock while training it. A crash leaves none behind."""
        lock = self._lock(run_id)
        with locked(lock, name, "training"):
            try:
                yield
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)  # waiting processes make a new one

    def _lock(self, run_id: str) -> FileLock:
        assert RUN_ID.fullmatch(run_id), run_id
        folder = self.outputs / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{run_id}.lock")

    def check_removable(self, folder: Path, going: Collection[str] = (), *, force: bool) -> None:
        """Raises UserError if a run is being trained, or others descend from it that aren't `going`
        (names of folders) too."""
        if folder.parent.resolve() != self.root.resolve():
            raise UserError(f"{folder}: not a run of {self.outputs}: give its own outputs=FOLDER")
        record, run_id = _read(folder), _id(folder)
        children = [f.name for f in self.children(run_id) if f.name not in going]
        if children and not force:
            verb, them = ("descends", "it") if len(children) == 1 else ("descend", "them")
            raise UserError(
                f"{folder.name}: {', '.join(children)} {verb} from it: remove {them} first, or add "
                "force=true"
            )
        if RUN_ID.fullmatch(run_id):
            status = "" if isinstance(record, str) else self.status(record)
            if status == "silent":
                raise UserError(
                    f"{folder.name}: a process that gives no sign of life holds its lock: end that "
                    f"first; if it is long gone, rm {self._lock(run_id).lock_file}"
                )
            if status == "running" or self.is_busy(run_id):
                raise UserError(f"{folder.name}: a process is training it now: stop that first")

    def remove(self, folder: Path, *, force: bool) -> None:
        """Remove a run. Raises UserError as `check_removable` does."""
        self.check_removable(folder, force=force)
        if folder.is_symlink():
            folder.unlink()
            return
        self.discard(folder)

    def discard(self, path: Path) -> None:
        """Remove a run, or a folder of one, at once, so that none is ever found half removed."""
        trash = self.beside / "trash" / f"{path.parent.name}.{path.name}.{os.getpid()}"
        trash.parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, trash)
        shutil.rmtree(trash)
        with suppress(OSError):  # another command's
            trash.parent.rmdir()


def find_run(outputs: Path, name: str) -> Path:
    """The folder of a finished run; see RunStore.find."""
    return RunStore(outputs).find(name)


def find_status(folder: Path) -> tuple[Status, Record]:
    """What has to be done for a run, and its record if it is finished."""
    if (folder / "run.json").exists():
        record = read_record(folder)
        if record["status"] == "finished" and (folder / "model.safetensors").exists():
            return "found", record
        if (folder / "checkpoints" / "last.ckpt").exists():
            return "resume", {}
    return "train", {}


def _id(folder: Path) -> str:
    """A run's id; where the record is broken, by the folder's name."""
    record = _read(folder)
    return folder.name.rpartition("-")[2] if isinstance(record, str) else record["id"]


def _read(folder: Path) -> Record | str:
    """The record of a run, or what is wrong with it."""
    try:
        return read_record(folder)
    except UserError as error:
        return str(error)
