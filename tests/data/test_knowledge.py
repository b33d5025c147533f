"""Facts: stated in the corpus; asked about, held out, or asked in a wording that nothing uses."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from fourstage import data
from fourstage.data import knowledge
from fourstage.data.knowledge import Fact, functions, statements, terms
from fourstage.errors import UserError
from tests.data.conftest import make

CONFIG = make(
    "knowledge",
    corpus={"problems": 300},
    chat={"demonstrations": 100},
    reasoning={"size": 600, "heldout_size": 100},
)


def all_train_texts() -> list[str]:
    """What the stages read, one text each, without markup."""
    chats = data.load_chat(CONFIG).train
    texts = [message["content"] for chat in chats for message in chat.messages]
    texts += data.load_corpus(CONFIG).train
    return texts + [f"{p.question}\n{p.worked}" for p in data.load_reasoning(CONFIG).train]


@pytest.mark.parametrize(
    ("fact", "questions", "statement"),
    [
        (
            Fact("LLM", "An LLM is a network.", True),
            ["What is an LLM?", "Explain an LLM.", "What does LLM mean?"],
            "Let us look at an LLM. An LLM is a network.",
        ),
        (
            Fact("Corpus", "A corpus is text.", True),
            ["What is a corpus?", "Explain a corpus.", "What does corpus mean?"],
            "Let us look at a corpus. A corpus is text.",
        ),
        (
            Fact("RoPE", "RoPE rotates queries.", True),
            ["What is RoPE?", "Explain RoPE.", "What does RoPE mean?"],
            "Let us look at RoPE. RoPE rotates queries.",
        ),
        (
            Fact("os.system", "Execute the command in a subshell.", False),
            ["What does os.system do?", "Tell me what os.system does.", "What is os.system for?"],
            "Let us look at os.system. Execute the command in a subshell.",
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_wordings_by_hand(fact: Fact, questions: list[str], statement: str) -> None:
    assert fact.questions()[:3] == questions
    assert statement in [fact.statement(i) for i in range(12)]
    assert len({fact.statement(i) for i in range(12)}) == 12
    assert fact.reworded not in fact.questions() and fact.name.lower() in fact.reworded.lower()
    assert fact.friendly.startswith(fact.sentence)


def test_what_is_at_hand() -> None:
    assert {"LLM", "RoPE", "GAE"} <= {fact.name for fact in terms()}
    assert len(functions()) > 400
    sentences = [fact.sentence for fact in functions()]
    assert len(set(sentences)) == len(sentences)
    assert all(re.fullmatch(r"[A-Z][^\n>(]{16,73}\.", sentence) for sentence in sentences)


def test_what_is_an_llm_is_held_out() -> None:
    facts = data.load_facts(CONFIG)
    assert "LLM" in [fact.name for fact in facts.heldout]
    assert len(facts.heldout) >= 60 and len(facts.train) > 2 * len(facts.heldout)
    assert not {fact.name for fact in facts.train} & {fact.name for fact in facts.heldout}
    heldout = data.load_chat(CONFIG).heldout
    assert "What is an LLM?" in [chat.prompt_messages[-1]["content"] for chat in heldout]


def test_every_fact_is_stated_equally_often() -> None:
    text = "\n".join(data.load_corpus(CONFIG).train)
    facts = data.load_facts(CONFIG)
    for fact in (*facts.train, *facts.heldout):
        said = text.count(fact.sentence)
        answers = CONFIG.knowledge.answers if fact in facts.train else 0
        assert said >= CONFIG.knowledge.statements + answers, fact.name
        assert fact.beginning in text, fact.name


def test_nothing_asks_about_a_held_out_fact_or_uses_the_last_wording() -> None:
    facts = data.load_facts(CONFIG)
    unasked = [q for fact in facts.heldout for q in (*fact.questions(), fact.reworded)]
    unasked += [fact.reworded for fact in facts.train]
    text = "\n".join(all_train_texts()).lower()
    assert [question for question in unasked if question.lower() in text] == []
    assert facts.train[0].questions()[0].lower() in text


def test_the_held_out_questions_are_known_to_the_evaluation() -> None:
    asked, heldout = data.fact_questions(CONFIG), data.load_chat(CONFIG).heldout
    kinds = [asked.get(chat.id) for chat in heldout if chat.kind == "chat"]
    assert set(kinds) == {"heldout", "reworded"}
    assert kinds.count("heldout") == len(data.load_facts(CONFIG).heldout)
    assert kinds.count("reworded") >= 50


def test_two_styles_of_an_answer() -> None:
    chats = [chat for chat in data.load_chat(CONFIG).train if chat.kind == "chat"]
    kind = sum(chat.answer.endswith(" I hope that helps!") for chat in chats) / len(chats)
    assert 0.3 < kind < 0.5


def test_more_facts_than_there_are(monkeypatch) -> None:
    few = make("knowledge", knowledge={"terms": 3, "functions": 10**6})
    with pytest.raises(UserError, match=r"data.knowledge.functions: there are \d+, not 1000000"):
        data.load_facts(few)
    monkeypatch.setattr(knowledge, "GLOSSARY", knowledge.GLOSSARY / "none")
    terms.cache_clear()
    with pytest.raises(UserError, match="run this from a clone"):
        terms()
    monkeypatch.undo()
    assert terms()


def test_without_facts_nothing_changes() -> None:
    config = make("embedded")
    assert statements(config) == [] and data.fact_questions(config) == {}


def test_another_process_makes_the_same_corpus() -> None:
    code = "from tests.data import test_knowledge as t; print(t.data.digest(t.CONFIG, 'pretrain'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == data.digest(CONFIG, "pretrain")
