"""vLLM answers as our own decoder does, from an exported folder.

In the interpreter that FOURSTAGE_VLLM_PYTHON names, if this one has no vLLM: it needs other
versions of what fourstage needs, and so an environment of its own.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.exchange.exports import SERVED, exported, greedy, prompts, ties
from tests.exchange.servers import check_answers, environment, interpreter, server

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "vllm_greedy.py"
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GB
PROMPTS, LENGTH = 64, 48


@pytest.mark.parametrize(
    ("shape", "kind"), [*((shape, "char") for shape in SERVED), ("moe_nano", "bpe")]
)
def test_greedy_tokens(shape: str, kind: str, tmp_path: Path) -> None:
    python = interpreter("FOURSTAGE_VLLM_PYTHON", "vllm")
    export = exported(shape, tmp_path / "it", kind)
    asked, answers = tmp_path / "prompts.json", tmp_path / "answers.json"
    rows = prompts(export.tokenizer, PROMPTS)
    asked.write_text(json.dumps(rows))
    files = [str(path) for path in (SCRIPT, export.folder, asked, answers)]
    done = subprocess.run(
        [python, *files, str(LENGTH)], env=environment(**SMALL), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = greedy(export, rows, LENGTH), json.loads(answers.read_text())
    assert ties(export, rows, expected, found) <= 1


def test_the_server(tmp_path: Path) -> None:
    python = interpreter("FOURSTAGE_VLLM_PYTHON", "vllm")
    pytest.importorskip("openai", reason="needs openai")
    export = exported("odd_shared", tmp_path / "it")
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(export.folder)]
    command += ["--dtype", "float32", "--enforce-eager", "--served-model-name", "it"]
    with server(command, tmp_path / "log", **SMALL) as address:
        check_answers(address, "it", export)
