"""What W&B gets of a stage.

A run holds, besides the columns of metrics.csv:

    summary eval/<name>            the value, under the metric's name in stages.json
            eval_low/, eval_high/  the ends of its 95 % interval: separate keys, because W&B's
                                   charts and its table of runs take single numbers
            eval_random/<name>     pretrain only: the row of random weights, or of the checkpoint
            cost/<name>            the cost in run.json
            benchmark*/<key>       public benchmarks, in a W&B run of their own (log_benchmarks)
    tables  samples                answers to the fixed prompts: while training those of the step,
                                   at the end all of them
            samples_by_stage       one row per prompt, two columns per stage of this ladder so far
            ladder                 everything this run measured: its own row, and what it adds to
                                   earlier rows, whose W&B runs are closed (ladder_eval.json)
    model   the weights as an artifact, made from those of its parents, so that W&B draws the
            lineage (offline, the parents' names are in config and metadata)
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourstage.errors import UserError
from fourstage.files import read_json, read_jsonl
from fourstage.job import StageJob
from fourstage.ladder import LADDER, stages
from fourstage.runs.benchmarks import FILE, START_FILE, read_benchmarks
from fourstage.runs.records import read_record, start_name

if TYPE_CHECKING:
    from wandb import Run

Table = tuple[list[str], list[list[Any]]]  # columns, rows
SAMPLE = ["step", "prompt_id", "prompt", "answer", "stopped", "right"]
NEITHER = (None, None)  # no answer, and nothing that is right


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


def last_values(metrics: Path) -> dict[str, float]:
    """The last value of each column of metrics.csv, for runs that went on in several folders."""
    with open(metrics, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {k: float(v) for row in rows for k, v in row.items() if v and k != "step"}


def _stored(path: Path) -> dict[str, Any]:
    """The metrics of an evaluation that have a value; none if there is no such file."""
    return _with_values(read_json(path)["metrics"]) if path.exists() else {}


def _with_values(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: cell for name, cell in metrics.items() if cell["value"] is not None}


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
    """The last answers of what the ladder starts from and of each stage so far, and whether each
    is right: a row per prompt.

    No rows for a stage that answers nothing (reward); a broken file of an ancestor is left out.
    """
    folders = {**job.ancestors, job.stage: job.folder}
    prompts: dict[str, str] = {}
    said: dict[str, dict[str, list[Any]]] = {}  # row of the ladder -> prompt id -> answer, right
    answers_here = (job.folder / "samples.jsonl").exists()
    for stage in [stage for stage in stages() if stage in folders and answers_here]:
        with suppress(OSError, ValueError, KeyError):
            for sample in read_jsonl(folders[stage] / "samples.jsonl"):
                row = start_row(job) if sample["step"] == 0 else stage
                name = sample["prompt_id"]
                # in order of the steps: the last answer stays
                said.setdefault(row, {})[name] = [sample["answer"], sample.get("right")]
                prompts[name] = sample["prompt"]
    columns = ["prompt_id", "prompt"]
    for row in said:
        columns += [row, f"{row}: right"]
    return columns, [
        [name, prompt, *(cell for answers in said.values() for cell in answers.get(name, NEITHER))]
        for name, prompt in prompts.items()
    ]


def samples(folder: Path) -> Table:
    """All that a run answered, a row per step and prompt; none if it answers nothing."""
    path = folder / "samples.jsonl"
    return sample_table(read_jsonl(path) if path.exists() else [])


def sample_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of samples.jsonl as a table; files of earlier versions have no "right"."""
    return SAMPLE, [[row.get(name) for name in SAMPLE] for row in rows]


def log_model(run: Run, job: StageJob) -> None:
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
