"""A ladder that starts from a pretrained checkpoint: stages.pretrain.parent=hf:FOLDER_OR_NAME.

Model and tokenizer of the command are then the checkpoint's, or those of the run with such an
ancestor that a later stage names as its parent. So whatever is typed of them has to agree, except
for settings that say nothing about the checkpoint's weights (FREE).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fourstage.errors import UserError
from fourstage.exchange.checkpoint import digest, read_checkpoint
from fourstage.exchange.hub import find_checkpoint
from fourstage.files import expanded
from fourstage.job import Start
from fourstage.model import ModelConfig
from fourstage.runs.records import read_record
from fourstage.runs.store import RunStore
from fourstage.settings import build
from fourstage.stages.prepare import sums_of
from fourstage.tokenizer import Tokenizer, TokenizerConfig

FREE = ("dropout", "balance", "bias_step", "switch_coef", "z_loss_coef", "expert_path")


@dataclass(frozen=True)
class Adopted:
    """A model and a tokenizer that are not the command's own. start: the checkpoint, if its first
    run is in the plan."""

    model: ModelConfig
    tokenizer: TokenizerConfig
    start: Start | None = None


def from_checkpoint(
    named: str, where: str, config: Mapping[str, Any], overrides: Sequence[str]
) -> Adopted:
    """What a command takes over from a checkpoint. Raises UserError for one that doesn't map onto
    our model, and for words of the command that say otherwise."""
    folder, name = find_checkpoint(named, where)
    found = read_checkpoint(folder, name)
    tokenizer = TokenizerConfig(name="hf", path=str(folder))
    if (tokens := Tokenizer.from_folder(folder).vocab_size) > found.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokens:,} tokens, config.json says vocab_size "
            f"{found.vocab_size:,}: copy the checkpoint again"
        )
    whose, typed = f"{where}=hf:{named}", words(overrides)
    free = [key for key in FREE if {"model", f"model.{key}"} & typed.keys()]
    if word := typed.get("model.max_seq_len"):
        free.append("max_seq_len")
        if config["model"]["max_seq_len"] > found.max_positions:
            raise UserError(f"{word}: {whose} has positions for {found.max_positions} tokens")
    values = asdict(found.model) | {key: config["model"][key] for key in free}
    model = build(ModelConfig, values, "model")
    check_typed(config, typed, model, folder, whose)
    sums = sums_of(Path(config["outputs"]))
    return Adopted(model, tokenizer, Start(name=name, folder=folder, digest=digest(folder, sums)))


def has_checkpoint(store: RunStore, folder: Path) -> bool:
    """Whether a run descends from a checkpoint, as far as its ancestors are still there."""
    return any("start" in read_record(run) for run in (folder, *store.ancestors(folder).values()))


def from_run(
    folder: Path, model: ModelConfig, where: str, config: Mapping[str, Any], typed: Sequence[str]
) -> Adopted:
    """The same of a finished run, which has a copy of its checkpoint's tokenizer."""
    check_typed(config, words(typed), model, folder, f"{where}={folder.name}")
    return Adopted(model, TokenizerConfig(name="hf", path=str(folder)))


def words(overrides: Sequence[str]) -> dict[str, str]:
    """The words of a command by their keys."""
    return {word.lstrip("+").partition("=")[0]: word for word in overrides}


def check_typed(
    config: Mapping[str, Any],
    typed: Mapping[str, str],
    model: ModelConfig,
    folder: Path,
    whose: str,
) -> None:
    """Raise UserError if a word of the command wants another model, or a tokenizer from another
    folder."""
    for key, word in typed.items():
        group, _, field = key.partition("@")[0].partition(".")
        if group == "model":
            asked, values = asdict(build(ModelConfig, config["model"], "model")), asdict(model)
            fields = [field] if field else values.keys() - {"name", "max_seq_len"}
            for name in [name for name in values if name in fields and values[name] != asked[name]]:
                raise UserError(
                    f"{word}: {whose} brings its own model, whose {name} is {values[name]}, not "
                    f"{asked[name]}: leave {key} out"
                )
        path = config["tokenizer"].get("path")
        if group == "tokenizer" and (path is None or expanded(path).resolve() != folder.resolve()):
            raise UserError(f"{word}: {whose} brings its own tokenizer: leave {key} out")
