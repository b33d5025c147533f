"""The resume state of a stage: when it is saved, and how it is replaced."""

import os
import secrets
import shlex
import signal
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from fourstage.errors import UserError
from fourstage.files import part_of, remove, swap_in
from fourstage.interruptions import Stopped, handle_stops, stop_now
from fourstage.parallel.state import read_tensors, write_tensors
from fourstage.stages.base import steps_done
from fourstage.stages.prepare import say
from fourstage.tracking.loggers import MetricsCSV

LOOPS = "loops.pt"
TENSORS = {"state_dict": {}, "optimizer_states": []}  # Lightning's keys; parallel/state.py has them


class Checkpointer(Checkpoint):
    """Keeps one resume state, `path`: every so many steps, after the last one, and when a signal
    asks to stop, which then ends the run.

    The state is whole at any moment: it is written beside its place, synced and renamed. If a
    validation follows the step, the state is saved after it, so that a resume keeps its metrics.
    Lightning runs Checkpoint callbacks after all others, so what they logged is in the state;
    what the module's own on_train_batch_end does comes later and is NOT in the state.
    Nothing is saved while steps are skipped: the state is the one before the first of them.
    """

    def __init__(self, path: Path, every: int, trainer: str = "") -> None:
        """trainer: the job's strategy and number of processes, in words."""
        self.path, self.every, self.trainer = path, every, trainer
        self.run = path.parts[-3]  # <stage>-<id>/checkpoints/last.ckpt
        self.due = False
        self.written = False  # to .part.ckpt, which is moved to `path` once the step is logged
        self.signum = 0  # of the signal that asked to stop
        self.stopped: Stopped | None = None  # set when the state is saved
        self.saved_at: int | None = None  # steps; None before training starts
        self.save_id = ""  # of the last save: all files of a state have it

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.strict_loading = False  # the weights come later, by `read_tensors`

    def state_dict(self) -> dict[str, str]:
        return {"run": self.run, "trainer": self.trainer, "save": self.save_id}

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        if state_dict["run"] != self.run:
            raise UserError(
                f"{self.path}: the state of {state_dict['run']}: remove it to train {self.run} "
                f"from the start: rm -r {shlex.quote(str(self.path))}"
            )
        self.save_id = state_dict["save"]
        if state_dict["trainer"] != self.trainer:
            began = state_dict["trainer"]
            say(f"  begun by {began}, goes on with {self.trainer}: the same steps but for rounding")

    def request(self, signum: int, frame: Any) -> None:
        """Handle a signal: stop after the current step, or at once if it is the second signal."""
        if self.signum:
            raise Stopped(signum)
        self.signum = signum
        if signum == signal.SIGINT:  # not print(), which the signal may have interrupted
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path:
            read_tensors(trainer, Path(trainer.ckpt_path), self.save_id)
        self.saved_at = steps_done(trainer)
        handle_stops(self.request, and_ctrl_c=True)  # Lightning restores the old ones after fit()
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.keep(self.saved_at)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = batch_idx + 1
        is_last = trainer.should_stop or trainer.is_last_batch
        self.due = step % self.every == 0 or (is_last and step > self.every)
        validates = trainer.enable_validation and (is_last or step % trainer.val_check_batch == 0)
        if not validates:
            self.save_if_due(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            handle_stops(stop_now, and_ctrl_c=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.save_if_due(trainer, pl_module)

    def save_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if it is time to, or if any process of the job was asked to stop."""
        asked = torch.tensor(self.signum, device=pl_module.device)
        signum = int(trainer.strategy.reduce(asked, reduce_op="max"))
        if (self.due or signum) and not pl_module.skipped_in_a_row:
            self.save(trainer)
        if signum:
            where = f"{self.run}, step {steps_done(trainer)}"
            self.stopped = Stopped(signum, where, f"it resumes from step {self.saved_at}")

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        # only now: Lightning logs a step after on_train_batch_end, and no row may be lost
        if self.written:
            self.written = False
            if trainer.is_global_zero:
                swap_in(part_of(self.path), self.path)
            trainer.strategy.barrier()
        if self.stopped:
            raise self.stopped

    on_train_epoch_end = on_train_batch_start

    def save(self, trainer: Trainer) -> None:
        self.due = False
        try:
            self.save_id = trainer.strategy.broadcast(secrets.token_hex(8))
            part_of(self.path).mkdir(parents=True, exist_ok=True)
            write_tensors(trainer, part_of(self.path), self.save_id)
            trainer.save_checkpoint(part_of(self.path))  # waits for every rank
        except Exception:  # half a file would keep a full disk full
            with suppress(OSError):  # other processes remove it too
                remove(part_of(self.path))
            raise
        self.written = True
        self.saved_at = steps_done(trainer)


class ResumeIO(TorchCheckpointIO):
    """What Lightning itself saves, beside the tensors: a file of the state's folder.

    Lightning's own way goes through memory and the system's temporary folder: perhaps another,
    smaller disk, where a kill would leave the file.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        with open(Path(path) / LOOPS, "wb") as file:
            torch.save({key: x for key, x in checkpoint.items() if key not in TENSORS}, file)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with zipfile.ZipFile(Path(path) / LOOPS) as parts:  # PyTorch doesn't read its checksums
            if (part := parts.testzip()) is not None:
                raise ValueError(f"{LOOPS} is damaged ({part})")
        loops = torch.load(Path(path) / LOOPS, map_location="cpu", weights_only=True)
        return {**loops, **{key: type(none)() for key, none in TENSORS.items()}}
