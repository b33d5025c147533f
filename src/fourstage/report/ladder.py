"""Which runs make a ladder, and what was measured of each: the rows of the report."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fourstage.evaluation import suite
from fourstage.ladder import LADDER, REFERENCE, REWARD, place, stages
from fourstage.report.files import Files, Item, Metric, ReportError, is_number

POLICY_METRICS = (
    "bits_per_char",
    "well_formed",
    "reasoning_accuracy",
    "true_score",
    "reward_model_score",
)


ANSWERED = ("chat", "chat_greedy", "reasoning", "reasoning_sampled")  # sets of answers


@dataclass(frozen=True)
class Run:
    """One readable run.json."""

    folder: Path
    stage: str
    id: str
    parents: dict[str, str]  # "policy", "reward" -> id
    record: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.id}"

    @property
    def is_finished(self) -> bool:
        return self.record["status"] == "finished"

    @property
    def is_debug(self) -> bool:
        return self.record.get("debug") is not None

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config that it was trained with; {} where the record has none."""
        config = self.record.get("config")
        return config if isinstance(config, dict) else {}

    def facts(self) -> dict[str, str]:
        """What was trained, for the report's first line."""
        config = self.config
        parts = {key: config[key] for key in ("model", "data", "tokenizer") if key in config}
        found = {k: str(v["name"]) for k, v in parts.items() if isinstance(v, dict) and "name" in v}
        if own := own_sources(config.get("data")):
            found["data"] = f"{found.get('data')} with files of {', '.join(own)}"
        if "seed" in config:
            found["seed"] = str(config["seed"])
        if isinstance(self.record.get("device"), str):
            found["on"] = self.record["device"]
        return found

    def costs(self) -> dict[str, float]:
        """The numbers under "cost" in run.json: seconds, tokens, ..."""
        cost = self.record.get("cost")
        return {k: v for k, v in cost.items() if is_number(v)} if isinstance(cost, dict) else {}

    def data_notes(self) -> dict[str, float]:
        """How many items of the data were used, truncated, dropped."""
        costs = self.costs()
        return {k.removeprefix("data_"): n for k, n in costs.items() if k.startswith("data_")}

    @property
    def rank(self) -> tuple[str, int, str]:
        """Largest for the latest finished (ISO times in UTC), then the furthest up the ladder."""
        return str(self.record.get("finished") or ""), place(self.stage), self.id


def own_sources(data: Any) -> list[str]:
    """The sources of data=embedded that are files all the same."""
    if not isinstance(data, dict) or data.get("name") != "embedded":
        return []
    return [
        name for name, source in data.items() if isinstance(source, dict) and source.get("path")
    ]


@dataclass(frozen=True)
class Row:
    """A line of the stage table; run is None for the random weights."""

    stage: str
    run: Run | None
    suite: str  # of its evaluation; "" where that cannot be read
    seed: int
    metrics: dict[str, Metric]
    items: list[Item]  # what the metrics are made of, later models' judgements joined in
    answers: dict[str, tuple[str, bool]]  # prompt -> answer, whether it stopped
    parent: Row | None = None  # the policy that it started from, where that row is there
    differences: dict[str, Metric] = field(default_factory=dict)  # to the parent, paired

    @property
    def id(self) -> str | None:
        return self.run.id if self.run else None

    @property
    def parents(self) -> list[str]:
        """Ids, the policy's first."""
        return [self.run.parents[role] for role in sorted(self.run.parents)] if self.run else []


# --- which runs


def read_runs(outputs: Path, files: Files) -> dict[str, Run]:
    """All runs with a readable record, by id."""
    runs: dict[str, Run] = {}
    folders = sorted(p for p in (outputs / "runs").glob("*") if p.is_dir())
    for folder in folders:
        record = files.json(folder / "run.json")
        if record is None:
            continue
        parents = record.get("parents")
        if (
            record.get("stage") not in LADDER
            or not isinstance(record.get("id"), str)
            or not isinstance(record.get("status"), str)
            or not isinstance(parents, dict)
        ):
            files.lost(folder / "run.json", "lacks stage, id, status or parents")
            continue
        parents = {role: str(parent) for role, parent in parents.items()}
        run = Run(folder, record["stage"], record["id"], parents, record)
        if runs.setdefault(run.id, run) is not run:
            files.lost(folder / "run.json", f"is a copy of {runs[run.id].folder.name}: not read")
    return runs


