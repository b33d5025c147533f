"""What the arena lets through, and what it refuses: requests, events with odd values, addresses."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import uuid
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

pytest.importorskip("gradio")

from fourstage.arena.contestants import open_ladder, open_runs
from fourstage.arena.page import Page, Talk, Voter, checked, frames, settings
from fourstage.arena.serve import free, is_event, is_foreign
from fourstage.arena.votes import Votes
from fourstage.errors import UserError
from fourstage.runs.store import RunStore
from tests.arena.browser import SOURCE, serving

STAGES = ["random", "pretrain", "sft", "ppo", "grpo"]
JOIN = "/gradio_api/queue/join"


# --- which requests


@pytest.mark.parametrize(
    ("host", "origin", "local", "anywhere"),
    [
        ("127.0.0.1:7860", None, False, False),
        ("localhost:7860", "http://localhost:7860", False, False),
        ("[::1]:7860", "http://[::1]:7860", False, False),
        ("127.0.0.1:7860", "http://127.0.0.1:7861", True, True),
        ("127.0.0.1:7860", "http://localhost:7860", True, True),
        ("127.0.0.1:7860", "https://example.com", True, True),
        ("127.0.0.1:7860", "null", True, True),
        ("127.0.0.1:7860", "", True, True),
        ("127.0.0.1:7860", "http://[", True, True),
        ("evil.example:7860", None, True, False),
        ("evil.example:7860", "http://evil.example:7860", True, False),
        ("127.0.0.1.evil.example", None, True, False),
        ("[", None, True, True),
        ("", None, True, False),
    ],
)
def test_whose_page_asks(host: str, origin: str | None, local: bool, anywhere: bool) -> None:
    headers = {"host": host} | ({} if origin is None else {"origin": origin})
    assert is_foreign(headers, is_local=True) is local
    assert is_foreign(headers, is_local=False) is anywhere


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"data": ["a", None, 0.5], "fn_index": 1}, True),
        ({"data": ["a", None], "fn_index": 1}, False),
        ({"data": ["a", None, 1, 2], "fn_index": 1}, False),
        ({"data": ["a", None, {"path": "/etc/passwd"}], "fn_index": 1}, False),
        ({"data": ["a", None, ["b"]], "fn_index": 1}, False),
        ({"data": "abc", "fn_index": 1}, False),
        ({"data": ["a", None, 1], "fn_index": 2}, False),
        ({"data": ["a", None, 1], "fn_index": "1"}, False),
        ({"data": ["a", None, 1], "fn_index": [1]}, False),
        ({"fn_index": 1}, False),
        ([1], False),
        (None, False),
    ],
)
def test_what_is_an_event(body: Any, expected: bool) -> None:
    assert is_event(json.dumps(body).encode(), {1: 3}) is expected
    assert not is_event(b"\xff{", {1: 3}) and not is_event(b"[" * 100_000, {1: 3})


class Client:
    """Speaks HTTP, as anybody could."""

    def __init__(self, url: str) -> None:
        self.host = urlsplit(url).netloc

    def __call__(
        self, method: str, path: str, body: bytes = b"", **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection(self.host, timeout=20)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body or None, named)
        found = connection.getresponse()
        said = found.read() if "heartbeat" not in path else b""
        connection.close()
        return found.status, said, dict(found.getheaders())

    def event(self, fn_index: Any, data: Any, **more: Any) -> tuple[int, list[dict]]:
        """Sends an event; returns the status, and what the server then says of it."""
        session = uuid.uuid4().hex
        sent = {"data": data, "fn_index": fn_index, "session_hash": session, **more}
        body = json.dumps(sent).encode()
        status, said, _ = self("POST", JOIN, body, Content_Type="application/json")
        if status != 200:
            return status, []
        status, said, _ = self("GET", f"/gradio_api/queue/data?session_hash={session}")
        return status, [json.loads(line[6:]) for line in said.decode().splitlines() if line]

    def events(self) -> dict[int, int]:
        """The page's events: how many values each takes."""
        config = json.loads(self("GET", "/config")[1])
        return {one["id"]: len(one["inputs"]) for one in config["dependencies"]}


