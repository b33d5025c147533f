"""A stand-in for the W&B server: what wandb-core 0.31 asks of one, and what it sends.

GraphQL by the operation's name, the file stream (history, events, console, summary) and uploads.
Lines land at their offset, as on the server: a line that is sent twice at one offset is one line.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HISTORY = "wandb-history.jsonl"
ENTITY = "tester"


@dataclass
class Stored:
    """One run as the server has it."""

    variables: dict[str, Any] = field(default_factory=dict)  # of UpsertBucket, the latest ones
    lines: dict[str, dict[int, str]] = field(default_factory=dict)  # file -> offset -> line
    files: dict[str, bytes] = field(default_factory=dict)
    states: list[dict[str, Any]] = field(default_factory=list)  # complete, exitcode, preempting

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for _, line in sorted(self.lines.get(HISTORY, {}).items())]

    @property
    def summary(self) -> dict[str, Any]:
        lines = self.lines.get("wandb-summary.json", {})
        return json.loads(lines[max(lines)]) if lines else {}


class StandIn(ThreadingHTTPServer):
    """Listens on a free port of this machine; `runs` by id."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, Stored] = {}
        self.asked: list[str] = []  # names of operations
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def answer(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL answer; an operation that isn't known gets nothing."""
        self.asked.append(name)
        project = {"id": "p", "name": variables.get("project"), "entity": {"name": ENTITY}}
        if name == "Viewer":
            return {"viewer": {"id": "v", "entity": ENTITY, "username": ENTITY, "flags": "{}"}}
        if name == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if name == "UpsertBucket":
            run_id = variables["name"]
            is_new = run_id not in self.runs
            run = self.runs.setdefault(run_id, Stored())
            run.variables |= {k: v for k, v in variables.items() if v is not None}
            bucket = {
                "id": f"b-{run_id}",
                "name": run_id,
                "displayName": run.variables.get("displayName", run_id),
                "config": run.variables.get("config", "{}"),
                "sweepName": run.variables.get("sweep"),
                "project": project,
                "historyLineCount": len(run.lines.get(HISTORY, {})),
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}
        if name == "RunResumeStatus":
            return {"model": {**project, "bucket": self.resumed(variables["name"])}}
        if name == "CreateRunFiles":
            run_id, names = variables["run"], variables["files"]
            urls = [
                {"name": file, "uploadUrl": f"{self.url}/storage/{run_id}/{file}"} for file in names
            ]
            return {"createRunFiles": {"runID": run_id, "uploadHeaders": [], "files": urls}}
        if name == "ArtifactType":
            return {"project": None}
        if name == "CreateArtifact":
            return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED"}}}
        return {}

    def resumed(self, run_id: str) -> dict[str, Any] | None:
        run = self.runs.get(run_id)
        if run is None:
            return None
        history = [line for _, line in sorted(run.lines.get(HISTORY, {}).items())]
        events = [line for _, line in sorted(run.lines.get("wandb-events.jsonl", {}).items())]
        return {
            "id": f"b-{run_id}",
            "name": run_id,
            "summaryMetrics": json.dumps(run.summary),
            "displayName": run.variables.get("displayName", run_id),
            "logLineCount": len(run.lines.get("output.log", {})),
            "historyLineCount": len(history),
            "eventsLineCount": len(events),
            "historyTail": json.dumps(history[-1:]),
            "eventsTail": json.dumps(events[-1:]),
            "config": run.variables.get("config", "{}"),
            "tags": run.variables.get("tags"),
            "wandbConfig": '{"t": 1}',
        }

    def stream(self, run_id: str, message: dict[str, Any]) -> None:
        run = self.runs[run_id]
        for name, chunk in (message.get("files") or {}).items():
            lines = run.lines.setdefault(name, {})
            lines |= {chunk["offset"] + i: line for i, line in enumerate(chunk["content"])}
        state = {k: message[k] for k in ("complete", "exitcode", "preempting") if k in message}
        if state:
            run.states.append(state)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def do_POST(self) -> None:
        raw = self.body()
        with self.server.lock:
            if not raw.startswith(b"{"):  # telemetry
                self.reply({}, 404)
                return
            body = json.loads(raw)
            if self.path == "/graphql":
                name = re.search(r"(?:query|mutation)\s+(\w+)", body["query"])
                data = self.server.answer(name[1] if name else "", body.get("variables") or {})
                self.reply({"data": data})
            elif found := re.fullmatch(r"/files/[^/]*/[^/]*/([^/]+)/file_stream", self.path):
                self.server.stream(found[1], body)
                self.reply({"exitcode": None, "limits": {}})
            else:
                self.reply({}, 404)

    def do_PUT(self) -> None:
        body = self.body()
        with self.server.lock:
            found = re.fullmatch(r"/storage/([^/]+)/(.+)", self.path)
            if found:
                self.server.runs[found[1]].files[found[2]] = body
        self.reply({})

    def do_GET(self) -> None:
        self.reply({}, 404)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client was killed
            super().handle()

    def reply(self, answer: dict[str, Any], code: int = 200) -> None:
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def cores(parent: int) -> list[int]:
    """The process that W&B starts for a training, in a session of its own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, fields = path.read_text().split("(", 1)[1].rsplit(")", 1)
            if name == "wandb-core" and int(fields.split()[1]) == parent:
                found.append(int(path.parent.name))
    return found
