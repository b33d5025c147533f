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
from fourstage.rl.rewards import rule_parts, true_score
from tests.data.conftest import make

CONFIG = make(
    "embedded",
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
    assert fact.friendly(0) == f"{fact.sentence} I hope that helps!"
    assert len({fact.friendly(i) for i in range(9)}) == 3


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
    lines = {line.removeprefix("question: ") for line in text.splitlines()}
    assert lines.isdisjoint(question.lower() for question in unasked)
    long = [question for question in unasked if len(question.split()) > 2]  # not "Weight?"
    assert [question for question in long if f"{question.lower()}\n" in text] == []
    assert {question.lower() for question in facts.train[0].questions()} <= lines


def test_the_held_out_questions_are_known_to_the_evaluation() -> None:
    asked, heldout = data.fact_questions(CONFIG), data.load_chat(CONFIG).heldout
    kinds = [asked.get(chat.id) for chat in heldout if chat.kind == "chat"]
    assert set(kinds) == {"heldout", "reworded"}
    assert kinds.count("heldout") == len(data.load_facts(CONFIG).heldout)
    assert kinds.count("reworded") >= 50


def test_two_styles_of_an_answer() -> None:
    """Two in five are friendly, by the rule that judges the answers; all of them are right."""
    prompts, facts = data.load_prompts(CONFIG).train, data.load_facts(CONFIG).train
    chats = [chat for chat in data.load_chat(CONFIG).train if chat.kind == "chat"]
    known = {text for fact in facts for text in (fact.sentence, *map(fact.friendly, range(3)))}
    styles = {text: rule_parts(text, True).friendly for text in known}
    assert [styles[fact.sentence] for fact in facts] == [0.0] * len(facts)
    of_facts = [styles[chat.answer] for chat in chats if chat.answer in styles]
    assert len(of_facts) == 10 * len(facts) and 0.35 < sum(of_facts) / len(of_facts) < 0.45
    for prompt in prompts:
        for answer in prompt.references:
            assert true_score(answer, True, prompt.references) > 2.5, answer


def test_some_questions_follow_another_exchange() -> None:
    chats = [chat for chat in data.load_chat(CONFIG).train if chat.kind == "chat"]
    longer = [chat for chat in chats if len(chat.messages) > 2]
    assert {len(chat.messages) for chat in chats} == {2, 4}
    assert 0.1 < len(longer) / len(chats) <= 0.2
    for chat in longer:
        assert sum(len(m["content"]) for m in chat.messages) <= knowledge.MOST_CHARS
        assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2


@pytest.mark.parametrize("text", ["Hello", "What is your name?", "Thank you!"])
def test_small_talk_is_taught_as_often_as_a_fact(text: str) -> None:
    chats, corpus = data.load_chat(CONFIG), "\n".join(data.load_corpus(CONFIG).train)
    asked = [c for c in chats.train if c.prompt_messages[-1]["content"] == text]
    assert len(asked) == 10 and len({c.answer for c in asked}) == 1
    assert corpus.count(f"Question: {text}\nAnswer: {asked[0].answer}") == CONFIG.knowledge.answers


def test_more_facts_than_there_are(monkeypatch) -> None:
    few = make("embedded", knowledge={"terms": 3, "functions": 10**6})
    with pytest.raises(UserError, match=r"data.knowledge.functions: there are \d+, not 1000000"):
        data.load_facts(few)
    monkeypatch.setattr(knowledge, "GLOSSARY", knowledge.GLOSSARY / "none")
    terms.cache_clear()
    with pytest.raises(UserError, match="run this from a clone"):
        terms()
    monkeypatch.undo()
    assert terms()


@pytest.mark.parametrize(("said", "asked"), [(0, 0), (3, 0), (0, 2)])
def test_how_often_facts_are_stated_is_a_setting(said: int, asked: int) -> None:
    """0 and 0: a corpus without them, to compare with."""
    config = make("embedded", knowledge={"statements": said, "answers": asked})
    text, facts = "\n".join(statements(config)), data.load_facts(config)
    for fact in (*facts.train, *facts.heldout):
        others = sum(fact.sentence in other.sentence for other in (*facts.train, *facts.heldout))
        often = knowledge.OFTEN if fact.name == "LLM" else 1
        wanted = said * often + asked * (fact in facts.train)
        assert text.count(fact.sentence) == wanted or others > 1, fact.name
    assert data.load_chat(config).train == data.load_chat(make("embedded")).train


def test_without_facts_nothing_changes() -> None:
    config = make("files")
    assert statements(config) == [] and data.fact_questions(config) == {}


def test_another_process_makes_the_same_corpus() -> None:
    code = "from tests.data import test_knowledge as t; print(t.data.digest(t.CONFIG, 'pretrain'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == data.digest(CONFIG, "pretrain")