@pytest.mark.slow
def test_what_a_stranger_gets(own_ladder) -> None:
    """No file, no private handler, no traceback (`serving` looks for it)."""
    with serving(f"outputs={own_ladder}", "runs=sft,ppo") as served:
        client = Client(served.url)
        status, page, headers = client("GET", "/")
        assert status == 200 and b"fourstage arena" in page
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        for origin in ("http://evil.example", "null", "http://localhost:1"):
            assert client("GET", "/", Origin=origin)[0] == 403
            assert client("POST", JOIN, b"{}", Origin=origin)[0] == 403
        assert client("GET", "/", Host="evil.example")[0] == 403
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec_WebSocket_Version": "13"}
        key = {"Sec_WebSocket_Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
        assert client("GET", "/gradio_api/queue/join", **upgrade, **key)[0] in (403, 404, 405)
        for path in (
            f"/gradio_api/file={own_ladder}/runs",
            "/gradio_api/file=/etc/passwd",
            "/gradio_api/file/etc/passwd",
            "/gradio_api/proxy=http://127.0.0.1/",
            "/static/../../../../etc/passwd",
            "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
            "/assets/..%2f..%2f..%2fetc/passwd",
            "/monitoring",
            "/docs",
            "/openapi.json",
            "/gradio_api/info",
        ):
            assert client("GET", path)[0] == 404, path
        for path in ("upload", "run/vote", "api/vote", "call/ask", "call/v2/ask", "vibe-edit"):
            assert client("POST", f"/gradio_api/{path}", b"{}")[0] == 404, path
        assert client("POST", JOIN, b"x" * (2**23 + 1))[0] == 413
        assert client("POST", JOIN, b"{}")[0] == 400
        assert client("GET", "/gradio_api/queue/data?session_hash=unknown")[0] in (200, 400, 404)
        assert client("GET", "/gradio_api/queue/data")[0] == 422
        for event, n in client.events().items():
            assert client.event(event, ["x"] * (n + 1))[0] == 400
            assert client.event(event, [{"path": "/etc/passwd"}] * (n or 1))[0] == 400
            for odd in ("x", None, -1, 1e308, 0.5, True, "\ud800", "9" * 5000):
                status, said = client.event(event, [odd] * n)
                assert status == 200
                assert said[-1]["msg"] == "close_stream"
                done = [one for one in said if one["msg"] == "process_completed"]
                assert done and all(one["success"] for one in done), (event, odd, done)
        assert client.event(0, [], session_hash=None)[0] in (400, 422)
        assert client.event(0, [], session_hash=5)[0] in (400, 422)
    assert not (own_ladder / "arena" / "votes.jsonl").exists()


@pytest.mark.slow
def test_a_password(own_ladder) -> None:
    settings = ["runs=sft", "host=0.0.0.0", "password=sesame"]
    with serving(f"outputs={own_ladder}", *settings) as served:
        client = Client(served.url)
        assert client("GET", "/config")[0] == 401
        form = {"Content_Type": "application/x-www-form-urlencoded"}
        for password, expected in (("wrong", 400), ("sesame", 200)):
            body = urlencode({"username": "arena", "password": password}).encode()
            status, _, headers = client("POST", "/login", body, **form)
            assert status == expected
        cookie = headers["set-cookie"].split(";")[0]
        status, config, _ = client("GET", "/config", Cookie=cookie)
        board = next(x["id"] for x in json.loads(config)["dependencies"] if not x["inputs"])
        assert client.event(board, [])[0] == 401
        assert client("POST", "/login", body, **form, Origin="http://evil.example")[0] == 403


# --- the command


def command(*settings: str) -> str:
    """What it says when it can't start."""
    asked = [sys.executable, "-m", "fourstage", "arena", *settings]
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(asked, env=env, text=True, capture_output=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return done.stderr


def test_another_address_needs_a_password(tmp_path) -> None:
    said = command("host=0.0.0.0", f"outputs={tmp_path}")
    assert said.startswith("error: host=0.0.0.0: everybody who reaches this machine")
    assert said.count("\n") == 1


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^port={port} on 127.0.0.1: Address already in use"):
            free("127.0.0.1", port)
    assert free("127.0.0.1", 0) > 0


# --- the page's handlers


@pytest.fixture(scope="module")
def arena(ladder):
    return open_ladder(RunStore(ladder), "grpo")


@pytest.fixture
def page(arena, tmp_path) -> Page:
    return Page(arena, Votes(tmp_path / "votes.jsonl"))


@pytest.mark.parametrize("odd", [None, "", " \n", 5, ["a"], {"a": 1}])
def test_a_question_is_text_that_is_there(odd: Any) -> None:
    with pytest.raises(UserError, match="ask something first"):
        checked(odd)


def test_a_question_is_cleaned() -> None:
    assert checked(" a\r\nb ") == "a\nb"
    assert checked("\ud800x") == "\ufffdx" and checked("\U0001f600") == "\U0001f600"
    assert len(checked("x" * 100_000)) == 100_000
    with pytest.raises(UserError, match="more than 100,000 characters"):
        checked("x" * 100_001)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (("x", 0, 20), "temperature"),
        ((None, 0, 20), "temperature"),
        ((True, 0, 20), "temperature"),
        ((float("nan"), 0, 20), "temperature"),
        ((2.1, 0, 20), "temperature"),
        ((1, -1, 20), "seed"),
        ((1, 2**31, 20), "seed"),
        ((1, 0, 9), "tokens"),
        ((1, 0, 401), "tokens"),
    ],
)
def test_settings_out_of_range(values: tuple, name: str) -> None:
    with pytest.raises(UserError, match=f"^{name}: give a number from"):
        settings(*values)