def choose(runs: dict[str, Run], name: str | None, outputs: Path) -> Run:
    """The run named, else the latest finished tip. Raises ReportError where there is none."""
    finished = [run for run in runs.values() if run.is_finished]
    real = [run for run in finished if not run.is_debug]
    if name is None:
        if not finished:
            raise ReportError(
                f"no finished run under {outputs / 'runs'}: train one first, for example with "
                "`make demo` or `python train.py stage=sft`"
            )
        return max(tips(real or finished), key=lambda run: run.rank)
    folder = Path(name).resolve()
    named = [r for r in finished if name in (r.id, r.name) or folder == r.folder.resolve()]
    named = named or [r for r in real or finished if r.stage == name]
    named = named or [r for r in finished if r.stage == name]
    if not named:
        known = sorted(run.name for run in finished)
        if len(known) > 8:
            known = [*known[:8], f"and {len(known) - 8} more"]
        there = ", ".join(known) or "none"
        raise ReportError(f"{name}: no such finished run under {outputs / 'runs'} ({there})")
    return max(named, key=lambda run: run.rank)


def tips(runs: list[Run]) -> list[Run]:
    """The runs that none of the others started from."""
    parents = {parent for run in runs for parent in run.parents.values()}
    return [run for run in runs if run.id not in parents]


def other_tips(runs: dict[str, Run], line: dict[str, Run]) -> list[Run]:
    """The finished real ladders that end elsewhere than in this line."""
    real = [run for run in runs.values() if run.is_finished and not run.is_debug]
    return [run for run in tips(real) if run not in line.values()]


def ladder(tip: Run, runs: dict[str, Run], files: Files) -> dict[str, Run]:
    """The tip and its ancestors, one a stage: the policy's line first, then the reward model's."""
    found: dict[str, Run] = {}
    waiting, seen = [tip], {tip.id}
    while waiting:
        run = waiting.pop(0)
        if found.setdefault(run.stage, run) is not run:
            files.problems.append(f"{run.name} is a second {run.stage} ancestor: not shown")
        for role, parent in sorted(run.parents.items()):  # "policy" before "reward"
            if parent not in runs:
                files.problems.append(
                    f"{run.name}: its {role} parent {parent} cannot be read, so that row and "
                    "those before it are not shown"
                )
            elif parent not in seen:
                seen.add(parent)
                waiting.insert(0 if role == "policy" else len(waiting), runs[parent])
    return {stage: found[stage] for stage in stages() if stage in found}


# --- rows


def leaves_policy(stage: str) -> bool:
    """Whether the row has a policy's metrics; random weights are one."""
    return stage == "random" or LADDER[stage].leaves == "policy"


def read_rows(line: dict[str, Run], files: Files) -> list[Row]:
    """The random weights' row and one for each run, later models' judgements joined in."""
    late = [_Late(run, files) for stage, run in line.items() if stage in (REFERENCE, REWARD)]
    rows: list[Row] = []

    def add(stage: str, run: Run | None, folder: Path, suffix: str, samples: list[Item]) -> None:
        evaluation = files.evaluation(folder / f"eval{suffix}.json")
        metrics = dict(evaluation.metrics)
        path = folder / f"eval_items{suffix}.jsonl"
        # another suite's items have other fields
        items = files.items(path) if evaluation.suite in (suite.SUITE, "") else []
        key = run.id if run else "random"
        for judge in late:
            for name, cell in judge.metrics(key, files).items():
                if cell["value"] is not None or name not in metrics:
                    metrics[name] = cell
            items = judge.joined(key, items)
        for name in POLICY_METRICS if leaves_policy(stage) else ("pair_accuracy",):
            why = f"not in {folder.name}/eval{suffix}.json"
            metrics.setdefault(name, {"value": None, "why": why})
        answers = _answers(samples)
        rows.append(Row(stage, run, evaluation.suite, evaluation.seed, metrics, items, answers))

    for stage, run in line.items():
        samples = files.samples(run.folder / "samples.jsonl") if leaves_policy(stage) else []
        if not LADDER[stage].parents:
            before = [row for row in samples if row["step"] == 0]
            add("random", None, run.folder, "_random", before)
            samples = [row for row in samples if row["step"] > 0]
        add(stage, run, run.folder, "", samples)
    return _with_parents(rows)


