"""One function over many items, in order, by several processes where there are cores."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from fourstage.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

FEW = 16  # items that aren't worth a second process
WAITING = 3  # items in flight for each process: memory stays constant


def mapped(
    make: Callable[..., Callable[[T], R]], arguments: tuple[Any, ...], items: Iterable[T]
) -> Iterator[R]:
    """make(*arguments)(item) of each item, in order. `make` is a function of a module, and what it
    is given and what it returns can be pickled: each process calls it once.
    Raises UserError if a process was killed."""
    items = iter(items)
    yield from map(make(*arguments), islice(items, FEW))
    rest = list(islice(items, 1))
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not rest:
        return
    if n == 1:
        yield from map(make(*arguments), chain(rest, items))
        return
    pool = ProcessPoolExecutor(
        n, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(make, arguments)
    )
    waiting: deque[Future[R]] = deque()
    try:
        for item in chain(rest, items):
            waiting.append(pool.submit(_run, item))
            if len(waiting) > WAITING * n:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except (BrokenProcessPool, OSError) as error:
        # the latter if one is killed while another is started
        if isinstance(error, OSError) and str(error) != "handle is closed":
            raise
        raise UserError(
            "a process that reads the corpus was killed, by the system perhaps for lack of memory: "
            "run the same command again, with fewer other programs or on fewer cores (taskset)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_function: Callable[[Any], Any]


def _begin(make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are enough
    _function = make(*arguments)


def _end_with_parent() -> None:
    """A killed parent would leave its workers waiting for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(item: Any) -> Any:
    return _function(item)
