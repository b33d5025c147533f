"""What lineage hands to the runner: one stage to train, with everything it needs, and its record.

The record is `run.json` in the run's folder; it is the only file that says what a run is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal

from fourstage.errors import UserError

if TYPE_CHECKING:  # types only: the record is read by programs that never need torch
    from fourstage.data import DataConfig
    from fourstage.evaluation import EvaluationConfig
    from fourstage.model import ModelConfig
    from fourstage.tokenizer import TokenizerConfig

STAGES = ("pretrain", "sft", "reward", "ppo", "grpo")
RUN_ID = re.compile("[a-z]{10}")
# what every record has, by type, and what it may have
RECORDED: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "stage": str,
    "parents": dict,
    "group": str,
    "status": str,
    "debug": (str, NoneType),
    "started": str,
    "config": dict,
    "config.seed": int,
    "config.model": dict,
    "config.model.name": str,
    "config.stages": dict,
    "cost": dict,
    "cost.seconds": (int, float),
}
OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "finished": (str, NoneType),
    "data": dict,
    "git": dict,
    "git.commit": (str, NoneType),
    "versions": dict,
    "threads": int,
    "config.evaluation": dict,
    "cost.eval_seconds": (int, float),
}


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Where a stage trains. "auto" is one GPU in bf16 where there is one, else the CPU in fp32."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    devices: int = 1  # -1: all of them
    num_nodes: int = 1
    strategy: Literal["auto", "ddp", "zero1", "zero2", "zero3", "zero3_offload"] = "auto"
    precision: Literal["auto", "32-true", "16-mixed", "bf16-mixed"] = "auto"
    compile: bool = False  # training forwards by torch.compile, decode steps as a CUDA graph
    checkpoint_activations: bool = False  # compute activations again in the backward

    def __post_init__(self) -> None:
        if self.devices < 1 and self.devices != -1:
            raise UserError(f"devices: must be at least 1, or -1 for all, got {self.devices}")
        if self.num_nodes < 1:
            raise UserError(f"num_nodes: must be at least 1, got {self.num_nodes}")

    def resolved(self) -> TrainerConfig:
        """The same with no "auto" left in accelerator and precision, nor -1 in devices.

        Raises UserError for a GPU that is not there, a precision that a CPU has not, and
        `compile` where a CPU's code could not be compiled.
        """
        import torch

        has = {
            "cpu": True,
            "gpu": torch.cuda.is_available(),
            "mps": torch.backends.mps.is_available(),
        }
        accelerator = self.accelerator
        if accelerator == "auto":
            accelerator = "gpu" if has["gpu"] else "cpu"
        if not has[accelerator]:
            raise UserError(
                f"trainer.accelerator: no {accelerator} here that PyTorch can use: take trainer=cpu"
            )
        precision = self.precision
        if precision == "auto":
            precision = "bf16-mixed" if accelerator == "gpu" else "32-true"
        if precision == "16-mixed" and accelerator == "cpu":  # Lightning would take bf16-mixed
            raise UserError("trainer.precision: no 16-mixed on a CPU: take 32-true or bf16-mixed")
        if self.strategy.startswith("zero"):
            if accelerator != "gpu":
                raise UserError(f"trainer.strategy: {self.strategy} needs GPUs: take ddp")
            if precision not in ("bf16-mixed", "32-true"):
                raise UserError(
                    f"trainer.precision: {self.strategy} trains in bf16-mixed or 32-true, "
                    f"not {precision}"
                )
        if self.compile and accelerator == "cpu":
            check_compiler("trainer.compile")
        for name in ("compile", "checkpoint_activations"):
            if getattr(self, name) and self.strategy.startswith("zero3"):
                raise UserError(f"trainer.{name}: not under {self.strategy}: take zero2")
        devices = self.devices
        if devices == -1:
            devices = torch.cuda.device_count() if accelerator == "gpu" else 1
        return replace(self, accelerator=accelerator, devices=devices, precision=precision)


def check_compiler(option: str) -> None:
    """Raise UserError unless torch.compile finds the C++ compiler that it needs on a CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(
            f"{option}: torch.compile finds no C++ compiler: install one, such as g++, or name it "
            f"in the variable CXX, or take {option}=false"
        ) from None


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    """Where metrics go besides metrics.csv. mode "auto": online when a key is set, else offline."""

    name: Literal["wandb", "none"] = "wandb"
    project: str = "fourstage"
    entity: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"


@dataclass(kw_only=True)
class StageJob:
    """One stage of one plan. All paths exist, except those that the stage itself makes."""

    stage: str
    run_id: str
    folder: Path
    outputs: Path
    settings: Any  # the stage's own Settings
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    digest: str  # of what the stage reads of its data, as planned
    trainer: TrainerConfig  # resolved
    logger: LoggerConfig
    evaluation: EvaluationConfig
    seed: int
    parents: dict[str, Path] = field(default_factory=dict)  # "policy", "reward"
    ancestors: dict[str, Path] = field(default_factory=dict)  # stage -> its finished run's folder
    group: str  # the ladder: its pretrain run's id
    debug: str | None = None
    resume: bool = False  # checkpoints/last.ckpt is there
    keep_checkpoints: bool = False
    config: dict[str, Any] = field(default_factory=dict)  # resolved, as in run.json
    plan_left: list[tuple[str, float | None]] = field(default_factory=list)  # (stage, seconds)

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.run_id}"

    @property
    def checkpoint(self) -> Path:
        """Resume state: weights, optimizer, loops and data position, written by Checkpointer."""
        return self.folder / "checkpoints" / "last.ckpt"


