"""Where metrics go: metrics.csv always; W&B online when a key is configured, else offline.

A W&B run holds, beside the columns of metrics.csv:

    summary eval/<name>            the value, under the metric's name in stages.json
            eval_low/, eval_high/  the ends of its 95 % interval: keys of their own, since W&B's
                                   charts and its table of runs take single numbers
            eval_random/<name>     pretrain only: the row of random weights
            cost/<name>            the cost in run.json
    tables  samples                answers to the fixed prompts while training: the whole history
            samples_by_stage       one row a prompt, one column a stage of this ladder so far
            ladder                 all that this run measured: its own row, and what it finds of
                                   earlier rows, whose W&B runs are closed (ladder_eval.json)
    model   the weights as an artifact, made from those of its parents: W&B draws the lineage
            (offline W&B takes no inputs: the parents' names are in config and metadata)
"""

from __future__ import annotations

import csv
import io
import netrc
import os
import secrets
import shlex
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from fourstage.errors import UserError
from fourstage.files import read_json, read_jsonl, write_atomic
from fourstage.job import LoggerConfig, StageJob
from fourstage.ladder import stages
from fourstage.runs.records import read_record, write_record

if TYPE_CHECKING:
    from wandb import Run

Table = tuple[list[str], list[list[Any]]]  # columns, rows


