"""What the five stages share: settings, optimizer, learning rate, and one way to take a step.

All stages use manual optimization, so that a step means the same in each: its batch is cut into
pieces of at most `micro_batch_size` rows, each piece's loss is a sum divided by the total over all
pieces and ranks, the gradient is clipped once, and the router's bias moves once. So 1 x 8 rows
equal 8 x 1 rows, whatever their lengths.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor, nn

from fourstage.batch import moved
from fourstage.errors import UserError
from fourstage.model import ModelConfig, ScalarModel, Transformer
from fourstage.optim.muon import Muon, hidden_matrices
from fourstage.parallel import strategies
from fourstage.settings import hashed

Numbers = dict[str, Tensor]  # of some rows, the first dimension
_TIME = re.compile(r"\d{1,3}:\d{1,2}:\d{1,2}:\d{1,2}")  # Lightning's DD:HH:MM:SS


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """The settings that every stage has; `stages.<name>` in the config.

    Raises UserError for a value that no run could use.
    """

    parent: str | None  # a stage or a run; null: the stage's usual parent
    max_steps: int  # -1: only max_time counts
    max_time: str | None  # DD:HH:MM:SS, replaces max_steps
    batch_size: int  # rows (prompts in ppo and grpo) a step, over all ranks
    micro_batch_size: int  # rows that one forward and backward hold at most
    lr: float
    min_lr: float  # share of lr at the end of the cosine; 1: constant after the warm-up
    warmup: float  # share of the budget with a linear warm-up
    weight_decay: float
    beta1: float
    beta2: float
    clip_norm: float  # 0: no clipping
    balance_router: bool  # whether the auxiliary-loss-free bias moves
    val_every: int  # steps between validations; 0: only after the last
    log_every: int
    sample_every: int  # steps between logged sample answers; 0: only after the last
    checkpoint_every: int
    max_skipped: int = 5  # optimizer steps in a row without a finite gradient that end the run
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of attention and experts

    # whether the loss has terms, or the networks dropout, that see a piece of a batch as a whole
    sees_pieces: ClassVar[bool] = False

    HASHED_UP_TO: ClassVar[str] = "optimizer"  # see settings.hashed
    # fmt: off
    NOT_HASHED: ClassVar[frozenset[str]] = frozenset((
        "parent", "reward_parent", "micro_batch_size", "val_every", "log_every", "sample_every",
        "checkpoint_every", "max_skipped",
    ))
    # fmt: on

    def __post_init__(self) -> None:
        check_range(self, 1, "batch_size", "micro_batch_size", "log_every", "checkpoint_every")
        check_range(self, 1, "max_skipped")
        check_range(self, 0, "val_every", "sample_every", "clip_norm", "weight_decay")
        check_range(self, 0, "min_lr", "warmup", "beta1", "beta2", most=1)
        check_positive(self, "lr")
        for name in ("beta1", "beta2"):
            if getattr(self, name) == 1:
                raise UserError(f"{name}: must be below 1, got 1.0")
        if self.max_time is not None and not _TIME.fullmatch(self.max_time):
            raise UserError(
                f"max_time: expected DD:HH:MM:SS such as 00:00:02:00, got {self.max_time!r}"
            )
        if self.seconds == 0:
            raise UserError(f"max_time: must be above 0, got {self.max_time!r}")
        if self.max_steps < 1 and self.max_steps != -1:
            raise UserError(f"max_steps: must be at least 1, got {self.max_steps}")
        if self.max_time is None and self.max_steps == -1:
            raise UserError("max_steps: -1 means no limit and needs a max_time=DD:HH:MM:SS")

    def hashed(self) -> dict[str, Any]:
        """The settings that are part of a run's id; equal times are written in one way."""
        values = {key: v for key, v in hashed(self).items() if key not in self.NOT_HASHED}
        if self.seconds is not None:
            minutes, seconds = divmod(int(self.seconds), 60)
            hours, minutes = divmod(minutes, 60)
            days, hours = divmod(hours, 24)
            values["max_time"] = f"{days:02}:{hours:02}:{minutes:02}:{seconds:02}"
        return values

    def pieces(self, model: ModelConfig, processes: int) -> list[int] | None:
        """[processes, rows at once], where the weights depend on how a batch is split, else None.

        They do with dropout, which draws for each piece, and with the switch loss, a product of two
        means over the tokens of a piece. All other terms add up over any pieces.
        """
        has_switch_loss = model.balance == "switch" and not model.dense
        if not self.sees_pieces or not (model.dropout or has_switch_loss):
            return None
        return [processes, min(self.micro_batch_size, self.batch_size // processes)]

    @property
    def seconds(self) -> float | None:
        """max_time in seconds."""
        if self.max_time is None:
            return None
        days, hours, minutes, seconds = map(int, self.max_time.split(":"))
        return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds


def check_range(settings: Any, least: float, *names: str, most: float = math.inf) -> None:
    """Raise UserError unless each named setting lies in [least, most]."""
    for name in names:
        value = getattr(settings, name)
        if not least <= value <= most:
            bound = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            raise UserError(f"{name}: must be {bound}, got {value}")


def check_positive(settings: Any, *names: str) -> None:
    """Raise UserError unless each named setting is a finite number above 0."""
    for name in names:
        value = getattr(settings, name)
        if not 0 < value < math.inf:
            raise UserError(f"{name}: must be above 0, got {value}")


def learning_rate_factor(progress: float, warmup: float, min_lr: float) -> float:
    """Linear warm-up, then a cosine from 1 to `min_lr`; `progress` is the share of the budget."""
    if progress < warmup:
        return progress / warmup
    done = min(1.0, (progress - warmup) / max(1e-12, 1 - warmup))
    return min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(
    network: nn.Module, weight_decay: float, optimizer: str = "adamw"
) -> list[dict[str, Any]]:
    """AdamW's matrices with weight decay, its gains and embeddings without; Muon's matrices.

    By name: under ZeRO-3 a weight has lost its shape by now. A network without weights has none.
    """
    splits = dict(hidden_matrices(network)) if optimizer == "muon" else {}
    decayed, plain = [], []
    for name, parameter in network.named_parameters():
        is_matrix = "norm" not in name and "embed" not in name
        if parameter not in splits:
            (decayed if is_matrix else plain).append(parameter)
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
    """A stage of training around the networks in `trained`; subclasses write one training_step."""

    uses_dropout: ClassVar[bool] = True  # False: a score or log-probability must be repeatable

    def __init__(self, settings: StageSettings, seed: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.settings = settings
        self.seed = seed
        self.tokens_seen = 0  # by this process; see cost.Spent
        self.tokens_generated = 0
        self.load_LE: Tensor | None = None  # of the policy, over all ranks, since the last take
        self.validated_at = -1  # steps_done at the last validation
        self.taken_steps = 0  # optimizer steps
        self.skipped_steps = 0  # and those that were not taken, so far and in a row until now
        self.skipped_in_a_row = 0

    def transformers(self) -> list[Transformer]:
        """Every trained transformer; first the one that is the stage's result."""
        raise NotImplementedError

    def result(self) -> Transformer | ScalarModel:
        """The network that the stage leaves behind."""
        raise NotImplementedError

    def networks(self) -> list[nn.Module]:
        """Every network that a step runs, whether it trains or not."""
        return list(self.children())

    def flops(self) -> int:
        """FLOPs of this process so far, in all of `networks` (model/flops.py says which count)."""
        modules = (module for network in self.networks() for module in network.modules())
        return sum(module.flops for module in modules if isinstance(module, Transformer))

    def on_fit_start(self) -> None:
        if not self.uses_dropout:
            for transformer in self.transformers():
                for layer in transformer.modules():
                    if isinstance(layer, nn.Dropout):
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

    # --- the learning rate follows the steps, or the clock where the budget is a time

    @property
    def steps_done(self) -> int:
        return steps_done(self.trainer)

    def progress(self, ahead: int = 0) -> float:
        """Share of the budget that is spent, 0 to 1; of a step budget, after `ahead` more steps."""
        if self.settings.seconds is None:
            return (self.steps_done + ahead) / self.settings.max_steps
        timers = [c for c in self.trainer.callbacks if isinstance(c, Timer)]
        share = min(1.0, timers[0].time_elapsed("train") / self.settings.seconds)
        return self.trainer.strategy.broadcast(share)  # one clock, so one learning rate

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
        """The sum of a tensor over all processes."""
        return self.trainer.strategy.reduce(value, reduce_op="sum")

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        return self.sum_over_ranks(value) / self.trainer.world_size

    def max_over_ranks(self, value: Tensor) -> Tensor:
        """The largest of all processes."""
        return self.trainer.strategy.reduce(value, reduce_op="max")

    def masked_mean(self, x: Tensor, mask: Tensor) -> Tensor:
        """Mean over the True entries of all processes; 0 where there is none."""
        total, count = self.sum_over_ranks(torch.stack([(x * mask).sum(), mask.sum()]))
        return total / count.clamp(min=1)

    def update(
        self, piece: Callable[[slice], tuple[Tensor, Numbers]], n_rows: int
    ) -> tuple[Tensor, Numbers]:
        """One optimizer step on a batch of `n_rows`, at most `micro_batch_size` rows at a time.

        `piece(rows)` gives these rows' share of the loss (their sum divided by the total over all
        pieces and ranks, so that the shares add up to the batch's loss), and numbers to keep.
        A step whose loss or gradient is not finite on any rank is skipped on all of them.
        Returns the gradient's norm before clipping, and the pieces' numbers, concatenated. Raises
        UserError after max_skipped steps in a row.
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
                return part * self.trainer.world_size  # the ranks' mean is taken, we need the sum

            strategies.backward(self, share, is_last=end == n_rows)
        loss = torch.stack(losses).sum()

        def is_finite(norm: Tensor) -> bool:
            return bool(torch.isfinite(self.sum_over_ranks(norm.to(loss) + loss)))

        norm, taken = strategies.step(self, self.settings.clip_norm, is_finite)
        if taken:
            self.taken_steps += 1
            self.skipped_in_a_row = 0
            self.balance()
        else:
            self.skip()
        return norm, {name: torch.cat([numbers[name] for numbers in seen]) for name in seen[0]}

    def forward(self, share: Callable[[], Tensor]) -> Tensor:
        """A share of the loss, called through what DeepSpeed wraps around the module."""
        return share()

    def skip(self) -> None:
        """Leave weights, optimizer and router biases as they are, up to a limit."""
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        for transformer in self.transformers():
            transformer.take_load()
        if self.skipped_in_a_row >= self.settings.max_skipped:
            raise UserError(
                f"step {self.steps_done + 1}: {self.skipped_in_a_row} optimizer steps in a row had "
                f"no finite loss and gradient: a lower lr than {self.settings.lr:g} makes a new "
                f"run; the same command goes on from the checkpoint before them, with a higher "
                f"max_skipped past them"
            )

    def check_trained(self) -> None:
        """Raise UserError where training has left nothing to use: no step, or no finite weights."""
        if self.skipped_steps and not self.taken_steps:
            raise UserError(
                f"none of {self.skipped_steps} optimizer steps had a finite loss and gradient: "
                f"lower lr ({self.settings.lr:g}) or the coefficients of the loss"
            )
        for name, weight in self.result().state_dict().items():
            if not torch.isfinite(weight).all():
                raise UserError(
                    f"{name} is not finite after the last step: lower lr ({self.settings.lr:g}) or "
                    f"weight_decay ({self.settings.weight_decay:g})"
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["steps_skipped"] = self.skipped_steps  # DeepSpeed has its own "skipped_steps"
        checkpoint["steps_taken"] = self.taken_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped_steps = checkpoint["steps_skipped"]
        self.taken_steps = checkpoint.get("steps_taken", 1)  # older states don't say

    # --- the routers

    def balance(self) -> None:
        """Moves the routers' biases by the load of the optimizer step, and keeps it for the log."""
        for transformer in self.transformers():
            load_LE = transformer.take_load()
            if load_LE is None:  # a dense model
                continue
            load_LE = self.sum_over_ranks(load_LE)
            if self.settings.balance_router and transformer.config.balance == "bias":
                transformer.update_expert_bias(load_LE)
            if transformer is self.transformers()[0]:
                self.load_LE = load_LE if self.load_LE is None else self.load_LE + load_LE

    def take_load(self) -> Tensor | None:
        """Tokens per expert [L, E] of the result's training forwards since the last call."""
        load_LE, self.load_LE = self.load_LE, None
        return load_LE

    # --- logs

    def record(
        self, prefix: str, metrics: Mapping[str, Tensor | float], tokens: Tensor | None = None
    ) -> None:
        """Log `<prefix>/<name>` for this training step, averaged over ranks, and count the tokens
        that it saw. Waits once for what the device computed."""
        numbers = self.read({**metrics, "tokens": 0 if tokens is None else tokens})
        self.tokens_seen += int(numbers.pop("tokens"))
        named = {f"{prefix}/{name}": value for name, value in numbers.items()}
        self.log_dict(named, on_step=True, on_epoch=False, batch_size=1, sync_dist=True)
        skipped = float(self.skipped_steps)  # the same on every rank
        self.log(f"{prefix}/skipped_steps", skipped, on_step=True, on_epoch=False, batch_size=1)

    def read(self, metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
        """The numbers that one-element tensors hold; the device is asked for all of its at once."""
        there = {
            name: x.detach()
            for name, x in metrics.items()
            if isinstance(x, Tensor) and x.device.type != "cpu"
        }
        found = dict(metrics)
        if there:
            dtype = torch.float32 if self.device.type == "mps" else torch.float64
            some = [x.to(dtype).reshape(()) for x in there.values()]
            found |= dict(zip(there, torch.stack(some).tolist(), strict=True))
        return {name: float(value) for name, value in found.items()}

    def learning_rate(self) -> float:
        return self.optimizers().param_groups[0]["lr"]
