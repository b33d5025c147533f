"""One W&B run per stage run, whose history has each training step once, whatever kills it.

W&B appends: online a resumed run would add the steps between checkpoint and kill again, and so
would `wandb sync` of the two folders of an offline run. So a row waits until the resume state on
the disk contains its step, and `_step` is the training step. Between that moment and W&B's own
disk or server a kill can still lose rows. A resumed run finds out which W&B has, from the server
or from the logs of the run, and sends the others from metrics.csv and samples.jsonl.
"""

from __future__ import annotations

import logging
import math
import secrets
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from fourstage.errors import UserError
from fourstage.interruptions import AGAIN, Stopped
from fourstage.job import LoggerConfig, StageJob
from fourstage.runs.records import read_record, write_record
from fourstage.settings import build
from fourstage.stages.base import steps_done
from fourstage.tracking import wandb_content as content
from fourstage.tracking.wandb_core import begin_run, end_core, is_lost
from fourstage.tracking.wandb_log import logged_offline, mark_sent
from fourstage.tracking.wandb_settings import (
    begun,
    entity_of,
    labels,
    names,
    project_of,
    set_up_wandb,
    wandb_folder,
    wandb_mode,
)

if TYPE_CHECKING:
    from wandb import Run

X_AXIS = "trainer/global_step"
ALL = math.inf  # every row up to the resumed state


class HeldRows(Logger):
    """The history of a W&B run: holds its rows, by step, until they are sent.

    `sent` is the last `_step` that W&B has: rows up to it are dropped.
    """

    name = "wandb"
    version = ""

    def __init__(self, run: Run, sent: float = -1) -> None:
        super().__init__()
        self.run, self.sent = run, sent
        self.rows: dict[int, dict[str, Any]] = {}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        self.hold(step, {name: value for name, value in metrics.items() if name != "epoch"})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are in the run's config."""

    def hold(self, step: int, values: Mapping[str, Any]) -> None:
        if step > self.sent:
            self.rows.setdefault(step, {}).update(values)

    def hold_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of samples.jsonl: a table for each step."""
        for step in dict.fromkeys(row["step"] for row in rows):
            table = content.sample_table([row for row in rows if row["step"] == step])
            self.hold(step, {"samples": as_table(table)})

    def send(self, until: float) -> None:
        """Send the rows of the steps up to and with `until`."""
        for step in sorted(step for step in self.rows if step <= until):
            self.run.log({X_AXIS: step, **self.rows.pop(step)}, step=step, commit=True)
            self.sent = step


class SendSaved(Callback):
    """Sends W&B the rows of the steps before the one that the resume state on the disk is of, which
    may yet get a validation.

    Reads `saved_at` and `written` of the trainer's Checkpointer: the steps of its last state, and
    whether that one has yet to be moved to its place.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = steps_done(trainer)
        by_name = {logger.name: logger for logger in trainer.loggers}
        held, metrics = by_name.get("wandb"), by_name["csv"]
        if not isinstance(held, HeldRows) or not done:
            return
        if held.sent == ALL:
            held.sent = done - 1
        for row in metrics.rows:
            step = int(row["step"])
            if step <= done:
                held.hold(step, {k: float(v) for k, v in row.items() if v and k != "step"})
        held.send(done - 1)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        state = trainer.checkpoint_callback
        if state.saved_at is not None and not state.written:
            for logger in trainer.loggers:
                if isinstance(logger, HeldRows):
                    logger.send(state.saved_at - 1)

    on_train_end = on_exception = on_train_batch_start


def open_wandb(job: StageJob) -> HeldRows | None:
    """Start or continue a stage's W&B run, or return None if W&B is switched off.

    Without a key or server W&B logs offline, and one line says so. Raises UserError for a WANDB_
    variable that W&B refuses or that would make two stages one run.
    """
    mode, why = wandb_mode(job.logger)
    if mode == "disabled":
        return None
    import wandb

    folder = set_up_wandb(job.outputs)
    record = begun(job.folder, job.resume)
    asked = names(job, record.get("wandb"))
    asked["id"] = asked["id"] or secrets.token_hex(4)
    if mode == "online":
        try:
            run = start_wandb(job, "online", asked)
            mark_sent(folder, run.id)
            return HeldRows(run, run.starting_step - 1 if run.resumed else -1)
        except wandb.errors.Error as error:
            why = str(error).splitlines()[0]
            if asked["resume"]:
                raise UserError(f"W&B: WANDB_RESUME={asked['resume']}: {why}") from error
    if why:
        _say_offline(why, folder)
    # what the server has can't be seen from here
    sent = ALL if record.get("wandb_online", False) else logged_offline(folder, asked["id"])
    return HeldRows(start_wandb(job, "offline", asked), sent)


