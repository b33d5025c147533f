"""Which runs make a ladder, and what was measured of each: the rows of the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fourstage.errors import UserError
from fourstage.evaluation import suite
from fourstage.ladder import LADDER, REFERENCE, REWARD, place, stages
from fourstage.report.files import FAULTS, Files, Item, Metric, Sample, is_number
from fourstage.runs.benchmarks import Benchmark
from fourstage.runs.records import read_record, start_name
from fourstage.runs.store import find_run

# the columns of the stage table; the last is the reward models', the others are the policies'
HEADLINES = (
    "bits_per_char",
    "well_formed",
    "reasoning_accuracy",
    "true_score",
    "reward_model_score",
    "pair_accuracy",
)
RANDOM = "random"  # the row of random weights
ANSWERED = ("chat", "chat_greedy", "reasoning", "reasoning_sampled")  # sets of answers


@dataclass(frozen=True)
class Run:
    """A run that has a valid run.json."""

    folder: Path
    stage: str
    id: str
    parents: dict[str, str]  # role ("policy", "reward") -> id, the policy first
    record: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.id}"

    @property
    def is_finished(self) -> bool:
        return self.record["status"] == "finished"

    @property
    def is_debug(self) -> bool:
        return self.record["debug"] is not None

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config that it was trained with."""
        return self.record["config"]

    @property
    def rank(self) -> tuple[str, int, str]:
        """Largest for the latest finished (ISO times in UTC), then the furthest up the ladder."""
        return self.record.get("finished") or "", place(self.stage), self.id

    def facts(self) -> dict[str, str]:
        """What was trained, for the report's first line."""
        parts = {key: self.config.get(key, {}) for key in ("model", "data", "tokenizer")}
        found = {key: str(part["name"]) for key, part in parts.items() if "name" in part}
        sources = [(name, x) for name, x in parts["data"].items() if isinstance(x, dict)]
        own = [name for name, source in sources if source.get("path")]
        if own and found.get("data") == "embedded":
            found["data"] += f" with files of {', '.join(own)}"
        found |= {"seed": str(self.config["seed"]), "on": str(self.record.get("device", "?"))}
        return found

    def costs(self) -> dict[str, float]:
        """The numbers under "cost" in run.json: seconds, tokens, ..."""
        return {k: v for k, v in self.record["cost"].items() if is_number(v)}

    def data_notes(self) -> dict[str, float]:
        """How many items of the data were used, truncated, dropped."""
        costs = self.costs()
        return {k.removeprefix("data_"): n for k, n in costs.items() if k.startswith("data_")}


@dataclass(frozen=True)
class Row:
    """A row of the stage table; run is None for what the ladder starts from, random weights or a
    pretrained checkpoint."""

    stage: str  # "random", a stage, or the checkpoint's name
    run: Run | None
    folder: Path  # which holds its evaluation: pretrain's for the start
    suite: str  # of its evaluation; "" if that can't be read
    seed: int
    metrics: dict[str, Metric]
    items: list[Item]  # what the metrics are computed from, with later models' judgements
    answers: dict[str, Sample]  # by prompt
    parent: Row | None  # the policy that it started from, if that row is there
    differences: dict[str, Metric] = field(default_factory=dict)  # to the parent, paired
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)  # by key

    @property
    def id(self) -> str | None:
        return self.run.id if self.run else None

    @property
    def is_random(self) -> bool:
        """Whether it is of random weights, which have nothing to lose."""
        return self.run is None and self.stage == RANDOM

    @property
    def parents(self) -> list[str]:
        """Ids, the policy's first."""
        return list(self.run.parents.values()) if self.run else []

    def value(self, name: str) -> float | None:
        """A metric's value; None if it wasn't measured."""
        return self.metrics.get(name, {}).get("value")

    def benchmark(self, key: str) -> float | None:
        """A public benchmark's value; None if it wasn't measured."""
        return self.benchmarks[key].value if key in self.benchmarks else None

    def cost(self, name: str) -> float | None:
        """A number of its run's costs; None if there is none."""
        return self.run.costs().get(name) if self.run else None


