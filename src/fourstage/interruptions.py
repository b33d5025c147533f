"""What ends a command early: signals, a full disk, too little memory, a lost process.

Each ends in one line that says what to do (docs/interruptions.md). Needs no PyTorch, so that
signals are handled from the first moment.
"""

import errno
import io
import os
import re
import signal
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fourstage.errors import UserError

# the end, a scheduler's warning before it, and the end of the terminal or the connection
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
NO_MEMORY = (
    "out of memory",  # CUDA
    "CUBLAS_STATUS_ALLOC_FAILED",
    "not enough memory",  # PyTorch's CPU allocator
    "can't allocate memory",
)
NO_PEER = (  # what gloo, NCCL and PyTorch's store say when another process is gone
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "recv, got 0 bytes",
    "client socket has timed out",
    "wait timeout after",
    "NCCL",
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # EFBIG: the limit of `ulimit -f`
NO_TEMPORARY = "No usable temporary directory"  # as tempfile says
NO_PLACE = (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST)  # EEXIST: a file is there
RESUMES = ": it resumes"
AGAIN = f"run the same command again{RESUMES}"
NO_READER = f"the reader of this command's output has ended (as `| head` does): {AGAIN}"
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
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
    """The handler for when nothing can be lost: all that a stage has made is on the disk."""
    raise Stopped(signum)


def handle_stops(handler: Callable[[int, Any], None], and_ctrl_c: bool = False) -> None:
    """Let `handler` handle the signals that ask for an end, except for those that are ignored."""

    def handle(signum: int, frame: Any) -> None:
        if signum == signal.SIGHUP:
            leave_the_terminal()
        handler(signum, frame)

    for signum in (*STOPS, signal.SIGINT) if and_ctrl_c else STOPS:
        may_be_ignored = signum in (signal.SIGHUP, signal.SIGINT)  # by nohup, by a shell's `&`
        if not (may_be_ignored and signal.getsignal(signum) == signal.SIG_IGN):
            signal.signal(signum, handle)


@contextmanager
def held_back() -> Iterator[None]:
    """Delay the signals that ask for an end: an error that a handler raises inside a __del__ is
    lost. A signal mask would not do, as another thread would get the signal."""
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
    """Let Ctrl-C raise an error: there is something to lose now (before, it ended train.py)."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave_the_terminal() -> None:
    """Print to nowhere: without a terminal, a write error would keep the state from being saved."""
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
    sees_pieces: bool = False,
) -> Iterator[None]:
    """Raise UserError for anything that is not a bug: which run ended, after how many `steps`, and
    what to do. `sees_pieces`: whether the run's weights depend on micro_batch_size."""
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
        found = advice(error, f"stages.{stage}", settings, sees_pieces)
        if found is None:
            raise
        raise UserError(f"{name}, after step {steps()}: {found}") from error


def advice(
    error: BaseException, where: str, settings: Mapping[str, Any], sees_pieces: bool = False
) -> str | None:
    """What happened and what to do about it; None for any other error."""
    if (full := disk_full(error)) is not None:
        return full
    if isinstance(error, BrokenPipeError):
        return NO_READER
    text = str(error)
    if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
        new_run = f"lower {', '.join(k for k in SIZES if k in settings)}, which makes a new run"
        if sees_pieces:
            return f"out of memory: {new_run.replace('lower ', 'lower micro_batch_size, ')}"
        same_run = f"lower {where}.micro_batch_size (now {settings['micro_batch_size']})"
        return f"out of memory: {same_run} and {AGAIN}; or {new_run}"
    if words := lost_peer(error):
        return f"lost another process of this job, whose own output says why ({words}): {AGAIN}"
    return None


def lost_peer(error: BaseException) -> str | None:
    """What the error says if it is that another process of the job is gone."""
    return next((words for words in NO_PEER if words in str(error)), None)


def disk_full(error: BaseException) -> str | None:
    """The line for a full disk, wherever it appears in the chain of errors."""
    chain: BaseException | None = error
    seen: set[int] = set()  # an error that is raised again can be in a context of its own
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        is_full = isinstance(chain, OSError) and chain.errno in FULL
        # safetensors has a class of its own
        if is_full or re.search("No space left on device|File too large", str(chain)):
            path = isinstance(chain, OSError) and (chain.filename2 or chain.filename)
            at = f" at {path}" if path else ""
            return f"disk full{at}: free space and {AGAIN}"
        if NO_TEMPORARY in str(chain):  # most often the same
            return f"no folder for temporary files: free space, or set TMPDIR, and {AGAIN}"
        chain = chain.__cause__ or chain.__context__
    return None


def one_line(error: BaseException) -> str | None:
    """What to tell the user instead of a traceback; None for a bug."""
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
    """Print characters that the terminal can't show as escapes instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Run main() with the command line's arguments; --help prints its module's docstring. Errors
    that are not bugs end in one line, and a closed pipe (`| head`) in none."""
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
        code = f"error: {line.removesuffix(RESUMES)}"  # which only train.py does
    sys.exit(code)
