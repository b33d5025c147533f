"""Serves the page, offline, to this machine or behind a password."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from fourstage.arena.contestants import Arena
from fourstage.arena.page import FILES, Page, build
from fourstage.arena.votes import Votes
from fourstage.errors import UserError

FONTS = ("system-ui", "sans-serif")
THREADS = 32  # visitors who are answered at once


class SameOrigin:
    """Refuses requests that pages of other sites make in a visitor's browser, and names of this
    machine that other sites have made up (DNS rebinding)."""

    def __init__(self, app: Callable[..., Awaitable[None]], is_local: bool) -> None:
        self.app, self.is_local = app, is_local

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        name = urlsplit(f"//{host}").hostname
        is_other = origin is not None and urlsplit(origin).netloc != host
        if is_other or (self.is_local and name not in ("127.0.0.1", "localhost", "::1")):
            response = PlainTextResponse("requests from other sites are refused", 403)
            return await response(scope, receive, send)
        return await self.app(scope, receive, send)


def serve(arena: Arena, votes: Votes, host: str, port: int, password: str) -> None:
    """Serve until Ctrl-C. Raises UserError for an address that can't be had."""
    arena.known, arena.prompts  # noqa: B018  read before the first visitor waits for them
    check_free(host, port)
    blocks = build(Page(arena, votes))
    blocks.queue(default_concurrency_limit=THREADS)
    theme = gr.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace"))
    _, url, _ = blocks.launch(
        server_name=host,
        server_port=port or None,
        auth=("arena", password) if password else None,
        theme=theme,
        css=FILES.joinpath("page.css").read_text(encoding="utf-8"),
        head=f"<script>{FILES.joinpath('page.js').read_text(encoding='utf-8')}</script>",
        app_kwargs={"middleware": [Middleware(SameOrigin, is_local=not password)]},
        footer_links=[],
        max_threads=THREADS,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
    )
    print(f"open {url} (Ctrl-C ends it); votes are in {votes.path}", flush=True)
    blocks.block_thread()


def check_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((host, port))
    except OSError as error:
        raise UserError(f"port={port} on {host}: {error.strerror}: give another port=") from None
