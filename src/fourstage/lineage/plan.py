"""From the config to a plan: which runs a command needs, and what is left to do for each.

Every mistake in a command is found here, before anything trains.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fourstage import data
from fourstage.data.vocabulary import loaded, tokenizer_of, waits
from fourstage.errors import UserError
from fourstage.files import expanded
from fourstage.job import Start
from fourstage.ladder import LADDER
from fourstage.lineage.command import Command, check_memory, check_stage
from fourstage.lineage.identity import architecture, identity_of, letters
from fourstage.lineage.parents import (
    adopt,
    check_role,
    named_parents,
    named_run,
    needed_stages,
    parent_key,
    recorded,
)
from fourstage.lineage.start import Adopted
from fourstage.model import ModelConfig
from fourstage.runs.records import Record, read_record
from fourstage.runs.store import RunStore, Status, find_status
from fourstage.settings import build
from fourstage.stages import StageSettings
from fourstage.stages.prepare import check_records
from fourstage.tokenizer import Tokenizer


@dataclass(kw_only=True)
class PlannedRun:
    """One run of the plan. `folder` is where it is, or will be."""

    stage: str
    id: str
    folder: Path
    settings: StageSettings
    parents: dict[str, str]  # "policy", "reward" -> run id
    parent_folders: dict[str, Path]
    data: dict[str, str]  # name, source, digest: what this stage reads
    status: Status | Literal["not needed"]
    group: str = ""  # the ladder, once the run is recorded
    tags: tuple[str, ...] = ()  # known when it is about to be trained
    estimate: float | None = None  # seconds, if it has to be trained
    hint: str = ""  # how to continue an unfinished run that has another budget
    start: Start | None = None  # the checkpoint that a first stage starts from
    record: Record = field(default_factory=dict)  # of the finished run
    warnings: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.id}"

    @property
    def to_do(self) -> bool:
        return self.status in ("train", "resume")


@dataclass(kw_only=True)
class Plan:
    """The runs of a command in training order; the last one is the one asked for."""

    command: Command
    store: RunStore
    runs: list[PlannedRun]
    vocab_size: int = 0  # of the last run
    adopted: Adopted | None = None  # model and tokenizer of a checkpoint


def make_plan(config: Mapping[str, Any], overrides: Sequence[str] = ()) -> Plan:
    """Check a config and find out which of its runs exist. `overrides`: what was typed, which has
    to agree with a checkpoint. Raises UserError for any mistake."""
    adopted = None
    if "stages" in config:
        kinds = [(name, row.code.Settings) for name, row in LADDER.items()]
        typed = build(make_dataclass("Stages", kinds, kw_only=True), config["stages"], "stages")
        config = {**config, "stages": vars(typed)}
        if (adopted := adopt(config, overrides)) is not None:
            config = {**config, "model": adopted.model, "tokenizer": adopted.tokenizer}
    command = build(Command, config, "")
    command = replace(command, trainer=command.trainer.resolved())
    command.model.check_widths(command.trainer.precision)
    if (root := command.data.root) is not None and not expanded(root).is_dir():
        raise UserError(f"data.root: {root} is not there: name the folder that holds OWNER/NAME")
    store = RunStore(Path(command.outputs))
    plan = Plan(command=command, store=store, runs=[], adopted=adopted)
    for stage in needed_stages(command.stage, command.stages):
        check_stage(command, stage)
        plan.runs.append(plan_run(plan, stage))
    if plan.runs[-1].status == "found":
        for run in plan.runs:
            run.status = "found" if run.status == "found" else "not needed"
    plan.vocab_size = vocab_size(plan, plan.runs[-1])
    for run in plan.runs:
        if run.to_do:
            check_memory(command, run.stage, vocab_size(plan, run))
            tokenizer, room = tokenizer_for(plan, run), command.model.max_seq_len
            is_read = not (run.settings.as_is or data.waits(command.data, run.stage))
            if tokenizer is not None and is_read:
                run.warnings += check_records(
                    command.data, run.stage, run.settings, tokenizer, room
                )
            run.estimate = estimate(command, plan.store, run)
    return plan


def vocab_size(plan: Plan, run: PlannedRun) -> int:
    """Of a run's tokenizer; at most, if it isn't trained yet."""
    tokenizer = tokenizer_for(plan, run)
    if tokenizer is not None:
        return tokenizer.vocab_size
    assert plan.command.tokenizer.vocab_size is not None
    return plan.command.tokenizer.vocab_size


def tokenizer_for(plan: Plan, run: PlannedRun) -> Tokenizer | None:
    """A run's tokenizer: its own if it is finished, its parent's if that is, else the command's;
    None if that is trained on a set on the hub."""
    for folder in (run.folder, *run.parent_folders.values()):
        if find_status(folder)[0] == "found" and (folder / "tokenizer.json").is_file():
            return loaded(folder)
    if waits(plan.command.tokenizer, plan.command.data):
        return None
    return tokenizer_of(plan.command.tokenizer, plan.command.data, plan.store.outputs)


def plan_run(plan: Plan, stage: str) -> PlannedRun:
    """Resolve a run's parents (those of the plan are planned already), its data and its id."""
    command, store, settings = plan.command, plan.store, plan.command.stages[stage]
    planned = {run.stage: run for run in plan.runs}
    parents: dict[str, str] = {}
    folders: dict[str, Path] = {}
    for role, name in named_parents(stage, settings).items():
        where = parent_key(stage, role)
        if name in LADDER:
            check_role(where, name, name, role)
            parents[role] = planned[name].id
            folders[role] = store.folder(name, parents[role])
        else:
            folders[role], record = named_run(command, store, stage, name, role)
            parents[role] = record["id"]
    planned_ids = [run.id for run in plan.runs]
    named = [folders[role] for role, run_id in parents.items() if run_id not in planned_ids]
    foreign = [run for own in named for run in (*store.ancestors(own).values(), own)]
    digest = "" if settings.as_is else data.digest(command.data, stage)
    identity = identity_of(command, stage, parents, digest)
    start = None
    if plan.adopted is not None:
        identity["tokenizer"] = {"name": "hf"}  # part of the checkpoint's digest, wherever it lies
        if not LADDER[stage].parents and (start := plan.adopted.start) is not None:
            identity["checkpoint"] = start.digest
    run_id = letters(identity)
    forced = command.force and stage == command.stage
    folder = (store.retrain_folder if forced else store.folder)(stage, run_id)
    status, record = find_status(folder)
    return PlannedRun(
        stage=stage,
        id=run_id,
        folder=folder,
        settings=settings,
        parents=parents,
        parent_folders=folders,
        data={
            "name": command.data.name,
            "source": LADDER[stage].source,
            "digest": digest,
            **data.fetched(command.data, stage),
        },
        status=status,
        start=start,
        record=record,
        hint=other_budget(store, identity) if status == "train" else "",
        warnings=foreign_data(plan, [folder] if status == "found" else foreign),
    )


