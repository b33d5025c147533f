"""The corpus source: the Python language reference or a user's text, and worked problems."""

from collections import Counter

from fourstage.data.config import DataConfig, cached
from fourstage.data.files import Paths, files_of, is_text, read_rows, read_text
from fourstage.data.heldout import check_sides, heldout_keys
from fourstage.data.keys import HeldOutKeys
from fourstage.data.knowledge import statements
from fourstage.data.reasoning import worked_problems
from fourstage.data.records import Corpus, Problem, Split, content_digest
from fourstage.data.schemas import document_from
from fourstage.data.split import is_heldout
from fourstage.data.userfiles import usable
from fourstage.errors import UserError

LONG = 2000  # characters: a file without blank lines is one paragraph


@cached("corpus", "chat", "preference", "reasoning", "knowledge")
def load_corpus(config: DataConfig) -> Corpus:
    """Documents for pretrain.

    A text is split by position: its last `corpus.heldout` is held out. Records are split by their
    hash. Train paragraphs that give away a held-out prompt are left out.

    Raises:
        UserError: no path under data=files, a bad file, or a text too short to be split.
    """
    corpus = config.corpus
    notes = Counter[str]()
    if corpus.path is None:
        if not config.embedded:
            raise UserError("stages.pretrain needs data.corpus.path=FILE (text to learn from)")
        train, heldout = by_position(language_reference(corpus.reference), corpus.heldout)
    elif corpus.heldout_path is not None:
        train, heldout = (
            _documents(path, config, notes) for path in (corpus.path, corpus.heldout_path)
        )
    elif is_text(corpus.path):
        train, heldout = by_position(_documents(corpus.path, config, notes), corpus.heldout)
    else:
        documents = _documents(corpus.path, config, notes)
        train = [d for d in documents if not is_heldout(d, corpus.heldout)]
        heldout = [d for d in documents if is_heldout(d, corpus.heldout)]
    said = ([d for d in side if d.strip()] for side in (train, heldout))
    check_sides("data.corpus", *said, notes)

    keys = heldout_keys(config)
    cleaned = [without_heldout(document, keys) for document in (*train, *statements(config))]
    notes["paragraphs_dropped_with_a_heldout_prompt"] = sum(n for _, n in cleaned)
    worked, heldout_worked = worked_problems(config, corpus.problems, corpus.heldout)
    train = [*(document for document, _ in cleaned), *map(render, worked)]
    heldout = [*heldout, *map(render, heldout_worked)]
    return Split(train, heldout, content_digest(*train, "", *heldout), dict(notes))


def language_reference(share: float = 1.0) -> list[str]:
    """A share of the topics of the Python language reference that every interpreter carries (PSF
    licence)."""
    from pydoc_data.topics import topics

    return [topics[name].strip() for name in sorted(topics) if is_heldout(name, share)]


def render(problem: Problem) -> str:
    """A problem as a document: the question, then the worked solution."""
    return f"{problem.question}\n{problem.worked}"


def by_position(documents: list[str], share: float) -> tuple[list[str], list[str]]:
    """Split off the last `share` of characters, inside a document if need be."""
    left = int(sum(map(len, documents)) * (1 - share))
    train, heldout = [], []
    for document in documents:
        head, tail = document[:left], document[left:]
        left -= len(head)
        if head:
            train.append(head)
        if tail:
            heldout.append(tail)
    return train, heldout


def without_heldout(document: str, keys: HeldOutKeys) -> tuple[str, int]:
    """The document without paragraphs that give away a held-out prompt, and how many those were.

    A paragraph longer than LONG loses only lines, if the prompt is within one line.
    """
    kept, dropped = [], 0
    for paragraph in document.split("\n\n"):
        if keys.in_text(paragraph):
            dropped += 1
            lines = paragraph.split("\n") if len(paragraph) > LONG else []
            paragraph = "\n".join(line for line in lines if not keys.in_text(line))
            if not paragraph or keys.in_text(paragraph):
                continue
        kept.append(paragraph)
    spread = keys.across(kept)
    kept = [paragraph for i, paragraph in enumerate(kept) if i not in spread]
    dropped += len(spread)
    return ("\n\n".join(kept), dropped) if dropped else (document, 0)


def _documents(path: Paths, config: DataConfig, notes: Counter[str]) -> list[str]:
    if is_text(path):
        return [read_text(file) for file in files_of(path)]
    return usable(read_rows(path, config.corpus.columns), document_from, notes)
