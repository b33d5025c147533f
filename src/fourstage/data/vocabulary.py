"""The tokenizer of a config: one that needs no data, one from a folder, or one that is trained.

A trained one is a function of the corpus's train side and of vocab_size. It is kept in
outputs/data/tokenizers/<digest>/, so that every run on this corpus has the same one and concurrent
jobs train it once.
"""

import shutil
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from fourstage.data.config import DataConfig
from fourstage.data.corpus import Corpus, load_corpus
from fourstage.data.identity import is_fetched
from fourstage.data.records import content_digest
from fourstage.errors import UserError
from fourstage.files import expanded, locked, swap_in
from fourstage.settings import hashed
from fourstage.tokenizer import TOKENIZERS, Tokenizer, TokenizerConfig

VERSION = 1  # of how a tokenizer is trained: another one is kept elsewhere
MOST = 100_000_000  # characters of the corpus, from its beginning, that one is trained on


def tokenizer_of(config: TokenizerConfig, data: DataConfig, outputs: Path) -> Tokenizer:
    """The tokenizer that a run's pre-training starts with. Raises UserError for a folder without a
    usable tokenizer, and for a corpus that can't be read where one has to be trained."""
    if config.name == "hf":
        assert config.path is not None
        return loaded(expanded(config.path))
    if config.name == "bpe":
        assert config.vocab_size is not None
        corpus = load_corpus(data)
        digest = content_digest("bpe", str(VERSION), str(config.vocab_size), corpus.digest)
        folder = outputs / "data" / "tokenizers" / digest
        return _kept(folder) or _train(corpus, config.vocab_size, folder)
    return TOKENIZERS[config.name]()


def waits(config: TokenizerConfig, data: DataConfig) -> bool:
    """Whether the tokenizer can't be made without a set on the hub."""
    return config.name == "bpe" and is_fetched(data, "corpus")


def identity_of(config: TokenizerConfig) -> dict[str, Any]:
    """What of the config counts for a run's id: of a folder what is in it, not where it is. (What
    a trained tokenizer depends on besides is the corpus, which counts already.)"""
    found = hashed(config)
    if config.name == "hf":
        assert config.path is not None
        found = {"name": "hf", "digest": loaded(expanded(config.path)).digest}
    return found


def loaded(folder: Path) -> Tokenizer:
    """The tokenizer in a folder, read once a process until its files change."""
    stats = [path.stat() for path in sorted(folder.glob("*.json*")) + sorted(folder.glob("*.ji*"))]
    return _loaded(folder, *((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats))


@lru_cache(maxsize=4)
def _loaded(folder: Path, *stats: tuple[int, ...]) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def _kept(folder: Path) -> Tokenizer | None:
    """The tokenizer that was trained before; None if there is none, or it is damaged."""
    try:
        return loaded(folder)
    except UserError:
        return None


def _train(corpus: Corpus, vocab_size: int, folder: Path) -> Tokenizer:
    """Train and save a tokenizer, unless another process is quicker."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(FileLock(folder.with_suffix(".lock")), f"the tokenizer in {folder}"):
        if (kept := _kept(folder)) is not None:
            return kept
        print(f"training a tokenizer of {vocab_size:,} tokens on the corpus: {folder}", flush=True)
        texts = (text for _, text in corpus.train.texts())
        tokenizer = Tokenizer.bpe(first(texts, MOST), vocab_size)
        corpus.check_unchanged()
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        tokenizer.save(partial)
        swap_in(partial, folder)
    return loaded(folder)


def first(documents: Iterable[str], most: int) -> Iterator[str]:
    """The first `most` characters of the documents."""
    for document in documents:
        yield document[:most]
        most -= len(document)
        if most <= 0:
            return