def read_runs(outputs: Path, files: Files) -> dict[str, Run]:
    """All runs with a valid record, by id."""
    runs: dict[str, Run] = {}
    root = outputs / "runs"
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        try:
            run = read_run(folder)
        except UserError as error:
            files.problems.append(str(error).removeprefix(f"{root}/"))
            continue
        if runs.setdefault(run.id, run) is not run:
            files.lost(folder / "run.json", f"is a copy of {runs[run.id].folder.name}: not read")
    return runs


def read_run(folder: Path) -> Run:
    """Raises UserError for a record that is missing or broken."""
    record = read_record(folder)
    parents = dict(sorted(record["parents"].items()))
    return Run(folder, record["stage"], record["id"], parents, record)


def choose(runs: dict[str, Run], name: str | None, outputs: Path) -> Run:
    """The run that is named, else the latest finished tip. Raises UserError if there is none."""
    if name is not None:
        run = runs.get(read_record(find_run(outputs, name))["id"])
        if run is None:
            raise UserError(f"{name}: not a run under {outputs / 'runs'}: give its own outputs=")
        return run
    if found := tips(runs):
        return max(found, key=lambda run: run.rank)
    raise UserError(
        f"no finished run under {outputs / 'runs'}: train one first, for example with `make demo` "
        "or `python train.py stage=sft`"
    )


def tips(runs: dict[str, Run]) -> list[Run]:
    """The finished runs that no other finished run started from; debug runs only if all are."""
    finished = [run for run in runs.values() if run.is_finished]
    real = [run for run in finished if not run.is_debug] or finished
    parents = {parent for run in real for parent in run.parents.values()}
    return [run for run in real if run.id not in parents]


def ladder(tip: Run, runs: dict[str, Run], files: Files) -> dict[str, Run]:
    """The tip and its ancestors, one a stage: the policy's line first, then the reward model's."""
    found: dict[str, Run] = {}
    waiting, seen = [tip], {tip.id}
    while waiting:
        run = waiting.pop(0)
        if found.setdefault(run.stage, run) is not run:
            files.problems.append(f"{run.name} is a second {run.stage} ancestor: not shown")
        for role, parent in run.parents.items():
            if parent not in runs:
                files.problems.append(
                    f"{run.name}: its {role} parent {parent} cannot be read, so that row and "
                    "those before it are not shown"
                )
            elif parent not in seen:
                seen.add(parent)
                waiting.insert(0 if role == "policy" else len(waiting), runs[parent])
    return {stage: found[stage] for stage in stages() if stage in found}


def leaves_policy(stage: str) -> bool:
    """Whether the row has a policy's metrics; what a ladder starts from is a policy."""
    return stage not in LADDER or LADDER[stage].leaves == "policy"


def read_rows(line: dict[str, Run], files: Files, details: bool = True) -> list[Row]:
    """One row for what the ladder starts from and one for each run, with what later models said of
    it. Without details, rows have neither items nor answers."""
    late_metrics: dict[str, dict[str, Metric]] = {}  # by row: a run's id, or "random"
    late = late_items(line, files) if details else []
    for judge in (line[stage] for stage in (REFERENCE, REWARD) if stage in line):
        for key, metrics in files.ladder_evaluation(judge.folder / "ladder_eval.json").items():
            late_metrics.setdefault(key, {}).update(metrics)
    rows: dict[str | None, Row] = {}

    def add(stage: str, run: Run | None, folder: Path, samples: Iterable[Sample]) -> None:
        key, suffix = (run.id, "") if run else ("random", "_random")
        evaluation = files.evaluation(folder / f"eval{suffix}.json")
        metrics = dict(evaluation.metrics)
        for name, cell in late_metrics.get(key, {}).items():
            if cell["value"] is not None or name not in metrics:
                metrics[name] = cell
        for name in HEADLINES[:-1] if leaves_policy(stage) else HEADLINES[-1:]:
            metrics.setdefault(name, suite.missing(f"not in {folder.name}/eval{suffix}.json"))
        items: list[Item] = []
        has_items = evaluation.suite in (suite.SUITE, "")  # another suite's have other fields
        if details and has_items:
            mine = [item for item in late if item.get("row") == key]
            items = suite.joined(files.items(folder / f"eval_items{suffix}.jsonl"), mine)
        answers = {sample.prompt: sample for sample in samples}
        parent = rows.get(run.parents.get("policy")) if run and leaves_policy(stage) else None
        used, seed = evaluation.suite, evaluation.seed
        public = files.benchmarks(folder / f"benchmark{suffix}.json")
        row = Row(stage, run, folder, used, seed, metrics, items, answers, parent)
        row = replace(row, benchmarks={one.key: one for one in public})
        rows[row.id] = row

    for stage, run in line.items():
        has_answers = details and leaves_policy(stage)
        samples = files.samples(run.folder / "samples.jsonl") if has_answers else []
        if not LADDER[stage].parents:
            start = [sample for sample in samples if sample.step == 0]
            add(start_name(run.record), None, run.folder, start)
            # a checkpoint as it is has answered once
            samples = [sample for sample in samples if sample.step > 0] or samples
        last = max((sample.step for sample in samples), default=0)
        add(stage, run, run.folder, [sample for sample in samples if sample.step == last])
    return list(rows.values())


