"""From a row of a user's file to a document, conversation, pair or problem.

The schema is read off the row's fields; the error for a row that fits none says what would.
"""

import re
from collections.abc import Callable
from typing import Any

from fourstage.data.files import Row
from fourstage.data.records import Conversation, Message, Pair, Problem
from fourstage.data.solutions import NoResult, solved
from fourstage.data.verify import FROM_FILE, MARK
from fourstage.errors import UserError
from fourstage.tokenizer import LONE_SURROGATE


class Unusable(UserError):
    """A row of the right schema that can't be used: left out, and counted by its reason."""

    def __init__(self, row: Row, reason: str, message: str) -> None:
        super().__init__(f"{row.where}: {message}")
        self.reason = reason


CHAT_SCHEMAS = '"instruction" and "output", "messages", "conversations", or "prompt" and "response"'
PAIR_SCHEMAS = '"chosen" and "rejected", with "prompt" or "instruction" or as dialogues'
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ ]?")


def document_from(row: Row) -> str:
    """{"text"}. Raises UserError if there is none, or if it is empty or not a text."""
    if "text" not in row:
        raise _unknown(row, '"text"', "corpus", "text")
    return _text(row, "text")


def conversation_from(row: Row) -> Conversation:
    """alpaca {instruction, input, output}, {messages}, {conversations}, {prompt, response}.

    Any of them may have {system}; alpaca's and prompts may have {history}, [[question, answer],
    ...]. Prompt and response may be lists of messages. Raises UserError for another schema or type
    of a field; Unusable for an empty text, an image, a tool's turn, or turns out of order.
    """
    turns = _own_messages(row)
    if turns is None and (answer := _answering(row, "instruction", "output", "response")):
        turns = [*_instructed(row), _assistant(_text(row, answer))]
    if turns is None and (answer := _answering(row, "prompt", "response", "completion")):
        asked = [*_history(row), *_turns(row, "prompt", _user)]
        turns = [*asked, *_turns(row, answer, _assistant)]
    if turns is None:
        raise _unknown(row, CHAT_SCHEMAS, "chat", "instruction")
    return Conversation(_dialogue(row, _with_system(row, turns)))


def pair_from(row: Row) -> Pair:
    """{prompt, chosen, rejected}, instruction / input with both, or two whole dialogues.

    Prompt and answers may be text or lists of messages; dialogues are lists of messages or
    hh-rlhf's text ("\\n\\nHuman: ...\\n\\nAssistant: ..."), and must share all but the last answer.
    Raises as conversation_from, and Unusable for two different prompts.
    """
    if "chosen" not in row or "rejected" not in row:
        raise _unknown(row, PAIR_SCHEMAS, "preference", "chosen")
    vote = row.get("arena")  # of our own page, which also says who answered
    if isinstance(vote, dict) and vote.get("choice") in ("tie", "both_bad"):
        raise Unusable(row, "ties", "a vote without a winner")
    if "prompt" in row:
        asked = _turns(row, "prompt", _user)
    elif "instruction" in row:
        asked = _instructed(row)
    else:  # the prompt's messages, as in LLaMA-Factory's ranking
        asked = _own_messages(row)
    if asked is None:
        chosen, rejected = (
            _with_system(row, _whole_dialogue(row, side)) for side in ("chosen", "rejected")
        )
        asked = chosen[:-1]
    else:
        chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
        asked = _with_system(row, _with_context(row, asked, chosen[:-1]))
    if chosen[:-1] != rejected[:-1]:
        raise _two_prompts(row)
    if not asked or asked[-1]["role"] != "user":
        raise Unusable(row, "turns_out_of_order", "the prompt must end with a message of the user")
    _alternating(row, asked)
    answers = chosen[-1]["content"], rejected[-1]["content"]
    if not isinstance(vote, dict):
        return Pair(asked, *answers)
    return Pair(asked, *answers, unfinished=_unfinished(row), is_vote=True)


