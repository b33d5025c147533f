"""From a record of a user's file to a document, conversation, pair or problem.

The schema is read off the record's fields; a record that fits none names itself and what would.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from fourstage.data.files import Record
from fourstage.data.records import Conversation, Message, Pair, Problem
from fourstage.data.solutions import NoResult, solved
from fourstage.data.verify import FROM_FILE, MARK
from fourstage.errors import UserError

T = TypeVar("T")


class Unusable(UserError):
    """A record of the right schema that cannot be used: left out and counted by its reason."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


CHAT_SCHEMAS = '"instruction" and "output", "messages", "conversations", or "prompt" and "response"'
PAIR_SCHEMAS = '"chosen" and "rejected", with "prompt" or "instruction" or as dialogues'
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
NOT_READ = "not_read_"  # in front of a field's name, in notes
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half an emoji, as JSON may escape it
TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ ]?")


def document_from(record: Record) -> str:
    """{"text"}.

    Raises:
        UserError: no such field, or it is empty or no text.
    """
    if "text" not in record:
        raise _unknown(record, '"text"', "corpus", "text")
    return _text(record, "text")


def conversation_from(record: Record) -> Conversation:
    """alpaca {instruction, input, output}, {messages}, {conversations}, {prompt, response}.

    Beside any of them {system}; beside alpaca's and prompts {history}, [[question, answer], ...].
    Prompt and response may be lists of messages.

    Raises:
        UserError: no such schema, or a field of another type.
        Unusable: an empty text, an image, a tool's turn, or turns out of order.
    """
    for name in ("messages", "conversations"):
        if name in record:
            return Conversation(_dialogue(record, _with_system(record, _messages(record, name))))
    for answer in ("output", "response"):
        if "instruction" in record and answer in record:
            asked = [*_history(record), _user(_instruction(record))]
            turns = [*asked, _assistant(_text(record, answer))]
            return Conversation(_dialogue(record, _with_system(record, turns)))
    for answer in ("response", "completion"):
        if "prompt" in record and answer in record:
            turns = [*_history(record), *_turns(record, "prompt", _user)]
            turns += _turns(record, answer, _assistant)
            return Conversation(_dialogue(record, _with_system(record, turns)))
    raise _unknown(record, CHAT_SCHEMAS, "chat", "instruction")


def pair_from(record: Record) -> Pair:
    """{prompt, chosen, rejected}, instruction / input with both, or two whole dialogues.

    Prompt and answers may be text or lists of messages; dialogues are lists of messages or
    hh-rlhf's text ("\\n\\nHuman: ...\\n\\nAssistant: ..."), and must share all but the last answer.

    Raises:
        UserError: no such schema, a field of another type, or dialogues with two prompts.
    """
    if "chosen" not in record or "rejected" not in record:
        raise _unknown(record, PAIR_SCHEMAS, "preference", "chosen")
    sides = ("chosen", "rejected")
    asked: list[Message] | None = None
    if "prompt" in record:
        asked = _turns(record, "prompt", _user)
    elif "instruction" in record:
        asked = [*_history(record), _user(_instruction(record))]
    else:
        for name in ("messages", "conversations"):  # the prompt, as in LLaMA-Factory's ranking
            if name in record and asked is None:
                asked = _messages(record, name)
    if asked is None:
        chosen, rejected = (_with_system(record, _whole_dialogue(record, side)) for side in sides)
        asked = chosen[:-1]
    else:
        chosen, rejected = (_answer(record, side) for side in sides)
        asked = _with_system(record, _with_context(record, asked, chosen[:-1]))
    if chosen[:-1] != rejected[:-1]:
        raise _of_two_prompts(record)
    return _pair(record, asked, chosen[-1]["content"], rejected[-1]["content"])


def _with_context(record: Record, asked: list[Message], before: list[Message]) -> list[Message]:
    """The whole of a prompt that is given apart, and in front of the answers too: as all that was
    said, its first or its last turn."""
    said = [message for message in before if message["role"] != "system"]
    turns = [message for message in asked if message["role"] != "system"]
    n = len(turns)
    if not said or said == turns:
        return before if len(before) > len(asked) else asked
    if n < len(said) and turns in (said[:n], said[-n:]):
        return before
    raise _of_two_prompts(record)


def _of_two_prompts(record: Record) -> Unusable:
    return Unusable(f"{record.where}: chosen and rejected answer different prompts", "two_prompts")


