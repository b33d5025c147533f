"""From the config to a plan: which runs a command needs, and what is left to do for each.

Everything that can be wrong in a command is found here, before anything trains.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.table import Table

from fourstage import data
from fourstage.errors import UserError
from fourstage.files import read_json
from fourstage.job import EvaluationConfig, LoggerConfig, TrainerConfig
from fourstage.ladder import LADDER, place, stages
from fourstage.model import ModelConfig
from fourstage.parallel.memory import GIB, WEIGHTS, bytes_per_gpu, machine_memory
from fourstage.runs.records import read_record
from fourstage.runs.store import Record, RunStore
from fourstage.settings import build, hashed
from fourstage.stages import StageSettings
from fourstage.stages.prepare import check_records
from fourstage.tokenizer import Tokenizer, TokenizerConfig
from fourstage.tracking.callbacks import clock

T = TypeVar("T")
Status = Literal["found", "resume", "train", "not needed"]


@dataclass(frozen=True, kw_only=True)
class Command:
    """The whole config tree, checked (see conf/config.yaml)."""

    stage: str
    seed: int
    outputs: str
    force: bool
    ancestors: Literal["train", "require"]
    keep_checkpoints: bool
    debug: str | None
    stages: dict[str, StageSettings]  # of every stage, by its name
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: data.DataConfig
    trainer: TrainerConfig
    logger: LoggerConfig
    evaluation: EvaluationConfig

    def __post_init__(self) -> None:
        if self.stage not in LADDER:
            raise UserError(f"stage: expected one of {', '.join(stages())}, got {self.stage!r}")
        if not 0 <= self.seed < 2**32:  # it is multiplied into the seeds of steps and rows
            raise UserError(f"seed: must be between 0 and {2**32 - 1}, got {self.seed}")
        self.evaluation.check_room(self.model.max_seq_len)


@dataclass(kw_only=True)
class PlannedRun:
    """One run of the plan. `folder` is where it is, or will be."""

    stage: str
    id: str
    folder: Path
    settings: StageSettings
    parents: dict[str, str]  # "policy", "reward" -> id
    parent_folders: dict[str, Path]
    group: str
    data: dict[str, str]  # name, source, digest: what this stage reads
    status: Status
    estimate: float | None = None  # seconds, where it has to be trained
    hint: str = ""  # how to go on with a run that was begun with another budget
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
    """The runs of a command in the order of training; the last one is what was asked for."""

    command: Command
    store: RunStore
    runs: list[PlannedRun]


def make_plan(config: Mapping[str, Any]) -> Plan:
    """Check a config and find out what is there already.

    Raises UserError, one line, for whatever is wrong in any stage that the command needs.
    """
    if "stages" in config:
        config = {**config, "stages": stage_settings(config["stages"])}
    command = build(Command, config, "")
    command = replace(command, trainer=command.trainer.resolved())
    store = RunStore(Path(command.outputs))
    plan = Plan(command=command, store=store, runs=[])
    command.model.check_widths(command.trainer.precision)
    for stage in needed_stages(command):
        check_stage(command, stage, command.stages[stage])
        plan.runs.append(plan_run(plan, stage, command.stages[stage]))
    target = plan.runs[-1]
    for run in plan.runs[:-1]:
        if target.status == "found" and run.status != "found":
            run.status = "not needed"
    tokenizer = Tokenizer.from_config(command.tokenizer)
    for run in plan.runs:
        if run.to_do:
            check_memory(command, run, tokenizer.vocab_size)
            room = command.model.max_seq_len
            run.warnings += check_records(command.data, run.stage, run.settings, tokenizer, room)
            run.estimate = estimate(command, store, run)
    return plan


def stage_settings(values: Mapping[str, Any]) -> dict[str, StageSettings]:
    """The typed settings of every stage."""
    kinds = [(name, LADDER[name].code.Settings) for name in stages()]
    return vars(build(make_dataclass("Stages", kinds, kw_only=True), values, "stages"))


def needed_stages(command: Command) -> list[str]:
    """The stage that was asked for and those it descends from."""
    waiting, needed = [command.stage], set()
    while waiting:
        stage = waiting.pop()
        needed.add(stage)
        for key, parent in named_parents(stage, command.stages[stage]).items():
            if parent not in LADDER:
                continue  # a run
            if place(parent) >= place(stage):
                where = f"stages.{stage}.{key}"
                raise UserError(f"{where}: {stage} cannot descend from {parent}: name a run")
            waiting.append(parent)
    return [stage for stage in stages() if stage in needed]


def named_parents(stage: str, settings: StageSettings) -> dict[str, str]:
    """config key -> the stage or run that it names, for each parent of a stage."""
    row = LADDER[stage]
    if not row.parents and settings.parent is not None:
        raise UserError(f"stages.{stage}.parent: must be null: it starts from random weights")
    return {key: getattr(settings, key) or row.parents[role] for role, key in row.keys.items()}


def check_stage(command: Command, stage: str, settings: StageSettings) -> None:
    """What a stage's settings cannot see on their own: the model and the devices."""
    where, values = f"stages.{stage}", asdict(settings)
    room = command.model.max_seq_len
    for keys in (["block_size"], ["max_tokens"], ["max_prompt_tokens", "max_new_tokens"]):
        if set(keys) <= set(values) and (tokens := sum(values[key] for key in keys)) > room:
            raise UserError(
                f"{where}.{' + '.join(keys)}: {tokens} tokens do not fit model.max_seq_len={room}"
            )
    processes = command.trainer.devices * command.trainer.num_nodes
    for key in ("batch_size", "minibatch_size"):
        if (rows := values.get(key, 0)) % processes:
            raise UserError(
                f"{where}.{key}: {rows} rows cannot be shared evenly by {processes} devices"
            )


