"""make for stages: climb the ladder, reuse what is there, resume what is unfinished.

A run's id is a hash of what determines its weights (plan.py), its folder is outputs/runs/
<stage>-<id>, its record run.json. `force=true` trains the named stage again in outputs/retrain/;
the old run stays where it is, and usable, until the new one is finished and takes its place.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fourstage import __version__
from fourstage.errors import UserError
from fourstage.files import clean_up, swap_in, undo_swap
from fourstage.interruptions import Stopped, heed_ctrl_c, one_line
from fourstage.job import StageJob
from fourstage.ladder import LADDER, stages
from fourstage.lineage.ranks import Ranks
from fourstage.runs.records import read_record, write_record
from fourstage.runs.store import find_run

if TYPE_CHECKING:  # plan imports PyTorch
    from fourstage.lineage.plan import Plan, PlannedRun

__all__ = ["climb", "find_run", "one_line"]

Train = Callable[[StageJob], dict[str, Any]]  # trains in job.folder, returns the cost


def climb(
    config: Mapping[str, Any], *, overrides: Sequence[str] = (), train: Train | None = None
) -> Path:
    """Plan, print the plan, train what is missing; returns the folder of the stage asked for.

    `config` is the resolved config tree, `overrides` what was typed (for messages).
    Raises UserError for what the user did wrong, before anything trains.
    """
    try:
        from fourstage.lineage.plan import make_plan, show

        plan = make_plan(config)
    except Stopped as stopped:
        stopped.then = "nothing had begun"
        raise
    commit = git_state()["commit"]
    ranks = Ranks(plan.store.outputs)
    if ranks.is_first:
        show(plan, Console(width=None if sys.stdout.isatty() else 120), commit)
        require_ancestors(plan, overrides)
    if train is None:
        from fourstage.lineage.runner import train_stage as train
    heed_ctrl_c()
    with ranks.job():
        for run in plan.runs:
            if run.status != "not needed":
                complete(plan, run, train, ranks)
    last = plan.runs[-1]
    place = plan.store.folder(last.stage, last.id)
    if ranks.is_first:
        print(ending(plan, place, overrides), flush=True)
    return place


def ending(plan: Plan, folder: Path, overrides: Sequence[str]) -> str:
    """What the stage that was asked for came to, where it lies, and which commands go on."""
    from fourstage.lineage.plan import outputs_word, python_word

    stage, last = plan.command.stage, [f"run={folder.name}", *outputs_word(plan)]
    shows = ["report"] if LADDER[stage].leaves == "scalar" else ["chat", "report"]
    commands = [shlex.join([python_word(), "-m", "fourstage", show, *last]) for show in shows]
    if (following := next_stage(plan)) is not None:
        commands.append(train_command(following, [*overrides, *missing_file(plan, following)]))
    lines = [gain(plan.store.outputs, folder.name), f"run: {folder}", "next:"]
    return "\n".join([*lines, *(f"  {command}" for command in commands)])


def next_stage(plan: Plan) -> str | None:
    """The stage that goes on from this one: one that was told to, else the first that does."""
    from fourstage.lineage.plan import named_parents

    stage, settings = plan.command.stage, plan.command.stages
    heirs = [
        name
        for name in stages()
        if name != stage and stage in named_parents(name, settings[name]).values()
    ]
    told = [
        name for name in heirs if settings[name].parent == stage != LADDER[name].parents["policy"]
    ]
    return next(iter([*told, *heirs]), None)


def missing_file(plan: Plan, stage: str) -> list[str]:
    """The setting that names a stage's own file, where it is still to be given."""
    data, source = plan.command.data, LADDER[stage].source
    from_gym = source == "reasoning" and data.reasoning.chosen
    is_there = data.embedded or getattr(data, source).path or from_gym
    return [] if is_there else [f"data.{source}.path=FILE"]


def gain(outputs: Path, name: str) -> str:
    """A run's goal before it and after it, with 95 % intervals, as its report has them."""
    from fourstage.report.files import Files
    from fourstage.report.ladder import choose, ladder, read_rows, read_runs
    from fourstage.report.tables import NO_COMPARISON, goals, measured, title

    files = Files()
    runs = read_runs(outputs, files)
    tip = choose(runs, name, outputs)
    goal = next(
        g for g in goals(read_rows(ladder(tip, runs, files), files)) if g.stage == tip.stage
    )
    values = [measured(goal.name, cell) for cell in (goal.before, goal.after)]
    if goal.after["value"] is None:
        return f"{tip.stage}: {title(goal.name)} not measured: {goal.after['why']}"
    start = f" ({goal.start})" if goal.start else ""
    doubt = f"; {goal.verdict}" if goal.verdict in NO_COMPARISON else ""
    return (
        f"{tip.stage}: {title(goal.name)} {values[0]}{start} → {values[1]} (95 % intervals{doubt})"
    )


def train_command(stage: str, overrides: Sequence[str]) -> str:
    """The command for another stage of the same ladder, to paste."""
    from fourstage.lineage.plan import python_word

    mine = ("stage=", "ancestors=", "force=", "sweep=")
    kept = [override for override in overrides if not override.startswith(mine)]
    script = Path(sys.argv[0])  # train.py, wherever the command stands
    train = str(script) if script.name == "train.py" else "train.py"
    flags = [word for word in sys.argv[1:] if word.startswith("--config")]
    return shlex.join([python_word(), train, *flags, f"stage={stage}", *kept])


