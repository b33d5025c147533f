"""The corpus source: the Python language reference or a user's text, and worked problems.

Documents are streams of pieces, read anew for each pass, so that memory doesn't grow with them.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fourstage.data.config import DataConfig, cached
from fourstage.data.files import PIECE, cut, files_of, is_text, text_pieces
from fourstage.data.heldout import check_sides, heldout_keys
from fourstage.data.identity import held_out, is_fetched, made_from
from fourstage.data.keys import HeldOutKeys
from fourstage.data.knowledge import statements
from fourstage.data.reasoning import worked_problems
from fourstage.data.records import Problem, content_digest
from fourstage.data.reference import language_reference
from fourstage.data.schemas import document_from
from fourstage.data.split import is_heldout, short_hash
from fourstage.data.userfiles import rows_of, usable
from fourstage.data.workers import mapped
from fourstage.errors import UserError
from fourstage.files import read_json, user_cache, write_json
from fourstage.tokenizer import Tokenizer

LONG = 2000  # characters: a file without blank lines is one paragraph
CONTEXT = 20_000  # characters around a piece in which a held-out prompt may begin or end
REMEMBER = 2**24  # bytes of files from which on their scan is kept for the next start
MOST_OF_A_TOKEN = 8  # characters, in the mean over a text
SCAN = 1  # version of what a scan finds
READ = ("corpus", "chat", "preference", "reasoning", "knowledge")  # what a corpus is made from


@dataclass(frozen=True)
class Piece:
    """A part of a document, whose pieces, joined, are its text."""

    text: str
    begins: bool  # its document
    before: str = ""  # what stands around it in the document
    after: str = ""
    searched: bool = False  # for held-out prompts


@dataclass(frozen=True)
class Scan:
    """What one pass over a corpus finds; by side documents, characters, and these in UTF-8."""

    digest: str
    total: int  # characters of the source, before it is split
    documents: dict[str, int]
    characters: dict[str, int]
    bytes: dict[str, int]
    notes: dict[str, int]  # what was left out, by reason


@dataclass(frozen=True)
class Documents:
    """One side of a corpus: an iterable of texts, of known length."""

    config: DataConfig
    side: str  # "train" | "heldout"
    scan: Scan

    def __len__(self) -> int:
        return self.scan.documents[self.side]

    @property
    def characters(self) -> int:
        return self.scan.characters[self.side]

    @property
    def bytes(self) -> int:
        return self.scan.bytes[self.side]

    def __iter__(self) -> Iterator[str]:
        """Whole documents, for corpora that fit into memory."""
        return whole_documents(Piece(text, begins) for begins, text in self.texts())

    def texts(self) -> Iterator[tuple[bool, str]]:
        """The documents in pieces: whether one begins, and text without held-out prompts."""
        for found in mapped(cleaner, (heldout_keys(self.config),), self._batches()):
            yield from ((begins, text) for begins, text, _ in found)

    def encoded(self, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
        """All tokens, uint32, in parts of about PIECE characters; bos_id begins a document."""
        return mapped(encoder, (heldout_keys(self.config), tokenizer), self._batches())

    def _batches(self) -> Iterator[list[Piece]]:
        return batched(_pieces(self.config, self.side, self.scan.total, Counter()))


@dataclass(frozen=True)
class Corpus:
    """Documents on two sides. The digest changes with any of them, and with max_tokens."""

    train: Documents
    heldout: Documents
    digest: str
    notes: dict[str, int]
    seen: tuple[Any, ...]  # the sizes and times of the files when they were read

    @property
    def text(self) -> str:
        """What it is, in words."""
        config = self.train.config
        return str(config.corpus.path or config.name)

    def check_unchanged(self) -> None:
        """Raise UserError if a file has changed since: what was made of it since is not of the
        digest, and mustn't be kept under its name."""
        if self.train.config.fingerprint(*READ) != self.seen:
            raise UserError(
                "data: a file has changed while it was read: wait until it is complete, and run "
                "the same command again"
            )


@cached(*READ)
def load_corpus(config: DataConfig) -> Corpus:
    """Documents for pretrain.

    A text is split by position: its last `corpus.heldout` is held out, at most `max_heldout`
    characters. Records are split by their hash. Train paragraphs that give away a held-out prompt
    are left out.

    Raises:
        UserError: no path under data=files, a bad file, or a text too short to be split.
    """
    config.check_given("corpus")
    seen = config.fingerprint(*READ)
    scan = remembered_scan(config)
    train, heldout = (Documents(config, side, scan) for side in ("train", "heldout"))
    most = config.corpus.max_tokens
    digest = scan.digest if most is None else short_hash(f"{scan.digest} {most}")
    return Corpus(train, heldout, digest, scan.notes, seen)


# --- one pass over everything


