"""`transformers serve` serves an exported folder to the openai client.

It needs fastapi and uvicorn (pip install -e ".[serve]"), in the interpreter that
FOURSTAGE_SERVE_PYTHON names, if that isn't this one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.exchange.exports import exported
from tests.exchange.servers import check_answers, interpreter, server


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["odd_shared", "llama"])
def test_transformers_serve(shape: str, tmp_path: Path) -> None:
    python = interpreter("FOURSTAGE_SERVE_PYTHON", "transformers", "fastapi", "uvicorn")
    pytest.importorskip("openai", reason="needs openai")
    export = exported(shape, tmp_path / "it")
    (tmp_path / "hub").mkdir()
    command = [python, "-m", "transformers.cli.transformers", "serve", str(export.folder)]
    command += ["--device", "cpu"]
    with server(command, tmp_path / "log", HF_HUB_CACHE=str(tmp_path / "hub")) as address:
        check_answers(address, str(export.folder), export)
