"""What the four sources hold: documents, conversations, pairs and problems."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from fourstage.data.split import short_hash

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": TEXT}


def prompt_text(messages: list[Message]) -> str:
    """A prompt as one text, for hashing: roles count, so no two prompts look the same."""
    return "\x1e".join(f"{m['role']}\x1f{m['content']}" for m in messages)


def opening(messages: list[Message]) -> str:
    """The first user text: conversations that open alike stand on the same side of the split."""
    return next(m["content"] for m in messages if m["role"] == "user")


@dataclass(frozen=True)
class Conversation:
    """Turns of user and assistant, ending with the assistant's answer."""

    messages: list[Message]
    kind: Literal["chat", "problem"] = "chat"  # problem: a worked problem of the reasoning source

    @property
    def prompt_messages(self) -> list[Message]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    @property
    def id(self) -> str:
        return short_hash(prompt_text(self.prompt_messages))


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the first preferred."""

    messages: list[Message]  # the prompt, ending with the user
    chosen: str
    rejected: str
    unfinished: tuple[str, ...] = ()  # "chosen", "rejected": cut off before its end of turn

    @property
    def prompt_messages(self) -> list[Message]:
        return self.messages

    @property
    def id(self) -> str:
        return short_hash(prompt_text(self.messages))


@dataclass(frozen=True)
class Problem:
    """A question with a checkable answer (fourstage.data.verify)."""

    question: str
    answer: str
    task: str  # of reasoning-gym, or fourstage.data.verify.FROM_FILE
    worked: str | None  # steps, then the line "#### ANSWER"; None where no solution is known
    entry: dict[str, Any]  # what the verifier reads; plain JSON

    @property
    def prompt_messages(self) -> list[Message]:
        return [{"role": "user", "content": self.question}]

    @property
    def id(self) -> str:
        return short_hash(prompt_text(self.prompt_messages))

    def conversation(self, terse: bool = False) -> Conversation:
        """The problem with its worked solution, as sft reads it; or with its last line only."""
        assert self.worked is not None
        text = self.worked.rsplit("\n", 1)[-1] if terse else self.worked
        answer = {"role": "assistant", "content": text}
        return Conversation([*self.prompt_messages, answer], kind="problem")


@dataclass(frozen=True)
class Corpus:
    """Plain text, a document an item."""

    train: list[str]
    heldout: list[str]
    digest: str
    notes: dict[str, int]


@dataclass(frozen=True)
class Chats:
    """Conversations. prompts_only() is what rollouts of the preference stages answer."""

    train: list[Conversation]
    heldout: list[Conversation]
    digest: str
    notes: dict[str, int]

    def prompts_only(self) -> Chats:
        """Without worked problems, one conversation a prompt; the digest is of the prompts."""
        train, heldout = (_one_a_prompt(side) for side in (self.train, self.heldout))
        notes = {"train": len(train), "heldout": len(heldout)}
        digest = content_digest(*(r.id for r in train), "", *(r.id for r in heldout))
        return replace(self, train=train, heldout=heldout, digest=digest, notes=notes)


def _one_a_prompt(conversations: list[Conversation]) -> list[Conversation]:
    return list({c.id: c for c in reversed(conversations) if c.kind == "chat"}.values())[::-1]


@dataclass(frozen=True)
class Pairs:
    """Preference pairs."""

    train: list[Pair]
    heldout: list[Pair]
    digest: str
    notes: dict[str, int]


@dataclass(frozen=True)
class Problems:
    """Problems with verifiers."""

    train: list[Problem]
    heldout: list[Problem]
    digest: str
    notes: dict[str, int]


def content_digest(*texts: str) -> str:
    """12 hexadecimal digits that change with any text or with their order."""
    return short_hash("\x1d".join(texts))
