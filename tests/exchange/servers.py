"""Servers of other software, in processes of their own, and the openai client in front of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.exchange.exports import Export, asked, greedy, questions, shown

PATIENCE = 300  # seconds that a server may take to start
LACKING = "import importlib.util as u, sys; print(*(m for m in sys.argv[1:] if not u.find_spec(m)))"
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def interpreter(variable: str, *modules: str) -> str:
    """The Python that an environment variable names, else this one; the test is skipped if it
    lacks a module."""
    python = os.environ.get(variable, sys.executable)
    command = [python, "-c", LACKING, *modules]
    if missing := subprocess.check_output(command, env=environment(), text=True).split():
        pytest.skip(f"{python} has no {' and no '.join(missing)}: name another in {variable}")
    return python


def environment(**more: str) -> dict[str, str]:
    """Without this project on the path: other software may have other versions of what it needs."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, **OFFLINE, **more}


@contextmanager
def server(command: list[str], log: Path, **more: str) -> Iterator[str]:
    """The address of a server, which the command starts on the port put behind it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment(**more),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it starts others, which must end with it
        )
    try:
        address = f"http://127.0.0.1:{port}"
        until = time.monotonic() + PATIENCE
        while not answers(f"{address}/health"):
            if process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (URLError, OSError):
        return False


def check_answers(address: str, model: str, export: Export, n: int = 12, length: int = 40) -> None:
    """Each of n questions is answered as by our own decoder, whole and in pieces; so is a text
    that begins with <bos>. The export must have no ties."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    words = export.tokenizer
    texts = questions(words, n)
    rows = [words.prompt([asked(text)]) for text in texts]
    how = {"model": model, "temperature": 0, "max_tokens": length}
    for text, ids in zip(texts, greedy(export, rows, length), strict=True):
        messages = [asked(text)]
        (choice,) = client.chat.completions.create(messages=messages, **how).choices
        assert choice.message.content == shown(words, ids)
        assert choice.finish_reason == ("stop" if ids[-1] == words.eot_id else "length")
        stream = client.chat.completions.create(messages=messages, stream=True, **how)
        deltas = [piece.choices[0].delta.content for piece in stream if piece.choices]
        pieces = [delta for delta in deltas if delta]
        assert "".join(pieces) == shown(words, ids)
        assert len(pieces) > 1 or len(ids) < 10
    text = "It is so"
    (ids,) = greedy(export, [[words.bos_id, *words.encode(text)]], length)
    (choice,) = client.completions.create(prompt=f"<bos>{text}", **how).choices
    assert choice.text == shown(words, ids)
