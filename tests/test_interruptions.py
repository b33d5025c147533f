"""Signals, full disks, too little memory, broken resume states: one line each, and it goes on."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import DistNetworkError

from fourstage.__main__ import COMMANDS
from fourstage.errors import UserError
from fourstage.files import remove
from fourstage.interruptions import (
    NO_READER,
    Stopped,
    advice,
    disk_full,
    explained,
    one_line,
    run_command,
    stop_now,
)
from fourstage.lineage.climb import climb
from fourstage.lineage.resume import LOOPS, ResumeIO
from fourstage.model.tensor_file import raw
from fourstage.runs.records import read_record
from fourstage.stages import PretrainModule
from tests.fakes import QUICK, config

SOURCE = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "src")}
STORE = (
    "lost another process of this job, whose own output says why (recv, got 0 bytes): run the same "
    "command again: it resumes"
)
SETTINGS = {"micro_batch_size": 8, "batch_size": 16, "max_new_tokens": 64, "lr": 1.0}
MEMORY = (
    "out of memory: lower stages.ppo.micro_batch_size (now 8) and run the same command again: it "
    "resumes; or lower batch_size, max_new_tokens, which makes a new run"
)
PEER = (
    "lost another process of this job, whose own output says why (Connection closed by peer): run "
    "the same command again: it resumes"
)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MEMORY),
        (MemoryError(), MEMORY),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough"), None),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to"), MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), MEMORY),
        (RuntimeError("[pair.cc:537] Connection closed by peer [127.0.0.1]:5"), PEER),
        (DistNetworkError("Failed to recv, got 0 bytes. Connection was likely"), STORE),
        (
            OSError(28, "No space left on device", "x/last.ckpt"),
            "disk full at x/last.ckpt: free space and run the same command again: it resumes",
        ),
        (BrokenPipeError(32, "Broken pipe"), NO_READER),
        (TypeError("a bug"), None),
    ],
)
def test_what_happened_and_what_to_do(error: Exception, line: str | None) -> None:
    assert advice(error, "stages.ppo", SETTINGS) == line
    name = "ppo-abc, after step 7: "
    try:
        with explained("ppo-abc", "ppo", SETTINGS, lambda: 7):
            raise error
    except Exception as found:
        assert one_line(found) == (name + line if line else None)
        assert found is error or found.__cause__ is error


def test_an_error_of_the_users_or_the_disks_is_one_line() -> None:
    full = OSError(28, "No space left on device", "x/last.ckpt")
    assert one_line(full).startswith("disk full at x/last.ckpt: free space")
    try:
        try:
            raise full
        except OSError as error:
            raise RuntimeError("could not save") from error
    except RuntimeError as error:
        assert one_line(error).startswith("disk full")
    assert one_line(ValueError("I/O error: No space left on device (os error 28)"))
    assert one_line(FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")) == (
        "no folder for temporary files: free space, or set TMPDIR, and run the same command again: "
        "it resumes"
    )
    assert one_line(UserError("lr: no")) == "lr: no"
    for error in (
        PermissionError(13, "Permission denied", "/x"),
        FileExistsError(17, "Exists", "/x"),
    ):
        assert one_line(error).startswith("/x: ") and "another outputs=" in one_line(error)
    assert one_line(ValueError("a bug")) is None and one_line(FileNotFoundError(2, "x")) is None


def test_what_a_file_holds_cannot_break_a_line() -> None:
    assert one_line(UserError("no field 'a\nb\x1b[31m'")) == r"no field 'a\nb\x1b[31m'"


def test_a_stop_while_planning_says_that_nothing_was_lost(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        "fourstage.lineage.plan.make_plan", lambda tree, overrides: stop_now(signal.SIGTERM, None)
    )
    with pytest.raises(Stopped) as caught:
        climb(config("stage=pretrain", f"outputs={tmp_path}"))
    assert caught.value.line == "stopped by SIGTERM: run the same command again: nothing had begun"


def test_ctrl_c_in_a_stage_says_its_name() -> None:
    with pytest.raises(Stopped) as caught, explained("ppo-abc", "ppo", SETTINGS, int):
        raise KeyboardInterrupt
    line = "ppo-abc: stopped by Ctrl-C: run the same command again: it resumes"
    assert (caught.value.code, caught.value.line) == (130, line)


def test_a_stage_that_was_stopped_says_its_name() -> None:
    line = "run the same command again: it resumes"
    with pytest.raises(Stopped) as caught, explained("ppo-abc", "ppo", SETTINGS, int):
        stop_now(signal.SIGUSR1, None)
    assert (caught.value.code, caught.value.line) == (138, f"ppo-abc: stopped by SIGUSR1: {line}")
    assert Stopped(signal.SIGTERM).line == f"stopped by SIGTERM: {line}"


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        (UserError("lr: no"), "error: lr: no"),
        (OSError(30, "Read-only file system", "x"), "error: x: Read-only file system: choose "),
        (OSError(28, "No space left on device", "x"), "error: disk full at x: free space"),
        (KeyboardInterrupt(), "130"),
    ],
)
def test_a_command_ends_in_one_line(ending: BaseException, code: str) -> None:
    def main(arguments: list[str]) -> None:
        raise ending

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert str(caught.value.code).startswith(code)


def test_a_bug_in_a_command_shows() -> None:
    with pytest.raises(TypeError):
        run_command(lambda arguments: len(1))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_a_line_the_usage_and_an_example(name, capsys, monkeypatch) -> None:
    module = importlib.import_module(f"fourstage.{COMMANDS[name][0]}")
    monkeypatch.setattr(sys, "argv", ["x", "run=a", "--help"])
    with pytest.raises(SystemExit) as end:
        run_command(module.main)
    assert end.value.code is None
    first, empty, *rest = capsys.readouterr().out.splitlines()
    assert len(first) < 100 and first[-1] == "." and empty == ""
    command = f"    python -m fourstage {name}"
    assert rest[0].startswith(command) and sum(line.startswith(command) for line in rest) >= 2


@pytest.mark.parametrize("name", ["report", "chat", "dashboard", "runs"])
def test_a_reader_that_has_enough_is_no_error(name: str, tmp_path: Path) -> None:
    words = [f"outputs={tmp_path}"] if name == "runs" else ["--help"]
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fourstage", name, *words]
    done = subprocess.run(command, env=SOURCE, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_what_the_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fourstage", "runs", f"outputs={tmp_path}/f\u00fcr"]
    ascii_only = {**SOURCE, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=ascii_only, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "f\\xfcr" in done.stdout


# --- a real stage


def train(outputs: Path, *overrides: str) -> Path:
    here = [*QUICK, f"outputs={outputs}", "stages.pretrain.checkpoint_every=1", *overrides]
    return climb(config(*here, "stage=pretrain"))


def at_step(step: int, error: Exception):
    """A training step that fails at `step`, from 1."""
    training_step = PretrainModule.training_step

    def failing(self: PretrainModule, batch, batch_idx: int) -> None:
        if batch_idx + 1 == step:
            raise error
        training_step(self, batch, batch_idx)

    return failing


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """The outputs of a run that ended for want of memory in its third step."""
    outputs = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        error = torch.OutOfMemoryError("CUDA out of memory.")
        patch.setattr(PretrainModule, "training_step", at_step(3, error))
        with pytest.raises(UserError, match=r"^pretrain-[a-z]{10}, after step 2: out of memory: "):
            train(outputs)
    return outputs


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> bytes:
    return (train(tmp_path_factory.mktemp("calm")) / "model.safetensors").read_bytes()


@pytest.fixture
def outputs(interrupted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(interrupted, tmp_path / "outputs"))


def state(outputs: Path) -> Path:
    (path,) = outputs.glob("runs/*/checkpoints/last.ckpt")
    return path


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_it_resumes_with_less_memory_to_the_same_weights(outputs, calm, capsys) -> None:
    folder = train(outputs)
    assert f"resuming {folder.name}" in capsys.readouterr().out
    assert (folder / "model.safetensors").read_bytes() == calm
    assert read_record(folder)["cost"]["skipped_steps"] == 0


def test_an_error_that_is_raised_again_and_again_is_no_full_disk() -> None:
    """As wandb does: it is in the context of its own context."""
    lost, other = ConnectionResetError("Connection lost"), ValueError("of a logger")
    lost.__context__, other.__context__ = other, lost
    assert disk_full(lost) is None and disk_full(other) is None


def test_a_full_disk_in_a_save_leaves_the_last_state(outputs, calm, monkeypatch) -> None:
    def full(self: ResumeIO, checkpoint, path, storage_options=None) -> None:
        (Path(path) / LOOPS).write_text("half")
        raise OSError(28, "No space left on device", str(path))

    before = content(state(outputs))
    with monkeypatch.context() as patch:
        patch.setattr(ResumeIO, "save_checkpoint", full)
        with pytest.raises(UserError, match=r", after step 3: disk full at .*\.part\.ckpt: free"):
            train(outputs)
    assert content(state(outputs)) == before
    assert [path.name for path in state(outputs).parent.iterdir()] == ["last.ckpt"]
    assert (train(outputs) / "model.safetensors").read_bytes() == calm


class Executed:
    """Makes a file when it is unpickled by who does not take care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def spoil(path: Path, kind: str, executed: Path) -> None:
    """Change a resume state, a folder of three files, so that it can't be resumed from."""
    loops, tensors = path / LOOPS, path / "rank-00000.safetensors"
    note = tensors.with_suffix(".json")
    if kind in ("truncated", "no header"):
        tensors.write_bytes(tensors.read_bytes()[: 100_000 if kind == "truncated" else 5])
    elif kind == "a file less":
        tensors.unlink()
    elif kind == "a file more":
        for file in (tensors, note):
            shutil.copy(file, file.with_stem("rank-00001"))
    elif kind == "a flipped bit":
        data = bytearray(tensors.read_bytes())
        data[-5] ^= 64
        tensors.write_bytes(data)
    elif kind == "a flipped bit in the loops":  # of a number that PyTorch would take as it is
        data = bytearray(loops.read_bytes())
        data[data.index(b"K", data.index(b"completed")) + 1] ^= 1
        loops.write_bytes(data)
        assert torch.load(loops, weights_only=True)
    elif kind == "another save":
        note.write_text(note.read_text().replace('"save": "', '"save": "0'))
    elif kind == "text":
        loops.write_text("hello\n")
    elif kind == "a file":  # as earlier versions had
        shutil.rmtree(path)
        path.write_text("hello\n")
    elif kind in ("other model", "a weight less", "half a weight"):
        weights, said = load_file(tensors), json.loads(note.read_text())
        name = next(name for name in weights if name.startswith("weight 0 "))
        weight = weights.pop(name)
        if kind == "half a weight":
            weights[name] = weight[: len(weight) // 2].clone()
        if kind == "other model":
            weights["weight 0 other"] = weight
        save_file(weights, tensors)
        said["crc32"] = {name: zlib.crc32(raw(weight)) for name, weight in weights.items()}
        note.write_text(json.dumps(said))
    else:
        found = torch.load(loops, weights_only=True)
        if kind == "code":
            found["epoch"] = Executed(executed)
        if kind == "other run":
            found["callbacks"]["Checkpointer"]["run"] = "sft-abcdefghij"
        torch.save(found, loops)


ANY = "broken, or not of this run and version: remove it to train the stage from the start"
OR = "restore it from a copy, or train the stage from the start"
SPOILT = {
    **dict.fromkeys(("truncated", "no header", "text", "a file", "code"), ANY),
    **dict.fromkeys(("other model", "a weight less", "half a weight"), ANY),
    "a flipped bit in the loops": ANY,
    "a file less": f"rank-00000.safetensors is missing: {OR}",
    "a file more": f"rank-00001.safetensors is of another save: {OR}",
    "another save": f"rank-00000.safetensors is of another save: {OR}",
    "a flipped bit": f"rank-00000.safetensors is damaged (NAME): {OR}",
    "other run": "the state of sft-abcdefghij: remove it to train RUN from the start",
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_broken_resume_state_is_one_line(outputs: Path, tmp_path: Path, kind: str) -> None:
    path = state(outputs)
    spoil(path, kind, tmp_path / "executed")
    if kind == "code":
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path / LOOPS, weights_only=True)
    before = content(path) if path.is_dir() else path.read_bytes()
    with pytest.raises(UserError) as caught:
        train(outputs)
    run = path.parts[-3]
    line = re.sub(r"(is damaged) \(.*?\)", r"\1 (NAME)", str(caught.value))
    what = SPOILT[kind].replace("RUN", run)
    assert line == f"{run}: {path}: {what}: rm -r {shlex.quote(str(path))}"
    assert (content(path) if path.is_dir() else path.read_bytes()) == before
    assert not (tmp_path / "executed").exists()
    remove(path)
    train(outputs)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("stages.pretrain.lr=1e38", "embedding.weight is not finite after the last step: lower lr"),
        ("model.z_loss_coef=1e30", "none of 3 optimizer steps had a finite loss and gradient"),
    ],
)
def test_a_run_that_diverged_is_not_finished(setting: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        train(tmp_path, setting)
    (folder,) = (tmp_path / "runs").iterdir()
    assert read_record(folder)["status"] == "failed"
    assert not (folder / "model.safetensors").exists()
