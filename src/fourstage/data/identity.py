"""Which data sets on the hub are, without a download: by name, commit and settings.

What a source on the hub holds out is not known while a command is planned. So where one is used,
no source is known by its content after cleaning: each is known by what it is made from.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fourstage.data.config import DataConfig, SourceConfig, cached
from fourstage.data.files import files_of
from fourstage.data.hub import HubSplit, pinned
from fourstage.data.knowledge import split_questions, statements
from fourstage.data.problems import split_problems
from fourstage.data.records import Split, content_digest, prompt_text
from fourstage.data.reference import language_reference
from fourstage.data.split import short_hash

HELD_OUT = (
    "chat",
    "preference",
    "reasoning",
)  # their held-out prompts are taken out of all sources
PATHS = ("path", "heldout_path", "revision", "subset", "split", "heldout_split")


def is_fetched(config: DataConfig, source: str) -> bool:
    """Whether a source can't be read without a set on the hub: it is one, or one decides what is
    taken out of it."""
    sources: list[SourceConfig] = [getattr(config, name) for name in {source, *HELD_OUT}]
    return any(one.on_hub(heldout=False) for one in sources)


def made_from(config: DataConfig, source: str) -> str:
    """12 hexadecimal digits of what a source is made from. Raises UserError if it isn't given."""
    config.check_given(source)
    names = [source]
    if source == "preference" and config.has_hidden_rule:  # sampled for the chats' prompts
        names.append("chat")
    takes = {"corpus": config.corpus.problems, "chat": config.chat.demonstrations}
    if takes.get(source):
        names.append("reasoning")
    return _digest(config, names)


def held_out(config: DataConfig) -> str | None:
    """12 hexadecimal digits of what the held-out prompts are made from; None if the plan reads
    them, as no set on the hub holds any."""
    if not is_fetched(config, "chat"):
        return None
    return _digest(config, HELD_OUT)


def commits(config: DataConfig, source: str) -> dict[str, str | None]:
    """hf:OWNER/NAME -> the commit at which a source is read."""
    return {split.name: split.revision for split in _splits(config, source)}


def _splits(config: DataConfig, name: str) -> list[HubSplit]:
    return [pinned(split, config.root) for split in getattr(config, name).splits()]


def _digest(config: DataConfig, names: Iterable[str]) -> str:
    found = [
        {**PARTS[name](config), "hub": [asdict(split) for split in _splits(config, name)]}
        for name in names
    ]
    parts = {"heldout": config.heldout, "parts": found}
    return short_hash(json.dumps(parts, sort_keys=True, separators=(",", ":")))


def _part(config: DataConfig, name: str) -> dict[str, Any]:
    """The contents of a source's files, and its settings; null ones are left out, so that a setting
    can be added."""
    source: SourceConfig = getattr(config, name)
    settings = {k: v for k, v in asdict(source).items() if k not in PATHS and v is not None}
    contents = [_file_digest(file) for path in source.local_paths for file in files_of(path)]
    if source.path is None or name == "corpus":
        contents.append(_built_in(config, name))
    return {"name": name, "settings": settings, "contents": contents}


def _built_in(config: DataConfig, name: str) -> str:
    """The digest of what a source has besides its files."""
    if name == "corpus":
        is_used = config.embedded and config.corpus.path is None
        texts = language_reference(config.corpus.reference) if is_used else []
        return content_digest(*texts, *statements(config))
    if name == "chat":
        chats = split_questions(config) if config.embedded else Split([], [])
        return content_digest(*(prompt_text(c.messages) for c in chats.train + chats.heldout))
    problems = split_problems(config) if name == "reasoning" else Split([], [])
    texts = (f"{p.question}\x1f{p.worked}" for p in problems.train + problems.heldout)
    return content_digest(*texts)


def _file_digest(file: str) -> str:
    with Path(file).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


PARTS = {
    name: cached(name, "knowledge")(partial(_part, name=name)) for name in ("corpus", *HELD_OUT)
}
