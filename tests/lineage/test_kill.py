"""Kill -9 in the middle of a stage, the same command again: the weights are those of a calm run."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fourstage.ladder import LADDER
from fourstage.runs.records import read_record
from fourstage.runs.store import RunStore

REPO = Path(__file__).parents[2]
STEPS = 8
SMALL = ["model=moe_nano", "debug=fast", "logger=none", "trainer=cpu"] + [
    f"stages.{stage}.{key}"
    for stage in LADDER
    for key in (f"max_steps={STEPS}", "checkpoint_every=3", "log_every=1")
]


def start(stage: str, outputs: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "train.py", f"stage={stage}", f"outputs={outputs}", *SMALL, *more]
    return subprocess.Popen(command, cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Path:
    """The outputs of a ladder that nobody disturbed."""
    outputs = tmp_path_factory.mktemp("calm") / "outputs"
    assert start("grpo", outputs).wait() == 0
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("stage", LADDER)
def test_a_killed_stage_resumes_to_the_same_bits(stage: str, calm: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    store = RunStore(calm)
    expected = store.find(stage)
    for ancestor in store.ancestors(expected).values():
        shutil.copytree(ancestor, outputs / "runs" / ancestor.name)

    process = start(stage, outputs)
    checkpoint = outputs / "runs" / expected.name / "checkpoints" / "last.ckpt"
    while not checkpoint.exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = outputs / "runs" / expected.name
    assert not (found / "model.safetensors").exists(), "too late: it was finished"

    assert start(stage, outputs).wait() == 0
    assert (found / "model.safetensors").read_bytes() == (
        expected / "model.safetensors"
    ).read_bytes()
    for name in ("eval.json", "eval_items.jsonl", "samples.jsonl"):
        if (expected / name).exists():
            assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    # no step is missing, none is there twice, and all but the clock's columns say the same
    assert rows_without_speed(found) == rows_without_speed(expected)
    costs = [read_record(place)["cost"] for place in (found, expected)]
    for name in ("steps", "tokens", "tokens_generated", "flops"):
        assert costs[0].get(name) == costs[1].get(name), name


@pytest.mark.slow
def test_kills_while_tokenizing_and_while_training_from_shards(tmp_path: Path) -> None:
    """A text that is long enough for several processes, and a tokenizer that is trained on it."""
    text = tmp_path / "text.txt"
    lines = (
        f"Line {i}: {i * i % 7919} naïve 狐狸 🦊 and words, words.\n\n" for i in range(450_000)
    )
    text.write_text("".join(lines), "utf-8")
    own = ["data=files", f"data.corpus.path={text}", "tokenizer=bpe", "data.corpus.problems=0"]
    calm, outputs = tmp_path / "calm", tmp_path / "outputs"
    assert start("pretrain", calm, *own).wait() == 0

    def killed_when(seen: Callable[[], bool]) -> None:
        process = start("pretrain", outputs, *own)
        while not seen():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()

    killed_when(lambda: any(f.stat().st_size for f in outputs.glob("data/.*.part/train-*.bin")))
    assert not list(outputs.glob("data/*/index.json"))
    killed_when(lambda: any(outputs.glob("runs/*/checkpoints/last.ckpt")))
    assert start("pretrain", outputs, *own).wait() == 0
    for place in ("data/*/*.bin", "data/tokenizers/*/tokenizer.json", "runs/*/model.safetensors"):
        found, expected = (
            {p.relative_to(o): p.read_bytes() for p in o.glob(place)} for o in (outputs, calm)
        )
        assert found == expected and expected, place
    (run,), (other,) = outputs.glob("runs/*"), calm.glob("runs/*")
    assert rows_without_speed(run) == rows_without_speed(other)
    assert not [*outputs.glob("data/.*.part*"), *outputs.glob("data/tokenizers/*.partial")]


def rows_without_speed(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in rows]
