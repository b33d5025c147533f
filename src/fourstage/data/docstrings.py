"""Prints {function or method of Python: the one-line summary in its docstring}, as JSON.

Only summaries that are a plain sentence of usual length, and no other function's too.
"""

import builtins
import inspect
import json
import re
from collections import Counter
from collections.abc import Iterator
from importlib import import_module

# fmt: off
MODULES = (
    "math", "cmath", "statistics", "random", "os", "os.path", "shutil", "string", "textwrap", "re",
    "json", "csv", "time", "calendar", "itertools", "functools", "operator", "collections", "heapq",
    "bisect", "copy", "pathlib", "tempfile", "glob", "hashlib", "hmac", "secrets", "base64", "zlib",
    "gzip", "bz2", "zipfile", "socket", "threading", "queue", "signal", "logging", "inspect", "gc",
    "locale", "platform", "getpass", "struct", "pickle", "contextlib", "webbrowser",
)
# fmt: on
TYPES = (str, bytes, list, dict, set, frozenset, tuple, int, float)
SUMMARY = re.compile(r"[A-Z][a-z]+ [\w ,'/-]+\.")  # a sentence without signs of code
LENGTHS = range(18, 76)


def summaries() -> dict[str, str]:
    found = {name: s for name, doc in docstrings() if (s := summary(doc))}
    count = Counter(found.values())
    return {name: s for name, s in found.items() if count[s] == 1}


def docstrings() -> Iterator[tuple[str, str]]:
    spaces = [(name, import_module(name)) for name in MODULES]
    spaces += [(t.__name__, t) for t in TYPES]
    for space, owner in spaces:
        for name in sorted(vars(owner)):
            value = getattr(owner, name)
            if not name.startswith("_") and callable(value) and not inspect.isclass(value):
                yield f"{space}.{name}", value.__doc__ or ""
    for name, value in sorted(vars(builtins).items()):
        if inspect.isbuiltin(value) and not name.startswith("_"):
            yield name, value.__doc__ or ""


def summary(doc: str) -> str | None:
    first = " ".join(doc.strip().split("\n\n")[0].split())
    match = SUMMARY.match(first)
    return match[0] if match and len(match[0]) in LENGTHS else None


if __name__ == "__main__":
    print(json.dumps(summaries()))