class MetricsCSV(Logger):
    """metrics.csv: one row a step, column `step` first; other columns appear when first logged.

    With `resume` the old rows are kept, and those after the resumed step are dropped (`keep`).
    A kill leaves a readable file: rows are appended whole, everything else is written atomically.
    """

    name = "csv"
    version = ""

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        super().__init__()
        self.path = path
        self.columns = ["step"]
        self.rows: list[dict[str, str]] = []
        if resume and path.exists():
            text = path.read_text(encoding="utf-8")
            reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
            self.rows = list(reader)
            self.columns = list(reader.fieldnames or self.columns)

    @rank_zero_only
    def keep(self, step: int) -> None:
        """Drop the rows after `step`, which will be logged again."""
        self.rows = [row for row in self.rows if int(row["step"]) <= step]
        self._rewrite()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        cells = {name: f"{value:.9g}" for name, value in metrics.items() if name != "epoch"}
        new = [name for name in cells if name not in self.columns]
        self.columns += new
        same = bool(self.rows) and self.rows[-1]["step"] == str(step)
        if same:
            self.rows[-1].update(cells)
        else:
            self.rows.append({"step": str(step), **cells})
        if new or same:
            self._rewrite()
        else:
            with open(self.path, "a", encoding="utf-8", newline="") as file:
                file.write(self._text(self.rows[-1:]))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are in run.json."""

    def _rewrite(self) -> None:
        header = {name: name for name in self.columns}
        write_atomic(self.path, self._text([header, *self.rows]))

    def _text(self, rows: list[dict[str, str]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, restval="", lineterminator="\n").writerows(rows)
        return text.getvalue()


def build_loggers(job: StageJob) -> list[Logger]:
    """metrics.csv always, and W&B unless it is switched off.

    Never raises for a missing key or server: W&B then logs offline, and one line says so. Raises
    UserError for a WANDB_ variable that W&B refuses.
    """
    loggers: list[Logger] = [MetricsCSV(job.folder / "metrics.csv", resume=job.resume)]
    mode, why = wandb_mode(job.logger)
    if mode == "disabled" or rank_zero_only.rank != 0:
        return loggers
    import wandb
    from pydantic import ValidationError

    folder = job.outputs.resolve() / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_DATA_DIR", str(folder))  # artifact files, else in the home folder
    os.environ.pop("WANDB_RUN_ID", None)  # it would be that of every stage
    if os.path.expanduser("~") == "~":  # in a container, as a user that it doesn't know
        os.environ["HOME"] = str(folder)
    try:
        wandb.setup()  # reads the WANDB_ variables
    except wandb.errors.UsageError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"W&B: {reason}: correct its variable, or take logger=none") from None
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(
            f"WANDB_{'_'.join(map(str, wrong['loc'])).upper()}: {wrong['msg']}, got "
            f"{wrong['input']!r}: correct it, unset it, or take logger=none"
        ) from None
    if mode == "online":
        try:
            return [*loggers, WandbLogger(experiment=start_wandb(job, "online"))]
        except wandb.errors.Error as error:
            why = str(error).splitlines()[0]
    if why:
        _say_offline(why, folder)
    return [*loggers, WandbLogger(experiment=start_wandb(job, "offline"))]


def start_wandb(job: StageJob, mode: Literal["online", "offline"]) -> Run:
    """One W&B run for one stage run, the same one after a resume; online it uses the artifacts of
    its parents. Raises wandb.errors.Error where the server cannot be reached."""
    import wandb

    wandb.finish()  # a run that an earlier job of this process left open
    stored = read_record(job.folder).get("wandb") if job.resume else None
    tags = [job.stage, job.model.name, job.data.name, f"seed{job.seed}"]
    run = wandb.init(
        name=job.name,
        project=job.logger.project,
        entity=job.logger.entity,
        id=stored or secrets.token_hex(4),
        resume="allow" if mode == "online" else None,
        group=job.group,
        job_type=job.stage,
        tags=[*tags, "debug", f"debug-{job.debug}"] if job.debug else tags,
        config={**job.config, "run": job.run_id, "parents": _names(job)},
        dir=job.outputs.resolve(),  # W&B adds /wandb
        mode=mode,
        settings=wandb.Settings(silent=mode == "offline", quiet=True, console="off"),
    )
    run.define_metric("trainer/global_step")  # WandbLogger's x axis
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    write_record(job.folder, wandb=run.id)
    if mode == "online":
        for parent in _names(job).values():
            _link_parent(run, parent)
    return run


def _link_parent(run: Run, parent: str) -> None:
    import wandb

    try:
        run.use_artifact(f"{parent}:latest")
    except (wandb.errors.Error, ValueError):  # trained offline, or its upload failed
        print(f"W&B: no artifact of {parent} on the server: the lineage there stops at {run.name}")


@rank_zero_only
def finish_wandb(job: StageJob, cost: Mapping[str, float] | None = None) -> None:
    """Log what the finished stage left in its folder, and close the W&B run.

    `cost` as in run.json; without it the stage has failed: nothing is logged, and the run is closed
    as failed.
    """
    wandb = sys.modules.get("wandb")  # None where no logger has asked for it: it may not be there
    if wandb is None or wandb.run is None:
        return
    if cost is None:
        wandb.finish(exit_code=1)
        return
    wandb.run.summary.update(summary(job.folder, cost))
    tables = {"ladder": ladder_table(job), "samples_by_stage": samples_by_stage(job)}
    wandb.run.log(
        {name: wandb.Table(columns, rows) for name, (columns, rows) in tables.items() if rows}
    )
    _log_model(wandb.run, job)
    wandb.finish()


def summary(folder: Path, cost: Mapping[str, float]) -> dict[str, float]:
    """What a W&B run's summary says of a finished stage: eval*/<name> and cost/<name>."""
    found = {f"cost/{name}": value for name, value in cost.items()}
    for name, cell in _measured(folder / "eval.json").items():
        found |= {
            f"eval/{name}": cell["value"],
            f"eval_low/{name}": cell["low"],
            f"eval_high/{name}": cell["high"],
        }
    for name, cell in _measured(folder / "eval_random.json").items():
        found[f"eval_random/{name}"] = cell["value"]
    return found


def _measured(path: Path) -> dict[str, Any]:
    """The metrics of an evaluation that have a value; none where there is no such file."""
    return _with_values(read_json(path)["metrics"]) if path.exists() else {}


def _with_values(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: cell for name, cell in metrics.items() if cell["value"] is not None}


