"""How a conversation becomes ids: the texts of its turns, and fixed pieces round them.

The pieces of a Hugging Face chat template are found by rendering conversations of placeholders.
Only pieces are parsed for special tokens; texts never are, so that what a user types stays text.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from fourstage.errors import UserError

Messages = Sequence[Mapping[str, str]]
Encode = Callable[[str], list[int]]
Render = Callable[[Messages, bool], str]  # the bool: whether the assistant is asked to answer

TODAY = datetime(2024, 7, 26)  # for templates that name the day: ids mustn't change overnight
EXCHANGES = (1, 2, 3)  # of the conversations that a template is tried on
PLACEHOLDER = re.compile("\ue000([a-z0-9]+)\ue001")  # private characters, which templates lack

PLAIN_TEMPLATE = (  # of a tokenizer that has none
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- {'system': '', 'user': 'User:\\n', 'assistant': 'Assistant:\\n'}[message['role']] -}}"
    "{{- message['content'] -}}"
    "{{- eos_token if message['role'] == 'assistant' else '' -}}{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class ChatFormat:
    """The ids round the texts of a conversation:

        head TEXT earlier TEXT next TEXT answer TEXT end

    User and assistant take turns; `earlier TEXT next` is there for each exchange before the last.
    """

    head: list[int]
    earlier: list[int]  # between a user text and an answer that is not the last
    next: list[int]  # between such an answer and the next user text
    answer: list[int]  # between the last user text and its answer: prompts end with it
    end: list[int]  # behind the last answer; the first one ends the answer
    # in front of and behind a system text, in place of `head`; None: a system text is put before
    # the first user text, with a blank line between them
    system: tuple[list[int], list[int]] | None = None
    written: int = 0  # ids at the end of `answer` that stock software leaves to the model

    @property
    def shortest_prompt(self) -> int:
        """The length of a prompt with one token of text."""
        return len(self.head) + 1 + len(self.answer)

    def conversation(self, messages: Messages, encode: Encode) -> tuple[list[int], list[int]]:
        """Ids, and a mask of equal length: 1 on tokens with loss. Those are the assistant's texts,
        the token that ends each, and what the model has to write in front of the last."""
        ids, texts = self._begin(messages, encode)
        if len(texts) % 2:
            raise UserError("a conversation must end with a message of the assistant")
        mask = [0] * len(ids)
        for i, text in enumerate(texts):
            said, is_answer, is_last = encode(text), i % 2 == 1, i >= len(texts) - 2
            ids += said
            mask += [int(is_answer)] * len(said)
            if is_answer:
                gap = self.end if is_last else self.next
                ends = int(gap[:1] == self.end[:1])
                mask += [ends] * ends + [0] * (len(gap) - ends)
            else:
                gap = self.answer if is_last else self.earlier
                written = self.written if is_last else 0
                mask += [0] * (len(gap) - written) + [1] * written
            ids += gap
        return ids, mask

    def prompt(self, messages: Messages, encode: Encode) -> list[int]:
        """Ids of a conversation that ends with the user, up to the answer."""
        if not messages or messages[-1]["role"] != "user":
            raise UserError("a prompt must end with a message of the user")
        ids, texts = self._begin(messages, encode)
        for i, text in enumerate(texts):
            is_last = i == len(texts) - 1
            gap = self.next if i % 2 else self.answer if is_last else self.earlier
            ids += [*encode(text), *gap]
        return ids

    def shorten(self, ids: list[int], length: int) -> list[int] | None:
        """A prompt's ids, without the beginning of its text if longer; None if no text fits."""
        if len(ids) <= length:
            return ids
        if length < self.shortest_prompt:
            return None
        return self.head + ids[len(ids) - (length - len(self.head)) :]

    def _begin(self, messages: Messages, encode: Encode) -> tuple[list[int], list[str]]:
        """The ids in front of the first user text, and the texts of user and assistant in turn.
        Raises UserError for roles in another order than [system,] user, assistant, user, ..."""
        turns = [(message["role"], message["content"]) for message in messages]
        head = list(self.head)
        if turns and turns[0][0] == "system":
            if len(turns) < 2 or turns[1][0] != "user":
                raise UserError("a system message must be followed by a message of the user")
            said = turns.pop(0)[1]
            if self.system is None:
                turns[0] = ("user", f"{said}\n\n{turns[0][1]}")
            else:
                before, behind = self.system
                head = [*before, *encode(said), *behind]
        if not turns:
            raise UserError("a conversation needs at least one message")
        for i, (role, _) in enumerate(turns):
            expected = ("user", "assistant")[i % 2]
            if role != expected:
                raise UserError(
                    f"message {i + 1} of a conversation has the role '{role}', expected "
                    f"'{expected}' (user and assistant take turns, the user first)"
                )
        return head, [text for _, text in turns]