def problem_from(row: Row) -> Problem:
    """gsm8k {question, answer}; the answer ends in "#### RESULT", holds \\boxed{RESULT}, says
    "answer: RESULT" at its end, or is the result alone, which may be a number. Raises UserError for
    another schema or type of a field; Unusable for an empty field, or without exactly one result.
    """
    if "question" not in row or "answer" not in row:
        raise _unknown(row, '"question" and "answer"', "reasoning", "question")
    question = _text(row, "question")
    answer = row.get("answer")
    text = str(answer) if isinstance(answer, int | float) else _text(row, "answer")
    try:
        steps, result = solved(text)
    except NoResult as error:
        raise Unusable(row, error.reason, str(error)) from None
    worked = "\n".join(part for part in (steps, f"{MARK}{result}") if part)
    return Problem(question, result, FROM_FILE, worked, {"answer": result})


# --- prompts and answers


def _answering(row: Row, asking: str, *names: str) -> str | None:
    """The first of these fields, if the row has one and the field that asks."""
    return next((name for name in names if asking in row and name in row), None)


def _with_context(row: Row, asked: list[Message], before: list[Message]) -> list[Message]:
    """The whole prompt of a row that gives it twice: by itself, and again in front of the answers.
    By itself it may be all that was said, the first turns or the last."""
    said = [message for message in before if message["role"] != "system"]
    turns = [message for message in asked if message["role"] != "system"]
    n = len(turns)
    if not said or said == turns:
        return before if len(before) > len(asked) else asked
    if n < len(said) and turns in (said[:n], said[-n:]):
        return before
    raise _two_prompts(row)


def _turns(row: Row, name: str, message: Callable[[str], Message]) -> list[Message]:
    """A list of messages, hh-rlhf's text of a dialogue, or a text as one message."""
    if isinstance(row.get(name), list | dict):
        return _messages(row, name)
    return (_split_turns(row, name) if message is _user else None) or [message(_text(row, name))]


def _answer(row: Row, name: str) -> list[Message]:
    """The answer, as the last of a dialogue's messages or alone."""
    if isinstance(row.get(name), list | dict):
        messages = _messages(row, name)
        if not messages or messages[-1]["role"] != "assistant":
            raise row.error(f"{name} must end with a message of the assistant")
        return messages
    turns = _split_turns(row, name) if str(row.get(name)).startswith("\n\n") else None
    return turns if turns and turns[-1]["role"] == "assistant" else [_assistant(_text(row, name))]


def _unfinished(row: Row) -> tuple[str, ...]:
    """Which answers of a vote were cut off."""
    sides = row.get("unfinished") or []
    if not isinstance(sides, list) or not all(side in ("chosen", "rejected") for side in sides):
        raise row.error(f'"unfinished" must be a list of "chosen" and "rejected", got {sides!r}')
    return tuple(sides)


def _whole_dialogue(row: Row, name: str) -> list[Message]:
    is_messages = isinstance(row.get(name), list | dict)
    messages = _messages(row, name) if is_messages else _split_turns(row, name)
    if not messages or messages[0]["role"] == "assistant":
        raise row.error(
            f'{name} has no prompt in it: give "prompt", or a whole dialogue '
            "(\\n\\nHuman: ...\\n\\nAssistant: ...)"
        )
    return _dialogue(row, messages)