def remembered_scan(config: DataConfig) -> Scan:
    """The scan of a corpus; of large files that haven't changed since, and of sets on the hub, as
    it was found before."""
    files = [Path(f).resolve() for path in config.corpus.local_paths for f in files_of(path)]
    if is_fetched(config, "corpus"):
        content = f"{made_from(config, 'corpus')} {held_out(config)}"
    elif sum(file.stat().st_size for file in files) < REMEMBER:
        return scan_corpus(config)
    else:
        keys = heldout_keys(config)
        searched = [*sorted(keys.prompts), *sorted(keys.problems)]
        added = [text for side in ("train", "heldout") for text in _added(config, side)]
        content = content_digest(*searched, "", *statements(config), "", *added)
    key = repr((SCAN, config.fingerprint("corpus"), [str(file) for file in files], content))
    kept = user_cache() / "scans" / f"{short_hash(key, 32)}.json"
    try:
        return Scan(**read_json(kept))
    except (OSError, ValueError, TypeError):
        scan = scan_corpus(config)
    with suppress(OSError):  # no cache folder: it is scanned again the next time
        write_json(kept, asdict(scan))
    return scan


def scan_corpus(config: DataConfig) -> Scan:
    """Read both sides once. Raises UserError if one has nothing on it."""
    digest, is_first = hashlib.sha256(), True
    documents, characters, sizes, notes = (Counter[str]() for _ in range(4))
    sources: dict[str, int] = {}
    dropped, total, keys = 0, source_characters(config), heldout_keys(config)
    for side in ("train", "heldout"):
        found = Counter[str]()
        batches = batched(_pieces(config, side, total, found))
        for begins, text, lost in chain.from_iterable(mapped(cleaner, (keys,), batches)):
            if begins:
                documents[side] += 1
                digest.update(b"" if is_first else b"\x1d")
                is_first = False
            content = text.encode("utf-8", "surrogatepass")
            digest.update(content)
            sizes[side] += len(content)
            characters[side] += len(text)
            dropped += lost
        sources[side] = found.pop("documents", 0)
        if side == "train" or config.corpus.has_heldout:  # else the same rows again
            notes += found
        if side == "train":
            digest.update(b"\x1d")  # an empty text stands between the sides
    check_sides("data.corpus", range(sources["train"]), range(sources["heldout"]), notes)
    notes["paragraphs_dropped_with_a_heldout_prompt"] = dropped
    counts = (dict(found) for found in (documents, characters, sizes, notes))
    return Scan(digest.hexdigest()[:12], total, *counts)


def source_characters(config: DataConfig) -> int:
    """Of all documents before they are split; 0 if they needn't be."""
    if config.corpus.has_heldout:
        return 0
    return sum(len(piece.text) for piece in _whole(config, Counter()))