def complete(plan: Plan, run: PlannedRun, train: Train, ranks: Ranks) -> None:
    """Make sure that one run is finished; whatever another process did meanwhile is found."""
    from fourstage.lineage.plan import find_status

    place = plan.store.folder(run.stage, run.id)
    if not run.to_do and run.folder == place:  # and so it stays, for every rank
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
        ranks.tell(run.id, run.status)
        if run.to_do:
            train_and_record(plan, run, train)
        if run.folder != place:  # force=true
            place.parent.mkdir(parents=True, exist_ok=True)
            swap_in(run.folder, place)
            run.folder = place


def train_and_record(plan: Plan, run: PlannedRun, train: Train) -> None:
    """Train one run, with its record in run.json from the first moment to the last."""
    if run.status == "train" and run.folder.exists():
        shutil.rmtree(run.folder)  # what is left of a run that never came to a checkpoint
    job = stage_job(plan, run)
    (job.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    before = read_record(job.folder)["cost"]["seconds"] if job.resume else 0.0
    start = time.monotonic()

    def cost() -> dict[str, float]:
        return {"seconds": round(before + time.monotonic() - start, 1)}

    began = {} if job.resume else {"started": now(), "cost": cost()}
    write_record(
        job.folder,
        id=run.id,
        stage=run.stage,
        name=run.name,
        parents=run.parents,
        group=run.group,
        status="running",
        debug=job.debug,
        finished=None,
        **began,
        data=run.data,
        git=git_state(),
        versions=versions(),
        device=device(job.trainer.accelerator),
        threads=threads(),
        config=job.config,
    )
    verb = "resuming" if job.resume else "training"
    print(f"{verb} {job.name} in {job.folder}", flush=True)
    try:
        found = train(job)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)  # SIGTERM ends as SystemExit
        with suppress(OSError):  # a full disk, perhaps
            write_record(job.folder, status="running" if stopped else "failed", cost=cost())
        raise
    assert (job.folder / "model.safetensors").exists(), "a stage ends with its weights"
    write_record(job.folder, status="finished", finished=now(), cost={**cost(), **found})
    if not job.keep_checkpoints:
        shutil.rmtree(job.folder / "checkpoints")
    print(f"finished {job.name} after {cost()['seconds']:.0f} s", flush=True)


def stage_job(plan: Plan, run: PlannedRun) -> StageJob:
    """What the runner needs to train a run of the plan."""
    command, store = plan.command, plan.store
    ancestors: dict[str, Path] = {}
    for folder in run.parent_folders.values():
        stage = read_record(folder)["stage"]
        ancestors = {**store.ancestors(folder), stage: folder, **ancestors}  # the policy's first
    later = plan.runs[plan.runs.index(run) + 1 :]
    config = json.loads(json.dumps(asdict(command)))  # tuples as lists, as they are read back
    config["stage"] = run.stage
    config["stages"] = {run.stage: json.loads(json.dumps(asdict(run.settings)))}
    return StageJob(
        stage=run.stage,
        run_id=run.id,
        folder=run.folder,
        outputs=store.outputs,
        settings=run.settings,
        model=command.model,
        tokenizer=command.tokenizer,
        data=command.data,
        digest=run.data["digest"],
        trainer=command.trainer,
        logger=command.logger,
        evaluation=command.evaluation,
        seed=command.seed,
        parents=run.parent_folders,
        ancestors=ancestors,
        group=run.group,
        debug=command.debug,
        resume=run.status == "resume",
        keep_checkpoints=command.keep_checkpoints,
        config=config,
        plan_left=[(r.stage, r.estimate) for r in later if r.to_do],
    )


def require_ancestors(plan: Plan, overrides: Sequence[str]) -> None:
    """Raise UserError where ancestors=require and one of them is not there."""
    missing = [run.stage for run in plan.runs[:-1] if run.to_do]
    if plan.command.ancestors == "require" and missing:
        raise UserError(
            f"ancestors=require: {', '.join(missing)} must be trained first: "
            + train_command(missing[-1], overrides)
        )


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def git_state() -> dict[str, Any]:
    """{"commit", "dirty"} of the code that runs; None where it is no git checkout."""

    def git(*words: str) -> str | None:
        here = Path(__file__).parent
        with suppress(OSError):
            done = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True)
            return done.stdout.strip() if done.returncode == 0 else None
        return None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def versions() -> dict[str, str]:
    packages = ("torch", "lightning", "tokenizers", "datasets", "reasoning-gym")
    found = {"fourstage": __version__, "python": sys.version.split()[0]}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def threads() -> int:
    """CPU threads of PyTorch; with other ones the last digits of sums differ."""
    import torch

    return torch.get_num_threads()


def device(accelerator: str) -> str:
    """The device in words, for the record."""
    import platform

    import torch

    from fourstage.model import ops

    if accelerator == "gpu":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    cpu = f"{platform.processor() or platform.machine()}, {threads} thread{'s' * (threads > 1)}"
    return f"{accelerator} ({cpu}, {ops.kernels_kind()})"
