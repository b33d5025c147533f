"""From the config to a plan: which runs a command needs, and what is left to do for each.

Every mistake in a command is found here, before anything trains.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from fourstage import data
from fourstage.data.vocabulary import identity_of as tokenizer_identity
from fourstage.data.vocabulary import loaded, tokenizer_of, waits
from fourstage.errors import UserError
from fourstage.files import expanded, read_json
from fourstage.job import EvaluationConfig, LoggerConfig, Start, TrainerConfig
from fourstage.ladder import LADDER, place, stages
from fourstage.lineage.start import Adopted, from_checkpoint, from_run, has_checkpoint
from fourstage.model import ModelConfig
from fourstage.parallel.memory import GIB, WEIGHTS, bytes_per_gpu, machine_memory
from fourstage.runs.records import Record, read_record
from fourstage.runs.store import RunStore, Status, find_status
from fourstage.settings import MOST_SEED, Bounded, between, build, hashed, positive
from fourstage.stages import StageSettings
from fourstage.stages.prepare import check_records
from fourstage.tokenizer import Tokenizer, TokenizerConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Command(Bounded):
    """The whole config tree, checked (see conf/config.yaml)."""

    stage: str
    seed: int = between(0, MOST_SEED)
    outputs: str
    force: bool
    ancestors: Literal["train", "require"]
    keep_checkpoints: bool
    debug: str | None
    tag: str | list[str] | None = None  # words for run.json
    max_outputs_gb: float | None = positive(default=None)
    stages: dict[str, StageSettings]  # of every stage, by name
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: data.DataConfig
    trainer: TrainerConfig
    logger: LoggerConfig
    evaluation: EvaluationConfig

    def __post_init__(self) -> None:
        if self.stage not in LADDER:
            raise UserError(f"stage: expected one of {', '.join(stages())}, got {self.stage!r}")
        super().__post_init__()
        self.evaluation.check_room(self.model.max_seq_len)
        for tag in self.tags:
            if not re.fullmatch(r"[\w.-]+", tag):
                raise UserError(
                    f"tag: expected words of letters, digits, '_', '.' and '-', got {tag[:40]!r}: "
                    "tag=NAME, or several in brackets: 'tag=[ONE,TWO]'"
                )

    @property
    def tags(self) -> tuple[str, ...]:
        named = self.tag.split(",") if isinstance(self.tag, str) else self.tag or ()
        return tuple(dict.fromkeys(named))


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
            check_memory(command, run, vocab_size(plan, run))
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


def adopt(config: Mapping[str, Any], overrides: Sequence[str]) -> Adopted | None:
    """The model and the tokenizer of the checkpoint that the runs of a command descend from: its
    own, or that of the first run that it names as a parent. None: there is no checkpoint."""
    if config.get("stage") not in LADDER or not isinstance(config.get("outputs"), str):
        return None  # Command says what is wrong
    settings, store = config["stages"], RunStore(Path(config["outputs"]))
    for stage in needed_stages(config["stage"], settings):
        if (named := settings[stage].checkpoint) is not None:
            return from_checkpoint(named, f"stages.{stage}.parent", config, overrides)
        for role, name in named_parents(stage, settings[stage]).items():
            if name in LADDER or LADDER[stage].takes_any_shape:
                continue
            folder, model = None, None
            with suppress(UserError):  # which named_run says
                folder = store.find(name)
                model = own_architecture(folder) if has_checkpoint(store, folder) else None
            if folder is not None and model is not None:
                return from_run(folder, model, parent_key(stage, role), config, overrides)
    return None


def needed_stages(last: str, settings: Mapping[str, StageSettings]) -> list[str]:
    """The stage that was asked for and those it descends from."""
    needed = {last}
    for stage in reversed(stages()):
        if stage not in needed:
            continue
        for role, parent in named_parents(stage, settings[stage]).items():
            if parent in LADDER and place(parent) >= place(stage):
                raise UserError(
                    f"{parent_key(stage, role)}: {stage} cannot descend from {parent}: name a run"
                )
            needed.add(parent)
    return [stage for stage in stages() if stage in needed]


def named_parents(stage: str, settings: StageSettings) -> dict[str, str]:
    """role -> the stage or run that the config names, for each parent of a stage."""
    row = LADDER[stage]
    where = f"stages.{stage}.parent"
    if row.parents and settings.checkpoint is not None:
        first = next(name for name, row in LADDER.items() if not row.parents)
        raise UserError(
            f"{where}: only {first} starts from a checkpoint: stages.{first}.parent="
            f"{settings.parent} stages.{first}.max_steps=0 takes it as it is"
        )
    if not row.parents and settings.parent is not None and settings.checkpoint is None:
        raise UserError(
            f"{where}: must be null: it starts from random weights, or from a pretrained "
            "checkpoint: hf:FOLDER_OR_NAME"
        )
    return {role: getattr(settings, key) or row.parents[role] for role, key in row.keys.items()}


def parent_key(stage: str, role: str) -> str:
    return f"stages.{stage}.{LADDER[stage].keys[role]}"


def check_stage(command: Command, stage: str) -> None:
    """Check a stage's settings against the model and the number of devices."""
    where, values = f"stages.{stage}", asdict(command.stages[stage])
    if command.stages[stage].as_is:
        return
    room = command.model.max_seq_len
    for keys in (["block_size"], ["max_tokens"], ["max_prompt_tokens", "max_new_tokens"]):
        if set(keys) <= set(values) and (tokens := sum(values[key] for key in keys)) > room:
            raise UserError(
                f"{where}.{' + '.join(keys)}: {tokens} tokens do not fit model.max_seq_len={room}"
            )
    processes = command.trainer.processes
    for key in ("batch_size", "minibatch_size"):
        if (rows := values.get(key, 0)) % processes:
            fewer = next(n for n in range(processes, 0, -1) if rows % n == 0)
            raise UserError(
                f"{where}.{key}: {rows} rows cannot be shared evenly by {processes} devices: take "
                f"{fewer}, or other rows, which make a new run"
            )


