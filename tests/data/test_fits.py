"""What a stage will not read is said before anything trains, or refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from fourstage.errors import UserError
from fourstage.stages.prepare import check_records
from fourstage.tokenizer import Tokenizer
from tests.data.conftest import make

TOKENIZER = Tokenizer.char()
OFF = {"problems": 0}


@pytest.fixture
def said(tmp_path):
    """The warnings of a stage whose file has these records."""

    def check(source: str, stage: str, rows, max_seq_len: int = 512, **settings) -> list[str]:
        path = tmp_path / (f"{source}.txt" if isinstance(rows, str) else f"{source}.jsonl")
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text)
        config = make("files", **{source: {"path": str(path)}})
        values = {"max_new_tokens": 8, "block_size": 8, **settings}
        return check_records(config, stage, SimpleNamespace(**values), TOKENIZER, max_seq_len)

    return check


def chats(lengths: list[int]) -> list[dict[str, str]]:
    return [{"instruction": f"Say {i}.", "output": "a" * n} for i, n in enumerate(lengths)]


def test_a_limit_that_loses_a_tenth_says_what_another_would_keep(said):
    lengths = [10] * 80 + [100] * 19 + [400]
    assert said("chat", "sft", chats(lengths), max_tokens=128) == []
    (line,) = said("chat", "sft", chats(lengths), max_tokens=32)
    kept = said("chat", "sft", chats([10] * 100), max_tokens=32)
    assert kept == []
    head, tail = line.split(": ", 1)
    assert head.startswith("stages.sft.max_tokens=32 leaves out ") and head.endswith(" records")
    lost, total = map(int, head.removesuffix(" records").split("leaves out ")[1].split(" of "))
    assert 15 <= lost <= 20 and 85 <= total <= 95, "of the train side"
    assert tail.startswith(("128 would keep", "256 would keep", "512 would keep"))


def test_a_limit_that_no_other_value_would_mend(said):
    (line,) = said("chat", "sft", chats([10] * 80 + [400] * 20), 64, max_tokens=64)
    assert line.endswith("records: they are too long for model.max_seq_len as well")


def test_no_record_left(said):
    with pytest.raises(UserError, match="no train record fits into stages.sft.max_tokens=9"):
        said("chat", "sft", chats([100] * 50), max_tokens=9)


def test_pairs_that_say_the_same(said):
    quotes = [
        {"prompt": f"Name {i}.", "chosen": f"It\u2019s {i}.", "rejected": f"It's {i}."}
        for i in range(60)
    ]
    with pytest.raises(UserError, match="two answers of each train pair are the same to the token"):
        said("preference", "reward", quotes, max_tokens=99)
    real = [{"prompt": f"Say {i}.", "chosen": "yes", "rejected": "no"} for i in range(100)]
    train, _ = said("preference", "reward", quotes + real, max_tokens=99)
    assert "train pairs are left out: their two answers are the same to the tokenizer" in train
    assert said("preference", "reward", real, max_tokens=99) == []


def test_a_task_that_vanishes_is_named():
    config = make(
        "embedded",
        reasoning={"only": ["gcd", "mini_sudoku", "countdown"], "size": 60, "heldout_size": 12},
    )
    settings = SimpleNamespace(max_prompt_tokens=96, max_new_tokens=8)
    message = (
        "stages.grpo.max_prompt_tokens=96: no problem of .*countdown.* fits: raise it \\(to \\d+"
    )
    with pytest.raises(UserError, match=message):
        check_records(config, "grpo", settings, TOKENIZER, 2048)


def test_losses_are_counted_by_task():
    tasks = {"gcd": {}, "word_sorting": {"min_words": 3, "max_words": 12}}
    config = make("embedded", reasoning={"only": tasks, "size": 200, "heldout_size": 20})
    settings = SimpleNamespace(max_prompt_tokens=340, max_new_tokens=8)
    (line,) = check_records(config, "grpo", settings, TOKENIZER, 2048)
    assert "stages.grpo.max_prompt_tokens=340 leaves out" in line and "680 would keep 200" in line
    assert "(kept: " in line and "gcd 100 of 100" in line and "word_sorting " in line


def test_unknown_characters_are_said_and_then_refused(said):
    english = "The quick brown fox jumps over the lazy dog. " * 20
    for unknown, loud in ((5, False), (20, True), (150, True)):
        lines = said("corpus", "pretrain", english + "\u4f60" * unknown)
        assert (lines != []) == loud, unknown
        if loud:
            assert "% of the characters (most often \u4f60): the model sees them all" in lines[0]
    with pytest.raises(UserError, match="doesn't know .* transliterate the text, or choose other"):
        said("corpus", "pretrain", english + "\u4f60" * 400)
    rows = [{"prompt": f"\u4f60\u597d {i}", "response": "\u4f60"} for i in range(40)]
    with pytest.raises(UserError, match="data.chat: the tokenizer doesn't know"):
        said("chat", "sft", rows, max_tokens=64)
    rows = [{"question": f"\u4f60\u597d {i}", "answer": "1"} for i in range(40)]
    with pytest.raises(UserError, match="data.reasoning: the tokenizer doesn't know"):
        said("reasoning", "grpo", rows, max_prompt_tokens=64)


def test_a_text_of_less_than_one_block_is_refused(said):
    text = "The quick brown fox jumps over the lazy dog."
    with pytest.raises(UserError, match="at most 40 tokens to train on are less than one block"):
        said("corpus", "pretrain", text, block_size=64)


def test_what_was_unusable_is_said_where_it_is_much(said):
    rows = chats([10] * 60) + [{"instruction": f"x{i}", "output": ""} for i in range(20)]
    assert said("chat", "sft", rows, max_tokens=64) == [
        "data.chat: unusable empty text: 20 of 80 records"
    ]
    assert said("chat", "sft", rows[:63], max_tokens=64) == []


def test_a_task_without_worked_solutions_is_named():
    tasks = {"gcd": {}, "propositional_logic": {}}
    config = make(
        "embedded",
        reasoning={"only": tasks, "size": 40, "heldout_size": 10},
        chat={"demonstrations": 10},
        corpus={"problems": 10},
    )
    for stage, where in (("sft", "data.chat.demonstrations"), ("pretrain", "data.corpus.problems")):
        lines = check_records(
            config, stage, SimpleNamespace(max_tokens=512, block_size=64), TOKENIZER, 512
        )
        assert [line for line in lines if line.startswith(f"{where}: propositional_logic has no")]
    config = make("embedded", corpus={"problems": 0}, chat={"demonstrations": 0})
    assert check_records(config, "pretrain", SimpleNamespace(block_size=64), TOKENIZER, 512) == []