def late_items(line: Mapping[str, Run], files: Files) -> list[Item]:
    """What later models of the ladder said of answers of earlier ones."""
    judges = [line[stage] for stage in (REFERENCE, REWARD) if stage in line]
    return [x for run in judges for x in files.items(run.folder / "ladder_eval_items.jsonl")]


def other_items(row: Row) -> dict[str, str]:
    """The item sets that a row and its parent don't share, and how they differ."""
    if row.parent is None:
        return {}
    # what the ladder starts from has pretrain's settings
    mine, its = (r.run.config.get("evaluation") or {} if r.run else {} for r in (row, row.parent))
    said = ", ".join(
        f"{key} {its[key]} before, {mine[key]} after"
        for key in sorted(mine.keys() & its.keys())
        if mine[key] != its[key] and (key == "max_new_tokens" or not key.startswith("max_"))
    )
    found = dict.fromkeys(ANSWERED, said) if said else {}
    for name in sorted({item["set"] for item in row.items}):
        after, before = (
            {str(item["id"]) for item in side.items if item["set"] == name}
            for side in (row, row.parent)
        )
        if before and after != before:
            found[name] = (
                f"{row.stage} {len(after)}, {row.parent.stage} {len(before)}, "
                f"{len(after & before)} of them the same"
            )
    return found


def notes_on_items(rows: list[Row], tip: str) -> list[str]:
    """A warning if neighbours were asked different held-out items, and how to fix it."""
    sets: dict[str, dict[str, None]] = {}  # how they differ -> the sets that do
    for row in rows:
        for name, how in other_items(row).items():
            sets.setdefault(how, {})[name] = None
    said = "; ".join(f"{', '.join(names)}: {how}" for how, names in sets.items())
    warning = (
        f"Not all rows were evaluated alike ({said}): their columns are not comparable, and "
        "differences are over the items in common. To evaluate all of them as the last one, "
        f"without training: python -m fourstage evaluation run={tip} ladder=true (a run whose own "
        "training data the last one's config doesn't name keeps its held-out data)"
    )
    return [warning] if said else []


def with_differences(rows: list[Row], files: Files) -> list[Row]:
    """The rows with the paired differences to their parents."""
    return [replace(row, differences=_differences(row, files)) for row in rows]


def _differences(row: Row, files: Files) -> dict[str, Metric]:
    if row.run is None or row.parent is None:
        return {}
    start = row.parent.stage
    for side in (row, row.parent):
        if side.suite != suite.SUITE:
            if side.suite:
                files.problems.append(
                    f"{row.stage}: no differences to {start}: {side.stage} was evaluated by suite "
                    f"{side.suite}, and only items of suite {suite.SUITE} are compared"
                )
            return {}
    path = row.run.folder / "eval_items.jsonl"
    try:
        with np.errstate(divide="ignore", invalid="ignore"):
            found = suite.differences(row.items, row.parent.items, row.seed)
    except FAULTS as error:  # broken items, or loads of another shape
        files.lost(path, f"cannot be compared with {start}'s ({error!r})")
        return {}
    found = files.valid_metrics(path, found)
    both = [n for n in row.metrics if None not in (row.value(n), row.parent.value(n))]
    if lost := [suite.definition(name).title for name in both if name not in found]:
        files.problems.append(
            f"{row.stage}: no difference to {start} for {', '.join(lost)}: the two have no items "
            "of it in common"
        )
    return found