# --- taking a chat template apart


def template_format(
    render: Render,
    encode: Encode,
    is_special: Callable[[int], bool],
    eos_ids: Sequence[int],
) -> ChatFormat:
    """The format of a chat template. `encode` is of text with special tokens in it.

    The answer ends with the special token that the template puts behind it. Where there is none,
    it ends with the token that begins the next turn, if that is one of `eos_ids`, else the first
    of these is put behind the last answer.

    Raises UserError for a template that does more than put fixed pieces round the texts.
    """
    literals = {
        (n, asks): _literals(render, n, asks, with_system=False)
        for n in EXCHANGES
        for asks in (False, True)
    }
    head, earlier, following, _, _, last, end = literals[max(EXCHANGES), False]
    asked = literals[1, True][-1]
    if not (last.startswith(asked) or asked.startswith(last)):
        _refuse(f"it begins answers with {last!r} but asks for them with {asked!r}")
    system = _system_literals(render)

    def expected(n: int, asks: bool, begin: list[str]) -> list[str]:
        middle = [earlier, following] * (n - 1)
        return [*begin, *middle, *([asked] if asks else [last, end])]

    for (n, asks), found in literals.items():
        same = found == expected(n, asks, [head])
        if same and system is not None:
            same = _literals(render, n, asks, with_system=True) == expected(n, asks, system)
        if not same:
            _refuse(f"a conversation of {n} exchanges has other pieces than one of 3")

    rest = last.removeprefix(asked) if last.startswith(asked) else ""
    written, next_ids, end_ids = encode(rest), encode(following), encode(end)
    if not end_ids or not is_special(end_ids[0]):
        if any(map(is_special, end_ids)):
            _refuse(f"it puts text between an answer and its end: {end!r}")
        end_ids = [next_ids[0] if next_ids[:1] and next_ids[0] in eos_ids else eos_ids[0]]
    return ChatFormat(
        head=encode(head),
        earlier=encode(earlier),
        next=next_ids,
        answer=[*encode(asked), *written],
        end=end_ids,
        system=None if system is None else (encode(system[0]), encode(system[1])),
        written=len(written),
    )


def renderer(template: str, names: Mapping[str, str]) -> Render:
    """A chat template as transformers renders it; `names` are bos_token, eos_token and the like.
    Raises UserError for a broken template."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    try:
        compiled = environment.from_string(template)
    except jinja2.TemplateError as error:
        _refuse(str(error))

    def render(messages: Messages, asks: bool) -> str:
        return compiled.render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=asks,
            enable_thinking=False,
            tools=None,
            documents=None,
            **names,
        )

    return render


def _generation_tag() -> type:
    """Jinja's extension for {% generation %}, with which some templates mark answers."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _literals(render: Render, n: int, asks: bool, with_system: bool) -> list[str]:
    """What stands in front of, between and behind the texts of n exchanges, the last one without
    its answer if the assistant `asks` for it."""
    turns = [(role, f"{role[0]}{i}") for i in range(n) for role in ("user", "assistant")]
    turns = [("system", "s")] * with_system + (turns[:-1] if asks else turns)
    messages = [{"role": role, "content": f"\ue000{name}\ue001"} for role, name in turns]
    try:
        found = PLACEHOLDER.split(render(messages, asks))
    except Exception as error:  # a template is someone else's program
        _refuse(str(error) or repr(error))
    if found[1::2] != [name for _, name in turns]:
        _refuse("it doesn't write each text once and in order")
    return found[::2]


def _system_literals(render: Render) -> list[str] | None:
    """The pieces in front of and behind a system text; None if the template refuses or ignores it
    (then it joins the first user text)."""
    messages = [{"role": "system", "content": "\ue000s\ue001"}]
    messages += [{"role": "user", "content": "\ue000u0\ue001"}]
    try:
        has_system = "\ue000s\ue001" in render(messages, True)
    except Exception:  # as Gemma's: "System role not supported"
        return None
    return _literals(render, 1, True, with_system=True)[:2] if has_system else None


def _refuse(why: str) -> NoReturn:
    raise UserError(
        f"the chat template can't be used ({why.splitlines()[0]}): give the tokenizer a simpler "
        "one, or take chat_template out for a plain one"
    ) from None
