"""Ladders with subword tokenizers: trained on the run's own text, and someone else's."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from fourstage import chat
from fourstage.errors import UserError
from fourstage.evaluation.__main__ import main as evaluate
from fourstage.ladder import LADDER
from fourstage.lineage.climb import climb
from fourstage.lineage.plan import make_plan
from fourstage.model.weights import load_policy
from fourstage.report import write_report
from fourstage.runs.store import RunStore
from fourstage.tokenizer import Tokenizer
from tests.fakes import QUICK, FakeTrain, config, ids
from tests.hub_tokenizers import CHATML, chatml, llama

CHINESE = "敏捷的棕色狐狸跳过懒狗。🦊🐶 It says: naïve café, 12 + 34 = 46.\n"


def chinese_files(folder: Path) -> list[str]:
    """A file for each source, in Chinese and with emoji."""
    rows = {
        "chat": [{"instruction": f"说 {i} 🙂", "output": f"是 {i}。🦊"} for i in range(40)],
        "preference": [
            {"prompt": f"说 {i} 🙂", "chosen": f"是 {i}。🦊", "rejected": "不。"} for i in range(40)
        ],
        "reasoning": [{"question": f"{i} 加 1 = ?", "answer": f"#### {i + 1}"} for i in range(40)],
    }
    folder.mkdir()
    for name, records in rows.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    text = "".join(f"{i}: {CHINESE}" for i in range(400))
    (folder / "corpus.txt").write_text(text, "utf-8")
    paths = [f"data.{name}.path={folder}/{name}.jsonl" for name in rows]
    return ["data=files", f"data.corpus.path={folder}/corpus.txt", *paths]


def climbed(outputs: Path, *words: str) -> Tokenizer:
    """The tokenizer of a ladder's last run, which all of its runs have."""
    words = (*QUICK, f"outputs={outputs}", *words)
    folder = climb(config(*words, "stage=grpo"))
    policy, tokenizer = load_policy(folder)
    assert policy.vocab_size == tokenizer.vocab_size
    folders = list((outputs / "runs").iterdir())
    assert len(folders) == len(LADDER)
    assert {Tokenizer.load(f).digest for f in folders} == {tokenizer.digest}
    assert (folder / "samples.jsonl").read_text("utf-8")
    write_report(outputs)
    rows = json.loads((outputs / "report" / "stages.json").read_text())["rows"]
    assert len(rows) == 1 + len(LADDER)
    before = (folder / "eval.json").read_bytes()
    (folder / "eval.json").unlink()
    evaluate([f"run={folder.name}", f"outputs={outputs}"])
    assert (folder / "eval.json").read_bytes() == before
    again = FakeTrain()
    climb(config(*words, "stage=grpo"), train=again)
    assert again.stages == []
    return tokenizer


def test_the_ladder_climbs_with_bpe(tmp_path, capsys):
    outputs = tmp_path / "outputs"
    tokenizer = climbed(outputs, "tokenizer=bpe", "tokenizer.vocab_size=500")
    assert tokenizer.vocab_size == 500 and tokenizer.unk_id is None
    said = capsys.readouterr().out
    assert said.count("training a tokenizer of 500 tokens on the corpus") == 1
    (kept,) = (outputs / "data" / "tokenizers").glob("*/tokenizer.json")
    assert Tokenizer.load(kept.parent).digest == tokenizer.digest
    chat.main(["run=sft", f"outputs={outputs}", "prompt=Hi", "max_new_tokens=9"])
    capsys.readouterr()

    # another pre-training has the same corpus, and so the same tokenizer
    words = [*QUICK, f"outputs={outputs}", "tokenizer=bpe", "tokenizer.vocab_size=500"]
    make_plan(config(*words, "seed=1"))
    assert "training a tokenizer" not in capsys.readouterr().out
    # a parent that is named brings its own
    sft = RunStore(outputs).find("sft")
    other = ["data.corpus.problems=7", f"stages.grpo.parent={sft.name}", "stage=grpo"]
    plan = make_plan(config(*words, *other))
    assert plan.vocab_size == 500 and "training" not in capsys.readouterr().out
    line = "sft-.* has another tokenizer: choose tokenizer=bpe tokenizer.vocab_size=500"
    with pytest.raises(UserError, match=line):
        make_plan(config(*words, *other, "tokenizer.vocab_size=501"))


def test_the_ladder_climbs_with_a_tokenizer_of_the_hub(tmp_path):
    folder = chatml(tmp_path / "hub")
    words = ["tokenizer=hf", f"tokenizer.path={folder}"]
    tokenizer = climbed(tmp_path / "outputs", *words)
    assert tokenizer.digest == Tokenizer.from_folder(folder).digest
    # its id is that of what is in the folder, wherever that is
    quick = [*QUICK, f"outputs={tmp_path}/outputs", "tokenizer=hf"]
    before = ids([*quick, f"tokenizer.path={folder}"])
    assert set(before.values()) <= {
        f.name.split("-")[1] for f in (tmp_path / "outputs" / "runs").iterdir()
    }
    folder = folder.rename(tmp_path / "moved")
    assert ids([*quick, f"tokenizer.path={folder}"]) == before
    sft = RunStore(tmp_path / "outputs").find("sft")
    parent = ["stage=grpo", f"stages.grpo.parent={sft.name}"]
    make_plan(config(*quick, f"tokenizer.path={folder}", *parent))
    (folder / "chat_template.jinja").write_text(CHATML.replace("user\\n", "human\\n"))
    assert not set(ids([*quick, f"tokenizer.path={folder}"]).values()) & set(before.values())
    with pytest.raises(UserError, match="sft-.* has another tokenizer"):
        make_plan(config(*quick, f"tokenizer.path={llama(tmp_path / 'llama')}", *parent))


def test_chinese_and_emoji(tmp_path, capsys):
    """Bits per byte fall, nothing is unknown, and answers are valid UTF-8."""
    outputs = tmp_path / "outputs"
    words = [*chinese_files(tmp_path / "files"), "tokenizer=bpe", "stages.pretrain.max_steps=60"]
    tokenizer = climbed(outputs, *words)
    runs = RunStore(outputs)
    with open(runs.find("pretrain") / "metrics.csv", newline="") as file:
        last = [row for row in csv.DictReader(file) if row["val/bits_per_byte"]][-1]
    per_byte, per_char = (float(last[f"val/bits_per_{what}"]) for what in ("byte", "char"))
    folder = runs.find("pretrain")
    before, after = (
        json.loads((folder / f"eval{suffix}.json").read_text())["metrics"]["bits_per_byte"]["value"]
        for suffix in ("_random", "")
    )
    assert after < 0.7 * before and per_byte == pytest.approx(after, rel=0.05)
    # a Chinese character has three bytes
    assert per_char / per_byte == pytest.approx(len(CHINESE.encode()) / len(CHINESE), rel=0.1)
    for text in (CHINESE, "def f(x):\n\treturn x ** 2  # ∀x∈ℝ", "\U0001f468\u200d\U0001f469"):
        token_ids = tokenizer.encode(text)
        assert tokenizer.decode(token_ids) == text
        assert tokenizer.bytes[token_ids].sum() == len(text.encode())
        assert tokenizer.characters[token_ids].sum() == len(text)
    assert np.array_equal(tokenizer.encode_array(CHINESE), tokenizer.encode(CHINESE))
    capsys.readouterr()
    chat.main(["run=sft", f"outputs={outputs}", "prompt=说 3 🙂", "max_new_tokens=40"])
    said = capsys.readouterr()
    assert "unknown to the tokenizer" not in said.err
    assert said.out.encode("utf-8")
