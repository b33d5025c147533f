"""The arena as its user has it: the command in a process of its own, and headless Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parents[2] / "src"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Served:
    """`python -m fourstage arena` with these settings."""

    def __init__(self, *settings: str) -> None:
        command = [sys.executable, "-m", "fourstage", "arena", "port=0", *settings]
        env = {**os.environ, "PYTHONPATH": str(SOURCE)}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, env=env, text=True, **streams)
        self.said: list[str] = []
        for line in self.process.stdout:
            self.said.append(line)
            if found := re.search(r"open (http://\S+/)", line):
                self.url = found[1]
                break
        else:
            raise AssertionError("".join(self.said))
        self.reading = threading.Thread(target=lambda: self.said.extend(self.process.stdout))
        self.reading.start()

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """Returns the exit code."""
        self.process.send_signal(signum)
        try:
            return self.process.wait(timeout=10)
        finally:
            self.process.kill()
            self.reading.join()
            self.process.stdout.close()


@contextmanager
def serving(*settings: str) -> Iterator[Served]:
    """Ends it, and sees that it printed no traceback."""
    served = Served(*settings)
    try:
        yield served
    finally:
        if served.process.poll() is None:
            served.stop()
    assert "Traceback" not in "".join(served.said), "".join(served.said)


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's Browser."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Visitor:
    """A tab. requests: the addresses it asked for; errors: what its console showed."""

    def __init__(self, browser: Any, url: str, width: int = 1280, **options: Any) -> None:
        size = {"width": width, "height": 900}
        self.page = browser.new_context(viewport=size, **options).new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "console",
            lambda said: self.errors.append(said.text) if said.type == "error" else None,
        )
        self.page.goto(url)
        self.page.wait_for_selector("#answers .said")

    def message(self, where: str, words: str) -> str:
        """Waits until the message has these words."""
        script = "([id, words]) => document.querySelector(id)?.textContent.includes(words)"
        self.page.wait_for_function(script, arg=[where, words])
        return self.page.inner_text(where)

    def ask(self, question: str, turn: int = 1) -> list[str]:
        """Ask by keyboard; returns the last answer of each column."""
        self.page.fill("#question textarea", question)
        self.page.press("#question textarea", "Enter")
        self.message("#message", f"question {turn} of")
        return self.answers()

    def paste(self, text: str) -> None:
        """Put any text into the question, halves of characters too."""
        script = (
            'const field = document.querySelector("#question textarea");'
            f"field.value = {json.dumps(text)}; field.dispatchEvent(new Event('input'))"
        )
        self.page.evaluate(script)

    def answers(self, where: str = "#answers") -> list[str]:
        script = "all => all.map(one => [...one.querySelectorAll('.answer')].at(-1).textContent)"
        return self.page.eval_on_selector_all(f"{where} .said", script)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def draw(self) -> None:
        self.page.keyboard.press("n")
        self.message("#voted", "which one do you prefer?")

    def titles(self, where: str = "#two-answers") -> list[str]:
        return self.page.eval_on_selector_all(f"{where} h3", "all => all.map(x => x.textContent)")