def check_memory(command: Command, run: PlannedRun, vocab_size: int) -> None:
    """Raise UserError if a stage needs more memory than this machine has, counting only its
    networks (on a GPU: the weights, which are made here) and one batch of token ids."""
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
    if needed > (available := machine_memory()):
        raise UserError(
            f"stages.{run.stage}: {parameters:,} parameters and {tokens:,} tokens at once take at "
            f"least {needed / GIB:,.0f} GiB of memory, and this machine has "
            f"{available / GIB:,.0f}: take a smaller model, batch or number of tokens"
        )


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
            folders[role], record = named_run(plan, where, stage, name, role)
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


def identity_of(
    command: Command, stage: str, parents: dict[str, str], digest: str
) -> dict[str, Any]:
    """Everything that determines a run's weights, and so its id."""
    settings = command.stages[stage]
    identity = {
        "stage": stage,
        "settings": settings.hashed(),
        "model": architecture(command.model),
        "tokenizer": tokenizer_identity(command.tokenizer),
        "seed": command.seed,
        "parents": parents,
        "precision": command.trainer.precision,
        "data": digest,
        "debug": command.debug,
    }
    pieces = settings.pieces(command.model, command.trainer.processes)
    if pieces is not None:
        identity["pieces"] = pieces
    return identity | getattr(LADDER[stage].code, "identity", lambda data: {})(command.data)


def letters(identity: Mapping[str, Any]) -> str:
    """10 letters a-z from the sha256 of canonical JSON. Hydra would read digits as a number."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    number = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
    name = ""
    for _ in range(10):
        number, letter = divmod(number, 26)
        name += chr(ord("a") + letter)
    return name


def architecture(model: ModelConfig) -> dict[str, Any]:
    """A model's config without its name, which changes no weight."""
    return {key: value for key, value in hashed(model).items() if key != "name"}


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


def check_role(where: str, name: str, stage: str, role: str) -> None:
    """Raise UserError for a reward model where a language model is needed, or the reverse."""
    is_scalar = LADDER[stage].leaves == "scalar"
    if is_scalar != (role == "reward"):
        wanted = "a language model, not a reward run" if is_scalar else "a reward run"
        raise UserError(f"{where}: {name} will not do, expected {wanted}")


def named_run(plan: Plan, where: str, stage: str, name: str, role: str) -> tuple[Path, Record]:
    """The finished run that a config names as a parent, and its record. Raises UserError if there
    is none, or if the stage needs the command's model and the run has another."""
    command = plan.command
    try:
        folder = plan.store.find(name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    record = read_record(folder)
    check_role(where, folder.name, record["stage"], role)
    if LADDER[stage].takes_any_shape:
        return folder, record
    its = own_architecture(folder) or recorded(ModelConfig, record, "model")
    if its is None:
        raise UserError(f"{where}: {folder.name} is of a model that is not known here")
    for key, value in asdict(command.model).items():
        if key != "name" and value != (other := getattr(its, key)):
            raise UserError(
                f"{where}: {folder.name} is of another model ({its.name}: "
                f"{key} {other}, not {value}): choose its model= or another parent"
            )
    its = recorded(TokenizerConfig, record, "tokenizer")
    if not same_tokenizer(command.tokenizer, its, folder):
        words = "its tokenizer="
        if its is not None:
            size = f" tokenizer.vocab_size={its.vocab_size}" if its.vocab_size else ""
            words = f"tokenizer={its.name}{f':{folder}' if its.name == 'hf' else size}"
        raise UserError(f"{where}: {folder.name} has another tokenizer: choose {words}")
    return folder, record


def same_tokenizer(config: TokenizerConfig, its: TokenizerConfig | None, folder: Path) -> bool:
    """Whether a run's tokenizer is the command's. One that is trained is the run's own, whatever
    corpus the command has; one from a folder may have moved."""
    if its is not None and {config.name, its.name} == {"hf"}:
        return tokenizer_identity(config)["digest"] == loaded(folder).digest
    return config == its


def own_architecture(folder: Path) -> ModelConfig | None:
    """The config of a run's own network, which its stage may have changed."""
    try:
        return build(ModelConfig, read_json(folder / "config.json")["model"], "model")
    except (OSError, ValueError, TypeError, KeyError):
        return None


def recorded(kind: type[T], record: Record, name: str) -> T | None:
    """A part of a run's config; missing keys have their defaults. None if it can't be read here."""
    try:
        return build(kind, record["config"].get(name, {}), name)
    except UserError:
        return None


def estimate(command: Command, store: RunStore, run: PlannedRun) -> float | None:
    """Seconds of training and evaluation, from the latest finished run of the same kind: its time
    per step and for its evaluation. Without such a run, the time budget if there is one."""
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
    evaluation = latest["cost"].get("eval_seconds", 0.0)
    if timed:
        return timed + evaluation
    steps = run.settings.max_steps / latest["config"]["stages"][run.stage]["max_steps"]
    return steps * (latest["cost"]["seconds"] - evaluation) + evaluation
