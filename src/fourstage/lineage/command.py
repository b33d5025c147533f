"""A command, checked: its config tree, and what its stages need of the model and the machine."""

import re
from dataclasses import asdict, dataclass
from typing import Literal

from fourstage import data
from fourstage.errors import UserError
from fourstage.job import EvaluationConfig, LoggerConfig, TrainerConfig
from fourstage.ladder import LADDER, stages
from fourstage.model import ModelConfig
from fourstage.parallel.memory import GIB, WEIGHTS, bytes_per_gpu, machine_memory
from fourstage.settings import MOST_SEED, Bounded, between, positive
from fourstage.stages import StageSettings
from fourstage.tokenizer import TokenizerConfig


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


def check_memory(command: Command, stage: str, vocab_size: int) -> None:
    """Raise UserError if a stage needs more memory than this machine has, counting only its
    networks (on a GPU: the weights, which are made here) and one batch of token ids."""
    trainer, values = command.trainer, asdict(command.stages[stage])
    parameters, _ = command.model.count_params(vocab_size)
    networks = WEIGHTS * parameters
    if trainer.accelerator == "cpu":
        networks = int(bytes_per_gpu("ddp", stage, parameters, 1))
    rows = max(values["batch_size"], values.get("pairs_per_prompt", 1))
    rows *= values.get("group_size", 1)
    lengths = ("block_size", "max_tokens", "max_prompt_tokens", "max_new_tokens")
    tokens = rows * sum(values.get(key, 0) for key in lengths)
    tokens = max(tokens, command.evaluation.max_new_tokens)
    needed = trainer.devices * networks + 8 * tokens
    if needed > (available := machine_memory()):
        raise UserError(
            f"stages.{stage}: {parameters:,} parameters and {tokens:,} tokens at once take at "
            f"least {needed / GIB:,.0f} GiB of memory, and this machine has "
            f"{available / GIB:,.0f}: take a smaller model, batch or number of tokens"
        )
