"""From a record of a user's file to a document, conversation, pair or problem.

The schema is read off the record's fields; a record that fits none names itself and what would.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

from fourstage.data.files import Row
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
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half an emoji, as JSON may escape it
TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ ]?")


def document_from(row: Row) -> str:
    """{"text"}.

    Raises:
        UserError: no such field, or it is empty or no text.
    """
    if "text" not in row:
        raise _unknown(row, '"text"', "corpus", "text")
    return _text(row, "text")


def conversation_from(row: Row) -> Conversation:
    """alpaca {instruction, input, output}, {messages}, {conversations}, {prompt, response}.

    Beside any of them {system}; beside alpaca's and prompts {history}, [[question, answer], ...].
    Prompt and response may be lists of messages.

    Raises:
        UserError: no such schema, or a field of another type.
        Unusable: an empty text, an image, a tool's turn, or turns out of order.
    """
    for name in ("messages", "conversations"):
        if name in row:
            return Conversation(_dialogue(row, _with_system(row, _messages(row, name))))
    for answer in ("output", "response"):
        if "instruction" in row and answer in row:
            asked = [*_history(row), _user(_instruction(row))]
            turns = [*asked, _assistant(_text(row, answer))]
            return Conversation(_dialogue(row, _with_system(row, turns)))
    for answer in ("response", "completion"):
        if "prompt" in row and answer in row:
            turns = [*_history(row), *_turns(row, "prompt", _user)]
            turns += _turns(row, answer, _assistant)
            return Conversation(_dialogue(row, _with_system(row, turns)))
    raise _unknown(row, CHAT_SCHEMAS, "chat", "instruction")


def pair_from(row: Row) -> Pair:
    """{prompt, chosen, rejected}, instruction / input with both, or two whole dialogues.

    Prompt and answers may be text or lists of messages; dialogues are lists of messages or
    hh-rlhf's text ("\\n\\nHuman: ...\\n\\nAssistant: ..."), and must share all but the last answer.

    Raises:
        UserError: no such schema, a field of another type, or dialogues with two prompts.
    """
    if "chosen" not in row or "rejected" not in row:
        raise _unknown(row, PAIR_SCHEMAS, "preference", "chosen")
    sides = ("chosen", "rejected")
    asked: list[Message] | None = None
    if "prompt" in row:
        asked = _turns(row, "prompt", _user)
    elif "instruction" in row:
        asked = [*_history(row), _user(_instruction(row))]
    else:
        for name in ("messages", "conversations"):  # the prompt, as in LLaMA-Factory's ranking
            if name in row and asked is None:
                asked = _messages(row, name)
    if asked is None:
        chosen, rejected = (_with_system(row, _whole_dialogue(row, side)) for side in sides)
        asked = chosen[:-1]
    else:
        chosen, rejected = (_answer(row, side) for side in sides)
        asked = _with_system(row, _with_context(row, asked, chosen[:-1]))
    if chosen[:-1] != rejected[:-1]:
        raise _of_two_prompts(row)
    return _pair(row, asked, chosen[-1]["content"], rejected[-1]["content"])


def _with_context(row: Row, asked: list[Message], before: list[Message]) -> list[Message]:
    """The whole of a prompt that is given apart, and in front of the answers too: as all that was
    said, its first or its last turn."""
    said = [message for message in before if message["role"] != "system"]
    turns = [message for message in asked if message["role"] != "system"]
    n = len(turns)
    if not said or said == turns:
        return before if len(before) > len(asked) else asked
    if n < len(said) and turns in (said[:n], said[-n:]):
        return before
    raise _of_two_prompts(row)


def _of_two_prompts(row: Row) -> Unusable:
    return Unusable(f"{row.where}: chosen and rejected answer different prompts", "two_prompts")


def problem_from(row: Row) -> Problem:
    """gsm8k {question, answer}; the answer ends in "#### RESULT", holds \\boxed{RESULT}, says
    "answer: RESULT" at its end, or is the result alone, which may be a number.

    Raises:
        UserError: no such schema, or a field that is no text.
        Unusable: a field that is empty, or no result, or one among several.
    """
    if "question" not in row or "answer" not in row:
        raise _unknown(row, '"question" and "answer"', "reasoning", "question")
    question = _text(row, "question")
    answer = row.get("answer")
    text = str(answer) if isinstance(answer, int | float) else _text(row, "answer")
    try:
        steps, result = solved(text)
    except NoResult as error:
        raise Unusable(f"{row.where}: {error}", error.reason) from None
    worked = "\n".join(part for part in (steps, f"{MARK}{result}") if part)
    return Problem(question, result, FROM_FILE, worked, {"answer": result})


def _pair(row: Row, asked: list[Message], chosen: str, rejected: str) -> Pair:
    if not asked or asked[-1]["role"] != "user":
        what = f"{row.where}: the prompt must end with a message of the user"
        raise Unusable(what, "turns_out_of_order")
    _alternating(row, asked)
    return Pair(asked, chosen, rejected)


def _turns(row: Row, name: str, message: Callable[[str], Message]) -> list[Message]:
    """A list of messages, hh-rlhf's text of a dialogue, or a text as one message."""
    if isinstance(row.get(name), list | dict):
        return _messages(row, name)
    text = _text(row, name)
    return (_split_turns(row, name) if message is _user else None) or [message(text)]


