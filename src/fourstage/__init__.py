"""fourstage: one Mixture-of-Experts language model, from random weights to reasoning, in stages."""

import ctypes
import os
import sys

__version__ = "0.1.0"

# Waiting threads spin briefly, then sleep. Endless spinning (libgomp's default) makes PyTorch 20
# times slower when other programs use the same cores; no spinning costs 40 % (docs/LOG.md). It is
# read once, when PyTorch is loaded: every entry point imports this package first.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

# The hub's client warns of each of its tries; what they come to is one line of ours.
os.environ.setdefault("HF_HUB_VERBOSITY", "error")

for _name in ("stdin", "stdout", "stderr"):  # a closed one (`<&-`) is None, which nobody expects
    if getattr(sys, _name) is None:
        _mode = "r" if _name == "stdin" else "w"
        setattr(sys, _name, open(os.devnull, _mode))  # noqa: SIM115  it stays open


def _keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks instead of returning them to the system.

    Otherwise a training step on a CPU waits for tens of thousands of page faults
    (docs/performance.md). Changes nothing on macOS or musl, or if the user tunes malloc.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD, bytes
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes


_keep_freed_memory()


class _Moved:
    """The last finder: says how to type a command that used to be a module."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        command = name.removeprefix("fourstage.")
        if command in ("dashboard", "scaling"):
            raise ImportError(f"it is now: python -m fourstage {command}")


sys.meta_path.append(_Moved)  # type: ignore[arg-type]
