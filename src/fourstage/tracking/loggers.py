"""Where metrics go: always to metrics.csv; to W&B (wandb_run.py) unless it is switched off."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from fourstage.files import write_atomic
from fourstage.job import StageJob
from fourstage.tracking.wandb_run import open_wandb
from fourstage.tracking.wandb_settings import set_up_wandb, wandb_mode


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


def check_loggers(job: StageJob) -> None:
    """Raise UserError for a WANDB_ variable that W&B refuses, before the stage does anything."""
    if rank_zero_only.rank == 0 and wandb_mode(job.logger)[0] != "disabled":
        set_up_wandb(job.outputs)


def build_loggers(job: StageJob) -> list[Logger]:
    """metrics.csv, and W&B unless it is switched off. Raises UserError for a WANDB_ variable that
    W&B refuses or that would make two stages one run."""
    metrics = MetricsCSV(job.folder / "metrics.csv", resume=job.resume)
    held = open_wandb(job) if rank_zero_only.rank == 0 else None
    return [metrics] if held is None else [metrics, held]
