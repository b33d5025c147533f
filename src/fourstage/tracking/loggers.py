"""Where metrics go: always to metrics.csv; to W&B online if a key is configured, else offline.

A W&B run holds, besides the columns of metrics.csv:

    summary eval/<name>            the value, under the metric's name in stages.json
            eval_low/, eval_high/  the ends of its 95 % interval: separate keys, because W&B's
                                   charts and its table of runs take single numbers
            eval_random/<name>     pretrain only: the row of random weights, or of the checkpoint
            cost/<name>            the cost in run.json
            benchmark*/<key>       public benchmarks, in a W&B run of their own (log_benchmarks)
    tables  samples                answers to the fixed prompts while training: the whole history
            samples_by_stage       one row per prompt, one column per stage of this ladder so far
            ladder                 everything this run measured: its own row, and what it adds to
                                   earlier rows, whose W&B runs are closed (ladder_eval.json)
    model   the weights as an artifact, made from those of its parents, so that W&B draws the
            lineage (offline, the parents' names are in config and metadata)
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
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from fourstage.errors import UserError
from fourstage.files import read_json, read_jsonl, write_atomic
from fourstage.job import LoggerConfig, StageJob
from fourstage.ladder import LADDER, stages
from fourstage.runs.benchmarks import FILE, START_FILE, read_benchmarks
from fourstage.runs.records import read_record, start_name, write_record
from fourstage.settings import build

if TYPE_CHECKING:
    from wandb import Run

Table = tuple[list[str], list[list[Any]]]  # columns, rows


class MetricsCSV(Logger):
    """metrics.csv: one row per step, column `step` first; other columns appear when first logged.

    With `resume` the old rows are kept up to the resumed step (`keep`). A kill leaves a readable
    file: whole rows are appended, everything else is written atomically.
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
    """metrics.csv, and W&B unless it is switched off.

    Without a key or server W&B logs offline, and one line says so. Raises UserError for a WANDB_
    variable that W&B refuses.
    """
    loggers: list[Logger] = [MetricsCSV(job.folder / "metrics.csv", resume=job.resume)]
    mode, why = wandb_mode(job.logger)
    if mode == "disabled" or rank_zero_only.rank != 0:
        return loggers
    import wandb

    folder = set_up_wandb(job.outputs)
    if mode == "online":
        try:
            return [*loggers, WandbLogger(experiment=start_wandb(job, "online"))]
        except wandb.errors.Error as error:
            why = str(error).splitlines()[0]
    if why:
        _say_offline(why, folder)
    return [*loggers, WandbLogger(experiment=start_wandb(job, "offline"))]


def set_up_wandb(outputs: Path) -> Path:
    """Make W&B's folder and have it read its variables. Raises UserError for one it refuses."""
    import wandb
    from pydantic import ValidationError

    folder = outputs.resolve() / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_DATA_DIR", str(folder))  # for artifacts; default: the home folder
    os.environ.pop("WANDB_RUN_ID", None)  # every stage would have this id
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
    return folder


def start_wandb(job: StageJob, mode: Literal["online", "offline"]) -> Run:
    """One W&B run per stage run, the same one after a resume; online it uses its parents'
    artifacts. Raises wandb.errors.Error if the server can't be reached."""
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
        config={**job.config, "run": job.run_id, "parents": job.parent_names},
        dir=job.outputs.resolve(),  # W&B adds /wandb
        mode=mode,
        settings=wandb.Settings(silent=mode == "offline", quiet=True, console="off"),
    )
    run.define_metric("trainer/global_step")  # WandbLogger's x axis
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    write_record(job.folder, wandb=run.id)
    for parent in job.parent_names.values() if mode == "online" else ():
        try:
            run.use_artifact(f"{parent}:latest")
        except (wandb.errors.Error, ValueError):  # trained offline, or its upload failed
            print(f"W&B: the server has no artifact of {parent}: its lineage starts at {run.name}")
    return run


@rank_zero_only
def finish_wandb(job: StageJob, cost: Mapping[str, float] | None = None) -> None:
    """Log what the finished stage left in its folder, and close the W&B run.

    `cost` as in run.json; without it the stage has failed, and so has the W&B run.
    """
    wandb = sys.modules.get("wandb")  # None if no logger has imported it
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
    for name, cell in _stored(folder / "eval.json").items():
        found |= {
            f"eval/{name}": cell["value"],
            f"eval_low/{name}": cell["low"],
            f"eval_high/{name}": cell["high"],
        }
    for name, cell in _stored(folder / "eval_random.json").items():
        found[f"eval_random/{name}"] = cell["value"]
    return found


def _stored(path: Path) -> dict[str, Any]:
    """The metrics of an evaluation that have a value; none if there is no such file."""
    return _with_values(read_json(path)["metrics"]) if path.exists() else {}


def _with_values(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: cell for name, cell in metrics.items() if cell["value"] is not None}


