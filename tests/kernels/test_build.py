"""The kernels' compiling and keeping, with sources of one line."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from fourstage.kernels import build
from fourstage.model import Transformer
from fourstage.sampling.decode import Decoder, TorchSteps
from tests.model.configs import read_config

needs_kernels = pytest.mark.skipif(not build.is_available(), reason="no kernels on this machine")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A loader that has compiled nothing yet: its sources, and the folder where it keeps."""
    sources, cache = tmp_path / "sources", tmp_path / "cache"
    sources.mkdir()
    (sources / "one.cpp").write_text('extern "C" int number() { return 1; }\n')
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("FOURSTAGE_KERNELS", raising=False)
    build.library.cache_clear()
    yield sources, cache / "fourstage"
    build.library.cache_clear()


def kept(*folders) -> list[str]:
    return [path.name for folder in folders if folder.is_dir() for path in folder.iterdir()]


def warned(caplog, reason: str) -> bool:
    (record,) = caplog.records
    return record.levelno == logging.WARNING and reason in record.getMessage()


@needs_kernels
def test_a_library_is_compiled_once_for_its_sources(fresh, monkeypatch):
    sources, folder = fresh
    assert build.library().number() == 1
    (name,) = kept(folder)
    assert name.startswith("kernels-") and name.endswith(".so")
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", None)
    build.library.cache_clear()
    assert build.library().number() == 1
    monkeypatch.setattr(subprocess, "run", run)
    (sources / "one.cpp").write_text(
        '#include "two.h"\nextern "C" int number() { return two(); }\n'
    )
    (sources / "two.h").write_text("static int two() { return 2; }\n")
    build.library.cache_clear()
    assert build.library().number() == 2
    assert len(kept(folder)) == 2


@needs_kernels
@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_damaged_library_is_compiled_again(fresh, content, caplog):
    assert build.library().number() == 1
    _, folder = fresh
    (name,) = kept(folder)
    (folder / name).unlink()  # the loaded one stays mapped
    (folder / name).write_bytes(content)
    build.library.cache_clear()
    assert build.library().number() == 1 and not caplog.records


def test_without_a_compiler_there_are_no_kernels_and_one_warning(fresh, monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert build.library() is None and not build.is_available() and not build.fits(16)
    assert warned(caplog, "there is no C++ compiler")
    assert not kept(fresh[1])


def test_a_compiler_that_is_not_there(fresh, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    assert build.library() is None
    assert warned(caplog, "no-such-compiler")


@needs_kernels
def test_a_compiler_that_fails(fresh, caplog):
    (fresh[0] / "one.cpp").write_text("#error out of order\n")
    assert build.library() is None
    assert warned(caplog, "out of order")
    assert kept(*fresh) == ["one.cpp"]


@needs_kernels
def test_where_the_cache_cannot_be_written_they_lie_next_to_the_sources(fresh, caplog):
    sources, folder = fresh
    folder.parent.write_text("not a folder")
    assert build.library().number() == 1
    assert len(kept(sources / "__pycache__")) == 1
    assert not caplog.records


@needs_kernels
def test_with_nowhere_to_keep_them_there_are_none(fresh, caplog):
    sources, folder = fresh
    folder.parent.write_text("not a folder")
    (sources / "__pycache__").write_text("not a folder")
    assert build.library() is None
    assert warned(caplog, "set XDG_CACHE_HOME")


def test_they_can_be_turned_off(fresh, monkeypatch, caplog):
    monkeypatch.setenv("FOURSTAGE_KERNELS", "0")
    assert build.library() is None and not caplog.records
    assert build.kind() == "no kernels"
    with pytest.raises(RuntimeError, match="no kernels here"):
        torch.ops.fourstage.linear(torch.ones(1, 16), torch.ones(16, 16))
    decoder = Decoder(Transformer(read_config("moe_nano"), 50), 12)
    assert isinstance(decoder.steps, TorchSteps)


def test_widths():
    assert not build.fits(16, 24)
    assert build.fits(0, 16, 48) == build.is_available()


LOAD = """
import sys
from pathlib import Path
from fourstage.kernels import build
build.SOURCES = Path(sys.argv[1])
assert build.library().number() == 1
"""


def start(code: str, *arguments, **environment) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    path = os.pathsep.join(map(str, sys.path))
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path, **environment})


@needs_kernels
def test_two_processes_at_once(fresh):
    both = [start(LOAD, fresh[0]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert len(kept(fresh[1])) == 1


DECODE = """
import sys
import torch
from fourstage.model import Transformer
from fourstage.sampling.decode import Decoder
from tests.model.configs import read_config
assert torch.backends.cpu.get_cpu_capability() == sys.argv[2]
torch.manual_seed(0)
config = read_config("moe_nano", init_std=0.2, n_heads=6, n_kv_heads=2, head_dim=16, d_shared=48)
model = Transformer(config, 50).eval()
ids = torch.randint(0, 50, (21, 40))
decoder = Decoder(model, 40)
assert type(decoder.steps).__name__ == "KernelSteps"
decoder.prefill(ids[:, :19])
found = torch.stack([decoder(ids_B) for ids_B in ids[:, 19:].unbind(1)], dim=1)
want = model.logits(model(ids).hidden_BTD)[:, 19:].detach()
torch.testing.assert_close(found, want, atol=5e-5, rtol=1e-4)
torch.save(found, sys.argv[1])
"""


@needs_kernels
def test_every_processor_gives_the_same(tmp_path):
    """The registers of AVX2 and of any x86-64, next to this machine's own."""
    own = torch.backends.cpu.get_cpu_capability()
    if own not in build.TARGETS:
        pytest.skip(f"a processor with {own} has no others to be")
    names = {own: {}, "AVX2": {"ATEN_CPU_CAPABILITY": "avx2"}}
    names["DEFAULT"] = {"ATEN_CPU_CAPABILITY": "default"}
    running = [
        start(DECODE, tmp_path / name, name, **({"XDG_CACHE_HOME": str(tmp_path)} | setting))
        if setting
        else start(DECODE, tmp_path / name, name)
        for name, setting in names.items()
    ]
    assert [process.wait() for process in running] == [0] * len(running)
    first, *others = (torch.load(tmp_path / name) for name in names)
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-5, rtol=1e-5)
