"""The stages and runs that a stage descends from, as the config names them."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from fourstage.data.vocabulary import identity_of as tokenizer_identity
from fourstage.data.vocabulary import loaded
from fourstage.errors import UserError
from fourstage.files import read_json
from fourstage.ladder import LADDER, place, stages
from fourstage.lineage.command import Command
from fourstage.lineage.start import Adopted, from_checkpoint, from_run, has_checkpoint
from fourstage.model import ModelConfig
from fourstage.runs.records import Record, read_record
from fourstage.runs.store import RunStore
from fourstage.settings import build
from fourstage.stages import StageSettings
from fourstage.tokenizer import TokenizerConfig

T = TypeVar("T")


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


def check_role(where: str, name: str, stage: str, role: str) -> None:
    """Raise UserError for a reward model where a language model is needed, or the reverse."""
    is_scalar = LADDER[stage].leaves == "scalar"
    if is_scalar != (role == "reward"):
        wanted = "a language model, not a reward run" if is_scalar else "a reward run"
        raise UserError(f"{where}: {name} will not do, expected {wanted}")


def named_run(
    command: Command, store: RunStore, stage: str, name: str, role: str
) -> tuple[Path, Record]:
    """The finished run that a config names as a parent, and its record. Raises UserError if there
    is none, or if the stage needs the command's model and the run has another."""
    where = parent_key(stage, role)
    try:
        folder = store.find(name)
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
