"""The tokenizer that a config names; one that is trained is trained once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fourstage.data import load_corpus, vocabulary
from fourstage.data.vocabulary import first, identity_of, tokenizer_of
from fourstage.errors import UserError
from fourstage.tokenizer import Tokenizer, TokenizerConfig
from tests.data.conftest import make
from tests.hub_tokenizers import chatml

BPE = TokenizerConfig(name="bpe", vocab_size=300)
TEXT = "The quick brown fox jumps over the lazy dog, 12 times a day.\n" * 60


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return make("files", corpus={"path": str(path)})


def test_each_kind(corpus, tmp_path):
    assert tokenizer_of(TokenizerConfig(), corpus, tmp_path).vocab_size == 103
    trained = tokenizer_of(BPE, corpus, tmp_path)
    expected = Tokenizer.bpe(load_corpus(corpus).train, 300)
    assert trained.digest == expected.digest and trained.vocab_size == 300
    folder = chatml(tmp_path / "hub")
    hub = TokenizerConfig(name="hf", path=str(folder))
    found = tokenizer_of(hub, corpus, tmp_path)
    assert found.digest == Tokenizer.from_folder(folder).digest
    assert identity_of(hub) == {"name": "hf", "digest": found.digest}
    assert identity_of(BPE) == {"name": "bpe", "vocab_size": 300}
    assert identity_of(TokenizerConfig()) == {"name": "char"}
    with pytest.raises(UserError, match="nowhere/tokenizer.json: no tokenizer there"):
        tokenizer_of(TokenizerConfig(name="hf", path=f"{tmp_path}/nowhere"), corpus, tmp_path)


def test_one_of_a_corpus_is_trained_once(corpus, tmp_path, monkeypatch, capsys):
    before = tokenizer_of(BPE, corpus, tmp_path)
    (folder,) = (tmp_path / "data" / "tokenizers").glob("*/")
    assert f"training a tokenizer of 300 tokens on the corpus: {folder}" in capsys.readouterr().out
    monkeypatch.setattr(Tokenizer, "bpe", None)
    assert tokenizer_of(BPE, corpus, tmp_path) is before
    with pytest.raises(TypeError):  # another size is another one
        tokenizer_of(TokenizerConfig(name="bpe", vocab_size=299), corpus, tmp_path)
    monkeypatch.undo()
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT + "More.\n")
    tokenizer_of(BPE, corpus, tmp_path)
    assert len(list((tmp_path / "data" / "tokenizers").glob("*/tokenizer.json"))) == 2


def test_a_damaged_one_is_trained_again(corpus, tmp_path):
    before = tokenizer_of(BPE, corpus, tmp_path).digest
    (folder,) = (tmp_path / "data" / "tokenizers").glob("*/")
    (folder / "tokenizer.json").write_text("{")
    assert tokenizer_of(BPE, corpus, tmp_path).digest == before


def test_one_of_a_file_that_changes_meanwhile_is_not_kept(corpus, tmp_path, monkeypatch):
    load_corpus(corpus)
    trained = Tokenizer.bpe

    def changing(*arguments):
        (tmp_path / "corpus.txt").write_text(TEXT + "More.\n")
        return trained(*arguments)

    monkeypatch.setattr(Tokenizer, "bpe", changing)
    with pytest.raises(UserError, match="a file has changed while it was read"):
        tokenizer_of(BPE, corpus, tmp_path)
    assert not list((tmp_path / "data" / "tokenizers").glob("*/tokenizer.json"))


TRAIN = """
import sys
from pathlib import Path
from tests.data.conftest import make
from tests.data.test_vocabulary import BPE
from fourstage.data.vocabulary import tokenizer_of
print(tokenizer_of(BPE, make("files", corpus={"path": sys.argv[1]}), Path(sys.argv[2])).digest)
"""


def test_two_jobs_train_one(corpus, tmp_path):
    words = [sys.executable, "-c", TRAIN, str(tmp_path / "corpus.txt"), str(tmp_path / "out")]
    jobs = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [job.communicate()[0].splitlines() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert len({lines[-1] for lines in said}) == 1
    assert sum("training a tokenizer" in line for lines in said for line in lines) == 1


def test_what_a_killed_process_left_is_no_tokenizer(corpus, tmp_path):
    expected = tokenizer_of(BPE, corpus, tmp_path / "a").digest
    (folder,) = (tmp_path / "a" / "data" / "tokenizers").glob("*/")
    partial = tmp_path / "b" / "data" / "tokenizers" / f"{folder.name}.partial"
    partial.mkdir(parents=True)
    (partial / "tokenizer.json").write_text('{"half"')
    assert tokenizer_of(BPE, corpus, tmp_path / "b").digest == expected
    names = {path.name for path in partial.parent.iterdir()}
    assert names == {folder.name, f"{folder.name}.lock"}
    assert os.listdir(folder) == os.listdir(partial.parent / folder.name)


def test_a_long_corpus_is_read_from_its_beginning(monkeypatch, corpus, tmp_path):
    documents = iter(["abc", "defg", "hij"])
    assert list(first(documents, 5)) == ["abc", "de"] and next(documents) == "hij"
    monkeypatch.setattr(vocabulary, "MOST", 40)
    expected = Tokenizer.bpe([TEXT[:40]], 300).digest
    assert tokenizer_of(BPE, corpus, tmp_path).digest == expected