def log_benchmarks(folder: Path, outputs: Path) -> None:
    """Log a finished run's public benchmarks, if the run was logged, as a W&B run of their own with
    its name, group and job type (by which the dashboards group) and the tag `benchmark`. The run's
    own W&B run stays closed: one that is opened again offline is a second folder, whose history
    begins anew."""
    record = read_record(folder)
    config = build(LoggerConfig, record["config"].get("logger", {}), "logger")
    mode, _ = wandb_mode(config)
    found = benchmark_summary(folder)
    if mode == "disabled" or "wandb" not in record or not found:
        return
    import wandb

    set_up_wandb(outputs)
    options = {
        "name": folder.name,
        "project": config.project,
        "entity": config.entity,
        "id": f"{record['wandb']}-benchmark",  # the next call's results replace these
        "group": record["group"],
        "job_type": record["stage"],
        "tags": [record["stage"], "benchmark", *["debug"] * (record["debug"] is not None)],
        "config": {**record["config"], "run": record["id"]},
        "dir": outputs.resolve(),
    }
    quiet = wandb.Settings(silent=True, quiet=True, console="off")
    try:
        resume = "allow" if mode == "online" else None
        run = wandb.init(**options, mode=mode, resume=resume, settings=quiet)
    except wandb.errors.Error as error:
        print(f"W&B: {str(error).splitlines()[0]}: logging offline")
        run = wandb.init(**options, mode="offline", settings=quiet)
    run.summary.update(found)
    run.finish()


def benchmark_summary(folder: Path) -> dict[str, float]:
    """benchmark/<task>/<metric>, benchmark_low/ and benchmark_high/; in the first stage's run
    benchmark_random/ for what the ladder starts from. Raises OSError, ValueError."""
    found: dict[str, float | None] = {}
    for one in read_benchmarks(folder / FILE):
        name = one.key.removeprefix("benchmark/")
        found |= {f"benchmark/{name}": one.value}
        found |= {f"benchmark_low/{name}": one.low, f"benchmark_high/{name}": one.high}
    for one in read_benchmarks(folder / START_FILE):
        found[f"benchmark_random/{one.key.removeprefix('benchmark/')}"] = one.value
    return {name: value for name, value in found.items() if value is not None}


def ladder_table(job: StageJob) -> Table:
    """Every metric that this run measured, of its own row and of earlier ones, with intervals."""
    first = start_row(job)
    names = {"random": first} | {f.name.split("-")[1]: s for s, f in job.ancestors.items()}
    late = job.folder / "ladder_eval.json"
    found = [
        (first, "", _stored(job.folder / "eval_random.json")),
        (job.stage, job.run_id, _stored(job.folder / "eval.json")),
    ]
    for run_id, metrics in (read_json(late) if late.exists() else {}).items():
        found.append((names[run_id], run_id.replace("random", ""), _with_values(metrics)))
    columns = ["row", "run", "metric", "value", "low", "high", "n"]
    return columns, [
        [row, run, name, *(cell[key] for key in columns[3:])]
        for row, run, metrics in found
        for name, cell in metrics.items()
    ]


def start_row(job: StageJob) -> str:
    """What the row is called that the ladder starts from, as in its report."""
    folders = {**job.ancestors, job.stage: job.folder}
    first = next((folder for s, folder in folders.items() if not LADDER[s].parents), None)
    with suppress(UserError):  # a broken record
        return "random" if first is None else start_name(read_record(first))
    return "random"


def samples_by_stage(job: StageJob) -> Table:
    """The last answers of what the ladder starts from and of each stage so far: a row per prompt.

    No rows for a stage that answers nothing (reward); a broken file of an ancestor is left out.
    """
    folders = {**job.ancestors, job.stage: job.folder}
    prompts: dict[str, str] = {}
    answers: dict[str, dict[str, str]] = {}  # row of the ladder -> prompt id -> answer
    answers_here = (job.folder / "samples.jsonl").exists()
    for stage in [stage for stage in stages() if stage in folders and answers_here]:
        with suppress(OSError, ValueError, KeyError):
            for sample in read_jsonl(folders[stage] / "samples.jsonl"):
                row = start_row(job) if sample["step"] == 0 else stage
                name = sample["prompt_id"]
                # in order of the steps: the last answer stays
                answers.setdefault(row, {})[name] = sample["answer"]
                prompts[name] = sample["prompt"]
    columns = ["prompt_id", "prompt", *answers]
    return columns, [
        [name, prompt, *(by_prompt.get(name) for by_prompt in answers.values())]
        for name, prompt in prompts.items()
    ]


def _log_model(run: Run, job: StageJob) -> None:
    """Log the weights as an artifact, so that W&B draws the lineage.

    They are uploaded from the run's folder (offline: by `wandb sync`); a copy would double the disk
    use. Only a retrained run's weights are copied, because its folder is about to move.
    """
    import wandb

    artifact = wandb.Artifact(
        job.name,
        type="model",
        metadata={"stage": job.stage, "parents": job.parent_names, "debug": job.debug},
    )
    stays = job.folder.parent.name == "runs"
    artifact.add_file(
        str(job.folder / "model.safetensors"),
        policy="immutable" if stays else "mutable",
        skip_cache=True,
    )
    for name in ("config.json", "tokenizer.json", "run.json"):  # run.json is yet to change
        artifact.add_file(str(job.folder / name))
    for name in ("tokenizer_config.json", "generation_config.json"):  # the chat template, the ends
        if (job.folder / name).exists():
            artifact.add_file(str(job.folder / name))
    run.log_artifact(artifact)


def wandb_mode(config: LoggerConfig) -> tuple[str, str]:
    """("online" | "offline" | "disabled", why it is offline if nobody asked for that).

    The config's mode comes first, then WANDB_MODE, then whether there is a key; uses no network.
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
    """Whether W&B would find a key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    named = os.environ.get("NETRC")
    for file in [named] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(file).authenticators(host):
                return True
    return False


@cache  # once per process: a ladder has five runs
def _say_offline(why: str, folder: Path) -> None:
    runs = f"{shlex.quote(str(folder))}/offline-run-*"
    print(f"W&B: {why}: logging offline; to send it later: wandb sync {runs}")
