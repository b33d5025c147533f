"""Where metrics go: metrics.csv always; W&B online when a key is configured, else offline."""

from __future__ import annotations

import csv
import io
import netrc
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from fourstage.job import LoggerConfig, StageJob, read_record, write_atomic, write_record

if TYPE_CHECKING:
    from wandb import Run


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

    Never raises for a missing key or server: W&B then logs offline, and one line says so.
    """
    loggers: list[Logger] = [MetricsCSV(job.folder / "metrics.csv", resume=job.resume)]
    mode, why = wandb_mode(job.logger)
    if mode == "disabled" or rank_zero_only.rank != 0:
        return loggers
    import wandb

    folder = job.outputs.resolve() / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_DATA_DIR", str(folder))  # artifact files, else in the home folder
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
    tags = [job.stage, job.model.name, job.data.name, f"seed{job.seed}"]
    run = wandb.init(
        name=job.name,
        project=job.logger.project,
        entity=job.logger.entity,
        id=read_record(job.folder).get("wandb") if job.resume else None,
        resume="allow" if mode == "online" else None,
        group=job.group,
        job_type=job.stage,
        tags=[*tags, f"debug-{job.debug}"] if job.debug else tags,
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
    """Upload the model (online only), so that W&B draws the lineage, and close the W&B run.

    cost: what the stage cost, for the run's summary; None where it did not finish.
    """
    import wandb

    if wandb.run is None:
        return
    if cost is not None:
        wandb.run.summary.update({f"cost/{name}": value for name, value in cost.items()})
    if not wandb.run.offline and (job.folder / "model.safetensors").exists():
        artifact = wandb.Artifact(job.name, type="model")
        for name in ("model.safetensors", "config.json", "tokenizer.json", "run.json"):
            artifact.add_file(str(job.folder / name))
        wandb.run.log_artifact(artifact)
    wandb.finish()


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
    print(f"W&B: {why}: logging offline; to send it later: wandb sync {folder}/offline-run-*")
