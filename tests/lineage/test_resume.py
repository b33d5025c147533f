"""The resume state around training steps, on a module of one parameter."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from fourstage.files import clean_up
from fourstage.interruptions import STOPS, Stopped
from fourstage.lineage.resume import LOOPS
from tests.one_weight import N_STEPS, Tiny, fit, read


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Tiny]:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(folder)


class Die(Callback):
    """Raises after a step, as a kill would, or inside a validation."""

    def __init__(self, step: int = 0, in_validation_of: int = 0) -> None:
        self.step, self.in_validation_of = step, in_validation_of

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx + 1 == self.step:
            raise RuntimeError("killed")

    def on_validation_start(self, trainer, module) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        if done == self.in_validation_of:
            raise RuntimeError("killed")


@pytest.mark.parametrize(
    ("die", "every", "first"),
    [
        (Die(step=5), 3, 4),  # between checkpoints
        (Die(step=4), 3, 1),  # before its row and state are in place
        (Die(step=10), 4, 9),  # the checkpoint was saved after a validation
        (Die(in_validation_of=4), 2, 3),  # its step has a checkpoint due
        (Die(in_validation_of=12), 3, 10),  # in the last validation
    ],
)
def test_resume_is_bit_identical_and_loses_no_row(
    tmp_path, whole, die: Die, every: int, first: int
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, die, every=every)
    resumed = fit(tmp_path, every=every)
    assert resumed.steps_of_this_process == list(range(first, N_STEPS + 1))
    assert torch.equal(resumed.weight, whole[1].weight)
    assert read(tmp_path) == read(whole[0])
    assert (tmp_path / "samples.jsonl").read_text() == (whole[0] / "samples.jsonl").read_text()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["last.ckpt"]


class Signal(Callback):
    """A signal arrives before a step, or in the validation after one."""

    def __init__(self, signum: int, step: int = 0, in_validation_of: int = 0) -> None:
        self.signum, self.step, self.in_validation_of = signum, step, in_validation_of

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx + 1 == self.step:
            os.kill(os.getpid(), self.signum)

    def on_validation_start(self, trainer, module) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.in_validation_of:
            os.kill(os.getpid(), self.signum)


@pytest.fixture
def handlers():
    """Whoever handled the signals gets them back when training ends."""
    asked = (*STOPS, signal.SIGINT)
    before = [signal.getsignal(signum) for signum in asked]
    yield
    assert [signal.getsignal(signum) for signum in asked] == before


@pytest.mark.parametrize(
    ("sent", "done"),
    [
        (Signal(signal.SIGTERM, step=7), 7),
        (Signal(signal.SIGUSR1, step=7), 7),
        (Signal(signal.SIGINT, step=7), 7),
        (Signal(signal.SIGTERM, step=8), 8),  # a validation follows, and is not lost
        (Signal(signal.SIGUSR1, in_validation_of=4), 4),
    ],
)
def test_a_signal_saves_after_the_step_and_stops(tmp_path, whole, handlers, sent, done) -> None:
    with pytest.raises(Stopped) as caught:
        fit(tmp_path, sent, every=100)
    assert caught.value.code == 128 + sent.signum
    by = {signal.SIGINT: "Ctrl-C"}.get(sent.signum, signal.Signals(sent.signum).name)
    assert caught.value.line == (
        f"{tmp_path.name}, step {done}: stopped by {by}: "
        f"run the same command again: it resumes from step {done}"
    )
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt" / LOOPS, weights_only=True)
    assert state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] == done
    assert torch.equal(fit(tmp_path).weight, whole[1].weight)
    assert read(tmp_path) == read(whole[0])


@pytest.mark.parametrize("again", [signal.SIGUSR1, signal.SIGINT])
def test_a_second_signal_does_not_wait(tmp_path, handlers, again, capfd) -> None:
    first = signal.SIGTERM if again != signal.SIGINT else again
    with pytest.raises(Stopped, match=f"{128 + again}"):
        fit(tmp_path, Signal(first, step=8), Signal(again, step=8))
    said = "\nstopping after this step; Ctrl-C again stops at once\n"
    assert (said in capfd.readouterr().err) == (first == signal.SIGINT)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt" / LOOPS, weights_only=True)
    assert state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] == 6


def test_the_last_state_is_that_before_the_first_skipped_step(tmp_path) -> None:
    class Skip(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            module.skipped_in_a_row = max(0, batch_idx + 1 - 4)  # from step 5 on

    with pytest.raises(Stopped) as caught:
        fit(tmp_path, Skip(), Signal(signal.SIGTERM, step=9), every=1)
    assert caught.value.line.endswith("it resumes from step 4")


def test_the_end_of_training_is_saved_too(tmp_path) -> None:
    """A kill in the evaluation that follows costs no step."""
    fit(tmp_path, every=5)
    assert fit(tmp_path, every=5).steps_of_this_process == []
    fit(tmp_path / "short", every=1000)  # states are not wanted
    assert not (tmp_path / "short" / "checkpoints" / "last.ckpt").exists()


def test_a_failed_save_leaves_the_old_state(tmp_path, monkeypatch) -> None:
    def full_disk(trainer: Trainer, path: Path) -> None:
        (Path(path) / LOOPS).write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, Die(step=5))
    state = tmp_path / "checkpoints" / "last.ckpt"
    before = {path.name: path.read_bytes() for path in state.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Trainer, "save_checkpoint", full_disk)
        fit(tmp_path)
    assert {path.name: path.read_bytes() for path in state.iterdir()} == before
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def state_of(folder: Path, text: str) -> Path:
    """A resume state as ZeRO's: a folder."""
    folder.mkdir(parents=True)
    (folder / "file").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("there", "left"),
    [
        (("last.ckpt", ".part.ckpt"), "last.ckpt"),  # in a save
        (("last.ckpt.old as .part.ckpt.old", ".part.ckpt"), "last.ckpt.old"),  # between the renames
        (("last.ckpt", ".part.ckpt.old"), "last.ckpt"),  # after them
        ((), None),
    ],
)
def test_a_kill_in_a_save_leaves_one_state(tmp_path: Path, there, left) -> None:
    for name in there:
        text, _, place = name.rpartition(" as ")
        state_of(tmp_path / place, text or name)
    clean_up(tmp_path / "last.ckpt")
    found = [path.name for path in tmp_path.iterdir()]
    assert found == (["last.ckpt"] if left else [])
    assert not left or (tmp_path / "last.ckpt" / "file").read_text() == left
