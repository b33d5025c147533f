"""Without the folder kernels/ everything works, through PyTorch's operations."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USE = """
import importlib
import pkgutil
import sys

import torch

import fourstage

assert fourstage.__file__.startswith(sys.argv[1])
names = [m.name for m in pkgutil.walk_packages(fourstage.__path__, "fourstage.")]
assert "fourstage.kernels" not in names and len(names) > 50
for name in names:
    if not name.endswith("__main__"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:  # an extra that isn't installed
            assert error.name in ("gradio", "starlette", "lm_eval"), name

from fourstage.lineage.climb import hardware
from fourstage.model import Transformer, ops
from fourstage.optim.muon import Muon, hidden_matrices
from fourstage.sampling.decode import Decoder, TorchSteps
from tests.model.configs import read_config

assert not ops.has_kernels() and "no kernels" in hardware("cpu")["device"]
torch.manual_seed(0)
model, ids = Transformer(read_config("moe_nano"), 50), torch.randint(0, 50, (3, 20))
weights, splits = zip(*hidden_matrices(model))
optimizer = Muon([{"params": list(weights), "splits": list(splits)}], lr=0.01)
losses = []
for _ in range(4):
    losses.append(model.logits(model(ids).hidden_BTD).logsumexp(-1).square().mean())
    losses[-1].backward()
    optimizer.step()
    optimizer.zero_grad()
assert losses[-1] < losses[0]
decoder = Decoder(model.eval(), 20)
assert isinstance(decoder.steps, TorchSteps)
decoder.prefill(ids[:, :19])
want = model.logits(model(ids).hidden_BTD)[:, -1]
torch.testing.assert_close(decoder(ids[:, 19]), want.detach(), rtol=1e-4, atol=1e-5)
"""
PARTS = ("conf", "src", "tests", "benchmarks", "pyproject.toml", "train.py")
TESTS = ("model", "rl", "sampling", "optim", "stages", "test_arrows.py", "test_golden.py")


def copy(folder: Path, parts: tuple[str, ...]) -> dict[str, str]:
    """The repository's parts without the kernels and their tests; the environment to use it in."""
    ignored = shutil.ignore_patterns("kernels", "__pycache__", "*.egg-info")
    for part in parts:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=ignored)
        else:
            shutil.copy(ROOT / part, folder / part)
    path = os.pathsep.join([str(folder / "src"), str(folder), *sys.path])
    return {**os.environ, "PYTHONPATH": path}


def test_everything_is_imported_trains_and_generates(tmp_path: Path) -> None:
    environment = copy(tmp_path, ("src", "conf", "tests"))
    command = [sys.executable, "-c", USE, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_other_tests_stay_green(tmp_path: Path) -> None:
    environment = copy(tmp_path, PARTS)
    command = [sys.executable, "-m", "pytest", "-q", *(f"tests/{name}" for name in TESTS)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
