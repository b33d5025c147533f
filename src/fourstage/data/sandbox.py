"""Judges a model's text in a process that can do no harm and may be killed.

This process asks a server, which never runs a model's text and forks a worker for each batch; the
worker judges. A worker may not write, connect, start or signal anything, has limited memory and
time, and its working directory is deleted. An item that takes longer than SECONDS, or whose worker
dies, has no result; a new worker, which costs a fork and no imports, goes on with the next item.
(A worker can read files, but it can't send what it reads anywhere.)
"""

import atexit
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from fourstage.errors import UserError

SECONDS = 1.0  # CPU time of an item
PATIENCE = 10.0  # wall time of an item, in seconds
MEMORY = 4 * 2**30  # bytes of a worker's address space, imports included
OPEN_FILES = 64
FORBIDDEN = (  # audit events, docs.python.org/3/library/audit_events.html
    *("os.", "shutil.", "subprocess.", "socket.", "ctypes.", "signal.", "pty.", "tempfile."),
    *("fcntl.", "mmap.", "syslog.", "webbrowser.", "urllib.", "ftplib.", "http.", "smtplib."),
)
ALLOWED = ("os.listdir", "os.scandir", "os.fspath")  # imports look around


class Sandbox:
    """A server that judges with the functions of a module, started on first use.

    The module has `prepare(item)`, which imports in the server what judging needs and must not look
    at a model's text, and `judge(item)`, whose result is JSON.
    """

    def __init__(self, module: str) -> None:
        self.module = module
        self._server: subprocess.Popen[str] | None = None
        self._owner = 0  # the process that started it: a fork starts its own
        self._lock = threading.Lock()

    def map(self, items: Sequence[Any]) -> list[Any]:
        """judge(item) of each, in order; None if that failed, took too long or was refused. Raises
        UserError if the server can't be started."""
        with self._lock:
            for _ in range(2):  # a server that was killed is restarted
                server, answer = self._running(), ""
                assert server.stdin and server.stdout
                try:
                    with suppress(BrokenPipeError):
                        server.stdin.write(json.dumps(list(items)) + "\n")
                        server.stdin.flush()
                        answer = server.stdout.readline()
                finally:  # after an interrupt, the next call would read these results
                    if not answer:
                        self.close()
                if answer:
                    return json.loads(answer)
        raise UserError("the process that judges answers ends at once: see its output")

    def _running(self) -> subprocess.Popen[str]:
        if self._server is None or self._owner != os.getpid():
            source = str(Path(__file__).parents[2])
            paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
            code = f"from fourstage.data.sandbox import serve; serve({self.module!r})"
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the program, which then closes the pipe
            )
            self._owner = os.getpid()
            atexit.register(self.close)
        return self._server

    def close(self) -> None:
        """End the server; the next call starts another."""
        server, self._server = self._server, None
        if server is not None and self._owner == os.getpid():
            server.kill()
            server.communicate()


# --- the server


def serve(module: str) -> None:
    """Answer each line of items on stdin with a line of results, until stdin is closed."""
    functions = importlib.import_module(module)
    requests, answers = sys.stdin, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints
    with suppress(BrokenPipeError, KeyboardInterrupt):
        for line in requests:
            answers.write(json.dumps(batch(functions, json.loads(line))) + "\n")
            answers.flush()


def batch(functions: Any, items: list[Any]) -> list[Any]:
    """judge(item) of each, with a new worker after each item that gave no result."""
    for item in items:
        functions.prepare(item)
    results: list[Any] = []
    while len(results) < len(items):
        ours, workers = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ours)
            work(functions, items[len(results) :], workers)
        os.close(workers)
        lines = lines_of(ours)
        if next(lines, None) is None:
            raise RuntimeError("the worker can't drop its rights")
        results += map(json.loads, islice(lines, len(items) - len(results)))
        os.close(ours)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if len(results) < len(items):
            results.append(None)
    return results


def lines_of(pipe: int) -> Iterator[bytes]:
    """The lines that a worker writes, until it ends or takes too long."""
    waiting = b""
    while select.select([pipe], [], [], PATIENCE)[0] and (read := os.read(pipe, 65_536)):
        *lines, waiting = (waiting + read).split(b"\n")
        yield from lines


# --- the worker


def work(functions: Any, items: list[Any], pipe: int) -> NoReturn:
    """Judge the items in this process, one line of JSON each, then exit."""
    code = 1
    with suppress(BaseException):
        lock_up(len(items))
        os.write(pipe, b"ready\n")
        for item in items:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # kills the process, whatever it does
            try:
                result = json.dumps(functions.judge(item), allow_nan=False)
            except Exception:  # a model may write anything
                result = "null"
            os.write(pipe, result.encode() + b"\n")
        code = 0
    os._exit(code)


def lock_up(n_items: int) -> None:
    """Give up for good whatever judging doesn't need."""
    os.chdir("/")
    with suppress(OSError):  # a container may have no writable folder
        folder = tempfile.mkdtemp()
        os.chdir(folder)
        os.rmdir(folder)  # so that nothing can be created in it
    null = os.open(os.devnull, os.O_RDWR)
    for file in range(3):
        os.dup2(null, file)
    seconds = int(SECONDS * n_items) + 10
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for what, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, seconds),  # in case the server is killed
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # not every system has all of them
            resource.setrlimit(what, (most, most))
    sys.addaudithook(refuse)


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook: an error for anything that could leave a trace."""
    if event == "open":
        mode, flags = arguments[1:3]
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        if writes or (isinstance(mode, str) and set(mode) & set("wax+")):
            raise PermissionError("open for writing")
    elif event.startswith(FORBIDDEN) and event not in ALLOWED:
        raise PermissionError(event)