def _split_turns(row: Row, name: str) -> list[Message] | None:
    """hh-rlhf's text of a dialogue as messages; None for another text, even one that begins with
    "Human: ". A last open turn is cut."""
    text = _text(row, name)
    _, *parts = TURN.split(text)
    is_dialogue = len(parts) > 2 or str(row.get(name)).startswith("\n\n")
    if not TURN.match(text) or not is_dialogue:
        return None
    turns = [
        (_user if role == "Human" else _assistant)(said.strip())
        for role, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    return turns[:-1] if turns[-1] == _assistant("") else turns


def _instructed(row: Row) -> list[Message]:
    """alpaca's history, and the instruction with its input."""
    text, extra = _text(row, "instruction"), row.get("input")
    if isinstance(extra, dict | list) and extra:
        raise row.error(f'"input" must be a text, got {_kind(extra)}')
    said = "" if extra is None or extra in ({}, []) else _clean(str(extra))
    return [*_history(row), _user(f"{text}\n{said}" if said else text)]


def _history(row: Row) -> list[Message]:
    """alpaca's earlier turns, [[question, answer], ...]."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in history
    ):
        raise row.error('"history" must be a list of [question, answer]')
    messages = [
        m for turn in history for m in (_user(_clean(turn[0])), _assistant(_clean(turn[1])))
    ]
    if not all(message["content"] for message in messages):
        raise _empty(row, "history")
    return messages


# --- messages


def _own_messages(row: Row) -> list[Message] | None:
    names = ("messages", "conversations")
    return next((_messages(row, name) for name in names if name in row), None)


def _messages(row: Row, name: str) -> list[Message]:
    value = row.get(name)
    if isinstance(value, dict):  # one message; or as columns, which `datasets` makes of a sequence
        is_columns = all(isinstance(column, list) for column in value.values())
        if is_columns and len({len(column) for column in value.values()}) > 1:
            raise row.error(f'the columns of "{name}" differ in length')
        rows = zip(*value.values(), strict=True) if is_columns else [value.values()]
        value = [dict(zip(value, fields, strict=True)) for fields in rows]
    if value is None:
        raise _empty(row, name)
    if not isinstance(value, list):
        raise row.error(f'"{name}" must be a list of messages')
    messages = [_message(row, name, item) for item in value]
    return [message for message in messages if message["content"]]  # an empty system text goes


def _message(row: Row, name: str, item: Any) -> Message:
    """{role, content} or {from, value}; content may be OpenAI's parts."""
    if not isinstance(item, dict):
        raise row.error(f'"{name}" must hold objects with role and content')
    role = item.get("role") or item.get("from")
    content = item.get("value") if item.get("content") is None else item["content"]
    lacks = row.error(f'a message in "{name}" lacks a role or a text content')
    if not isinstance(role, str):
        raise lacks
    role = role.strip().lower()
    if item.get("weight") == 0:
        what = "has a message of weight 0, but a record is learned as a whole or not at all"
        raise Unusable(row, "weight_0", f'"{name}" {what}')
    if role in TOOL_ROLES or item.get("tool_calls"):
        raise Unusable(row, "tools", f'"{name}" has the turn of a tool: remove the record')
    if role not in ROLES:
        what = f"unknown role {role[:40]!r}: known are {', '.join(ROLES)}"
        raise Unusable(row, "unknown_role", what)
    if isinstance(content, list):
        content = "\n".join(_part(row, part) for part in content)
    is_text = content is None or isinstance(content, str)
    if not is_text or not item.keys() & {"content", "value"}:
        raise lacks
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
    raise Unusable(row, "not_text", f"a message holds {str(kind)[:40]!r}, but only text is read")


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    """With the row's own system text in front, if the messages have none."""
    has_one = bool(messages) and messages[0]["role"] == "system"
    if has_one or "system" not in row:
        return messages
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise row.error(f'"system" must be a text, got {_kind(system)}')
    text = _clean(system or "")
    return [{"role": "system", "content": text}, *messages] if text else messages


def _dialogue(row: Row, messages: list[Message]) -> list[Message]:
    """Messages that end with the assistant; a last question without an answer is cut."""
    if messages and messages[-1]["role"] == "user":
        messages = messages[:-1]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise Unusable(row, "without_an_answer", "the conversation has no answer of the assistant")
    _alternating(row, messages)
    return messages


def _alternating(row: Row, messages: list[Message]) -> None:
    roles = [m["role"] for m in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * len(turns)
    if turns != expected[: len(turns)]:
        rule = (
            "after an optional system message, user and assistant must take turns, the user first"
        )
        what = f"the roles are {', '.join(roles[:8])}: {rule}"
        raise Unusable(row, "turns_out_of_order", what)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


# --- texts and errors


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise _empty(row, name)
    if not isinstance(value, str):
        raise row.error(f'"{name}" must be a text, got {_kind(value)}')
    return _clean(value)


def _clean(text: str) -> str:
    return LONE_SURROGATE.sub("\ufffd", text.replace("\r\n", "\n")).strip()


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _empty(row: Row, name: str) -> Unusable:
    return Unusable(row, "empty_text", f'"{name}" is empty: fill it or remove the record')


def _two_prompts(row: Row) -> Unusable:
    return Unusable(row, "two_prompts", "chosen and rejected answer different prompts")


def _unknown(row: Row, wanted: str, source: str, name: str) -> UserError:
    said = ", ".join(f'"{field}"' for field in list(row.values)[:8]) or "no fields"
    named = f"data.{source}.columns={{{name}: YOUR_NAME, ...}}"
    return row.error(f"unknown schema ({said}): needs {wanted}; for other names {named}")
