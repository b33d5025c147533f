"""`python -m fourstage arena`: mistakes are one line, before anything is loaded."""

from __future__ import annotations

import importlib.util

import pytest

from fourstage.arena.__main__ import main
from fourstage.errors import UserError


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["ladder=grpo", "runs=sft"], "ladder, runs: give one of them"),
        (["host=0.0.0.0"], "host=0.0.0.0: everybody who reaches this machine"),
        (["port=65536"], "port: must be between 0 and 65535, got 65536"),
        (["prot=1"], "prot: unknown key"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], line: str) -> None:
    with pytest.raises(UserError) as found:
        main(arguments)
    assert str(found.value).startswith(line) and "\n" not in str(found.value)


def test_without_gradio_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^arena needs the extra web: pip install .*'\.\[web\]'$"):
        main([])
