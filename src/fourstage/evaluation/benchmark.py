"""Measure a run by public benchmarks: the tasks of lm-eval, or task files of your own.

    python -m fourstage benchmark run=NAME tasks=TASK[,TASK…] [ladder=true] [limit=N]
                                  [num_fewshot=N] [include_path=FOLDER] [batch_size=N]

For example:

    python -m fourstage benchmark run=grpo ladder=true tasks=arc_easy,hellaswag,gsm8k limit=200
    python -m fourstage benchmark run=sft tasks=my_task include_path=my_tasks

It needs the extra `lm-eval`, and each task's data. The results are kept in the run's folder
(benchmark.json), and shown by `report` and `report compare`. ladder=true measures the run's
ancestors and what the ladder started from too. limit=N takes the first N items of each task. Other
settings: outputs=outputs. docs/benchmarks.md says how a model is asked, and what chance is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from fourstage.errors import UserError
from fourstage.files import expanded, locked, remove
from fourstage.interruptions import handle_stops, run_command, stop_now
from fourstage.ladder import LADDER
from fourstage.runs.benchmarks import FILE, START_FILE, Benchmark, add_benchmarks, read_benchmarks
from fourstage.runs.records import read_record, start_name
from fourstage.runs.store import RunStore
from fourstage.settings import Bounded, at_least, from_arguments

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(Bounded):
    """The command line."""

    run: str = ""
    tasks: str = ""
    ladder: bool = False
    limit: int | None = at_least(1, default=None)
    num_fewshot: int | None = at_least(0, default=None)
    include_path: str | None = None
    batch_size: int = at_least(1, default=16)
    outputs: str = "outputs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.run:
            raise UserError("run: name a run, as in run=sft (see --help)")
        if not self.names:
            raise UserError("tasks: name one or more, as in tasks=arc_easy,gsm8k (see --help)")
        if self.include_path is not None and not expanded(self.include_path).is_dir():
            raise UserError(f"include_path: there is no folder {self.include_path}")

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(filter(None, (x.strip() for x in self.tasks.split(",")))))


@dataclass(frozen=True)
class Subject:
    """A row of the ladder to measure: `export` writes its model into a new folder."""

    name: str
    file: Path  # where its results go
    export: Callable[[Path], None]
    is_chat: bool


def subjects(store: RunStore, folder: Path, with_ladder: bool) -> list[Subject]:
    """A run, after what leads to it if `with_ladder`. Raises UserError for a run that holds no
    language model."""
    from fourstage.exchange.export import export_run

    stage = read_record(folder)["stage"]
    if LADDER[stage].leaves != "policy":
        raise UserError(
            f"{folder.name}: holds a reward model, which gives no answers: name another run"
        )
    line = store.ancestors(folder) if with_ladder else {}
    found = []
    for name, run in {**line, stage: folder}.items():
        is_first = not LADDER[name].parents
        if is_first and with_ladder:
            start = partial(export_start, store, run)
            found.append(Subject(start_name(read_record(run)), run / START_FILE, start, False))
        if LADDER[name].leaves == "policy":
            found.append(Subject(name, run / FILE, partial(export_run, run), not is_first))
    return found


def export_start(store: RunStore, run: Path, to: Path) -> None:
    """The weights that a first stage's run started from: drawn again from its seed, or those of a
    checkpoint."""
    from fourstage.evaluation.run import checked_config, recorded_job, start_weights
    from fourstage.exchange.export import write_folder
    from fourstage.tokenizer import Tokenizer

    record = read_record(run)
    job = recorded_job(run, record, checked_config(run, record), {}, store.outputs)
    tokenizer = Tokenizer.load(run)
    write_folder(to, start_weights(job, tokenizer), tokenizer)


@contextmanager
def exported(row: Subject, outputs: Path) -> Iterator[Path]:
    """A folder with the subject's model, removed afterwards; one that a kill has left, before."""
    folder, lock = outputs / "benchmark-model", outputs / "locks" / "benchmark.lock"
    lock.parent.mkdir(exist_ok=True)
    with locked(FileLock(lock), str(folder)):
        try:
            remove(folder)
            row.export(folder)
            yield folder
        finally:
            remove(folder)
            lock.unlink(missing_ok=True)


def check_files(files: Sequence[Path]) -> None:
    """Raise UserError for a file of results that can't be added to."""
    for path in files:
        try:
            read_benchmarks(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: broken ({error}): remove it") from None


# --- what is printed


def line(row: str, found: Sequence[Benchmark]) -> str:
    """What a subject got in a task, and what was not as the task wants it."""
    one = found[0]
    parts = [f"{x.shown_metric} {x.measured} (chance {x.guessed})" for x in found]
    if one.truncated:
        parts.append(f"{one.truncated} of {one.n} prompts truncated on the left")
    return f"{row}: {one.task}: {', '.join(parts)}"


def table(results: Mapping[Subject, Sequence[Benchmark]]) -> Table:
    """A row for each subject, a column for each metric, and below them what guessing gives."""
    from rich.table import Column, Table

    some = next(iter(results.values()))
    titles = [f"{one.task}\n{one.shown_metric}, n {one.n}" for one in some]
    shown = Table(Column(no_wrap=True), *(Column(title, overflow="fold") for title in titles))
    for row, found in results.items():
        shown.add_row(row.name, *(one.measured for one in found))
    shown.add_row("chance", *(one.guessed for one in some))
    return shown


# --- the command


def benchmark(
    settings: BenchmarkSettings, tell: Callable[[str], None] = print
) -> dict[Subject, list[Benchmark]]:
    """Measure and write, a file at a time. Raises UserError for a mistake."""
    store = RunStore(Path(settings.outputs))
    rows = subjects(store, store.find(settings.run), settings.ladder)
    check_files([row.file for row in rows])
    if settings.ladder and rows[0].file.name != START_FILE:
        tell(f"{rows[0].name}: no run in {store.root} that it started from: left out")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "benchmark needs lm-eval: install it with `pip install -c constraints.txt "
            "-e '.[lm-eval]'` in the repository"
        )
    from fourstage.evaluation import harness

    folder = expanded(settings.include_path) if settings.include_path else None
    items = harness.load_tasks(settings.names, folder)
    sizes = [f"{name} ({harness.count_items(x, settings.limit)})" for name, x in items.items()]
    tell(f"{', '.join(row.name for row in rows)} on {', '.join(sizes)}")
    results: dict[Subject, list[Benchmark]] = {row: [] for row in rows}
    for row in rows:
        with exported(row, store.outputs) as model_folder, harness.quiet():
            model = harness.Model(model_folder, settings.batch_size)
        for name, item in items.items():
            found = harness.measure(
                model,
                name,
                item,
                is_chat=row.is_chat,
                limit=settings.limit,
                num_fewshot=settings.num_fewshot,
            )
            if dropped := add_benchmarks(row.file, harness.VERSION, found):
                tell(f"{row.file}: {len(dropped)} results of another lm-eval were dropped")
            results[row] += found
            tell(line(row.name, found))
    return results


def main(arguments: list[str]) -> None:
    """Measure by public benchmarks. Raises UserError for a mistake in the command."""
    from rich.console import Console

    from fourstage.tracking.wandb_run import log_benchmarks

    settings = from_arguments(BenchmarkSettings, arguments)
    handle_stops(stop_now)  # so that the exported model is removed
    results = benchmark(settings, partial(print, flush=True))
    for folder in dict.fromkeys(row.file.parent for row in results):
        log_benchmarks(folder, Path(settings.outputs))
    Console(markup=False).print(table(results))  # a task's name may hold brackets


if __name__ == "__main__":
    run_command(main)
