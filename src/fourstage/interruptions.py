"""What ends a command before its time: signals, a full disk, too little memory, a lost process.

Each ends in one line that says what to do (docs/interruptions.md). Needs no PyTorch, so that a
signal is understood from the first moment.
"""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fourstage.errors import UserError

# the end, a scheduler's warning that it comes, and the end of the terminal or the connection
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
NO_MEMORY = (
    "out of memory",  # CUDA
    "CUBLAS_STATUS_ALLOC_FAILED",
    "not enough memory",  # PyTorch's CPU allocator
    "can't allocate memory",
)
NO_PEER = (  # what gloo and NCCL say when another process is gone
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "NCCL",
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: as large as `ulimit -f` lets a file be
NO_PLACE = (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST)  # the last: a file is there
NO_READER = (
    "what read this command's output has ended (as `| head` does): run the same command again: "
    "it resumes"
)
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
FREE_SETTINGS = ("micro_batch_size",)  # the weights of most runs don't depend on them
SIZES = ("batch_size", "minibatch_size", "group_size", "max_new_tokens", "max_tokens", "block_size")


class Stopped(SystemExit):
    """A signal ended the command in good order; the exit code is the shell's, 128 + signal."""

    def __init__(self, signum: int, where: str = "", then: str = "it resumes") -> None:
        super().__init__(128 + signum)
        self.name = signal.Signals(signum).name
        self.where, self.then = where, then

    @property
    def line(self) -> str:
        where = f"{self.where}: " if self.where else ""
        by = "Ctrl-C" if self.name == "SIGINT" else self.name
        return f"{where}stopped by {by}: run the same command again: {self.then}"


def stop_now(signum: int, frame: Any) -> None:
    """The handler where nothing is lost: all that a stage has made is on the disk."""
    raise Stopped(signum)


def handle_stops(handler: Callable[[int, Any], None], and_ctrl_c: bool = False) -> None:
    """Let `handler` answer the signals that ask for an end, but for those that are ignored."""

    def answer(signum: int, frame: Any) -> None:
        if signum == signal.SIGHUP:
            leave_the_terminal()
        handler(signum, frame)

    for signum in (*STOPS, signal.SIGINT) if and_ctrl_c else STOPS:
        may_be_ignored = signum in (signal.SIGHUP, signal.SIGINT)  # by nohup, by a shell's `&`
        if not (may_be_ignored and signal.getsignal(signum) == signal.SIG_IGN):
            signal.signal(signum, answer)


@contextmanager
def held_back() -> Iterator[None]:
    """Signals that ask for an end wait until this is over: an error that a handler raises in the
    middle of a __del__ is lost. Not by a mask: another thread would take the signal."""
    came: list[int] = []
    handlers = {signum: signal.getsignal(signum) for signum in (*STOPS, signal.SIGINT)}
    ours = {signum: handler for signum, handler in handlers.items() if callable(handler)}
    for signum in ours:
        signal.signal(signum, lambda signum, _: came.append(signum))
    try:
        yield
    finally:
        for signum, handler in ours.items():
            signal.signal(signum, handler)
        for signum in came:
            signal.raise_signal(signum)


def heed_ctrl_c() -> None:
    """From now on there is something to lose: before, Ctrl-C just ended the process (train.py)."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave_the_terminal() -> None:
    """Print to nowhere where the terminal is gone: an error would stop what saves the state."""
    null = os.open(os.devnull, os.O_RDWR)
    for file in (1, 2):
        if stat.S_ISCHR(os.fstat(file).st_mode):
            os.dup2(null, file)


@contextmanager
def explained(
    name: str,
    stage: str,
    settings: Mapping[str, Any],
    steps: Callable[[], int],
    free: Sequence[str] = FREE_SETTINGS,
) -> Iterator[None]:
    """Whatever ends the run inside says which run, at which step, and what to do.

    `steps`: those that are done by then; `free`: settings that this run's weights don't depend on.
    Raises UserError for what is no bug; others pass.
    """
    try:
        yield
    except Stopped as stopped:
        stopped.where = stopped.where or name
        raise
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT, name) from None
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except Exception as error:
        found = advice(error, f"stages.{stage}", settings, free)
        if found is None:
            raise
        raise UserError(f"{name}, after step {steps()}: {found}") from error


def advice(
    error: BaseException,
    where: str,
    settings: Mapping[str, Any],
    free: Sequence[str] = FREE_SETTINGS,
) -> str | None:
    """What happened and what to do about it; None for an error that is none of these."""
    if (full := disk_full(error)) is not None:
        return full
    if isinstance(error, BrokenPipeError):
        return NO_READER
    text = str(error)
    if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
        names = [f"{where}.{key} (now {settings[key]})" for key in FREE_SETTINGS]
        others = [key for key in SIZES if key in settings]
        if not free:  # a loss or dropout that sees the pieces of a batch
            others = [*FREE_SETTINGS, *others]
            return f"out of memory: lower {', '.join(others)}, which makes a new run"
        return (
            f"out of memory: lower {', '.join(names)} and run the same command again: it resumes; "
            f"or lower {', '.join(others)}, which makes a new run"
        )
    lost = [words for words in NO_PEER if words in text]
    if lost:
        return (
            f"lost another process of this job, whose own output says why ({lost[0]}): "
            "run the same command again: it resumes"
        )
    return None


def disk_full(error: BaseException) -> str | None:
    """The line for a full disk, wherever in the chain of errors it shows."""
    chain: BaseException | None = error
    while chain is not None:
        is_full = isinstance(chain, OSError) and chain.errno in FULL
        if is_full or "No space left on device" in str(chain):  # safetensors has its own class
            path = isinstance(chain, OSError) and (chain.filename2 or chain.filename)
            at = f" at {path}" if path else ""
            return f"disk full{at}: free space and run the same command again: it resumes"
        chain = chain.__cause__ or chain.__context__
    return None


def one_line(error: BaseException) -> str | None:
    """What to tell the user instead of a traceback; None where a traceback is the right thing."""
    if isinstance(error, UserError):  # which may quote what a file holds
        return CONTROL.sub(lambda found: repr(found[0])[1:-1], str(error))
    if isinstance(error, OSError) and error.errno in NO_PLACE:
        return f"{error.filename}: {error.strerror}: choose another outputs=FOLDER"
    if isinstance(error, BrokenPipeError):
        return NO_READER
    if isinstance(error, MemoryError):
        return "out of memory: take a smaller model or batch, or less data"
    return disk_full(error)


def escape_output() -> None:
    """Print what the terminal cannot show as an escape, rather than fail over it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """What `python -m` does: main() with the arguments; whatever is no bug ends in one line, a
    reader that has enough (`| head`) in none. --help prints the docstring of main's module.
    """
    escape_output()
    code: int | str | None
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            code = print(sys.modules[main.__module__].__doc__)
        else:
            code = main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = print("stopped by Ctrl-C: what was finished is on the disk", file=sys.stderr) or 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        code = 141
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        code = f"error: {line}"
    sys.exit(code)
