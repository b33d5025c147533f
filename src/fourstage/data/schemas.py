"""From a record of a user's file to a document, conversation, pair or problem.

The schema is read off the record's fields; a record that fits none names itself and what would.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

from fourstage.data.files import Record
from fourstage.data.records import Conversation, Message, Pair, Problem
from fourstage.errors import UserError
from fourstage.verify import FROM_FILE, MARK, extract

T = TypeVar("T")


class Unusable(UserError):
    """A record of the right schema that cannot be used: left out and counted."""


CHAT_SCHEMAS = '"instruction" and "output", "messages", "conversations", or "prompt" and "response"'
PAIR_SCHEMAS = '"chosen" and "rejected", with "prompt" or "instruction" or as dialogues'
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
TIGHT_MARK = re.compile(r"####[ \t]*(?=\S)")  # "####42" is meant as "#### 42"
CALCULATOR = re.compile(r"<<.*?>>")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half an emoji, as JSON may escape it
TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ ]?")


def document_from(record: Record) -> str:
    """{"text"}.

    Raises:
        UserError: no such field, or it is empty or no text.
    """
    if "text" not in record.values:
        raise _unknown(record, '"text"')
    return _text(record, "text")


def conversation_from(record: Record) -> Conversation:
    """alpaca {instruction, input, output}, {messages}, {conversations}, {prompt, response}.

    Raises:
        UserError: no such schema, a field that is not text, or turns out of order.
    """
    fields = record.values
    if "messages" in fields:
        return Conversation(_dialogue(record, _messages(record, "messages")))
    if "conversations" in fields:
        return Conversation(_dialogue(record, _messages(record, "conversations")))
    if "instruction" in fields and "output" in fields:
        return Conversation([_user(_instruction(record)), _assistant(_text(record, "output"))])
    for answer in ("response", "completion"):
        if "prompt" in fields and answer in fields:
            return Conversation([_user(_text(record, "prompt")), _assistant(_text(record, answer))])
    raise _unknown(record, CHAT_SCHEMAS)


def pair_from(record: Record) -> Pair:
    """{prompt, chosen, rejected}, instruction / input with both, or two whole dialogues.

    Prompt and answers may be text or lists of messages; dialogues are lists of messages or
    hh-rlhf's text ("\\n\\nHuman: ...\\n\\nAssistant: ..."), and must share all but the last answer.

    Raises:
        UserError: no such schema, a field of another type, or dialogues with two prompts.
    """
    fields = record.values
    if "chosen" not in fields or "rejected" not in fields:
        raise _unknown(record, PAIR_SCHEMAS)
    if "prompt" in fields:
        if isinstance(fields["prompt"], list):
            asked = _messages(record, "prompt")
        else:
            text = _text(record, "prompt")
            asked = _split_turns(text) or [_user(text)]
        return _pair(record, asked, _answer(record, "chosen"), _answer(record, "rejected"))
    if "instruction" in fields:
        asked = [_user(_instruction(record))]
        return _pair(record, asked, _answer(record, "chosen"), _answer(record, "rejected"))
    chosen, rejected = (_whole_dialogue(record, name) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise Unusable(f"{record.where}: chosen and rejected answer different prompts")
    return _pair(record, chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def problem_from(record: Record) -> Problem:
    """gsm8k {question, answer}, the answer ending in "#### RESULT" or being the result alone.

    Raises:
        UserError: no such schema, or a field that is empty or no text.
    """
    if "question" not in record.values or "answer" not in record.values:
        raise _unknown(record, '"question" and "answer"')
    question, solution = _text(record, "question"), _text(record, "answer")
    solution = TIGHT_MARK.sub(MARK, solution)
    final = extract(f"{solution} ")  # the space completes a mark at the very end
    if final is None:
        return Problem(question, solution, FROM_FILE, f"{MARK}{solution}", {"answer": solution})
    if not final:
        raise Unusable(f"{record.where}: nothing follows '{MARK}' in the answer")
    worked = CALCULATOR.sub("", solution)
    return Problem(question, final, FROM_FILE, worked, {"answer": final})


def usable(records: list[Record], build: Callable[[Record], T]) -> tuple[list[T], int]:
    """What `build` makes of the records, and how many were left out as unusable.

    Raises:
        UserError: a record of another schema, or no record can be used.
    """
    built: list[T] = []
    first: Unusable | None = None
    for record in records:
        try:
            built.append(build(record))
        except Unusable as error:
            first = first or error
    if not built:
        assert first is not None
        raise first
    return built, len(records) - len(built)


def _pair(record: Record, asked: list[Message], chosen: str, rejected: str) -> Pair:
    if not asked or asked[-1]["role"] != "user":
        raise Unusable(f"{record.where}: the prompt must end with a message of the user")
    _alternating(record, asked)
    return Pair(asked, chosen, rejected)


def _answer(record: Record, name: str) -> str:
    """The last message of a list, or the text, without a dialogue in front of it."""
    value = record.values[name]
    if isinstance(value, list):
        messages = _messages(record, name)
        if not messages or messages[-1]["role"] != "assistant":
            raise UserError(f"{record.where}: {name} must end with a message of the assistant")
        return messages[-1]["content"]
    text = _text(record, name)
    turns = _split_turns(text)
    return turns[-1]["content"] if turns and turns[-1]["role"] == "assistant" else text


def _whole_dialogue(record: Record, name: str) -> list[Message]:
    value = record.values[name]
    if isinstance(value, list):
        messages = _messages(record, name)
    else:
        messages = _split_turns(_text(record, name)) or []
    if not messages or messages[0]["role"] == "assistant":
        raise UserError(
            f'{record.where}: {name} has no prompt in it: give "prompt", or a whole dialogue '
            "(\\n\\nHuman: ...\\n\\nAssistant: ...)"
        )
    return _dialogue(record, messages)


def _split_turns(text: str) -> list[Message] | None:
    """hh-rlhf's dialogue text as messages; None if the text is none. A last open turn is cut."""
    if not TURN.match(text):
        return None
    parts = TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[parts[i]], "content": parts[i + 1].strip()} for i in range(0, len(parts), 2)
    ]
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    return turns