class _Late:
    """What the model of an sft or reward run said of earlier rows."""

    def __init__(self, run: Run, files: Files) -> None:
        self.path = run.folder / "ladder_eval.json"
        cells = files.json(self.path)
        if cells == {}:
            files.lost(self.path, "says nothing of any row")
        self.cells = cells or {}
        self.items = files.judgements(run.folder / "ladder_eval_items.jsonl")

    def metrics(self, key: str, files: Files) -> dict[str, Metric]:
        return files.cells(self.path, self.cells.get(key, {}))

    def joined(self, key: str, items: list[Item]) -> list[Item]:
        return suite.joined(items, [item for item in self.items if item["row"] == key])


def _answers(samples: list[dict[str, Any]]) -> dict[str, tuple[str, bool]]:
    """The answers of the last step that was sampled."""
    last = max((row["step"] for row in samples), default=0)
    return {
        row["prompt"]: (row["answer"], row["stopped"]) for row in samples if row["step"] == last
    }


def _with_parents(rows: list[Row]) -> list[Row]:
    done: dict[str | None, Row] = {}
    for row in rows:
        if row.run is not None and leaves_policy(row.stage):
            row = replace(row, parent=done.get(row.run.parents.get("policy")))
        done[row.id] = row
    return list(done.values())


# --- on what they were evaluated


def other_items(row: Row) -> dict[str, str]:
    """The sets of which a row and its parent were asked other items, and how many of which."""
    if row.parent is None:
        return {}
    mine, its = _ids(row.items), _ids(row.parent.items)
    settings = _other_settings(row.run, row.parent.run)
    return settings | {
        name: f"{row.stage} {len(mine[name])}, {row.parent.stage} {len(its[name])}, "
        f"{len(mine[name] & its[name])} of them the same"
        for name in sorted(mine.keys() & its.keys())
        if mine[name] != its[name]
    }


def notes_on_items(rows: list[Row], tip: str) -> list[str]:
    """A line where neighbours were asked other held-out items, with the way to mend it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for name, how in other_items(row).items():
            found.setdefault(how, []).append(name)
    said = [f"{', '.join(dict.fromkeys(names))}: {how}" for how, names in found.items()]
    if not found:
        return []
    return [
        f"Not all rows were evaluated alike ({'; '.join(said)}): their columns are not comparable, "
        "and differences are over the items in common. To evaluate all of them as the last one, "
        f"without training: python -m fourstage evaluation run={tip} ladder=true (a run whose own "
        "training data the last one's config doesn't name keeps its held-out data)"
    ]


def _other_settings(run: Run | None, parent: Run | None) -> dict[str, str]:
    """The sets on which some setting of the evaluation tells; random weights have pretrain's."""
    mine, its = ((r.config.get("evaluation") or {}) if r else {} for r in (run, parent))
    differ = sorted(key for key in mine.keys() & its.keys() if mine[key] != its[key])
    differ = [key for key in differ if not key.startswith("max_") or key == "max_new_tokens"]
    said = ", ".join(f"{key} {its[key]} before, {mine[key]} after" for key in differ)
    return dict.fromkeys(ANSWERED, said) if said else {}


def _ids(items: list[Item]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for item in items:
        found.setdefault(item["set"], set()).add(str(item["id"]))
    return found


# --- differences


def with_differences(rows: list[Row], files: Files) -> list[Row]:
    """The rows with the paired differences to their parents."""
    return [
        replace(row, differences=_differences(row, row.run, row.parent, files))
        if row.run and row.parent
        else row
        for row in rows
    ]


def _differences(row: Row, run: Run, parent: Row, files: Files) -> dict[str, Metric]:
    for side in (row, parent):
        if side.suite != suite.SUITE:
            if side.suite:
                files.problems.append(
                    f"{row.stage}: no differences to {parent.stage}: {side.stage} was evaluated "
                    f"by suite {side.suite}, and only items of suite {suite.SUITE} are compared"
                )
            return {}
    path = run.folder / "eval_items.jsonl"
    try:
        with np.errstate(divide="ignore", invalid="ignore"):
            found = suite.differences(row.items, parent.items, row.seed)
    except ValueError as error:  # numbers that make no sense together
        files.lost(path, f"cannot be compared with {parent.stage}'s ({error})")
        return {}
    found = files.cells(path, found)
    both = [n for n in row.metrics if _is_measured(row, n) and _is_measured(parent, n)]
    if lost := [suite.definition(name).title for name in both if name not in found]:
        files.problems.append(
            f"{row.stage}: no difference to {parent.stage} for {', '.join(lost)}: the two have no "
            "items of it in common"
        )
    return found


def _is_measured(row: Row, name: str) -> bool:
    return name in row.metrics and row.metrics[name]["value"] is not None
