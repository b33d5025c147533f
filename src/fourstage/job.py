"""What lineage hands to the runner: one stage to train, with everything it needs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fourstage.errors import UserError
from fourstage.settings import MOST_SEED, Bounded, at_least, between

if TYPE_CHECKING:  # some users of this module never need PyTorch
    from fourstage.data import DataConfig
    from fourstage.model import ModelConfig
    from fourstage.tokenizer import TokenizerConfig

MOST_SAMPLES = 1000  # answers per problem, which are all generated before the first is judged
LEAST_PROMPT = 8  # tokens that must be left for a prompt


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(Bounded):
    """Where a stage trains. "auto" is one GPU in bf16 if there is one, else the CPU in fp32."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    devices: int = 1  # -1: all of them
    num_nodes: int = at_least(1, default=1)
    strategy: Literal["auto", "ddp", "zero1", "zero2", "zero3", "zero3_offload"] = "auto"
    precision: Literal["auto", "32-true", "16-mixed", "bf16-mixed"] = "auto"
    compile: bool = False  # training forwards by torch.compile, decode steps as a CUDA graph
    checkpoint_activations: bool = False  # recompute activations in the backward pass

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.devices < 1 and self.devices != -1:
            raise UserError(f"devices: must be at least 1, or -1 for all, got {self.devices}")

    @property
    def processes(self) -> int:
        """One per device, over all nodes."""
        return self.devices * self.num_nodes

    @property
    def words(self) -> str:
        """Such as "2 processes under zero3"."""
        under = f" under {self.strategy}" if self.strategy.startswith("zero") else ""
        return f"{self.processes} process{'es' * (self.processes > 1)}{under}"

    def resolved(self) -> TrainerConfig:
        """The same without "auto" in accelerator and precision or -1 in devices. Raises UserError
        for what this machine or the chosen strategy doesn't support."""
        import torch

        has_gpu = torch.cuda.is_available()
        has = {"cpu": True, "gpu": has_gpu, "mps": torch.backends.mps.is_available()}
        accelerator, precision, devices = self.accelerator, self.precision, self.devices
        if accelerator == "auto":
            accelerator = "gpu" if has_gpu else "cpu"
        if not has[accelerator]:
            raise UserError(
                f"trainer.accelerator: PyTorch finds no {accelerator} here: use trainer=cpu"
            )
        on_gpu = accelerator == "gpu"
        if precision == "auto":
            precision = "bf16-mixed" if on_gpu else "32-true"
        if precision == "16-mixed" and accelerator == "cpu":  # Lightning would take bf16-mixed
            raise UserError("trainer.precision: no 16-mixed on a CPU: take 32-true or bf16-mixed")
        if self.strategy.startswith("zero"):
            if not on_gpu:
                raise UserError(f"trainer.strategy: {self.strategy} needs GPUs: take ddp")
            if precision == "16-mixed":
                raise UserError(
                    f"trainer.precision: {self.strategy} trains in bf16-mixed or 32-true, "
                    f"not {precision}"
                )
        if self.compile and accelerator == "cpu":
            check_compiler("trainer.compile")
        for name in ("compile", "checkpoint_activations"):
            if getattr(self, name) and self.strategy.startswith("zero3"):
                raise UserError(f"trainer.{name}: not under {self.strategy}: take zero2")
        if devices == -1:
            devices = torch.cuda.device_count() if on_gpu else 1
        return replace(self, accelerator=accelerator, devices=devices, precision=precision)


def check_compiler(option: str) -> None:
    """Raise UserError if torch.compile doesn't find the C++ compiler that it needs on a CPU."""
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
    """Where metrics go besides metrics.csv. mode "auto": online if a key is set, else offline."""

    name: Literal["wandb", "none"] = "wandb"
    project: str | None = None  # None: WANDB_PROJECT, else fourstage
    entity: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Bounded):
    """`evaluation` in the config: how many held-out items, and the seed of the sampled answers."""

    seed: int = between(0, MOST_SEED)
    max_prompts: int = at_least(1)  # chat prompts
    max_problems: int = at_least(1)
    max_pairs: int = at_least(1)
    max_new_tokens: int = at_least(1)
    samples: int = at_least(1, default=8)  # answers per problem for pass@k
    max_sampled_problems: int = at_least(1, default=100)
    max_blocks: int = at_least(1, default=1000)  # of 256 tokens, evenly spread over held-out text
    # older runs lack the last three

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples > MOST_SAMPLES:
            raise UserError(f"samples: must be at most {MOST_SAMPLES}, got {self.samples}")

    def check_room(self, max_seq_len: int) -> None:
        """Raise UserError if an answer would leave no room for a prompt."""
        if max_seq_len - self.max_new_tokens < LEAST_PROMPT:
            raise UserError(
                f"evaluation.max_new_tokens: {self.max_new_tokens} tokens leave no room for a "
                f"prompt in model.max_seq_len={max_seq_len}: lower it"
            )


@dataclass(frozen=True, kw_only=True)
class Start:
    """The pretrained checkpoint that a ladder starts from."""

    name: str  # as tables show it
    folder: Path
    digest: str  # of its weights and tokenizer


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
    digest: str  # of the data that the stage reads, as planned
    trainer: TrainerConfig  # resolved
    logger: LoggerConfig
    evaluation: EvaluationConfig
    seed: int
    parents: dict[str, Path] = field(default_factory=dict)  # "policy", "reward"
    ancestors: dict[str, Path] = field(default_factory=dict)  # stage -> its finished run's folder
    group: str  # the ladder: the id of its first run
    tags: tuple[str, ...] = ()  # the user's words
    start: Start | None = None  # of the first stage; None: random weights
    debug: str | None = None
    is_named: bool = False  # by the command; else it is an ancestor of that stage
    resume: bool = False  # checkpoints/last.ckpt is there
    keep_checkpoints: bool = False
    config: dict[str, Any] = field(default_factory=dict)  # resolved, as in run.json
    plan_left: list[tuple[str, float | None]] = field(default_factory=list)  # (stage, seconds)

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.run_id}"

    @property
    def parent_names(self) -> dict[str, str]:
        """role -> <stage>-<id>."""
        return {role: folder.name for role, folder in self.parents.items()}

    @property
    def checkpoint(self) -> Path:
        """Resume state: weights, optimizer, loops and data position, written by Checkpointer."""
        return self.folder / "checkpoints" / "last.ckpt"