def _messages(record: Record, name: str) -> list[Message]:
    value = record.values[name]
    if not isinstance(value, list):
        raise UserError(f'{record.where}: "{name}" must be a list of messages')
    messages = []
    for item in value:
        if not isinstance(item, dict):
            raise UserError(f'{record.where}: "{name}" must hold objects with role and content')
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f'{record.where}: a message in "{name}" lacks a role or a text content')
        messages.append({"role": ROLES.get(role, role), "content": _clean(content)})
    return messages


def _dialogue(record: Record, messages: list[Message]) -> list[Message]:
    """Messages that end with the assistant; a last question without an answer is cut."""
    if messages and messages[-1]["role"] == "user":
        messages = messages[:-1]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise Unusable(f"{record.where}: the conversation has no answer of the assistant")
    _alternating(record, messages)
    return messages


def _alternating(record: Record, messages: list[Message]) -> None:
    roles = [m["role"] for m in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * len(turns)
    if turns != expected[: len(turns)]:
        raise Unusable(
            f"{record.where}: the roles are {', '.join(roles)}: after an optional system message, "
            "user and assistant must take turns, the user first"
        )


def _instruction(record: Record) -> str:
    text = _text(record, "instruction")
    extra = record.values.get("input")
    return f"{text}\n{_clean(extra)}" if isinstance(extra, str) and extra.strip() else text


def _text(record: Record, name: str) -> str:
    value = record.values[name]
    if not isinstance(value, str):
        raise UserError(f'{record.where}: "{name}" must be a text, got {_kind(value)}')
    if not value.strip():
        raise Unusable(f'{record.where}: "{name}" is empty: fill it or remove the record')
    return _clean(value)


def _clean(text: str) -> str:
    return LONE_SURROGATE.sub("\ufffd", text.replace("\r\n", "\n")).strip()


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _unknown(record: Record, wanted: str) -> UserError:
    has = ", ".join(f'"{name}"' for name in list(record.values)[:8]) or "no fields"
    return UserError(f"{record.where}: unknown schema ({has}): needs {wanted}")
