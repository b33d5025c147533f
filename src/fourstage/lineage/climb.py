"""make for stages: climb the ladder, reuse finished runs, resume unfinished ones.

A run's id is a hash of everything that determines its weights (identity.py), its folder is
outputs/runs/<stage>-<id>, its record run.json. `force=true` trains the named stage again in
outputs/retrain/; the old run stays usable until the new one is finished and takes its place.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from rich.console import Console

from fourstage import __version__
from fourstage.errors import UserError
from fourstage.files import clean_up, remove_parts, swap_in, undo_swap
from fourstage.interruptions import Stopped, heed_ctrl_c
from fourstage.job import StageJob
from fourstage.lineage.ranks import Ranks
from fourstage.runs.disk import GB, too_much, trim
from fourstage.runs.heartbeat import beating, sign_of_life
from fourstage.runs.records import add_tags, read_record, write_record
from fourstage.runs.store import RunStore, find_status
from fourstage.tracking.wandb_log import mended
from fourstage.tracking.wandb_settings import begun, check_variables, wandb_folder

if TYPE_CHECKING:  # plan imports PyTorch
    from fourstage.lineage.plan import Plan, PlannedRun

Train = Callable[[StageJob], dict[str, Any]]  # trains in job.folder, returns the cost


def climb(
    config: Mapping[str, Any], *, overrides: Sequence[str] = (), train: Train | None = None
) -> Path:
    """Plan, print the plan, train what is missing; returns the folder of the stage asked for.

    `config` is the resolved config tree, `overrides` what was typed (for messages).
    Raises UserError for the user's mistakes, before anything trains.
    """
    try:
        from fourstage.lineage import messages
        from fourstage.lineage.plan import make_plan
        from fourstage.lineage.runner import train_stage

        plan = make_plan(config, overrides)
    except Stopped as stopped:
        stopped.then = "nothing had begun"
        raise
    ranks = Ranks(plan.store.outputs)
    if ranks.is_first:
        if (last := plan.runs[-1]).to_do:
            stored = begun(last.folder, last.status == "resume").get("wandb")
            check_variables(plan.command.logger, plan.store.outputs, last.folder, stored)
        console = Console(width=None if sys.stdout.isatty() else 120)
        messages.show(plan, console, git_state()["commit"])
        missing = [run.stage for run in plan.runs[:-1] if run.to_do]
        if plan.command.ancestors == "require" and missing:
            raise UserError(
                f"ancestors=require: {', '.join(missing)} must be trained first: "
                + messages.train_command(missing[-1], overrides)
            )
    heed_ctrl_c()
    with ranks.job():
        for run in plan.runs:
            if run.status != "not needed":
                complete(plan, run, train or train_stage, ranks)
    last = plan.runs[-1]
    place = plan.store.folder(last.stage, last.id)
    if ranks.is_first:
        print(messages.ending(plan, place, overrides), flush=True)
    return place


def complete(plan: Plan, run: PlannedRun, train: Train, ranks: Ranks) -> None:
    """Make sure that a run is finished, whatever other processes have done since the plan."""
    place = plan.store.folder(run.stage, run.id)
    if not run.to_do and run.folder == place:  # every rank knows that
        if ranks.is_first:
            add_tags(place, plan.command.tags)
        return
    if not ranks.is_first:
        run.status = ranks.wait_for(run.id)
        if run.to_do:
            train(stage_job(plan, run))
        return
    with plan.store.locked(run.name, run.id):
        clean_up(run.folder / "checkpoints" / "last.ckpt")
        undo_swap(plan.store.retrain_folder(run.stage, run.id), place)
        run.status, run.record = find_status(run.folder)
        if run.to_do:
            remove_parts(run.folder)
        if run.to_do and (line := make_room(plan)):
            raise UserError(line)
        ranks.tell(run.id, run.status)
        run.tags = all_tags(plan, run)
        if run.to_do:
            train_and_record(plan, run, train)
            if line := make_room(plan):
                print(f"warning: {line}", flush=True)
        add_tags(run.folder, run.tags)
        if run.folder != place:  # force=true
            place.parent.mkdir(parents=True, exist_ok=True)
            swap_in(run.folder, place)
            run.folder = place


def make_room(plan: Plan) -> str | None:
    """Keep outputs below max_outputs_gb, but for what this command resumes; what to say if it
    can't be done."""
    most = plan.command.max_outputs_gb
    if most is None:
        return None
    for line in trim(plan.store, most * GB, spared=[run.folder for run in plan.runs]):
        print(line, flush=True)
    return too_much(plan.store, most * GB)


