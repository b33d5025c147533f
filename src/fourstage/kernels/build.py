"""The kernels' sources become a library, compiled where it runs by the machine's own compiler.

Where there is no compiler with OpenMP, or FOURSTAGE_KERNELS=0 is set, there are no kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).parent
WIDTH = 16  # floats, of which every width must be a multiple
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp"]
TARGETS = {  # what PyTorch found the processor to have (ATEN_CPU_CAPABILITY lowers it)
    "AVX512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "AVX2": ["-march=x86-64-v3"],
}

log = logging.getLogger(__name__)


def is_available() -> bool:
    return library() is not None


def kind() -> str:
    """For records: with others the last digits of sums differ."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{capability} kernels" if is_available() else "no kernels"


def fits(*widths: int) -> bool:
    """Whether there are kernels, and for these widths."""
    return not any(width % WIDTH for width in widths) and is_available()


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The kernels, compiled at the first call on this machine; None where they cannot be."""
    if os.environ.get("FOURSTAGE_KERNELS", "1") == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled()))
    except OSError as error:
        log.warning(
            "fourstage's kernels for a CPU are not used: %s. Everything works without them, but "
            "training takes 1.5, sampling 2 to 10 times as long (FOURSTAGE_KERNELS=0 for silence)",
            error,
        )
        return None


def _compiled() -> Path:
    """The shared library: made once for these sources and this kind of processor, then kept.

    Raises:
        OSError: there is no compiler, it failed, or there is nowhere to write.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    flags = FLAGS + TARGETS.get(capability, [])
    sources = sorted(SOURCES.glob("*.cpp"))
    text = b"".join(path.read_bytes() for path in [*sources, *sorted(SOURCES.glob("*.h"))])
    key = hashlib.sha256(text + repr((flags, platform.machine())).encode()).hexdigest()[:16]
    for folder in _folders():
        if (kept := folder / f"kernels-{key}.so").exists():
            return kept
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        raise OSError("there is no C++ compiler (g++)")
    command = [*compiler.split(), *flags, "-fPIC"]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        jobs = [
            [*command, "-c", source, "-o", made]
            for source, made in zip(sources, objects, strict=True)
        ]
        list(pool.map(_run, jobs))
        made = Path(scratch) / "kernels.so"
        _run([*command, "-shared", *objects, "-o", made])
        return _keep(made, f"kernels-{key}.so")


def _run(command: list[str | Path]) -> None:
    """Raises OSError with the first line of what the compiler said."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip() or "no reason given").splitlines()[0]
        raise OSError(f"{command[0]} failed ({reason})")


def _keep(made: Path, name: str) -> Path:
    """In the first folder that takes it, whole or not at all: other processes may do the same."""
    for folder in _folders():
        partial = folder / f"{name}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(made, partial)
            return partial.replace(folder / name)
        except OSError:
            with suppress(OSError):
                partial.unlink()
    raise OSError("there is no folder to keep them in: set XDG_CACHE_HOME")


def _folders() -> list[Path]:
    """Where compiled kernels are kept: the user's cache, else next to the sources."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [Path(cache) / "fourstage", SOURCES / "__pycache__"]


def run(name: str, *arguments: Tensor | ctypes.Structure | int | float | None) -> None:
    """Runs a kernel on the threads that PyTorch would use; floats are float32 there.

    It reads and writes memory as it is told: who calls has checked tensors (`check`).

    Raises:
        RuntimeError: there are no kernels here.
        MemoryError: it found none.
        ValueError: it refuses what a tensor holds.
    """
    if (kernels := library()) is None:
        raise RuntimeError(f"fourstage::{name}: there are no kernels here")
    kernel = getattr(kernels, name)
    kernel.restype = ctypes.c_char_p
    reason = kernel(torch.get_num_threads(), *map(_in_c, arguments))
    if reason is not None:
        error = MemoryError if reason == b"no memory" else ValueError
        raise error(f"fourstage::{name}: {reason.decode()}")


def _in_c(argument: Tensor | ctypes.Structure | int | float | None) -> object:
    if isinstance(argument, Tensor):
        if not argument.is_contiguous():
            raise ValueError("a kernel reads contiguous tensors")
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    return ctypes.c_float(argument) if isinstance(argument, float) else argument


def check(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    """Whether a kernel may read x as it is, but for its strides (`run` asks for these).

    Raises:
        TypeError: x has another dtype or device.
        ValueError: x has another shape.
    """
    if x.dtype != dtype or not x.is_cpu:
        raise TypeError(f"{name} must be {dtype} on the CPU, not {x.dtype} on {x.device}")
    if x.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, not {list(x.shape)}")