def check_memory(command: Command, run: PlannedRun, vocab_size: int) -> None:
    """Raise UserError for a stage that takes more memory than this machine has, at the very least:
    its networks (on a GPU: the weights, which are made here) and one batch of token ids."""
    trainer, values = command.trainer, asdict(run.settings)
    parameters, _ = command.model.count_params(vocab_size)
    networks = WEIGHTS * parameters
    if trainer.accelerator == "cpu":
        networks = int(bytes_per_gpu("ddp", run.stage, parameters, 1))
    rows = max(values["batch_size"], values.get("pairs_per_prompt", 1))
    rows *= values.get("group_size", 1)
    lengths = ("block_size", "max_tokens", "max_prompt_tokens", "max_new_tokens")
    tokens = rows * sum(values.get(key, 0) for key in lengths)
    tokens = max(tokens, command.evaluation.max_new_tokens)
    needed = trainer.devices * networks + 8 * tokens
    if needed > (there := machine_memory()):
        raise UserError(
            f"stages.{run.stage}: {parameters:,} parameters and {tokens:,} tokens at once take at "
            f"least {needed / GIB:,.0f} GiB of memory, and this machine has {there / GIB:,.0f}: "
            "take a smaller model, batch or number of tokens"
        )


def plan_run(plan: Plan, stage: str, settings: StageSettings) -> PlannedRun:
    """Resolve a run's parents (those of the plan are planned already), its data and its id."""
    command, store = plan.command, plan.store
    folders: dict[str, Path] = {}
    parents: dict[str, str] = {}
    group = ""
    for role, (key, name) in zip(
        LADDER[stage].parents, named_parents(stage, settings).items(), strict=True
    ):
        planned = {run.stage: run for run in plan.runs}
        if name in LADDER:
            check_role(f"stages.{stage}.{key}", name, name, role)
            parent_id, parent_group = planned[name].id, planned[name].group
            folders[role] = store.folder(name, parent_id)
        else:
            folders[role], record = named_run(command, store, stage, key, name, role)
            parent_id, parent_group = record["id"], record["group"]
        parents[role] = parent_id
        group = group or parent_group
    source = LADDER[stage].source
    digest = data.digest(command.data, stage)
    identity = {
        "stage": stage,
        "settings": settings.hashed(),
        "model": shape(command.model),
        "tokenizer": hashed(command.tokenizer),
        "seed": command.seed,
        "parents": parents,
        "precision": command.trainer.precision,
        "data": digest,
        "debug": command.debug,
    }
    pieces = settings.pieces(command.model, command.trainer.devices * command.trainer.num_nodes)
    if pieces is not None:
        identity["pieces"] = pieces
    identity |= getattr(LADDER[stage].code, "identity", lambda data: {})(command.data)
    run_id = letters(identity)
    planned_folders = [store.folder(run.stage, run.id) for run in plan.runs]
    forced = command.force and stage == command.stage
    folder = (store.retrain_folder if forced else store.folder)(stage, run_id)
    status, record = find_status(folder)
    foreign = [path for path in folders.values() if path.exists() and path not in planned_folders]
    warnings = [
        line for path in foreign for line in foreign_data(command, store, path) if status != "found"
    ]
    return PlannedRun(
        stage=stage,
        id=run_id,
        folder=folder,
        settings=settings,
        parents=parents,
        parent_folders=folders,
        group=group or run_id,
        data={"name": command.data.name, "source": source, "digest": digest},
        status=status,
        record=record,
        hint=other_budget(store, identity) if status == "train" else "",
        warnings=list(dict.fromkeys(warnings)),
    )


