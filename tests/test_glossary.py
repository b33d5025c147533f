"""docs/glossary.md keeps a form that programs read too: one fact a line, each sentence alone."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

TEXT = (Path(__file__).parents[1] / "docs" / "glossary.md").read_text(encoding="utf-8")
LINE = re.compile(r"\*\*([^*]+)\*\*: ([A-Z][^*_`\[\]|<>#]*\.)")
HEAD, *GROUPS = TEXT.split("\n## ")
TERMS = {line: LINE.fullmatch(line) for group in GROUPS for line in group.splitlines()[1:] if line}


def repeated(words: list[str]) -> list[str]:
    return [word for word, n in Counter(words).items() if n > 1]


def test_a_heading_then_groups_of_lines() -> None:
    assert re.fullmatch(r"# Glossary\n\n[^\n*]+\n", HEAD)
    for group in GROUPS:
        assert re.fullmatch(r"[A-Z][^\n*]*\n\n(\*\*[^\n]+\n)+", group.rstrip("\n") + "\n"), group
    assert [line for line, match in TERMS.items() if match is None] == []
    assert TEXT.isascii() and "\t" not in TEXT and TEXT.endswith(".\n")


def test_there_are_many_and_none_is_said_twice() -> None:
    lines = [line for group in GROUPS for line in group.splitlines()[1:] if line]
    terms, sentences = zip(*(LINE.fullmatch(line).groups() for line in lines), strict=True)
    assert len(terms) >= 130 and "LLM" in terms
    assert repeated(list(terms)) == []
    assert repeated([sentence.lower() for sentence in sentences]) == []


def test_a_sentence_is_one_and_stands_alone() -> None:
    for match in TERMS.values():
        term, sentence = match.groups()
        assert 40 <= len(sentence) <= 110, (len(sentence), sentence)
        assert not re.search(r"[.!?] ", sentence.replace("Dr. GRPO", "")), sentence
        assert "  " not in sentence and term == term.strip()
        assert not re.match(r"(It|This|That|These|Those|They|He|She|Here|There)\b", sentence)
        # the sentence names what it explains
        words = re.findall(r"[a-z0-9@.-]+", re.sub(r"\(.*\)", "", term).lower())
        assert any(word.rstrip("s")[:6] in sentence.lower() for word in words), (term, sentence)
