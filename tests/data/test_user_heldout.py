"""A user's held-out prompts are no training text of the built-in sources either."""

from __future__ import annotations

import json

import pytest

from fourstage import data
from tests.data.conftest import make

QUESTIONS = ("Can you tell me what a tokenizer is?", "I want to know about RoPE.")


@pytest.mark.parametrize("source", ["chat", "preference"])
def test_a_users_held_out_prompt_is_taken_from_the_statements(tmp_path, source: str) -> None:
    names = ("train", "test")
    for name in names:
        asked = QUESTIONS if name == "test" else [f"Say number {i} to me please" for i in range(9)]
        rows = [
            {"prompt": text, "chosen": "Yes.", "rejected": "No."}
            if source == "preference"
            else {"prompt": text, "response": "Yes."}
            for text in asked
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, test = (str(tmp_path / f"{name}.jsonl") for name in names)
    config = make(
        "embedded", corpus={"problems": 0}, **{source: {"path": train, "heldout_path": test}}
    )
    before = "\n".join(data.load_corpus(make("embedded", corpus={"problems": 0})).train)
    after = "\n".join(data.load_corpus(config).train)
    for question in QUESTIONS:
        assert question in before and question not in after
    assert len(after) > 0.9 * len(before)
