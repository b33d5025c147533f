"""Compiles the kernels into a shared library at first use, with the machine's own compiler.

Without a compiler that has OpenMP, or with FOURSTAGE_KERNELS=0, there are no kernels.
"""

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

from fourstage.files import user_cache

SOURCES = Path(__file__).parent
WIDTH = 16  # floats; all widths must be multiples of it
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp"]
TARGETS = {  # by the capability that PyTorch detects (ATEN_CPU_CAPABILITY lowers it)
    "AVX512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "AVX2": ["-march=x86-64-v3"],
}

log = logging.getLogger(__name__)


def is_available() -> bool:
    return library() is not None


def kind() -> str:
    """For a run's record: the last digits of sums depend on it."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{capability} kernels" if is_available() else "no kernels"


def fits(*widths: int) -> bool:
    """Whether there are kernels for these widths."""
    return not any(width % WIDTH for width in widths) and is_available()


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The kernels, compiled if this machine has none yet; None where that isn't possible."""
    if os.environ.get("FOURSTAGE_KERNELS", "1") == "0":
        return None
    try:
        path = _compiled()
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # damaged where it was kept
            path.unlink()
            return ctypes.CDLL(str(_compiled()))
    except OSError as error:
        log.warning(
            "fourstage's CPU kernels are not used: %s. Everything works without them, but training "
            "takes 1.5, sampling 2 to 10 times as long (FOURSTAGE_KERNELS=0 silences this)",
            error,
        )
        return None


def _compiled() -> Path:
    """The shared library, compiled once for these sources and this kind of processor. Raises
    OSError if there is no compiler, it fails, or no folder can be written."""
    flags = FLAGS + TARGETS.get(torch.backends.cpu.get_cpu_capability(), [])
    sources = sorted(SOURCES.glob("*.cpp"))
    text = b"".join(path.read_bytes() for path in [*sources, *sorted(SOURCES.glob("*.h"))])
    key = hashlib.sha256(text + repr((flags, platform.machine())).encode()).hexdigest()[:16]
    name = f"kernels-{key}.so"
    for folder in _folders():
        if (folder / name).exists():
            return folder / name
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        raise OSError("there is no C++ compiler (g++)")
    command = [*compiler.split(), *flags, "-fPIC"]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [Path(scratch, f"{source.stem}.o") for source in sources]
        jobs = zip(sources, objects, strict=True)
        list(pool.map(lambda job: _run([*command, "-c", job[0], "-o", job[1]]), jobs))
        made = Path(scratch, name)
        _run([*command, "-shared", *objects, "-o", made])
        return _keep(made)


def _run(command: list[str | Path]) -> None:
    """Raises OSError with the first line of the compiler's message."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip() or "no reason given").splitlines()[0]
        raise OSError(f"{command[0]} failed ({reason})")


def _keep(made: Path) -> Path:
    """Copies it to the first writable folder, atomically: other processes may do the same."""
    for folder in _folders():
        partial = folder / f"{made.name}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(made, partial)
            return partial.replace(folder / made.name)
        except OSError:
            with suppress(OSError):
                partial.unlink()
    raise OSError("there is no folder to keep them in: set XDG_CACHE_HOME")


def _folders() -> list[Path]:
    """Where compiled kernels are kept: the user's cache, or else next to the sources."""
    return [user_cache(), SOURCES / "__pycache__"]


def run(name: str, *arguments: Tensor | ctypes.Structure | int | float | None) -> None:
    """Runs a kernel on as many threads as PyTorch; floats are passed as float32.

    It trusts the sizes that it is given: callers check the tensors. Raises RuntimeError without
    kernels, MemoryError, or ValueError for a size or content that the kernel refuses.
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
            raise ValueError("kernels read contiguous tensors only")
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    return ctypes.c_float(argument) if isinstance(argument, float) else argument