def problem_from(record: Record) -> Problem:
    """gsm8k {question, answer}; the answer ends in "#### RESULT", holds \\boxed{RESULT}, says
    "answer: RESULT" at its end, or is the result alone, which may be a number.

    Raises:
        UserError: no such schema, or a field that is no text.
        Unusable: a field that is empty, or no result, or one among several.
    """
    if "question" not in record or "answer" not in record:
        raise _unknown(record, '"question" and "answer"', "reasoning", "question")
    question = _text(record, "question")
    answer = record.get("answer")
    text = str(answer) if isinstance(answer, int | float) else _text(record, "answer")
    try:
        steps, result = solved(text)
    except NoResult as error:
        raise Unusable(f"{record.where}: {error}", error.reason) from None
    worked = "\n".join(part for part in (steps, f"{MARK}{result}") if part)
    return Problem(question, result, FROM_FILE, worked, {"answer": result})


def usable(records: list[Record], build: Callable[[Record], T]) -> tuple[list[T], dict[str, int]]:
    """What `build` makes of the records, and notes: how many were left out, "unusable_REASON", and
    how many hold something in a field that nothing reads, "not_read_FIELD".

    Raises:
        UserError: a record of another schema, or no record can be used.
    """
    built: list[T] = []
    first: Unusable | None = None
    notes = Counter[str]()
    for record in records:
        try:
            built.append(build(record))
        except Unusable as error:
            first = first or error
            notes[f"unusable_{error.reason}"] += 1
        else:
            notes.update(f"{NOT_READ}{name}" for name in record.unread())
    if not built:
        assert first is not None
        raise first
    return built, dict(notes)


def added(notes: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    """The notes of two files together."""
    return {name: notes.get(name, 0) + more.get(name, 0) for name in {**notes, **more}}


def _pair(record: Record, asked: list[Message], chosen: str, rejected: str) -> Pair:
    if not asked or asked[-1]["role"] != "user":
        what = f"{record.where}: the prompt must end with a message of the user"
        raise Unusable(what, "turns_out_of_order")
    _alternating(record, asked)
    return Pair(asked, chosen, rejected)


def _turns(record: Record, name: str, message: Callable[[str], Message]) -> list[Message]:
    """A list of messages, hh-rlhf's text of a dialogue, or a text as one message."""
    if isinstance(record.get(name), list | dict):
        return _messages(record, name)
    text = _text(record, name)
    return (_split_turns(record, name) if message is _user else None) or [message(text)]


def _answer(record: Record, name: str) -> list[Message]:
    """The answer, as the last of a dialogue's messages or alone."""
    if isinstance(record.get(name), list | dict):
        messages = _messages(record, name)
        if not messages or messages[-1]["role"] != "assistant":
            raise UserError(f"{record.where}: {name} must end with a message of the assistant")
        return messages
    text = _text(record, name)
    turns = _split_turns(record, name) if str(record.get(name)).startswith("\n\n") else None
    return turns if turns and turns[-1]["role"] == "assistant" else [_assistant(text)]


def _whole_dialogue(record: Record, name: str) -> list[Message]:
    value = record.get(name)
    if isinstance(value, list | dict):
        messages = _messages(record, name)
    else:
        messages = _split_turns(record, name) or []
    if not messages or messages[0]["role"] == "assistant":
        raise UserError(
            f'{record.where}: {name} has no prompt in it: give "prompt", or a whole dialogue '
            "(\\n\\nHuman: ...\\n\\nAssistant: ...)"
        )
    return _dialogue(record, messages)


def _split_turns(record: Record, name: str) -> list[Message] | None:
    """hh-rlhf's text of a dialogue as messages; None for a text that is none, even one that begins
    with "Human: ". A last open turn is cut."""
    text = _text(record, name)
    parts = TURN.split(text)[1:]
    is_dialogue = len(parts) > 2 or str(record.get(name)).startswith("\n\n")
    if not TURN.match(text) or not is_dialogue:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[parts[i]], "content": parts[i + 1].strip()} for i in range(0, len(parts), 2)
    ]
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    return turns


def _messages(record: Record, name: str) -> list[Message]:
    value = record.get(name)
    if isinstance(value, dict):  # one message; or as columns, which `datasets` makes of a sequence
        is_columns = all(isinstance(column, list) for column in value.values())
        if is_columns and len({len(column) for column in value.values()}) > 1:
            raise UserError(f'{record.where}: the columns of "{name}" differ in length')
        rows = zip(*value.values(), strict=False) if is_columns else [value.values()]
        value = [dict(zip(value, row, strict=True)) for row in rows]
    if value is None:
        raise _empty(record, name)
    if not isinstance(value, list):
        raise UserError(f'{record.where}: "{name}" must be a list of messages')
    messages = [_message(record, name, item) for item in value]
    return [message for message in messages if message["content"]]  # but for an empty system text