def foreign_data(plan: Plan, folders: list[Path]) -> list[str]:
    """Warnings about those of these runs that trained on other data."""
    return [
        f"{run.name} may have trained on what is held out now: with these data settings {why}"
        for run in folders
        if (why := data.other_source(plan.command.data, read_record(run))) is not None
    ]


def other_budget(store: RunStore, identity: Mapping[str, Any]) -> str:
    """How to continue an unfinished run that differs from this one only in its budget."""
    stage, mine = identity["stage"], identity["settings"]
    for folder, record in store.records().items():
        if record["stage"] != stage or find_status(folder)[0] != "resume":
            continue
        its = record["config"]["stages"][stage]
        budget = {key: its.get(key) for key in ("max_steps", "max_time")}
        if letters({**identity, "settings": {**mine, **budget}}) == record["id"]:
            other = {
                key: value or "null" for key, value in budget.items() if value != mine.get(key)
            }
            words = " ".join(f"stages.{stage}.{key}={value}" for key, value in other.items())
            return (
                f"{record['id']} is unfinished and differs only in its budget: {words} continues "
                "it (another budget is another run, as the learning rate follows it)"
            )
    return ""


def estimate(command: Command, store: RunStore, run: PlannedRun) -> float | None:
    """Seconds of training and evaluation, from the latest finished run of the same kind: its time
    per step and for all else (set-up, evaluation). Without such a run, the time budget if any."""
    timed = run.settings.seconds

    def is_alike(record: Record) -> bool:
        if (record["stage"], record["status"]) != (run.stage, "finished"):
            return False
        its, model = record["config"]["stages"][run.stage], recorded(ModelConfig, record, "model")
        steps, batch = its.get("max_steps"), (its.get("batch_size"), its.get("max_time"))
        counts_steps = isinstance(steps, int) and steps > 0
        same_steps = counts_steps and batch == (run.settings.batch_size, None)
        same_model = model is not None and architecture(model) == architecture(command.model)
        return same_model and record["debug"] == command.debug and bool(timed or same_steps)

    alike = [record for record in store.records().values() if is_alike(record)]
    if not alike:
        return timed
    latest = max(alike, key=lambda record: record["finished"])
    cost = latest["cost"]
    evaluation = cost.get("eval_seconds", 0.0)
    if timed:
        return timed + evaluation
    steps = run.settings.max_steps / latest["config"]["stages"][run.stage]["max_steps"]
    stepping = cost.get("train_seconds", cost["seconds"] - evaluation)
    return steps * stepping + cost["seconds"] - stepping