def _answer(row: Row, name: str) -> list[Message]:
    """The answer, as the last of a dialogue's messages or alone."""
    if isinstance(row.get(name), list | dict):
        messages = _messages(row, name)
        if not messages or messages[-1]["role"] != "assistant":
            raise UserError(f"{row.where}: {name} must end with a message of the assistant")
        return messages
    text = _text(row, name)
    turns = _split_turns(row, name) if str(row.get(name)).startswith("\n\n") else None
    return turns if turns and turns[-1]["role"] == "assistant" else [_assistant(text)]


def _whole_dialogue(row: Row, name: str) -> list[Message]:
    value = row.get(name)
    if isinstance(value, list | dict):
        messages = _messages(row, name)
    else:
        messages = _split_turns(row, name) or []
    if not messages or messages[0]["role"] == "assistant":
        raise UserError(
            f'{row.where}: {name} has no prompt in it: give "prompt", or a whole dialogue '
            "(\\n\\nHuman: ...\\n\\nAssistant: ...)"
        )
    return _dialogue(row, messages)


def _split_turns(row: Row, name: str) -> list[Message] | None:
    """hh-rlhf's text of a dialogue as messages; None for a text that is none, even one that begins
    with "Human: ". A last open turn is cut."""
    text = _text(row, name)
    parts = TURN.split(text)[1:]
    is_dialogue = len(parts) > 2 or str(row.get(name)).startswith("\n\n")
    if not TURN.match(text) or not is_dialogue:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[parts[i]], "content": parts[i + 1].strip()} for i in range(0, len(parts), 2)
    ]
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    return turns


def _messages(row: Row, name: str) -> list[Message]:
    value = row.get(name)
    if isinstance(value, dict):  # one message; or as columns, which `datasets` makes of a sequence
        is_columns = all(isinstance(column, list) for column in value.values())
        if is_columns and len({len(column) for column in value.values()}) > 1:
            raise UserError(f'{row.where}: the columns of "{name}" differ in length')
        rows = zip(*value.values(), strict=False) if is_columns else [value.values()]
        value = [dict(zip(value, row, strict=True)) for row in rows]
    if value is None:
        raise _empty(row, name)
    if not isinstance(value, list):
        raise UserError(f'{row.where}: "{name}" must be a list of messages')
    messages = [_message(row, name, item) for item in value]
    return [message for message in messages if message["content"]]  # but for an empty system text


