"""What the five stages share: settings, optimizer, learning rate, and one way to take a step.

All stages use manual optimization, so that a step means the same in each: its batch is split into
pieces of at most `micro_batch_size` rows, each piece's loss is a sum divided by the total over all
pieces and ranks, the gradient is clipped once, and the router's bias moves once. So 1 x 8 rows
equal 8 x 1 rows, whatever their lengths.
"""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor, nn

from fourstage.batch import moved
from fourstage.errors import UserError
from fourstage.model import ModelConfig, ScalarModel, Transformer
from fourstage.model.moe import Router
from fourstage.optim.muon import Muon, hidden_matrices
from fourstage.parallel import strategies
from fourstage.settings import Bounded, at_least, between, hashed, positive

Numbers = dict[str, Tensor]  # one entry per row in the first dimension
Metrics = dict[str, Tensor | float]  # single numbers
_TIME = re.compile(r"\d{1,3}:\d{1,2}:\d{1,2}:\d{1,2}")  # Lightning's DD:HH:MM:SS


@dataclass(frozen=True, kw_only=True)
class StageSettings(Bounded):
    """What every stage has; `stages.<name>` in the config. Raises UserError for a useless value."""

    parent: str | None  # a stage or a run; null: the stage's usual parent
    max_steps: int  # -1: only max_time counts; 0: a checkpoint as it is
    max_time: str | None  # DD:HH:MM:SS, replaces max_steps
    batch_size: int = at_least(1)  # rows (prompts in ppo and grpo) per step, over all ranks
    micro_batch_size: int = at_least(1)  # most rows in one forward and backward
    lr: float = positive()
    min_lr: float = between(0, 1)  # fraction of lr at the end of the cosine; 1: constant
    warmup: float = between(0, 1)  # fraction of the budget with a linear warm-up
    weight_decay: float = at_least(0)
    beta1: float = between(0, 1)
    beta2: float = between(0, 1)
    clip_norm: float = at_least(0)  # 0: no clipping
    balance_router: bool  # whether the auxiliary-loss-free bias moves
    val_every: int = at_least(0)  # steps between validations; 0: only after the last
    log_every: int = at_least(1)
    sample_every: int = at_least(0)  # steps between logged sample answers; 0: only after the last
    checkpoint_every: int = at_least(1)
    max_skipped: int = at_least(1, default=5)  # skipped optimizer steps in a row that end the run
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of attention and experts
    freeze_router: bool = False  # keep the routers' weights; balance_router says it of their bias

    HASHED_UP_TO: ClassVar[str] = "optimizer"  # see settings.hashed
    # fmt: off
    NOT_HASHED: ClassVar[frozenset[str]] = frozenset((
        "parent", "reward_parent", "micro_batch_size", "val_every", "log_every", "sample_every",
        "checkpoint_every", "max_skipped",
    ))
    # fmt: on

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            if getattr(self, name) == 1:
                raise UserError(f"{name}: must be below 1, got 1.0")
        if self.max_time is not None and not _TIME.fullmatch(self.max_time):
            what = "expected DD:HH:MM:SS such as 00:00:02:00"
            raise UserError(f"max_time: {what}, got {self.max_time!r}")
        if self.seconds == 0:
            raise UserError(f"max_time: must be above 0, got {self.max_time!r}")
        if self.max_steps < 1 and self.max_steps != -1 and not self.as_is:
            raise UserError(f"max_steps: must be at least 1, got {self.max_steps}")
        if self.max_time is None and self.max_steps == -1:
            raise UserError("max_steps: -1 means no limit and needs a max_time=DD:HH:MM:SS")

    def hashed(self) -> dict[str, Any]:
        """The settings that are part of a run's id, with equal times written alike."""
        if self.as_is:  # no other setting moves a weight
            return {"max_steps": 0}
        values = {key: v for key, v in hashed(self).items() if key not in self.NOT_HASHED}
        if self.seconds is not None:
            days, rest = divmod(self.seconds, 24 * 60 * 60)
            values["max_time"] = f"{days:02.0f}:{time.strftime('%H:%M:%S', time.gmtime(rest))}"
        return values

    def pieces(self, model: ModelConfig, processes: int) -> list[int] | None:
        """[processes, rows at once] if the weights depend on how a batch is split, else None."""
        return None

    @property
    def checkpoint(self) -> str | None:
        """The folder or the name on the hub of a parent hf:FOLDER_OR_NAME."""
        is_checkpoint = self.parent is not None and self.parent.startswith("hf:")
        return self.parent.removeprefix("hf:") if is_checkpoint else None

    @property
    def as_is(self) -> bool:
        """Whether the stage only takes over a checkpoint."""
        return self.checkpoint is not None and self.max_steps == 0 and self.max_time is None

    @property
    def seconds(self) -> float | None:
        """max_time in seconds."""
        if self.max_time is None:
            return None
        days, hours, minutes, seconds = map(int, self.max_time.split(":"))
        return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds


