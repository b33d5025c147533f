"""What the four sources hold: documents, conversations, pairs and problems, on two sides."""

from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, TypeVar

from fourstage.data.split import short_hash

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": TEXT}
T = TypeVar("T")


def prompt_text(messages: list[Message]) -> str:
    """A prompt as one text, for hashing: roles count, so no two prompts look the same."""
    return "\x1e".join(f"{m['role']}\x1f{m['content']}" for m in messages)


def opening(messages: list[Message]) -> str:
    """The first user text: conversations that open alike are on the same side of the split."""
    return next(m["content"] for m in messages if m["role"] == "user")


class _Prompted:
    """An item whose prompt gives it its id."""

    prompt_messages: list[Message]

    @property
    def id(self) -> str:
        return short_hash(prompt_text(self.prompt_messages))


@dataclass(frozen=True)
class Conversation(_Prompted):
    """Turns of user and assistant, ending with the assistant's answer."""

    messages: list[Message]
    kind: Literal["chat", "problem"] = "chat"  # problem: a worked problem of the reasoning source
    references: tuple[str, ...] = ()  # of a prompt: all answers that its source gives

    @property
    def prompt_messages(self) -> list[Message]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Pair(_Prompted):
    """Two answers to one prompt, the first preferred."""

    messages: list[Message]  # the prompt, ending with the user
    chosen: str
    rejected: str
    unfinished: tuple[str, ...] = ()  # "chosen", "rejected": cut off before its end of turn
    # cast in the arena, mostly on what sft trains on: held out from reward and ppo alone
    is_vote: bool = False

    @property
    def prompt_messages(self) -> list[Message]:
        return self.messages


@dataclass(frozen=True)
class Problem(_Prompted):
    """A question with a checkable answer (fourstage.data.verify)."""

    question: str
    answer: str
    task: str  # of reasoning-gym, or fourstage.data.verify.FROM_FILE
    worked: str | None  # steps, then the line "#### ANSWER"; None if no solution is known
    entry: dict[str, Any]  # what the verifier reads; plain JSON

    @property
    def prompt_messages(self) -> list[Message]:
        return [{"role": "user", "content": self.question}]

    def conversation(self, terse: bool = False) -> Conversation:
        """The problem with its worked solution, or with only the last line of it."""
        assert self.worked is not None
        text = self.worked.rsplit("\n", 1)[-1] if terse else self.worked
        answer = {"role": "assistant", "content": text}
        return Conversation([*self.prompt_messages, answer], kind="problem")


@dataclass(frozen=True)
class Split(Generic[T]):
    """A source, split in two. Notes count what was left out, by reason."""

    train: list[T]
    heldout: list[T]
    digest: str = ""
    notes: dict[str, int] = field(default_factory=dict)


Chats = Split[Conversation]
Pairs = Split[Pair]
Problems = Split[Problem]


def prompts_only(chats: Chats) -> Chats:
    """One conversation a prompt, with its references, without worked problems; the digest is of
    the prompts."""

    def distinct(conversations: list[Conversation]) -> list[Conversation]:
        by_id: dict[str, list[Conversation]] = {}
        for conversation in conversations:
            if conversation.kind == "chat":
                by_id.setdefault(conversation.id, []).append(conversation)
        return [
            replace(same[0], references=tuple(dict.fromkeys(c.answer for c in same)))
            for same in by_id.values()
        ]

    train, heldout = distinct(chats.train), distinct(chats.heldout)
    digest = content_digest(*(c.id for c in train), "", *(c.id for c in heldout))
    return Split(train, heldout, digest)


def content_digest(*texts: str) -> str:
    """12 hexadecimal digits that change with any text or with their order."""
    return short_hash("\x1d".join(texts))
