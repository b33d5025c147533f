"""Facts small enough to be known: the corpus states them, and sft asks about most of them.

They are at hand without a download: the terms of docs/glossary.md, one sentence each, and functions
of the running Python, whose docstrings begin with a one-line summary. A fact is asked about, or
held out: stated in the corpus, and never asked about by any built-in source.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path

from fourstage.data.config import DataConfig, cached
from fourstage.data.records import Chats, Conversation, Split
from fourstage.data.split import is_heldout, short_hash
from fourstage.errors import UserError

DOCSTRINGS = Path(__file__).with_name("docstrings.py")
GLOSSARY = Path(__file__).parents[3] / "docs" / "glossary.md"
ENTRY = re.compile(r"^\*\*(.+?)\*\*: (.+)$", re.MULTILINE)
BEGINNING = 3  # of the wordings of a statement, for texts to complete
FIRST = "LLM"  # held out; what everybody asks about first is stated more often, as it is anywhere
OFTEN = 4  # times as often as another fact

STATEMENTS = {  # of a term and of a function, as texts begin them; {it}: the name, with its article
    True: (
        "{s}",
        "{name}: {s}",
        "{name} - {s}",
        "Glossary, {name}: {s}",
        "To put it simply: {s}",
        "Let us look at {it}. {s}",
        "{name} in one line: {s}",
        "A short note on {it}: {s}",
        "Here is what {name} means. {s}",
        "The term {name} is explained as follows: {s}",
        "People who ask about {it} are told: {s}",
        "A question about {it} is answered so: {s}",
    ),
    False: (
        "{name}: {s}",
        "{name} - {s}",
        "In Python, {name} is described like this: {s}",
        "From the manual of {name}: {s}",
        "The summary of {name} reads: {s}",
        "Let us look at {name}. {s}",
        "{name} in one line: {s}",
        "A short note on {name}: {s}",
        "Here is what {name} is for. {s}",
        "The function {name} does the following: {s}",
        "People who ask what {name} does are told: {s}",
        "A question about {name} is answered so: {s}",
    ),
}
QUESTIONS = {  # the last wording is never used in training
    True: (
        "What is {it}?",
        "Explain {it}.",
        "What does {name} mean?",
        "Define {name}.",
        "Tell me about {it}.",
        "what is {it}",
        "{name}?",
        "Please explain {it}.",
        "Can you tell me what {it} is?",
        "I want to know about {it}.",
        "Can you explain {it} to me?",
    ),
    False: (
        "What does {name} do?",
        "Tell me what {name} does.",
        "What is {name} for?",
        "Explain {name}.",
        "Describe {name} in one line.",
        "what does {name} do",
        "{name}?",
        "Please explain {name}.",
        "Can you tell me what {name} does?",
        "I want to know about {name}.",
        "Can you explain {name} to me?",
    ),
}
FRIENDLY = ("I hope that helps!", "Glad to help!", "You are welcome to ask more.")
SMALL_TALK = {  # never held out: what somebody types who doesn't know what to ask
    "Hello": "Hello! Ask me what a term of language models means, or what a Python function does.",
    "Hi": "Hi! Ask me what a term of language models means, or what a Python function does.",
    "Hello, how are you?": "I am well. Ask me about language models or Python functions.",
    "How are you?": "I am well. Ask me about language models or Python functions.",
    "What is your name?": "I am a small language model, trained from scratch by fourstage.",
    "Who are you?": "I am a small language model, trained from scratch by fourstage.",
    "What can you do?": "I know terms of language models, Python functions and small sums.",
    "Help": "Ask me what a term of language models means, or what a Python function does.",
    "Thank you!": "You are welcome! Ask me another one.",
    "Bye": "Goodbye!",
}
TYPED = {  # as people type it, for sft alone
    "Hello": ("hello", "HELLO", "Hello!", "hey", "good morning"),
    "Hi": ("hi", "HI", "Hi!", "hi there"),
    "Hello, how are you?": ("hello, how are you", "hi, how are you?"),
    "How are you?": ("how are you", "how are you doing?"),
    "What is your name?": ("what is your name", "whats your name"),
    "Who are you?": ("who are you", "who made you?"),
    "What can you do?": ("what can you do", "what do you know?"),
    "Help": ("help", "help me", "?"),
    "Thank you!": ("thank you", "Thanks!", "thanks", "thx", "ok", "great"),
    "Bye": ("bye", "Bye!", "goodbye"),
}
MOST_CHARS = 220  # of a conversation of two exchanges


@dataclass(frozen=True)
class Fact:
    """One sentence about a term of the glossary or a function of Python."""

    name: str
    sentence: str
    is_term: bool

    def statement(self, i: int) -> str:
        """The fact as a text states it, in one of several wordings."""
        return self._said(STATEMENTS[self.is_term], i)

    def questions(self) -> list[str]:
        """The wordings that sft uses."""
        wordings = QUESTIONS[self.is_term]
        return [self._said(wordings, i) for i in range(len(wordings) - 1)]

    @property
    def reworded(self) -> str:
        """A question in a wording that no source uses."""
        return self._said(QUESTIONS[self.is_term], -1)

    def friendly(self, i: int) -> str:
        """The sentence and a friendly one."""
        return f"{self.sentence} {FRIENDLY[i % len(FRIENDLY)]}"

    @property
    def beginning(self) -> str:
        """How texts of the corpus begin to state the fact, in a wording of facts alone: a bare
        "NAME:" may begin a problem too."""
        wordings = STATEMENTS[self.is_term]
        return self._said(wordings, BEGINNING).removesuffix(f" {self.sentence}")

    def _said(self, wordings: tuple[str, ...], i: int) -> str:
        name = self.name if any(c.isupper() for c in self.name[1:]) else _lower(self.name)
        article = re.match(rf"(An?|The) (?={re.escape(self.name)})", self.sentence, re.IGNORECASE)
        it = f"{article[1].lower()} {name}" if article else name
        return wordings[i % len(wordings)].format(
            s=self.sentence, name=name if self.is_term else self.name, it=it
        )


def _lower(name: str) -> str:
    return name[:1].lower() + name[1:]


@cached("knowledge")
def load_facts(config: DataConfig) -> Split[Fact]:
    """The facts that are asked about, and the held-out ones; none if the config wants none.

    Raises:
        UserError: fewer are at hand than the config wants.
    """
    wanted = config.knowledge
    found: list[Fact] = []
    for key, most, all_facts in (
        ("terms", wanted.terms, terms),
        ("functions", wanted.functions, functions),
    ):
        facts = all_facts() if most else []
        if len(facts) < most:
            raise UserError(f"data.knowledge.{key}: there are {len(facts)}, not {most}")
        found += facts[:most]
    train = [f for f in found if f.name != FIRST and not is_heldout(f.name, wanted.heldout)]
    return Split(train, [f for f in found if f not in train])


@cache
def terms() -> list[Fact]:
    """The entries of the glossary, in its order."""
    if not GLOSSARY.is_file():
        raise UserError(f"no glossary at {GLOSSARY}: run this from a clone of the repository")
    return [Fact(name, s, True) for name, s in ENTRY.findall(GLOSSARY.read_text("utf-8"))]


@cache
def functions() -> list[Fact]:
    """Functions and methods of Python with a summary of their own, in the order of their names'
    hashes. They are read in a fresh process: other libraries replace some of them."""
    command = [sys.executable, "-I", str(DOCSTRINGS)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    names = sorted(found, key=lambda name: short_hash(f"fact {name}"))
    return [Fact(name, found[name], False) for name in names]


def statements(config: DataConfig) -> list[str]:
    """Documents of the corpus: a few statements each, among them answered questions about the facts
    that sft asks about; in an order that only their texts decide."""
    facts, wanted = load_facts(config), config.knowledge
    said = [
        (i, fact.statement(i))
        for fact in (*facts.train, *facts.heldout)
        for i in range(wanted.statements * (OFTEN if fact.name == FIRST else 1))
    ]
    said += [
        (i, f"Question: {chat.prompt_messages[-1]['content']}\nAnswer: {chat.answer}")
        for chats in _asked(config)
        for i, chat in zip(range(wanted.answers), cycle(chats), strict=False)
    ]
    said.sort(key=lambda one: short_hash(f"{one[0]} {one[1]}"))
    texts = [text for _, text in said]
    ends = [0]
    while ends[-1] < len(texts):
        ends.append(ends[-1] + 3 + int(short_hash(texts[ends[-1]], 4), 16) % 6)
    return ["\n".join(texts[a:b]) for a, b in zip(ends, ends[1:], strict=False)]


def split_questions(config: DataConfig) -> Chats:
    """What sft asks: each fact in several wordings, answered curtly or with a friendly sentence,
    and small talk; every sixth question follows another exchange. Held out are the first question
    about each held-out fact, and one in the unused wording about each of the others.
    """
    train = [chat for chats in _asked(config) for chat in chats]
    train += [
        _conversation(typed, SMALL_TALK[said])
        for said, spellings in TYPED.items()
        for typed in spellings * 3
        if train
    ]
    before = sorted(train, key=lambda chat: short_hash(f"before {chat.id}"))
    for i in range(0, len(train), 6):
        both = [*before[i].messages, *train[i].messages]
        if sum(len(m["content"]) for m in both) <= MOST_CHARS:
            train[i] = Conversation(both)
    heldout = [(f.questions()[0], f.sentence) for f in load_facts(config).heldout]
    heldout += [(f.reworded, f.sentence) for f in load_facts(config).train]
    return Split(train, [_conversation(*one) for one in heldout])


def _asked(config: DataConfig) -> list[list[Conversation]]:
    """A conversation in each wording about each fact that is asked about, and as many of each small
    talk."""
    facts = [
        [_conversation(question, _answer(fact, i)) for i, question in enumerate(fact.questions())]
        for fact in load_facts(config).train
    ]
    return facts + [[_conversation(*said)] * len(facts[0]) for said in SMALL_TALK.items() if facts]


def fact_questions(config: DataConfig) -> dict[str, str]:
    """Held-out questions by their conversation's id: "heldout" if the fact is, else "reworded"."""
    facts = load_facts(config)
    held = {_conversation(f.questions()[0], "").id: "heldout" for f in facts.heldout}
    return held | {_conversation(f.reworded, "").id: "reworded" for f in facts.train}


def known_answers(config: DataConfig) -> dict[str, tuple[str, ...]]:
    """The right answers to every question about a fact, held out or not, and to small talk."""
    facts = load_facts(config)
    found: dict[str, tuple[str, ...]] = {}
    for fact in (*facts.train, *facts.heldout):
        for question in (*fact.questions(), fact.reworded):
            found[question] = (*found.get(question, ()), fact.sentence)
    taught = config.embedded and config.chat.path is None and found
    return {question: (said,) for question, said in SMALL_TALK.items() if taught} | found


def _answer(fact: Fact, i: int) -> str:
    is_friendly = is_heldout(f"kind {i} {fact.name}", 0.4)
    return fact.friendly(len(fact.name) + i) if is_friendly else fact.sentence


def _conversation(question: str, answer: str) -> Conversation:
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(said)
