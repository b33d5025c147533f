"""Talk to the model of any stage.

    python -m fourstage chat                       talk to the furthest stage trained so far
    python -m fourstage chat run=sft               another: a stage, an id, <stage>-<id>, a folder
    python -m fourstage chat run=sft prompt="Hi"   print one answer and nothing else

Other settings: temperature=0.7 (0: the likeliest), top_k=0, top_p=1, max_new_tokens=200, seed=0,
outputs=outputs. Type /help while talking. run=random is the same model with untrained weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from fourstage.errors import UserError
from fourstage.interruptions import run_command
from fourstage.ladder import LADDER, stages
from fourstage.settings import build

if TYPE_CHECKING:  # PyTorch is imported when a model is needed, so that --help is quick
    from fourstage.model import Transformer
    from fourstage.tokenizer import Tokenizer

HELP = """\
/stage NAME  talk to another run: random, pretrain, sft, ppo, grpo, an id or a folder
/reset       forget the conversation
/help        this list
/quit        end (so do Ctrl-D and Ctrl-C; Ctrl-C during an answer ends the answer)"""


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """The command line."""

    run: str = ""  # empty: the furthest stage
    prompt: str | None = None
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 200
    seed: int = 0
    outputs: str = "outputs"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed: must be between 0 and {2**32 - 1}, got {self.seed}")
        if self.prompt is not None and not self.prompt.strip():
            raise UserError("prompt: it is empty: leave prompt= out to talk, or ask something")


def parse(arguments: list[str]) -> ChatSettings:
    """key=value arguments. Raises UserError for an unknown key or a value of the wrong type."""
    kinds = {f.name: f.type for f in fields(ChatSettings)}
    values: dict[str, object] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r}: expected key=value, such as run=sft (see --help)")
        values[key] = text
        with suppress(ValueError):  # build says what was expected
            if kinds.get(key) in ("int", "float"):
                values[key] = int(text) if kinds[key] == "int" else float(text)
    return build(ChatSettings, values, "")


@dataclass(frozen=True)
class Voice:
    """A model that can be talked to."""

    name: str
    model: Transformer
    tokenizer: Tokenizer
    max_seq_len: int


Speak = Callable[[Voice, list[int], int], Iterator[int]]  # prompt ids and a seed -> answer ids


@dataclass
class Chat:
    """A conversation with one voice; `open_voice` finds another, `speak` lets it answer."""

    settings: ChatSettings
    voice: Voice
    open_voice: Callable[[str], Voice]
    speak: Speak
    messages: list[dict[str, str]] = field(default_factory=list)
    turns: int = 0  # answers so far, so that each draws from other random numbers

    def answer(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece, which then is part of the conversation.

        The oldest exchanges are forgotten when the conversation outgrows the model's context.
        Raises UserError where `text` alone does.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        tokenizer = self.voice.tokenizer
        room = self.voice.max_seq_len - self.settings.max_new_tokens
        while len(prompt := tokenizer.prompt(messages)) > room and len(messages) > 1:
            messages = messages[2:]
        ids: list[int] = []
        said = ""
        try:
            for token in self.speak(self.voice, prompt, self.settings.seed + self.turns):
                ids.append(token)
                whole = tokenizer.decode(ids)
                yield whole[len(said) :]
                said = whole
        finally:  # a stopped answer counts as far as it went
            if ids:
                self.messages = [*messages, {"role": "assistant", "content": said}]
                self.turns += 1

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages, self.turns = [], 0

    def unknown(self, text: str) -> int:
        """How many characters of `text` the tokenizer does not know."""
        tokenizer = self.voice.tokenizer
        return tokenizer.count_unknown(tokenizer.encode(text))

    def command(self, line: str) -> str:
        """Carry out a line that begins with a slash; returns what to print.

        Raises UserError for an unknown command or run.
        """
        name, _, rest = line.partition(" ")
        match name, rest.strip():
            case "/help", "":
                return HELP
            case "/reset", "":
                self.reset()
                return "(a new conversation)"
            case "/stage", run if run:
                self.voice = self.open_voice(run)
                self.reset()
                return f"({self.voice.name}, a new conversation)"
            case "/stage", "":
                raise UserError("/stage: name a stage or a run, as in /stage sft")
        raise UserError(f"unknown command {line!r}: /help lists them")


def replaced(unknown: int) -> str:
    """What the model does not see of a prompt."""
    what = "1 character" if unknown == 1 else f"{unknown} characters"
    return f"{what} unknown to the tokenizer {'was' if unknown == 1 else 'were'} replaced"


def converse(chat: Chat, read: Callable[[], str], write: Callable[[str], None]) -> None:
    """Lines from `read` to answers, until /quit, or read raises EOFError or KeyboardInterrupt."""
    try:
        write(f"({chat.voice.name}; /help for commands)\n")
        while True:
            line = read().strip()
            if line in ("/quit", "/exit"):
                return
            if line:
                respond(chat, line, write)
                write("\n")
    except (EOFError, KeyboardInterrupt):
        write("\n")


def respond(chat: Chat, line: str, write: Callable[[str], None]) -> None:
    """One line of the user to what is written for it; Ctrl-C ends the answer, not the chat."""
    try:
        if line.startswith("/"):
            write(chat.command(line))
            return
        if unknown := chat.unknown(line):
            write(f"({replaced(unknown)})\n")
        for piece in chat.answer(line):
            write(piece)
    except UserError as error:
        write(f"error: {error}")
    except KeyboardInterrupt:
        write(" (stopped)")


# --- real models


def load_voice(outputs: Path, name: str, seed: int) -> Voice:
    """The language model of a finished run, "" for the furthest stage, or "random".

    Raises UserError where there is no such run, or where it holds no language model.
    """
    import torch

    from fourstage.model import Transformer
    from fourstage.model.weights import load_policy
    from fourstage.runs.store import find_run

    folder = furthest(outputs) if name in ("", "random") else find_run(outputs, name)
    model, tokenizer = load_policy(folder)
    if name == "random":
        torch.manual_seed(seed)
        model = Transformer(model.config, tokenizer.vocab_size)
    shown = f"untrained {model.config.name}" if name == "random" else folder.name
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return Voice(shown, model, tokenizer, model.config.max_seq_len)


def furthest(outputs: Path) -> Path:
    """The latest finished run of the furthest stage that writes text."""
    from fourstage.runs.store import find_run

    first, *others = [stage for stage in stages() if LADDER[stage].leaves == "policy"]
    for stage in reversed(others):
        with suppress(UserError):
            return find_run(outputs, stage)
    return find_run(outputs, first)


def start(settings: ChatSettings) -> Chat:
    """A chat with a real model."""
    import torch

    from fourstage.sampling.generate import Sampling, stream

    torch.set_flush_denormal(True)
    options = {
        name: getattr(settings, name)
        for name in ("max_new_tokens", "temperature", "top_k", "top_p")
    }
    Sampling(stop_id=0, **options)  # refuses what is out of range before anything is loaded

    def open_voice(name: str) -> Voice:
        return load_voice(Path(settings.outputs), name, settings.seed)

    def speak(voice: Voice, prompt: list[int], seed: int) -> Iterator[int]:
        sampling = Sampling(stop_id=voice.tokenizer.eot_id, seed=seed, **options)
        return stream(voice.model, prompt, sampling)

    return Chat(settings, open_voice(settings.run), open_voice, speak)


def main(arguments: list[str]) -> None:
    """The command. Raises UserError for what the user did wrong."""
    settings = parse(arguments)
    chat = start(settings)

    def write(text: str) -> None:
        print(text, end="", flush=True)

    if settings.prompt is None:
        with suppress(ImportError):
            import readline  # noqa: F401  line editing and history in input()
        converse(chat, lambda: input("> "), write)
        return
    if unknown := chat.unknown(settings.prompt):
        print(replaced(unknown), file=sys.stderr)
    for piece in chat.answer(settings.prompt):
        write(piece)
    write("\n")


if __name__ == "__main__":
    run_command(main)
