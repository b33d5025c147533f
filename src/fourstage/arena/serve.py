"""Serves the page, offline, to this machine or behind a password."""

from __future__ import annotations

import gc
import json
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import torch
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from fourstage.arena.__main__ import HERE
from fourstage.arena.contestants import Arena
from fourstage.arena.page import FILES, Page, build
from fourstage.arena.votes import Votes
from fourstage.errors import UserError

FONTS = ("system-ui", "sans-serif")
THREADS = 32  # visitors who are answered at once

# what the page asks for; Gradio has more (uploads, files, a proxy), which nobody needs here
JOIN = "/gradio_api/queue/join"
PATHS = {"/", "/config", "/login", "/logout", "/theme.css", "/favicon.ico", JOIN}
APP = ("queue/data", "startup-events", "login_check", "app_id")
PATHS |= {f"/gradio_api/{name}" for name in APP}
FOLDERS = ("/assets/", "/static/", "/gradio_api/heartbeat/")
LONGEST_BODY = 2**23  # bytes
POLICY = (  # the browser's part: nothing is loaded from elsewhere, nobody shows the page in a frame
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; "
    "base-uri 'self'; form-action 'self'; object-src 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """Lets through what the page itself asks for, and nothing that another site could ask for in a
    visitor's browser. inputs: how many values each of the page's events sends."""

    def __init__(
        self, app: Callable[..., Awaitable[None]], is_local: bool, inputs: Mapping[int, int]
    ) -> None:
        self.app, self.is_local, self.inputs = app, is_local, inputs

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        has_begun = False

        async def answer(message: Any) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        async def refuse(why: str, status: int) -> None:
            await PlainTextResponse(why, status)(scope, receive, answer)

        if is_foreign(Headers(scope=scope), self.is_local):
            return await refuse("requests from other sites are refused", 403)
        path = scope["path"]
        if ".." in path or not (path in PATHS or path.startswith(FOLDERS)):
            return await refuse("not found", 404)
        if scope["method"] == "POST":
            body = await body_of(receive)
            if body is None:
                return await refuse("too long", 413)
            if path == JOIN and not is_event(body, self.inputs):
                return await refuse("this is no event of the page", 400)
            receive = replayed(body, receive)
        try:
            await self.app(scope, receive, answer)
        except Exception:  # Gradio's, for requests that the page doesn't make
            if not has_begun:
                return await refuse("bad request", 400)
            await send({"type": "http.response.body"})


def is_foreign(headers: Headers, is_local: bool) -> bool:
    """Whether a request comes from another site's page, or to a name for this machine that another
    site has made up (DNS rebinding)."""
    host, origin = headers.get("host", ""), headers.get("origin")
    try:
        name = urlsplit(f"//{host}").hostname
        is_other = origin is not None and urlsplit(origin).netloc != host
    except ValueError:
        return True
    return is_other or (is_local and name not in HERE)


async def body_of(receive: Any) -> bytes | None:
    """None if it is too long."""
    found = b""
    while True:
        message = await receive()
        found += message.get("body", b"")
        if len(found) > LONGEST_BODY:
            return None
        if not message.get("more_body"):
            return found


def replayed(body: bytes, receive: Any) -> Callable[[], Awaitable[Any]]:
    """A `receive` that hands out the body, and then what else comes."""
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        return parts.pop() if parts else await receive()

    return replay


def is_event(body: bytes, inputs: Mapping[int, int]) -> bool:
    """Whether it is JSON of an event that the page has, with as many plain values as it takes."""
    try:
        found = json.loads(body)
        values, event = found["data"], found["fn_index"]
        is_known = type(event) is int and inputs.get(event) == len(values)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    plain = (str, int, float, type(None))
    return is_known and isinstance(values, list) and all(isinstance(x, plain) for x in values)


def serve(arena: Arena, votes: Votes, host: str, port: int, password: str) -> None:
    """Serve until Ctrl-C. Raises UserError for an address that can't be had."""
    port = free(host, port)
    arena.known, arena.prompts  # noqa: B018  read before the first visitor waits for them
    torch.set_num_threads(1)  # of each visitor
    blocks = build(Page(arena, votes))
    blocks.queue(default_concurrency_limit=THREADS)
    inputs = {i: len(fn.inputs) for i, fn in blocks.fns.items()}
    _, url, _ = blocks.launch(
        server_name=host,
        server_port=port,
        auth=("arena", password) if password else None,
        theme=gr.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace")),
        css=FILES.joinpath("page.css").read_text(encoding="utf-8"),
        head=f"<script>{FILES.joinpath('page.js').read_text(encoding='utf-8')}</script>",
        app_kwargs={"middleware": [Middleware(Guard, is_local=not password, inputs=inputs)]},
        footer_links=[],
        max_threads=THREADS,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
    )
    print(f"open {url} (Ctrl-C ends it); votes are in {votes.path}", flush=True)
    gc.freeze()  # what is there stays to the end, which a collection would only delay
    threading.Event().wait()


def free(host: str, port: int) -> int:
    """The port, or any free one for 0. Raises UserError if it can't be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((host, port))
            return one.getsockname()[1]
    except OSError as error:
        why = f"{error.strerror}: give another port= or host="
        raise UserError(f"port={port} on {host}: {why}") from None