def ladder_table(job: StageJob) -> Table:
    """Every metric that this run measured, of its own row and of earlier ones, with intervals."""
    found = [
        ("random", "", _measured(job.folder / "eval_random.json")),
        (job.stage, job.run_id, _measured(job.folder / "eval.json")),
    ]
    late = job.folder / "ladder_eval.json"
    if late.exists():
        stages = {folder.name.split("-")[1]: stage for stage, folder in job.ancestors.items()}
        for run_id, metrics in read_json(late).items():
            row = ("random", "") if run_id == "random" else (stages[run_id], run_id)
            found.append((*row, _with_values(metrics)))
    columns = ["row", "run", "metric", "value", "low", "high", "n"]
    return columns, [
        [row, run, name, *(cell[key] for key in columns[3:])]
        for row, run, metrics in found
        for name, cell in metrics.items()
    ]


def _samples(path: Path) -> list[dict[str, Any]]:
    """The sample answers of a run; none where its file is missing or broken."""
    try:
        return [row for row in read_jsonl(path) if {"prompt_id", "prompt", "answer"} <= set(row)]
    except (OSError, ValueError):
        return []


def samples_by_stage(job: StageJob) -> Table:
    """The last answers of random weights and of each stage so far, side by side: a row a prompt.

    No rows for a stage that answers nothing (reward).
    """
    folders = {**job.ancestors, job.stage: job.folder}
    prompts: dict[str, str] = {}
    answers: dict[str, dict[str, str]] = {}  # row of the ladder -> prompt id -> answer
    if (job.folder / "samples.jsonl").exists():
        paths = {s: folders[s] / "samples.jsonl" for s in stages() if s in folders}
        for stage, path in paths.items():
            for sample in _samples(path):
                row = "random" if sample["step"] == 0 else stage
                prompts[sample["prompt_id"]] = sample["prompt"]
                # in order of the steps: the last answer stays
                answers.setdefault(row, {})[sample["prompt_id"]] = sample["answer"]
    columns = ["prompt_id", "prompt", *answers]
    return columns, [
        [name, prompt, *(by_prompt.get(name) for by_prompt in answers.values())]
        for name, prompt in prompts.items()
    ]


def _log_model(run: Run, job: StageJob) -> None:
    """The weights as an artifact, so that W&B draws the lineage.

    They are read from the run's folder when they are uploaded (offline: by `wandb sync`), not
    copied, which would double the disk use. Only a retrained run's folder is about to move.
    """
    import wandb

    artifact = wandb.Artifact(
        job.name,
        type="model",
        metadata={"stage": job.stage, "parents": _names(job), "debug": job.debug},
    )
    stays = job.folder.parent.name == "runs"
    artifact.add_file(
        str(job.folder / "model.safetensors"),
        policy="immutable" if stays else "mutable",
        skip_cache=True,
    )
    for name in ("config.json", "tokenizer.json", "run.json"):  # run.json is yet to change
        artifact.add_file(str(job.folder / name))
    run.log_artifact(artifact)


def _names(job: StageJob) -> dict[str, str]:
    return {role: folder.name for role, folder in job.parents.items()}


def wandb_mode(config: LoggerConfig) -> tuple[str, str]:
    """("online" | "offline" | "disabled", why it is offline though nobody asked for that).

    The config's mode comes first, then WANDB_MODE, then whether a key is there; no network is used.
    """
    if config.name == "none":
        return "disabled", ""
    mode = config.mode
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "auto").lower()
        mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
    if mode in ("offline", "disabled"):
        return mode, ""
    return ("online", "") if has_key() else ("offline", "no API key")


def has_key() -> bool:
    """Whether W&B would find a key without asking: in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            if netrc.netrc(file).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


@cache  # once a process: a ladder has five runs
def _say_offline(why: str, folder: Path) -> None:
    runs = f"{shlex.quote(str(folder))}/offline-run-*"
    print(f"W&B: {why}: logging offline; to send it later: wandb sync {runs}")