def read_record(folder: Path) -> dict[str, Any]:
    """The run.json of a run's folder.

    Raises UserError when it is missing, broken, or of a stage that this version doesn't know.
    """
    record = _stored(folder)
    if wrong := what_is_wrong(record):
        path = folder / "run.json"
        raise UserError(f"{path}: broken ({wrong}): remove the folder and train again")
    if record["stage"] not in STAGES:
        raise UserError(f"{folder}: of a stage that is not known here ({record['stage'][:40]})")
    return record


def what_is_wrong(record: dict[str, Any]) -> str | None:
    """The first key of a record that is missing or of another type, or that makes no sense."""
    for kinds, must_be in ((RECORDED, True), (OPTIONAL, False)):
        for key, kind in kinds.items():
            value: Any = record
            for name in key.split("."):
                value = value.get(name, MISSING) if isinstance(value, dict) else MISSING
            if value is MISSING and must_be:
                return f"it has no {key}"
            if value is not MISSING and (not isinstance(value, kind) or isinstance(value, bool)):
                return f"{key} is {str(value)[:40]!r}"
    ids = [record["id"], record["group"], *record["parents"].values()]
    for run_id in ids:
        if not isinstance(run_id, str) or not RUN_ID.fullmatch(run_id):  # it names files
            return f"{str(run_id)[:40]!r} is no run's id, which is ten letters a to z"
    if record["stage"] in STAGES and not isinstance(
        record["config"]["stages"].get(record["stage"]), dict
    ):
        return f"it has no config.stages.{record['stage']}"
    if record["status"] == "finished" and not isinstance(record.get("finished"), str):
        return "it has no finished"
    return None


def _stored(folder: Path) -> dict[str, Any]:
    """The object in run.json, whatever it holds."""
    path = folder / "run.json"
    try:
        record = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: not a run (it has no run.json)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: broken ({error}): remove the folder and train again") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}: broken (no JSON object): remove the folder and train again")
    return record


def write_record(folder: Path, **changes: Any) -> dict[str, Any]:
    """Merge the changes into run.json (a dict key by key) and return the whole record."""
    record = _stored(folder) if (folder / "run.json").exists() else {}
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(record.get(key), dict):
            value = {**record[key], **value}
        record[key] = value
    write_json(folder / "run.json", record)
    return record


def write_json(path: Path, value: Any) -> None:
    """An indented JSON file, atomically. Raises UserError for numbers that are not finite."""
    write_atomic(path, _json(path, value, indent=1) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line; other line separators than a newline may stand in their texts.

    Raises ValueError for what is none.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = [parse_json(line) for line in lines if line]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line without a JSON object")
    return rows


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises OSError, and ValueError for what is no JSON."""
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """json.loads, whose every refusal is a ValueError: too deep, too many digits, NaN."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, atomically. Raises UserError for numbers that are not finite."""
    write_atomic(path, "".join(_json(path, row) + "\n" for row in rows))


def _json(path: Path, value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise UserError(
            f"{path.name}: the model's numbers are not finite: its weights have grown too large: "
            "train with a lower lr"
        ) from None


def write_atomic(path: Path, text: str) -> None:
    """A reader, or a later start after a crash, sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        swap_in(part, path)
    finally:
        part.unlink(missing_ok=True)


def swap_in(new: Path, place: Path) -> None:
    """Move a file or folder to `place`, whose old content goes; a kill loses neither of the two.

    Where a kill may come between a folder's two renames, `undo_swap` has to be called before
    `place` is read again.
    """
    undo_swap(new, place)
    for path in [new, *new.rglob("*")]:
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    if not place.is_dir():  # a rename replaces a file, but not a folder
        os.replace(new, place)
        return
    os.rename(place, set_aside(new))  # of a link to a folder, the link
    os.rename(new, place)
    remove(set_aside(new))


def undo_swap(new: Path, place: Path) -> None:
    """Put the old folder back that `swap_in` set aside before a kill, or remove it at last."""
    old = set_aside(new)
    if not old.exists() and not old.is_symlink():
        return
    if place.exists():
        remove(old)
    else:
        os.rename(old, place)


def exists(path: Path) -> bool:
    """Whether a file or folder is there; none has a name that is too long or holds a NUL."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def clean_up(state: Path) -> None:
    """After a kill: the last good resume state in its place, and none half-written beside it."""
    undo_swap(part_of(state), state)
    remove(part_of(state))


def part_of(state: Path) -> Path:
    """Where the next resume state is written."""
    return state.with_name(".part.ckpt")


def remove(path: Path) -> None:
    """A file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def set_aside(new: Path) -> Path:
    """Where the old folder waits while the new one takes its place."""
    return new.with_name(f"{new.name}.old")