def _message(row: Row, name: str, item: Any) -> Message:
    """{role, content} or {from, value}; content may be OpenAI's parts."""
    if not isinstance(item, dict):
        raise UserError(f'{row.where}: "{name}" must hold objects with role and content')
    role = item.get("role") or item.get("from")
    content = item.get("value") if item.get("content") is None else item["content"]
    if not isinstance(role, str):
        raise UserError(f'{row.where}: a message in "{name}" lacks a role or a text content')
    role = role.strip().lower()
    if item.get("weight") == 0:
        raise Unusable(
            f'{row.where}: "{name}" has a message of weight 0: all of a record is learned, or none',
            "weight_0",
        )
    if role in TOOL_ROLES or item.get("tool_calls"):
        raise Unusable(f'{row.where}: "{name}" has the turn of a tool: remove the record', "tools")
    if role not in ROLES:
        raise Unusable(
            f"{row.where}: unknown role {role[:40]!r}: known are {', '.join(ROLES)}",
            "unknown_role",
        )
    if isinstance(content, list):
        content = "\n".join(_part(row, part) for part in content)
    if content is not None and not isinstance(content, str):
        raise UserError(f'{row.where}: a message in "{name}" lacks a role or a text content')
    if "content" not in item and "value" not in item:
        raise UserError(f'{row.where}: a message in "{name}" lacks a role or a text content')
    text = _clean(content or "")
    if not text and ROLES[role] != "system":
        raise _empty(row, name)
    return {"role": ROLES[role], "content": text}


def _part(row: Row, part: Any) -> str:
    """The text of one of OpenAI's content parts."""
    text = part.get("text") if isinstance(part, dict) else part
    if isinstance(text, str):
        return text
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise Unusable(
        f"{row.where}: a message holds {str(kind)[:40]!r}, but only text is read", "not_text"
    )


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    """With the record's own system text in front, where the messages have none."""
    has_one = bool(messages) and messages[0]["role"] == "system"
    if has_one or "system" not in row:
        return messages
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise UserError(f'{row.where}: "system" must be a text, got {_kind(system)}')
    text = _clean(system or "")
    return [{"role": "system", "content": text}, *messages] if text else messages


def _history(row: Row) -> list[Message]:
    """alpaca's earlier turns, [[question, answer], ...]."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in history
    ):
        raise UserError(f'{row.where}: "history" must be a list of [question, answer]')
    messages = [
        m for turn in history for m in (_user(_clean(turn[0])), _assistant(_clean(turn[1])))
    ]
    if not all(message["content"] for message in messages):
        raise _empty(row, "history")
    return messages


def _dialogue(row: Row, messages: list[Message]) -> list[Message]:
    """Messages that end with the assistant; a last question without an answer is cut."""
    if messages and messages[-1]["role"] == "user":
        messages = messages[:-1]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        what = f"{row.where}: the conversation has no answer of the assistant"
        raise Unusable(what, "without_an_answer")
    _alternating(row, messages)
    return messages


def _alternating(row: Row, messages: list[Message]) -> None:
    roles = [m["role"] for m in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * len(turns)
    if turns != expected[: len(turns)]:
        raise Unusable(
            f"{row.where}: the roles are {', '.join(roles[:8])}: after an optional system "
            "message, user and assistant must take turns, the user first",
            "turns_out_of_order",
        )


def _instruction(row: Row) -> str:
    text, extra = _text(row, "instruction"), row.get("input")
    if isinstance(extra, dict | list) and extra:
        raise UserError(f'{row.where}: "input" must be a text, got {_kind(extra)}')
    said = "" if extra is None or extra in ({}, []) else _clean(str(extra))
    return f"{text}\n{said}" if said else text


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise _empty(row, name)
    if not isinstance(value, str):
        raise UserError(f'{row.where}: "{name}" must be a text, got {_kind(value)}')
    return _clean(value)


def _empty(row: Row, name: str) -> Unusable:
    return Unusable(f'{row.where}: "{name}" is empty: fill it or remove the record', "empty_text")


def _clean(text: str) -> str:
    return LONE_SURROGATE.sub("\ufffd", text.replace("\r\n", "\n")).strip()


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _unknown(row: Row, wanted: str, source: str, name: str) -> UserError:
    said = ", ".join(f'"{field}"' for field in list(row.values)[:8]) or "no fields"
    named = f"data.{source}.columns={{{name}: YOUR_NAME, ...}}"
    return UserError(
        f"{row.where}: unknown schema ({said}): needs {wanted}; for other names {named}"
    )
