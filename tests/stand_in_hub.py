"""A hub on loopback with small sets in the layouts of the real ones, and a client that reads them.

The client is the real one, in a process of its own, as it reads its settings when it is imported:

    python -m tests.stand_in_hub '[{"source": "chat", "path": "hf:OWNER/NAME"}]'
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from fourstage.data.hub import KNOWN

ROOT = Path(__file__).parent.parent
Files = dict[str, bytes]


class Hub:
    """The sets that are served, what is said of each request, and which requests came."""

    def __init__(self) -> None:
        self.sets: dict[str, tuple[str, Files]] = {}  # repository -> its commit and files
        self.refused: dict[str, tuple[int, str]] = {}  # repository -> status and error code
        self.declared: dict[str, int] = {}  # file -> a size to pretend
        self.truncated: set[str] = set()  # files whose transfer breaks off
        self.pages: set[str] = set()  # repositories for which a proxy answers with a page
        self.requests: list[str] = []
        self.url = ""

    def add(self, repo: str, files: Files, commit: str | None = None) -> str:
        commit = commit or (KNOWN[repo].revision if repo in KNOWN else "c" * 40)
        self.sets[repo] = commit, {".gitattributes": b"*.parquet filter=lfs\n", **files}
        return commit


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(is_head=True)

        def do_GET(self) -> None:
            self.answer(is_head=False)

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, is_head: bool) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            hub.requests.append(f"{self.command} {'/'.join(parts)}")
            is_api = parts[0] == "api"
            if "/".join(parts[2:4]) in hub.pages:
                return self.send(b"<html>", "", is_head)
            if is_api and parts[4:5] in ([], ["revision"]):
                return self.tell("/".join(parts[2:4]), "".join(parts[5:]) or "main", is_head)
            kind, *repo, what, commit = parts[is_api:][:5]
            name = "/".join(parts[is_api:][5:])
            assert kind == "datasets", parts
            own, files = hub.sets.get("/".join(repo), ("", {}))
            if "/".join(repo) in hub.refused and not (is_api and what == "tree"):
                return self.refuse(*hub.refused["/".join(repo)])
            if not own:
                return self.refuse(404, "RepoNotFound")
            if commit != own:
                return self.refuse(404, "RevisionNotFound")
            if is_api and what == "tree":
                entries = [
                    {
                        "type": "file",
                        "path": path,
                        "size": len(body),
                        "oid": hashlib.sha1(body).hexdigest(),
                    }
                    for path, body in files.items()
                ]
                return self.send(json.dumps(entries).encode(), own, is_head)
            assert what == "resolve", parts
            if name not in files:
                return self.refuse(404, "EntryNotFound")
            self.send(files[name], own, is_head, name)

        def tell(self, repo: str, revision: str, is_head: bool) -> None:
            own, files = hub.sets.get(repo, ("", {}))
            if repo in hub.refused:
                return self.refuse(*hub.refused[repo])
            if revision not in ("main", own) or not own:
                return self.refuse(404, "RevisionNotFound" if own else "RepoNotFound")
            names = [{"rfilename": name} for name in files]
            said = {"id": repo, "sha": own, "siblings": names, "private": False, "tags": []}
            self.send(json.dumps(said).encode(), own, is_head)

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send(self, body: bytes, commit: str, is_head: bool, name: str = "") -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(hub.declared.get(name, len(body))))
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.end_headers()
            if name in hub.truncated:
                body = body[: len(body) // 2]
            if not is_head:
                self.wfile.write(body)

    return Handler


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# --- sets


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def card(subsets: dict[str, dict[str, str]]) -> bytes:
    """A README that says which files a subset's splits are."""
    lines = ["---", "license: mit", "configs:"]
    for subset, splits in subsets.items():
        lines += [f"- config_name: {subset}", "  data_files:"]
        for split, path in splits.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    return "\n".join([*lines, "---", "# A set"]).encode()


def said(*texts: str) -> list[dict[str, str]]:
    """A conversation, the user first."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


# --- the client


def environment(hub: Hub, home: Path, **changes: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **changes,
    }


def ask(
    hub: Hub, home: Path, *asked: dict[str, Any], quiet: bool = True, **changes: str
) -> list[Any]:
    """The rows of each source that is asked for, {"values", "where"}, or the line of the error."""
    command = [sys.executable, "-m", "tests.stand_in_hub", json.dumps(asked)]
    environ = environment(hub, home, **changes)
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (quiet and done.stderr), done.stderr
    return json.loads(done.stdout)


def main() -> None:
    import time

    from fourstage.data.userfiles import rows_of
    from fourstage.errors import UserError
    from tests.data.conftest import make

    time.sleep = lambda _: None  # between the client's tries
    found: list[Any] = []
    for asked in json.loads(sys.argv[1]):
        settings = dict(asked)
        source, side = settings.pop("source"), settings.pop("heldout", False)
        most, root = settings.pop("most", None), settings.pop("root", None)
        try:
            rows = rows_of(make("files", root=root, **{source: settings}), source, side)
            found.append([{"values": r.values, "where": r.where} for r in islice(rows, most)])
        except UserError as error:
            found.append(str(error))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
