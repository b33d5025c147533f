"""transformers takes an exported folder as its own: text, chat template, scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fourstage.exchange.checkpoint import load_checkpoint, read_checkpoint
from fourstage.exchange.export import USAGE, write_folder
from fourstage.model import ScalarModel
from fourstage.tokenizer import Tokenizer
from tests.exchange.exports import (
    SERVED,
    SHAPES,
    Export,
    asked,
    exported,
    greedy,
    network,
    prompts,
    questions,
    shown,
    ties,
    tokenizer,
)
from tests.hub_tokenizers import chatml, glm, llama

transformers = pytest.importorskip("transformers", reason="needs transformers (make setup-dev)")
pytestmark = pytest.mark.slow

LENGTH = 48
SYSTEM = {"role": "system", "content": "Be kind.\nAlways. "}
TURNS = [
    asked(" Hi  there\n"),
    {"role": "assistant", "content": "It is so."},
    asked("12 + 3 = ?"),
    {"role": "assistant", "content": "15"},
    asked("Is it?"),
]


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("shape", SERVED)
def test_greedy_answers(shape: str, kind: str, tmp_path: Path) -> None:
    """In one batch, padded at the left; each ends with <eot>, or after LENGTH tokens."""
    export = exported(shape, tmp_path / "it", kind)
    auto = transformers.AutoTokenizer.from_pretrained(export.folder)
    assert auto.model_max_length == export.model.config.max_seq_len
    model = transformers.AutoModelForCausalLM.from_pretrained(export.folder)
    rows = prompts(export.tokenizer, 48)
    batch = auto.pad({"input_ids": rows}, return_tensors="pt")
    answers = model.generate(**batch, max_new_tokens=LENGTH)[:, batch["input_ids"].shape[1] :]
    expected = greedy(export, rows, LENGTH)
    theirs = [ids[: len(own)] for ids, own in zip(answers.tolist(), expected, strict=True)]
    assert ties(export, rows, expected, theirs) <= 1
    # what follows an end is padding: generation stopped there
    rest = {i for ids, own in zip(answers.tolist(), theirs, strict=True) for i in ids[len(own) :]}
    assert rest <= {export.tokenizer.pad_id}


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_the_pipeline(kind: str, tmp_path: Path) -> None:
    export = exported("odd_shared", tmp_path / "it", kind)
    pipeline = transformers.pipeline("text-generation", model=str(export.folder))
    texts = questions(export.tokenizer, 24)
    answers = greedy(export, prompts(export.tokenizer, 24), LENGTH)
    # by default it samples at a temperature of 0.7
    how = {"do_sample": False, "max_new_tokens": LENGTH}
    said = pipeline([[asked(text)] for text in texts], **how)
    found = [answer[0]["generated_text"][-1]["content"] for answer in said]
    assert found == [shown(export.tokenizer, ids) for ids in answers]


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_the_chat_template(kind: str, tmp_path: Path) -> None:
    words = exported("moe_nano", tmp_path / "it", kind).tokenizer
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "it")
    for turns in (TURNS[:1], TURNS[:3], TURNS, [SYSTEM, *TURNS[:1]], [SYSTEM, *TURNS]):
        said = auto.apply_chat_template(turns, add_generation_prompt=True)
        ids = words.prompt(turns)
        assert said["input_ids"] == ids
        text = auto.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert text == words.decode(ids, keep_special=True)
        whole = [*turns, {"role": "assistant", "content": " Yes.\n"}]
        assert auto.apply_chat_template(whole)["input_ids"] == words.chat(whole)[0]
    text = "It 's n't so , is it ?  <b>\n\t'"
    ids = auto(text)["input_ids"]
    assert ids == words.encode(text) and auto.decode(ids) == text


@pytest.mark.parametrize("kind", [chatml, llama, glm])
def test_a_tokenizer_from_elsewhere(kind: Callable[[Path], Path], tmp_path: Path) -> None:
    """It pads, its answers end, and a second export of the folder is the first."""
    words = Tokenizer.from_folder(kind(tmp_path / "hub"))
    model = network(SHAPES["moe_nano"], words.vocab_size)
    write_folder(tmp_path / "it", model, words)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "it")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "it")
    assert (auto.pad_token_id, auto.eos_token_id) == (words.pad_id, words.eos_ids[-1])
    assert theirs.generation_config.eos_token_id in (words.eos_ids, words.eos_ids[0])
    rows = prompts(words, 24)
    batch = auto.pad({"input_ids": rows}, return_tensors="pt")
    answers = theirs.generate(**batch, max_new_tokens=LENGTH)[:, batch["input_ids"].shape[1] :]
    export = Export(tmp_path / "it", model, words)
    expected = greedy(export, rows, LENGTH)
    found = [ids[: len(own)] for ids, own in zip(answers.tolist(), expected, strict=True)]
    assert ties(export, rows, expected, found) <= 1
    back = read_checkpoint(tmp_path / "it", "it")
    again = load_checkpoint(tmp_path / "it", back.model, back.vocab_size)
    write_folder(tmp_path / "again", again, Tokenizer.from_folder(tmp_path / "it"))
    for path in (tmp_path / "it").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_the_example_of_the_card(tmp_path: Path, monkeypatch, capsys) -> None:
    export = exported("odd_shared", tmp_path / "it")
    monkeypatch.chdir(export.folder)
    exec(USAGE["policy"], {})
    rows = [export.tokenizer.prompt([asked("What is an LLM?")])]
    (ids,) = greedy(export, rows, 200)
    assert capsys.readouterr().out == shown(export.tokenizer, ids) + "\n"


def test_the_example_of_a_reward_model(tmp_path: Path, monkeypatch, capsys) -> None:
    words = tokenizer("char")
    model = ScalarModel(network(SHAPES["dense_tiny"], words.vocab_size)).eval()
    write_folder(tmp_path / "it", model, words)
    monkeypatch.chdir(tmp_path / "it")
    exec(USAGE["scalar"], {})
    turns = [asked("What is an LLM?"), {"role": "assistant", "content": "A large language model."}]
    ids = words.chat(turns)[0]
    with torch.no_grad():
        expected = model.last(torch.tensor([ids]), torch.tensor([len(ids)])).item()
    assert float(capsys.readouterr().out) == pytest.approx(expected, abs=1e-5)


def test_it_is_saved_again(tmp_path: Path) -> None:
    export = exported("odd_shared", tmp_path / "it")
    transformers.AutoModelForCausalLM.from_pretrained(export.folder).save_pretrained(
        tmp_path / "again"
    )
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("it", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("shape", ["dense_tiny", "llama"])
def test_scores_of_a_reward_model(shape: str, tmp_path: Path) -> None:
    """A dense one, in padded batches; those with experts have no class."""
    words = tokenizer("char")
    model = ScalarModel(network(SHAPES[shape], words.vocab_size)).eval()
    write_folder(tmp_path / "it", model, words)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "it")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "it")
    rows = [[*ids, *ids[3:20], words.eot_id] for ids in prompts(words, 48)]
    for at in range(0, 48, 12):
        some = rows[at : at + 12]
        left, right = (
            auto.pad({"input_ids": some}, padding_side=side, return_tensors="pt")
            for side in ("left", "right")
        )
        with torch.no_grad():
            found = theirs(**right).logits.squeeze(1)
            torch.testing.assert_close(theirs(**left).logits.squeeze(1), found)
            expected = model.last(right["input_ids"], torch.tensor([len(ids) for ids in some]))
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