def learning_rate_factor(progress: float, warmup: float, min_lr: float) -> float:
    """Linear warm-up, then a cosine from 1 to `min_lr`; `progress` is a fraction of the budget."""
    if progress < warmup:
        return progress / warmup
    done = min(1.0, (progress - warmup) / max(1e-12, 1 - warmup))
    return min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(
    network: nn.Module, weight_decay: float, optimizer: str = "adamw"
) -> list[dict[str, Any]]:
    """AdamW's matrices with weight decay, its gains and embeddings without; Muon's matrices. Told
    apart by name, since under ZeRO-3 the weights have no shape at this point."""
    splits = dict(hidden_matrices(network)) if optimizer == "muon" else {}
    decayed, plain = [], []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and parameter not in splits:
            (plain if "norm" in name or "embed" in name else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": list(splits), "splits": list(splits.values()), "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


def steps_done(trainer: L.Trainer) -> int:
    """Finished training_steps (rollouts in ppo and grpo), including those before a resume."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed


class StageModule(L.LightningModule):
    """A stage of training; subclasses write one training_step.

    Its child modules are the networks that it trains. Those that it only reads are in `frozen`, a
    plain dict, so that no state_dict holds them.
    """

    policy: Transformer
    uses_dropout: ClassVar[bool] = True  # False: scores and log-probabilities must be repeatable

    def __init__(self, settings: StageSettings, seed: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.settings = settings
        self.seed = seed
        self.frozen: dict[str, Any] = {}
        self.tokens_seen = 0  # by this process; see cost.Spent
        self.tokens_generated = 0
        self.load_LE: Tensor | None = None  # of the result, over all ranks, since the last take
        self.validated_at = -1  # steps_done at the last validation
        self.taken_steps = self.skipped_steps = self.skipped_in_a_row = 0  # optimizer steps

    def result(self) -> Transformer | ScalarModel:
        """The network that the stage leaves behind."""
        return self.policy

    def transformers(self) -> list[Transformer]:
        """Every trained transformer, the result's first."""
        return strategies.transformers(self)

    def flops(self) -> int:
        """This process's FLOPs so far, in trained and frozen networks (see model/flops.py)."""
        networks = (self, *self.frozen.values())
        return sum(t.flops for network in networks for t in strategies.transformers(network))

    def setup(self, stage: str) -> None:
        if self.settings.freeze_router:  # before a strategy looks which weights have gradients
            for layer in self.modules():
                if isinstance(layer, Router):
                    layer.requires_grad_(False)

    def on_fit_start(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Dropout) and not self.uses_dropout:
                layer.p = 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        s = self.settings
        groups = [
            group
            for network in self.children()
            for group in parameter_groups(network, s.weight_decay, s.optimizer)
        ]
        if s.optimizer == "muon":
            return Muon(groups, lr=s.lr, betas=(s.beta1, s.beta2))
        return torch.optim.AdamW(groups, lr=s.lr, betas=(s.beta1, s.beta2), fused=True)

    # --- the learning rate follows the steps, or the clock if the budget is a time

    @property
    def steps_done(self) -> int:
        return steps_done(self.trainer)

    def progress(self, ahead: int = 0) -> float:
        """Fraction of the budget spent, 0 to 1; of a step budget, after `ahead` more steps."""
        if self.settings.seconds is None:
            return (self.steps_done + ahead) / self.settings.max_steps
        timer = next(c for c in self.trainer.callbacks if isinstance(c, Timer))
        spent = min(1.0, timer.time_elapsed("train") / self.settings.seconds)
        return self.trainer.strategy.broadcast(spent)  # one clock, so one learning rate

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        s = self.settings
        factor = learning_rate_factor(self.progress(ahead=1), s.warmup, s.min_lr)
        for group in self.optimizers().param_groups:
            group["lr"] = s.lr * factor

    def on_validation_end(self) -> None:
        self.validated_at = self.steps_done

    def on_train_end(self) -> None:
        strategies.make_plain(self)

    # --- one optimizer step

    def here(self, x: Tensor) -> Tensor:
        """The tensor on this process's device."""
        return moved(x, self.device)

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(value, reduce_op="sum")

    def max_over_ranks(self, value: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(value, reduce_op="max")

    def masked_mean(self, x: Tensor, mask: Tensor) -> Tensor:
        """Mean over the True entries of all ranks; 0 if there are none."""
        total, count = self.sum_over_ranks(torch.stack([(x * mask).sum(), mask.sum()]))
        return total / count.clamp(min=1)

    def update(
        self, piece: Callable[[slice], tuple[Tensor, Numbers]], n_rows: int
    ) -> tuple[Tensor, Numbers]:
        """One optimizer step on a batch of `n_rows`, at most `micro_batch_size` rows at a time.

        `piece(rows)` gives these rows' share of the loss (their sum divided by the total over all
        pieces and ranks, so that the shares add up to the batch's loss), and numbers to keep.
        A step whose loss or gradient is not finite on any rank is skipped on all of them.

        Returns the gradient's norm before clipping, and the pieces' numbers, concatenated.
        Raises UserError after max_skipped skipped steps in a row.
        """
        self.optimizers().zero_grad()
        losses: list[Tensor] = []
        seen: list[Numbers] = []
        for start in range(0, n_rows, self.settings.micro_batch_size):
            end = min(start + self.settings.micro_batch_size, n_rows)

            def share(rows: slice = slice(start, end)) -> Tensor:
                part, numbers = piece(rows)
                losses.append(part.detach())
                seen.append({name: x.detach() for name, x in numbers.items()})
                return part * self.trainer.world_size  # the ranks are averaged, we need their sum

            strategies.backward(self, share, is_last=end == n_rows)
        loss = torch.stack(losses).sum()

        def is_finite(norm: Tensor) -> bool:
            return bool(torch.isfinite(self.sum_over_ranks(norm.to(loss) + loss)))

        norm, taken = strategies.step(self, self.settings.clip_norm, is_finite)
        self.balance(taken)
        self.count(taken)
        return norm, {name: torch.cat([numbers[name] for numbers in seen]) for name in seen[0]}

    def forward(self, share: Callable[[], Tensor]) -> Tensor:
        """A share of the loss, called through what DeepSpeed wraps around the module."""
        return share()

    def balance(self, taken: bool) -> None:
        """Move the routers' biases by the load of the optimizer step, unless it was skipped."""
        for i, transformer in enumerate(self.transformers()):
            load_LE = transformer.take_load()
            if load_LE is None or not taken:  # None: a dense model
                continue
            load_LE = self.sum_over_ranks(load_LE)
            if self.settings.balance_router and transformer.config.balance == "bias":
                transformer.update_expert_bias(load_LE)
            if i == 0:
                self.load_LE = load_LE if self.load_LE is None else self.load_LE + load_LE

    def take_load(self) -> Tensor | None:
        """Tokens per expert [L, E] of the result's training forwards since the last call."""
        load_LE, self.load_LE = self.load_LE, None
        return load_LE

    def count(self, taken: bool) -> None:
        """Count an optimizer step; raise UserError if too many in a row were skipped."""
        s = self.settings
        self.taken_steps += taken
        self.skipped_steps += not taken
        self.skipped_in_a_row = 0 if taken else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= s.max_skipped:
            raise UserError(
                f"step {self.steps_done + 1}: {self.skipped_in_a_row} optimizer steps in a row had "
                f"no finite loss and gradient: lower lr ({s.lr:g}), which starts a new run; or run "
                "the same command again, which resumes from the last checkpoint, with a higher "
                "max_skipped"
            )

    def check_trained(self) -> None:
        """Raise UserError if training left nothing to use: no step taken, or non-finite weights."""
        s = self.settings
        if self.skipped_steps and not self.taken_steps:
            raise UserError(
                f"none of {self.skipped_steps} optimizer steps had a finite loss and gradient: "
                f"lower lr ({s.lr:g}) or the coefficients of the loss"
            )
        for name, weight in self.result().state_dict().items():
            if not torch.isfinite(weight).all():
                raise UserError(
                    f"{name} is not finite after the last step: lower lr ({s.lr:g}) or "
                    f"weight_decay ({s.weight_decay:g})"
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["steps_skipped"] = self.skipped_steps  # DeepSpeed has its own "skipped_steps"
        checkpoint["steps_taken"] = self.taken_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped_steps = checkpoint["steps_skipped"]
        self.taken_steps = checkpoint.get("steps_taken", 1)  # missing in older checkpoints

    # --- logs

    def log_step(self, metrics: Metrics, tokens: Tensor | int = 0) -> None:
        """Log train/<name> for this training step, averaged over ranks, and count its tokens."""
        lr = self.optimizers().param_groups[0]["lr"]
        metrics = {**metrics, "lr": lr, "skipped_steps": self.skipped_steps}
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        cells = [torch.as_tensor(x, dtype=dtype).detach() for x in (*metrics.values(), tokens)]
        # a single wait for the device
        *numbers, n_tokens = torch.stack([self.here(x).reshape(()) for x in cells]).tolist()
        self.tokens_seen += int(n_tokens)
        named = {f"train/{name}": x for name, x in zip(metrics, numbers, strict=True)}
        self.log_dict(named, on_step=True, on_epoch=False, batch_size=1, sync_dist=True)