def foreign_data(command: Command, store: RunStore, folder: Path) -> list[str]:
    """A warning for a parent, named in the config, and for each of its ancestors, that did not
    train on this config's data: what is held out now they may have trained on."""
    return [
        f"{run.name} may have trained on what is held out now: with these data settings {why}"
        for run in (*store.ancestors(folder).values(), folder)
        if (why := data.other_source(command.data, read_record(run))) is not None
    ]


def other_budget(store: RunStore, identity: Mapping[str, Any]) -> str:
    """How to go on with an unfinished run that differs from this one in nothing but its budget."""
    stage, mine = identity["stage"], identity["settings"]
    for folder in store.folders():
        record = read_record(folder)
        if record["stage"] != stage or find_status(folder)[0] != "resume":
            continue
        its = record["config"]["stages"][stage]
        budget = {
            key: its.get(key) for key in ("max_steps", "max_time") if its.get(key) != mine[key]
        }
        if letters({**identity, "settings": {**mine, **budget}}) == record["id"]:
            words = " ".join(
                f"stages.{stage}.{key}={value or 'null'}" for key, value in budget.items()
            )
            return (
                f"{record['id']} is unfinished and differs in its budget alone: {words} goes on "
                "with it (another budget is another run: the learning rate follows it)"
            )
    return ""


def find_status(folder: Path) -> tuple[Status, Record]:
    """What is in a run's folder, and its record where it is finished."""
    if (folder / "run.json").exists():
        record = read_record(folder)
        if record["status"] == "finished" and (folder / "model.safetensors").exists():
            return "found", record
        if (folder / "checkpoints" / "last.ckpt").exists():
            return "resume", {}
    return "train", {}


def letters(identity: Mapping[str, Any]) -> str:
    """10 letters a-z from the sha256 of canonical JSON: a number would be read as one by Hydra."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    number = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
    name = ""
    for _ in range(10):
        number, letter = divmod(number, 26)
        name += chr(ord("a") + letter)
    return name


def shape(model: ModelConfig) -> dict[str, Any]:
    """What of a model's config matters: not what it is called."""
    return {key: value for key, value in hashed(model).items() if key != "name"}


def check_role(where: str, name: str, stage: str, role: str) -> None:
    """Raise UserError for a reward model where a language model is needed, and the reverse."""
    is_scalar = LADDER[stage].leaves == "scalar"
    if is_scalar != (role == "reward"):
        wanted = "a language model, not a reward run" if is_scalar else "a reward run"
        raise UserError(f"{where}: {name} will not do, expected {wanted}")