def start_wandb(job: StageJob, mode: Literal["online", "offline"], asked: Mapping[str, Any]) -> Run:
    """The W&B run of `names`; online it uses its parents' artifacts. Raises wandb.errors.Error if
    the server can't be reached."""
    import wandb

    wandb.finish()  # a run that an earlier job of this process left open
    tags = [job.stage, job.model.name, job.data.name, f"seed{job.seed}", *job.tags]
    tags += ["debug", f"debug-{job.debug}"] if job.debug else []
    settings = wandb.Settings(silent=mode == "offline", quiet=True, console="wrap")
    settings.sweep_id = asked["sweep_id"]
    options = {
        "id": asked["id"],
        "name": asked["name"],
        "resume": (asked["resume"] or "allow") if mode == "online" else None,
        "project": project_of(job.logger),
        "entity": entity_of(job.logger),
        **labels(job.group, job.stage, tags),
        "config": {**job.config, "run": job.run_id, "parents": job.parent_names},
        "dir": wandb_folder(job.outputs).parent,  # W&B adds /wandb
    }
    was_online = read_record(job.folder).get("wandb_online", False)
    write_record(job.folder, wandb=asked["id"], wandb_online=was_online)  # a kill may come
    run = begin_run(**options, mode=mode, settings=settings)
    run.define_metric(X_AXIS)
    run.define_metric("*", step_metric=X_AXIS, step_sync=True)
    if mode == "online":
        write_record(job.folder, wandb_online=True)
    for parent in job.parent_names.values() if mode == "online" else ():
        try:
            run.use_artifact(f"{parent}:latest")
        except (wandb.errors.Error, ValueError):  # trained offline, or its upload failed
            print(f"W&B: the server has no artifact of {parent}: its lineage starts at {run.name}")
    return run


@rank_zero_only
def finish_wandb(job: StageJob, loggers: list[Logger], cost: Mapping[str, float]) -> None:
    """Send the rows that are left and what the finished stage left in its folder, and close the
    W&B run. `cost` as in run.json.

    The tables have a row of their own after the last step, which isn't sent again if a kill came
    after it.
    """
    for held in loggers:
        if isinstance(held, HeldRows):
            held.send(cost["steps"])
            held.run.summary.update(content.last_values(job.folder / "metrics.csv"))
            held.run.summary.update(content.summary(job.folder, cost))
            tables = {
                "ladder": content.ladder_table(job),
                "samples_by_stage": content.samples_by_stage(job),
                "samples": content.samples(job.folder),
            }
            found = {name: as_table(table) for name, table in tables.items() if table[1]}
            last = int(cost["steps"])
            if found and held.sent <= last:
                held.run.log({**found, X_AXIS: last}, step=last + 1, commit=True)
            content.log_model(held.run, job)
            close(held.run)


@rank_zero_only
def abandon_wandb(error: BaseException) -> None:
    """Close the W&B run of a stage that ended early. One that a signal stopped is preempted: it
    isn't failed, and a sweep queues it again; any other has failed. Raises UserError if the stage
    ended because W&B's own process did."""
    wandb = sys.modules.get("wandb")  # None if no logger has imported it
    if wandb is None or wandb.run is None:
        return
    code: Any = 1
    try:
        if isinstance(error, Stopped | KeyboardInterrupt):
            wandb.run.mark_preempting()
            code = error.code if isinstance(error, Stopped) else 128 + signal.SIGINT
        close(wandb.run, code)
    except Exception:  # wandb-core is gone: the next job of a multirun starts another one
        end_core(code)
        if is_lost(error):
            raise UserError(f"W&B's process wandb-core has ended: {AGAIN}") from error


def close(run: Run, code: int = 0) -> None:
    """Finish a W&B run, its debug.log first: on a full disk that fails, after the end was written,
    which W&B then writes again; and `wandb sync` crashes at a log with two ends."""
    log = logging.getLogger("wandb")
    for handler in [h for h in log.handlers if isinstance(h, logging.FileHandler)]:
        log.removeHandler(handler)
        with suppress(OSError):
            handler.close()
    run.finish(exit_code=code)


def as_table(table: content.Table) -> Any:
    import wandb

    columns, rows = table
    return wandb.Table(columns, rows)


def log_benchmarks(folder: Path, outputs: Path) -> None:
    """Log a finished run's public benchmarks, if the run was logged, as a W&B run of their own with
    its name, group and job type (by which the dashboards group) and the tag `benchmark`. The run's
    own W&B run stays closed: one that is opened again offline is a second folder, whose history
    begins anew."""
    record = read_record(folder)
    config = build(LoggerConfig, record["config"].get("logger", {}), "logger")
    mode, _ = wandb_mode(config)
    found = content.benchmark_summary(folder)
    if mode == "disabled" or "wandb" not in record or not found:
        return
    import wandb

    set_up_wandb(outputs)
    tags = [record["stage"], "benchmark", *["debug"] * (record["debug"] is not None)]
    options = {
        "name": folder.name,
        "project": project_of(config),
        "entity": entity_of(config),
        "id": f"{record['wandb']}-benchmark",  # the next call's results replace these
        **labels(record["group"], record["stage"], tags),
        "config": {**record["config"], "run": record["id"]},
        "dir": wandb_folder(outputs).parent,
    }
    quiet = wandb.Settings(silent=True, quiet=True, console="off")
    try:
        resume = "allow" if mode == "online" else None
        run = begin_run(**options, mode=mode, resume=resume, settings=quiet)
    except wandb.errors.Error as error:
        print(f"W&B: {str(error).splitlines()[0]}: logging offline")
        run = begin_run(**options, mode="offline", settings=quiet)
    run.summary.update(found)
    run.finish()


@cache  # once per process: a ladder has five runs
def _say_offline(why: str, folder: Path) -> None:
    runs = f"{shlex.quote(str(folder))}/offline-run-*"
    print(f"W&B: {why}: logging offline; to send it later: wandb sync {runs}")