def batched(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces in lists of about PIECE characters."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# --- the pieces of a side


def _pieces(config: DataConfig, side: str, total: int, notes: Counter[str]) -> Iterator[Piece]:
    """Everything on one side. total: see Scan. Notes count records that were left out, and the
    source's own "documents"."""
    for piece in with_context(without_blank(_source(config, side, total, notes))):
        notes["documents"] += piece.begins
        yield replace(piece, searched=side == "train")
    if side == "train":
        yield from (Piece(text, True, searched=True) for text in statements(config))
    yield from (Piece(text, True) for text in _added(config, side))


def _added(config: DataConfig, side: str) -> list[str]:
    """Worked problems as documents."""
    sides = worked_problems(config, config.corpus.problems, config.corpus.heldout)
    return [render(problem) for problem in sides[side == "heldout"]]


def _source(config: DataConfig, side: str, total: int, notes: Counter[str]) -> Iterator[Piece]:
    """One side of the user's files, of a set on the hub, or of the language reference."""
    corpus, is_train = config.corpus, side == "train"
    if corpus.has_heldout:
        whole = _whole(config, notes, heldout=not is_train)
        yield from whole if is_train else between(whole, 0, corpus.max_heldout)
        return
    share = corpus.heldout
    if corpus.max_heldout is not None:
        share = min(share, corpus.max_heldout / max(1, total))
    if _is_text(config):
        left = int(total * (1 - share))
        yield from between(_whole(config, notes), *((0, left) if is_train else (left, None)))
        return
    for document in whole_documents(_whole(config, notes)):
        if is_heldout(document, share) != is_train:
            yield from _cut(document)


def _whole(config: DataConfig, notes: Counter[str], heldout: bool = False) -> Iterator[Piece]:
    """The source before it is split, or its given held-out side. Only as much is read as
    max_tokens can need."""
    corpus = config.corpus
    most = None
    if corpus.max_tokens is not None and not heldout:
        most = MOST_OF_A_TOKEN * corpus.max_tokens + (corpus.max_heldout or 0)
    return between(_read(config, notes, heldout), 0, most)


def _is_text(config: DataConfig, heldout: bool = False) -> bool:
    """Whether the source is text without records."""
    corpus = config.corpus
    path = corpus.heldout_path if heldout else corpus.path
    return corpus.on_hub(heldout) is None and (path is None or is_text(path))


def _read(config: DataConfig, notes: Counter[str], heldout: bool) -> Iterator[Piece]:
    """The pieces of text files, each of which is a document, of records, or of the reference."""
    corpus = config.corpus
    path = corpus.heldout_path if heldout else corpus.path
    if not _is_text(config, heldout):
        rows = rows_of(config, "corpus", heldout)
        for document in usable(rows, document_from, notes, corpus.max_records):
            yield from _cut(document)
    elif path is None:
        yield from (Piece(text, True) for text in language_reference(corpus.reference))
    else:
        for file in files_of(path):
            yield from _cut(text_pieces(file))


def whole_documents(pieces: Iterable[Piece]) -> Iterator[str]:
    """The documents that the pieces are of."""
    parts: list[str] = []
    for piece in pieces:
        if piece.begins and parts:
            yield "".join(parts)
            parts = []
        parts.append(piece.text)
    if parts:
        yield "".join(parts)


def _cut(document: str | Iterable[str]) -> Iterator[Piece]:
    parts = [document] if isinstance(document, str) else document
    return (Piece(text, i == 0) for i, text in enumerate(cut(parts)))


def between(pieces: Iterable[Piece], start: int, end: int | None) -> Iterator[Piece]:
    """Characters `start` to `end` of all pieces in a row; a document cut in two is two."""
    at, is_begun = 0, False
    for piece in pieces:
        is_begun = is_begun and not piece.begins
        text = piece.text[max(0, start - at) : None if end is None else max(0, end - at)]
        at += len(piece.text)
        if text:
            yield Piece(text, begins=not is_begun)
            is_begun = True
        if end is not None and at >= end:
            return


def without_blank(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces without documents that hold only white space."""
    blank = ""  # the beginning of a document of which nothing else was seen yet
    is_begun = False
    for piece in pieces:
        if piece.begins:
            blank, is_begun = "", False
        if not is_begun and not piece.text.strip():
            blank += piece.text
            continue
        yield Piece(blank + piece.text, begins=not is_begun)
        blank, is_begun = "", True


def with_context(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces, with what stands around them in their document."""
    last: Piece | None = None
    for piece in pieces:
        if last is not None:
            goes_on = not piece.begins
            yield replace(last, after=piece.text[:CONTEXT]) if goes_on else last
            piece = replace(piece, before=last.text[-CONTEXT:]) if goes_on else piece
        last = piece
    if last is not None:
        yield last


def render(problem: Problem) -> str:
    """A problem as a document: the question, then the worked solution."""
    return f"{problem.question}\n{problem.worked}"


# --- held-out prompts


def cleaner(keys: HeldOutKeys) -> Callable[[list[Piece]], list[tuple[bool, str, int]]]:
    """Of each piece whether it begins a document, its text without held-out prompts, and how many
    paragraphs went."""
    has_none = not (keys.problems or keys.prompts)

    def clean(piece: Piece) -> tuple[bool, str, int]:
        if has_none or not piece.searched:
            return piece.begins, piece.text, 0
        return piece.begins, *without_heldout(piece.text, keys, piece.before, piece.after)

    return lambda pieces: [clean(piece) for piece in pieces]


def encoder(keys: HeldOutKeys, tokenizer: Tokenizer) -> Callable[[list[Piece]], np.ndarray]:
    """The tokens of the pieces' texts without held-out prompts, uint32."""
    clean = cleaner(keys)

    def encode(pieces: list[Piece]) -> np.ndarray:
        parts = []
        for begins, text, _ in clean(pieces):
            if begins:
                parts.append(np.array([tokenizer.bos_id], np.uint32))
            parts.append(tokenizer.encode_array(text))
        return np.concatenate(parts)

    return encode


def without_heldout(
    text: str, keys: HeldOutKeys, before: str = "", after: str = ""
) -> tuple[str, int]:
    """The text without paragraphs that give away a held-out prompt, and how many those were.

    A paragraph longer than LONG loses only lines, if the prompt is within one line. before, after:
    what stands around the text, where a prompt may begin or end.
    """
    kept, dropped = [], 0
    for paragraph in text.split("\n\n"):
        if keys.in_text(paragraph):
            dropped += 1
            lines = paragraph.split("\n") if len(paragraph) > LONG else []
            paragraph = "\n".join(line for line in lines if not keys.in_text(line))
            if not paragraph or keys.in_text(paragraph):
                continue
        kept.append(paragraph)
    first = before.split("\n\n") if before else []
    spread = keys.across([*first, *kept, *(after.split("\n\n") if after else [])])
    rest = [paragraph for i, paragraph in enumerate(kept, start=len(first)) if i not in spread]
    dropped += len(kept) - len(rest)
    return ("\n\n".join(rest), dropped) if dropped else (text, 0)
