"""Whole ladders on sets of a stand-in hub. Slow."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.hub_sets import OTHER, SHARD, STORY, known_sets
from tests.stand_in_hub import ROOT, Hub, environment, parquet, said, serving


def small_public(n: int = 40) -> dict[str, dict[str, bytes]]:
    """The sets of data=public with short records. The chats and the stories ask some of gsm8k's
    test questions, which no stage may train on."""
    files = known_sets()

    def problem(i: int) -> dict[str, str]:
        return {
            "question": f"What is {i} more than {i}?",
            "answer": f"{i}+{i}={2 * i}\n#### {2 * i}",
        }

    def pair(i: int) -> dict[str, Any]:
        prompt = f"Say the number {i}"
        return {
            "prompt": prompt,
            "chosen": said(prompt, f"It is {i}."),
            "rejected": said(prompt, "No."),
        }

    stories = [{"text": f"{STORY} It had {i} toys and was glad. " * 3} for i in range(n)]
    stories += [{"text": f"Mom said: {problem(i)['question']}"} for i in range(n, n + 5)]
    chats = [{"messages": said(f"Say {i} please", f"It is {i}.")} for i in range(n)]
    chats += [{"messages": said(problem(i)["question"], str(2 * i))} for i in range(n, n + 5)]
    gsm8k, talk = files["openai/gsm8k"], files["HuggingFaceTB/smoltalk"]
    feedback, tales = (
        files["HuggingFaceH4/ultrafeedback_binarized"],
        files["roneneldan/TinyStories"],
    )
    gsm8k[f"main/train-{SHARD}"] = parquet([problem(i) for i in range(n)])
    gsm8k[f"main/test-{SHARD}"] = parquet([problem(i) for i in range(n, n + 10)])
    talk[f"data/all/train-{SHARD}"] = parquet(chats)
    talk[f"data/all/test-{SHARD}"] = parquet(
        [{"messages": said("Say hello to Tim", "Hello, Tim.")}]
    )
    feedback[f"data/train_prefs-{SHARD}"] = parquet([pair(i) for i in range(n)])
    feedback[f"data/test_prefs-{SHARD}"] = parquet([pair(i) for i in range(n, n + 10)])
    tales["data/train-00000-of-00002-2d5a.parquet"] = parquet(stories[: n // 2])
    tales["data/train-00001-of-00002-2d5a.parquet"] = parquet(stories[n // 2 :])
    tales["data/validation-00000-of-00001-869c.parquet"] = parquet([{"text": f"{OTHER} " * 20}] * 3)
    return files


def long_public() -> dict[str, dict[str, bytes]]:
    """The sets of data=public with records as long as the real ones: most don't fit into the limits
    of debug=fast."""
    files, n = small_public(), 200
    words = ("the", "a", "big", "red", "dog", "cat", "ran", "sat", "to", "of", "and", "was", "glad")

    def text(size: int, i: int) -> str:
        """About `size` characters, other ones for each i."""
        draw = random.Random(f"{size} {i}")
        return " ".join(draw.choices(words, k=size // 4)).capitalize() + "."

    def chat(i: int) -> dict[str, Any]:
        size = i % 50
        texts = (text(40 + 9 * size, i), text(60 + 60 * size, -i))
        return {"messages": said(*texts, *texts[: 2 * (i % 2)])}

    def pair(i: int) -> dict[str, Any]:
        size = i % 50
        prompt = text(50 + 40 * size, i)
        chosen, rejected = (said(prompt, text(100 + 50 * size, -i - side)) for side in (0, 1000))
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    def problem(i: int) -> dict[str, str]:
        question = f"Tim has {i} cats. {text(60 + 6 * (i % 50), i)} How many are {i} more?"
        return {"question": question, "answer": f"{text(250, i)}\n{i}+{i}={2 * i}\n#### {2 * i}"}

    for repo, train, held, make in (
        ("HuggingFaceTB/smoltalk", "data/all/train", "data/all/test", chat),
        ("HuggingFaceH4/ultrafeedback_binarized", "data/train_prefs", "data/test_prefs", pair),
        ("openai/gsm8k", "main/train", "main/test", problem),
    ):
        files[repo][f"{train}-{SHARD}"] = parquet([make(i) for i in range(n)])
        files[repo][f"{held}-{SHARD}"] = parquet([make(i) for i in range(n, n + 40)])
    tales = files["roneneldan/TinyStories"]
    stories = [{"text": f"{STORY} {text(900, i)}"} for i in range(2 * n)]
    tales["data/train-00000-of-00002-2d5a.parquet"] = parquet(stories[:n])
    tales["data/train-00001-of-00002-2d5a.parquet"] = parquet(stories[n:])
    return files


WORDS = ("stage=grpo", "model=moe_nano", "debug=fast", "logger=none", "trainer=cpu")


def train(hub: Hub, home: Path, *words: str, **changes: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train.py"), *WORDS, *words]
    environ = environment(hub, home, **changes)
    return subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_whole_ladder(tmp_path) -> None:
    """From stand-ins of the sets of data=public; what is held out is in no source; a second ladder
    makes no request, and neither does a plan."""
    hub = Hub()
    for repo, files in small_public().items():
        hub.add(repo, files)
    with serving(hub):
        out = f"outputs={tmp_path / 'outputs'}"
        words = (out, "data=public")
        planned = train(hub, tmp_path / "home", *words, "ancestors=require")
        assert "ancestors=require: pretrain, sft, reward, ppo must be trained" in planned.stderr
        assert hub.requests == []
        done = train(hub, tmp_path / "home", *words)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "%|" not in done.stderr
        assert hub.requests
        hub.requests.clear()
        other = train(hub, tmp_path / "home", *words, "seed=1")
        assert other.returncode == 0, other.stderr[-2000:]
        assert hub.requests == []
    records = {
        record["stage"]: record
        for path in (tmp_path / "outputs" / "runs").glob("*/run.json")
        if (record := json.loads(path.read_text()))["config"]["seed"] == 0
    }
    assert (
        list(map(records.__contains__, ("pretrain", "sft", "reward", "ppo", "grpo"))) == [True] * 5
    )
    assert records["pretrain"]["cost"]["data_paragraphs_dropped_with_a_heldout_prompt"] == 5
    assert records["sft"]["cost"]["data_dropped_from_train_as_heldout"] == 5
    assert "heldout" in records["grpo"]["data"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [("data=public", "tokenizer=bpe"), ("data=public",), ("experiment=tinystories_gpu",)]
)
def test_ladders_on_records_of_real_lengths(tmp_path, words) -> None:
    """Each limit loses records and leaves some."""
    hub, outputs = Hub(), tmp_path / "outputs"
    for repo, files in long_public().items():
        hub.add(repo, files)
    with serving(hub):
        done = train(hub, tmp_path / "home", *words, f"outputs={outputs}")
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads(path.read_text()) for path in (outputs / "runs").glob("*/run.json")]
    assert len(records) == 5
    cost = {record["stage"]: record["cost"] for record in records}
    assert cost["sft"]["data_train_rows"] >= 4 and cost["reward"]["data_train_rows"] >= 4
    assert cost["reward"]["data_train_dropped"] > 0
    if "data=public" not in words:
        (kept,) = (outputs / "data").glob("*/index.json")
        assert json.loads(kept.read_text())["vocab_size"] <= 4096