def test_an_answer_is_text_and_the_last_frame_is_shown(monkeypatch) -> None:
    monkeypatch.setattr("fourstage.arena.page.FRAME", 1e9)
    assert list(frames([["a"], ["b"], ["c"]])) == [["a"], ["c"]]
    monkeypatch.setattr("fourstage.arena.page.FRAME", 0)
    assert list(frames([["a"], ["b"], ["c"]])) == [["a"], ["b"], ["c"]]


def test_a_newer_question_ends_an_older_one(page) -> None:
    talk = Talk()
    older = page.ask("Hello!", talk, 0.7, 0, 100)
    next(older)
    *_, (shown, said, _) = page.ask("What is an LLM?", talk, 0.7, 0, 20)
    assert list(older) == []
    assert talk.questions == ["What is an LLM?"] and "Hello!" not in shown
    *_, (_, said, same) = page.ask("", talk, 0.7, 0, 20)
    assert "ask something first" in said and same is talk


def test_what_the_context_does_not_hold_is_said(page) -> None:
    talk = Talk()
    for n in range(1, 6):
        *_, (shown, _, _) = page.ask(f"{n}" * 100, talk, 0.7, 0, 100)
    assert "context full: the first" in shown and "were not read" in shown


def test_votes_before_and_after_their_time(page) -> None:
    voter = Voter()
    assert "press n first" in page.vote("left", voter)[1]
    drawing = page.draw("Hello!", False, 0.7, 20, voter)
    next(drawing)
    assert "wait until both" in page.vote("left", voter)[1]
    *_, (shown, asked, said, _) = drawing
    assert asked == "Hello!" and "which one do you prefer?" in said
    assert not any(name in shown for name in STAGES)
    assert "saved" in page.vote("left", voter)[1]
    assert "you have voted on these" in page.vote("right", voter)[1]
    assert len(page.votes.read()[0]) == 1
    assert "taken back" in page.undo(voter)[0]
    assert "you have voted on these" in page.vote("right", voter)[1]  # their names are known
    assert page.votes.read() == ([], 0)
    assert "no vote to take back" in page.undo(voter)[0]


def test_undo_takes_back_one_after_the_other(page) -> None:
    voter = Voter()
    for choice in ("left", "right"):
        list(page.draw("Hello!", False, 0.7, 20, voter))
        page.vote(choice, voter)
    list(page.draw("Hello!", False, 0.7, 20, voter))
    page.undo(voter)
    assert [vote.choice for vote in page.votes.read()[0]] == ["left"]
    assert "saved" in page.vote("tie", voter)[1]  # what is shown is still blind


def test_two_answers_of_one_stage_need_a_temperature(page) -> None:
    *_, (_, _, said, _) = page.draw("Hello!", True, 0, 20, Voter())
    assert "at temperature 0 a stage always says the same" in said


def test_data_that_is_gone(own_ladder, tmp_path) -> None:
    """The answers come all the same."""
    for folder in (own_ladder / "runs").glob("grpo-*"):
        record = json.loads((folder / "run.json").read_text())
        record["config"]["data"] = {"name": "files", "chat": {"path": str(tmp_path / "gone.jsonl")}}
        (folder / "run.json").write_text(json.dumps(record))
    arena = open_ladder(RunStore(own_ladder), "grpo")
    page = Page(arena, Votes(tmp_path / "votes.jsonl"))
    *_, (_, _, said, _) = page.draw("", False, 0.7, 20, Voter())
    assert "type one" in said
    *_, (shown, said, _) = page.ask("Hello!", Talk(), 0.7, 0, 20)
    assert "answered" in said and "log p" in shown


def test_a_run_that_is_removed_goes_on_answering(own_ladder, tmp_path) -> None:
    arena = open_runs(RunStore(own_ladder), ["sft", "ppo"])
    shutil.rmtree(own_ladder / "runs")
    page = Page(arena, Votes(tmp_path / "votes.jsonl"))
    *_, (_, said, _) = page.ask("Hello!", Talk(), 0.7, 0, 20)
    assert "answered" in said


def test_votes_that_cannot_be_read(page) -> None:
    page.votes.path.mkdir()
    assert "could not be read" in page.board()[0]
    assert page.board()[1:] == ("", "")