def train_and_record(plan: Plan, run: PlannedRun, train: Train) -> None:
    """Train a run and keep its run.json up to date from start to end."""
    if run.status == "train" and run.folder.exists():  # it never came to a checkpoint
        with suppress(UserError):  # a broken record
            mended(wandb_folder(plan.store.outputs), read_record(run.folder).get("wandb", ""))
        shutil.rmtree(run.folder)
    before = read_record(run.folder)["cost"]["seconds"] if run.status == "resume" else 0.0
    start = time.monotonic()

    def cost() -> dict[str, float]:
        return {"seconds": round(before + time.monotonic() - start, 1)}

    about = {"git": git_state(), "versions": versions()}
    about |= hardware(plan.command.trainer.accelerator)
    with grouping(plan.store.outputs):
        run.group = group_of(plan.store, run)
        job = stage_job(plan, run)
        (job.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_record(
            job.folder,
            id=run.id,
            stage=run.stage,
            name=run.name,
            parents=run.parents,
            group=run.group,
            status="running",
            debug=job.debug,
            tags=list(job.tags),
            heartbeat=sign_of_life(),
            finished=None,
            **({} if job.resume else {"started": now(), "cost": cost()}),
            data=run.data,
            **about,
            config=job.config,
            **({"start": start_of(job)} if job.start else {}),
        )
    print(f"{'resuming' if job.resume else 'training'} {job.name} in {job.folder}", flush=True)
    try:
        with beating(job.folder):
            found = train(job)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)  # SIGTERM ends as SystemExit
        if not (job.folder / "run.json").exists():
            if stopped:
                raise
            raise UserError(f"{job.folder}: removed while it was trained: run it again") from error
        with suppress(OSError):  # a full disk, perhaps
            write_record(job.folder, status="running" if stopped else "failed", cost=cost())
        raise
    assert (job.folder / "model.safetensors").exists(), "a stage ends with its weights"
    write_record(job.folder, status="finished", finished=now(), cost={**cost(), **found})
    if not job.keep_checkpoints:
        shutil.rmtree(job.folder / "checkpoints")
    print(f"finished {job.name} after {cost()['seconds']:.0f} s", flush=True)


@contextmanager
def grouping(outputs: Path) -> Iterator[None]:
    """Hold the store's lock on groups: two jobs that begin at once must not both join one."""
    folder = outputs / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "groups.lock") as lock:
        try:
            yield
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)  # waiting processes make a new one


def group_of(store: RunStore, run: PlannedRun) -> str:
    """The ladder that a run belongs to, which holds one run of each stage: its policy parent's,
    unless another run of its stage is in that; then it begins its own."""
    for folder in (run.folder, store.folder(run.stage, run.id)):
        with suppress(UserError):
            return read_record(folder)["group"]
    if not run.parent_folders:
        return run.id
    group = read_record(next(iter(run.parent_folders.values())))["group"]
    others = (record for record in store.records().values() if record["id"] != run.id)
    taken = any((other["stage"], other["group"]) == (run.stage, group) for other in others)
    return run.id if taken else group


def start_of(job: StageJob) -> dict[str, Any]:
    """The checkpoint that a first stage starts from, for its record."""
    assert job.start is not None
    return {**asdict(job.start), "folder": str(job.start.folder)}


def stage_job(plan: Plan, run: PlannedRun) -> StageJob:
    """Everything that the runner needs to train a run of the plan."""
    command, store = plan.command, plan.store
    ancestors: dict[str, Path] = {}
    for folder in run.parent_folders.values():
        stage = read_record(folder)["stage"]
        ancestors = {**store.ancestors(folder), stage: folder, **ancestors}  # the policy's first
    later = plan.runs[plan.runs.index(run) + 1 :]
    config = json.loads(json.dumps(asdict(command)))  # as it is read back: tuples are lists
    config |= {"stage": run.stage, "stages": {run.stage: config["stages"][run.stage]}}
    del config["tag"], config["max_outputs_gb"]  # they say nothing about the run
    same = ("model", "tokenizer", "data", "trainer", "logger", "evaluation", "seed", "debug")
    return StageJob(
        **{name: getattr(command, name) for name in (*same, "keep_checkpoints")},
        stage=run.stage,
        run_id=run.id,
        folder=run.folder,
        outputs=store.outputs,
        settings=run.settings,
        digest=run.data["digest"],
        parents=run.parent_folders,
        ancestors=ancestors,
        group=run.group,
        tags=run.tags,
        start=run.start,
        is_named=run is plan.runs[-1],
        resume=run.status == "resume",
        config=config,
        plan_left=[(r.stage, r.estimate) for r in later if r.to_do],
    )


def all_tags(plan: Plan, run: PlannedRun) -> tuple[str, ...]:
    """Those that the run has, also the one that force=true trains again, and the command's."""
    found: list[str] = []
    for folder in (plan.store.folder(run.stage, run.id), run.folder):
        with suppress(UserError):  # it is new
            found += read_record(folder).get("tags", ())
    return tuple(dict.fromkeys((*found, *plan.command.tags)))


# --- for the record


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def git_state() -> dict[str, Any]:
    """{"commit", "dirty"} of the running code; None outside a git checkout."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", Path(__file__).parent, *words]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def versions() -> dict[str, str]:
    found = {"fourstage": __version__, "python": platform.python_version()}
    for package in ("torch", "lightning", "tokenizers", "datasets", "reasoning-gym"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def hardware(accelerator: str) -> dict[str, Any]:
    """The device in words, and PyTorch's CPU threads: sums' last digits depend on both."""
    import torch

    from fourstage.model import ops

    threads = torch.get_num_threads()
    if accelerator == "gpu":
        return {"device": torch.cuda.get_device_name(), "threads": threads}
    cpu = f"{platform.processor() or platform.machine()}, {threads} thread{'s' * (threads > 1)}"
    kernels = ops.kernels.kind() if ops.kernels else "no kernels"
    return {"device": f"{accelerator} ({cpu}, {kernels})", "threads": threads}
