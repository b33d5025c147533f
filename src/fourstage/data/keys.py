"""How texts are searched for held-out prompts.

A text gives away a held-out prompt if it is one, or contains one word for word: neither "Solve
this: " in front nor case, spacing or punctuation hides it. A prompt of fewer words and signs than
LEAST counts only as a whole message of the user, as a held-out "Hello" would forbid half of all
texts. Problems of reasoning-gym are also found by their expression, with its operands in any order.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from fourstage.data.records import Conversation, Message, Pair, Problem
from fourstage.data.split import expressions, normalise, whole_expressions
from fourstage.data.verify import FROM_FILE
from fourstage.tokenizer import LOOK_ALIKES

LEAST = 5  # words and signs of a chat prompt that is searched for inside texts
LEAST_PROBLEM = 3  # of a problem's question, which is rarely said by chance
NUMBER = re.compile(r"\d+")
WORD = re.compile(r"[^\W_]+|[^\w\s*`]")  # not the marks of bold and italics
UNSEEN = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad]|^[ \t]*(?:>[ \t]?)+", re.MULTILINE)
NUMBERED = re.compile(r"^\s*\d{1,3}[.)]\s+")
ALIKE = {**LOOK_ALIKES, "\u00ab": '"', "\u00bb": '"', "\u2026": "..."}
ODD = re.compile(f"[{''.join(ALIKE)}]")  # translating every character takes ten times as long


@dataclass(frozen=True)
class HeldOutKeys:
    """Held-out prompts in the forms in which texts are searched for them."""

    problems: frozenset[str] = frozenset()  # normalised questions and expressions
    prompts: frozenset[str] = frozenset()  # normalised prompts of chats and pairs
    longest: int = 0  # operands of an expression among the problems
    # the first words of a phrase -> the phrases that begin so
    phrases: dict[tuple[str, ...], list[tuple[str, ...]]] = field(default_factory=dict)

    def hold(self, prompt: str) -> bool:
        key = plain(prompt)
        return key in self.prompts or key in self.problems

    def in_text(self, text: str) -> bool:
        """Whether a text is or contains a held-out problem, or contains a held-out prompt."""
        if self.problems and plain(text) in self.problems:
            return True
        if self.longest and not self.problems.isdisjoint(expressions(text, self.longest)):
            return True
        return bool(self.phrases) and any(True for _ in self._phrases_in(words(text)))

    def in_messages(self, messages: Iterable[Message]) -> bool:
        """Whether any message does, or a user's message is a held-out prompt."""
        return any(
            self.in_text(m["content"])
            or (m["role"] == "user" and plain(m["content"]) in self.prompts)
            for m in messages
        )

    def _phrases_in(self, text: tuple[str, ...]) -> Iterator[tuple[int, int]]:
        """The first and last position of each held-out phrase."""
        first_words = self._first_words
        for at in (i for i, word in enumerate(text) if word in first_words):
            for phrase in self.phrases.get(text[at : at + LEAST_PROBLEM], ()):
                if text[at : at + len(phrase)] == phrase:
                    yield at, at + len(phrase) - 1

    @cached_property
    def _first_words(self) -> frozenset[str]:
        return frozenset(beginning[0] for beginning in self.phrases)

    def across(self, paragraphs: list[str]) -> set[int]:
        """The indices of paragraphs that share a held-out prompt with a blank line in it."""
        if not self.phrases or len(paragraphs) < 2:
            return set()
        said = [(i, word) for i, text in enumerate(paragraphs) for word in _words(text)]
        spread: set[int] = set()
        for first, last in self._phrases_in(tuple(word for _, word in said)):
            if said[first][0] != said[last][0]:
                spread.update(range(said[first][0], said[last][0] + 1))
        return spread


def plain(text: str) -> str:
    """The key of a prompt; characters that the tokenizer doesn't tell apart are equal."""
    return normalise(_folded(text))


def words(text: str) -> tuple[str, ...]:
    """Words and signs in lower case, without a list's number and the signs at both ends."""
    found = _words(NUMBERED.sub("", text))
    while found and not found[-1].isalnum():
        found.pop()
    first = next((i for i, word in enumerate(found) if word.isalnum()), 0)
    return tuple(found[first:])


def _words(text: str) -> list[str]:
    return WORD.findall(_folded(text).lower())


def _folded(text: str) -> str:
    """Without invisible characters and quote marks, and with one form of look-alikes."""
    if ">" in text or not text.isascii():
        text = UNSEEN.sub("", text)
    if text.isascii():  # most texts, and faster
        return text
    return ODD.sub(lambda found: ALIKE[found[0]], unicodedata.normalize("NFC", text))


def keys_of(problems: Iterable[Problem], prompts: Iterable[str] = ()) -> HeldOutKeys:
    """The keys of held-out problems and of held-out prompts."""
    prompts = list(prompts)
    whole: set[str] = set()
    longest = 0
    questions: list[str] = []
    for problem in problems:
        whole.add(plain(problem.question))
        spelt_out = set() if problem.task == FROM_FILE else whole_expressions(problem.question)
        whole |= spelt_out
        longest = max(longest, *(len(NUMBER.findall(key)) for key in spelt_out), 0)
        if not spelt_out:
            questions.append(problem.question)
    phrases: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for least, texts in ((LEAST_PROBLEM, questions), (LEAST, prompts)):
        for phrase in {words(text) for text in texts}:
            if len(phrase) >= least:
                phrases.setdefault(phrase[:LEAST_PROBLEM], []).append(phrase)
    asked = frozenset(map(plain, prompts))
    return HeldOutKeys(frozenset(whole), asked, longest, phrases)


def openings(items: Iterable[Conversation | Pair | Problem]) -> list[str]:
    """What the items ask first, and later questions that are long enough to be recognised."""
    asked: list[str] = []
    for item in items:
        first, *later = [m["content"] for m in item.prompt_messages if m["role"] == "user"]
        asked += [first, *(text for text in later if len(words(text)) >= LEAST)]
    return asked