def _message(record: Record, name: str, item: Any) -> Message:
    """{role, content} or {from, value}; content may be OpenAI's parts."""
    if not isinstance(item, dict):
        raise UserError(f'{record.where}: "{name}" must hold objects with role and content')
    role = item.get("role") or item.get("from")
    content = item.get("value") if item.get("content") is None else item["content"]
    if not isinstance(role, str):
        raise UserError(f'{record.where}: a message in "{name}" lacks a role or a text content')
    role = role.strip().lower()
    if item.get("weight") == 0:
        raise Unusable(
            f'{record.where}: "{name}" has a message of weight 0: all of a record is learned, or '
            "none",
            "weight_0",
        )
    if role in TOOL_ROLES or item.get("tool_calls"):
        raise Unusable(
            f'{record.where}: "{name}" has the turn of a tool: remove the record', "tools"
        )
    if role not in ROLES:
        raise Unusable(
            f"{record.where}: unknown role {role[:40]!r}: known are {', '.join(ROLES)}",
            "unknown_role",
        )
    if isinstance(content, list):
        content = "\n".join(_part(record, part) for part in content)
    if content is not None and not isinstance(content, str):
        raise UserError(f'{record.where}: a message in "{name}" lacks a role or a text content')
    if "content" not in item and "value" not in item:
        raise UserError(f'{record.where}: a message in "{name}" lacks a role or a text content')
    text = _clean(content or "")
    if not text and ROLES[role] != "system":
        raise _empty(record, name)
    return {"role": ROLES[role], "content": text}


def _part(record: Record, part: Any) -> str:
    """The text of one of OpenAI's content parts."""
    text = part.get("text") if isinstance(part, dict) else part
    if isinstance(text, str):
        return text
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise Unusable(
        f"{record.where}: a message holds {str(kind)[:40]!r}, but only text is read", "not_text"
    )


def _with_system(record: Record, messages: list[Message]) -> list[Message]:
    """With the record's own system text in front, where the messages have none."""
    has_one = bool(messages) and messages[0]["role"] == "system"
    if has_one or "system" not in record:
        return messages
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise UserError(f'{record.where}: "system" must be a text, got {_kind(system)}')
    text = _clean(system or "")
    return [{"role": "system", "content": text}, *messages] if text else messages


def _history(record: Record) -> list[Message]:
    """alpaca's earlier turns, [[question, answer], ...]."""
    history = record.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in history
    ):
        raise UserError(f'{record.where}: "history" must be a list of [question, answer]')
    messages = [
        m for turn in history for m in (_user(_clean(turn[0])), _assistant(_clean(turn[1])))
    ]
    if not all(message["content"] for message in messages):
        raise _empty(record, "history")
    return messages


def _dialogue(record: Record, messages: list[Message]) -> list[Message]:
    """Messages that end with the assistant; a last question without an answer is cut."""
    if messages and messages[-1]["role"] == "user":
        messages = messages[:-1]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        what = f"{record.where}: the conversation has no answer of the assistant"
        raise Unusable(what, "without_an_answer")
    _alternating(record, messages)
    return messages


def _alternating(record: Record, messages: list[Message]) -> None:
    roles = [m["role"] for m in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * len(turns)
    if turns != expected[: len(turns)]:
        raise Unusable(
            f"{record.where}: the roles are {', '.join(roles[:8])}: after an optional system "
            "message, user and assistant must take turns, the user first",
            "turns_out_of_order",
        )


def _instruction(record: Record) -> str:
    text, extra = _text(record, "instruction"), record.get("input")
    if isinstance(extra, dict | list) and extra:
        raise UserError(f'{record.where}: "input" must be a text, got {_kind(extra)}')
    said = "" if extra is None or extra in ({}, []) else _clean(str(extra))
    return f"{text}\n{said}" if said else text


def _text(record: Record, name: str) -> str:
    value = record.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise _empty(record, name)
    if not isinstance(value, str):
        raise UserError(f'{record.where}: "{name}" must be a text, got {_kind(value)}')
    return _clean(value)


def _empty(record: Record, name: str) -> Unusable:
    return Unusable(
        f'{record.where}: "{name}" is empty: fill it or remove the record', "empty_text"
    )


def _clean(text: str) -> str:
    return LONE_SURROGATE.sub("\ufffd", text.replace("\r\n", "\n")).strip()


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _unknown(record: Record, wanted: str, source: str, name: str) -> UserError:
    said = ", ".join(f'"{field}"' for field in list(record.values)[:8]) or "no fields"
    named = f"data.{source}.columns={{{name}: YOUR_NAME, ...}}"
    return UserError(
        f"{record.where}: unknown schema ({said}): needs {wanted}; for other names {named}"
    )
