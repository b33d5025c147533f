"""fourstage: one Mixture-of-Experts language model, from random weights to reasoning, in stages."""

import ctypes
import os
import sys

__version__ = "0.1.0"

# Waiting threads spin for a moment, then sleep. Endless spinning (libgomp's default) makes PyTorch
# 20 times slower where other programs use the cores too; no spinning costs 40 % (docs/LOG.md).
# It is read once, when PyTorch is loaded: every entry point imports this package first.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def _keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks; by default it gives them back and asks for them again.

    A training step on a CPU then waits for tens of thousands of page faults (docs/performance.md).
    Elsewhere (macOS, musl), or where the user tunes malloc, nothing changes.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD, bytes
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes


_keep_freed_memory()


class _Moved:
    """Says how a command is typed that was a module here; asked where no other finder knows one."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        command = name.removeprefix("fourstage.")
        if command in ("dashboard", "scaling"):
            raise ImportError(f"it is now: python -m fourstage {command}")


sys.meta_path.append(_Moved)  # type: ignore[arg-type]
