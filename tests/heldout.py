"""A small held-out side, and the settings to ask it with."""

from __future__ import annotations

from fourstage.data.records import Conversation, Problem
from fourstage.data.verify import FROM_FILE
from fourstage.evaluation.items import HeldOut
from fourstage.job import EvaluationConfig
from tests.tokens import tokens_of

CONFIG = EvaluationConfig(
    seed=0,
    max_prompts=50,
    max_problems=50,
    max_pairs=50,
    max_new_tokens=12,
    samples=2,
    max_sampled_problems=3,
)


def chat(text: str, answer: str = "It is.") -> Conversation:
    turns = [("user", text), ("assistant", answer)]
    messages = [{"role": role, "content": content} for role, content in turns]
    return Conversation(messages, references=(answer,))


def problem(
    question: str, answer: str, task: str = FROM_FILE, worked: str | None = None
) -> Problem:
    return Problem(question, answer, task, worked, {"answer": answer})


CHATS = [chat(f"Question {i}?") for i in range(7)]
HELDOUT = HeldOut(
    corpus=tokens_of(
        ["A short text.", "Another one, which is a little longer than that: " + "word " * 30]
    ),
    chats=CHATS,
    problems=[problem(f"{i} + 1 = ?", str(i + 1)) for i in range(5)],
    has_true_score=True,
    facts={CHATS[0].id: "heldout", CHATS[1].id: "reworded"},
    statements=[("Term:", "It is.")],
)
NOTHING = HeldOut("no corpus: why", "no chats: why", "no problems: why", has_true_score=False)


def changed(**changes: int) -> EvaluationConfig:
    return EvaluationConfig(**{**vars(CONFIG), **changes})