def named_run(
    command: Command, store: RunStore, stage: str, key: str, name: str, role: str
) -> tuple[Path, Record]:
    """A finished run that a config names as a parent; of this model, where the stage asks that."""
    where = f"stages.{stage}.{key}"
    try:
        folder = store.find(name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    record = read_record(folder)
    check_role(where, folder.name, record["stage"], role)
    if LADDER[stage].takes_any_shape:
        return folder, record
    its = own_shape(folder) or recorded(ModelConfig, record, "model")
    if its is None:
        raise UserError(f"{where}: {folder.name} is of a model that is not known here")
    for key, value in asdict(command.model).items():
        if key != "name" and value != (other := getattr(its, key)):
            raise UserError(
                f"{where}: {folder.name} is of another model ({its.name}: "
                f"{key} {other}, not {value}): choose its model= or another parent"
            )
    if command.tokenizer != recorded(TokenizerConfig, record, "tokenizer"):
        raise UserError(f"{where}: {folder.name} has another tokenizer: choose its tokenizer=")
    return folder, record


def own_shape(folder: Path) -> ModelConfig | None:
    """The shape of a run's own network, which its stage may have changed."""
    try:
        return build(ModelConfig, read_json(folder / "config.json")["model"], "model")
    except (OSError, ValueError, TypeError, KeyError, UserError):
        return None


def recorded(kind: type[T], record: Record, name: str) -> T | None:
    """A part of a run's config; what it lacks has its default. None where it is not known here."""
    try:
        return build(kind, record["config"].get(name, {}), name)
    except UserError:
        return None


def estimate(command: Command, store: RunStore, run: PlannedRun) -> float | None:
    """Seconds of training and evaluation, as the latest finished run of its kind took for a step
    and for its evaluation; without one a time budget alone is known."""
    latest: Record | None = None
    timed = run.settings.seconds
    for folder in store.folders():
        record = read_record(folder)
        if (record["stage"], record["status"]) != (run.stage, "finished"):
            continue
        settings = record["config"]["stages"][run.stage]
        model = recorded(ModelConfig, record, "model")
        alike = (
            model is not None
            and shape(model) == shape(command.model)
            and record["debug"] == command.debug
        )
        same_steps = (
            settings.get("batch_size") == run.settings.batch_size
            and isinstance(settings.get("max_steps"), int)
            and settings["max_steps"] > 0
            and settings.get("max_time") is None
        )
        newer = latest is None or record["finished"] > latest["finished"]
        if alike and newer and (timed or same_steps):
            latest = record
    if latest is None:
        return timed
    evaluation = latest["cost"].get("eval_seconds", 0.0)
    if timed:
        return timed + evaluation
    steps = run.settings.max_steps / latest["config"]["stages"][run.stage]["max_steps"]
    return steps * (latest["cost"]["seconds"] - evaluation) + evaluation


def show(plan: Plan, console: Console, commit: str | None) -> None:
    """Print the plan: what is found, what is trained, how large and how long."""
    command = plan.command
    vocab_size = Tokenizer.from_config(command.tokenizer).vocab_size
    total, active = command.model.count_params(vocab_size)
    debug = f", debug={command.debug}" if command.debug else ""
    table = Table("stage", "run", "from", "budget", "time", "status")
    for run in plan.runs:
        settings = run.settings
        known = "?" if run.estimate is None else clock(run.estimate)
        table.add_row(
            run.stage,
            run.id,
            ", ".join(run.parents.values()),
            settings.max_time or f"{settings.max_steps} steps x {settings.batch_size}",
            known if run.to_do else "",
            run.status + (" (again)" if command.force and run is plan.runs[-1] else ""),
        )
    console.print(
        f"{command.model.name}: {total:,} parameters, {active:,} active; "
        f"data {command.data.title}, seed {command.seed}, "
        f"{command.trainer.accelerator} {command.trainer.precision}{debug}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(table)
    for warning in dict.fromkeys(line for run in plan.runs for line in run.warnings):
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True, markup=False)
    for line in [*(run.hint for run in plan.runs), evaluated_otherwise(plan)]:
        if line:
            console.print(f"note: {line}", highlight=False, soft_wrap=True, markup=False)
    for run in plan.runs:
        made_by = run.record.get("git", {}).get("commit")
        if commit and made_by and made_by != commit:
            console.print(
                f"warning: {run.name} was made by commit {made_by[:8]}, this is {commit[:8]} "
                f"(stage={run.stage} force=true trains it again)",
                highlight=False,
                soft_wrap=True,
            )


def evaluated_otherwise(plan: Plan) -> str:
    """How to evaluate the finished runs again whose stored evaluation has other settings, or is on
    the held-out data of another config."""
    mine, changes = plain(plan.command.evaluation), {}
    names: dict[str, list[str]] = {"with other settings": [], "on other held-out data": []}
    for run in plan.runs:
        config = run.record.get("config", {})
        its = config.get("evaluation", {})
        if found := {key: mine[key] for key in mine if its.get(key, mine[key]) != mine[key]}:
            names["with other settings"].append(run.name)
            changes |= found
        its = recorded(data.DataConfig, run.record, "data") if "data" in config else None
        if its not in (None, plan.command.data):
            names["on other held-out data"].append(run.name)
    said = [
        f"{', '.join(runs)} {'was' if len(runs) == 1 else 'were'} evaluated {how}"
        for how, runs in names.items()
        if runs
    ]
    if not said:
        return ""
    tip = plan.runs[-1]  # whose data its ancestors take
    other_settings, other_data = names.values()
    last = tip.name if other_data else other_settings[-1]
    words = [python_word(), "-m", "fourstage", "evaluation", f"run={last}"]
    words += ["ladder=true"] * (len(other_settings) > 1 or bool(other_data))
    words += [f"evaluation.{key}={value}" for key, value in changes.items()]
    words += outputs_word(plan)
    when = "when this is done, " if last == tip.name and tip.to_do else ""
    return f"{'; '.join(said)}: {when}{shlex.join(words)}"


def plain(config: Any) -> Any:
    """A typed config as it is read back from JSON."""
    return json.loads(json.dumps(asdict(config)))


def outputs_word(plan: Plan) -> list[str]:
    """outputs=FOLDER for a command to paste, where it is not the default one."""
    outputs = plan.command.outputs
    return [] if outputs == "outputs" else [f"outputs={outputs}"]


def python_word() -> str:
    """This interpreter for a command to paste: as short as the shell here understands."""
    here, path = Path.cwd(), Path(sys.executable)
    if shutil.which("python") == sys.executable:  # an activated .venv
        return "python"
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
