"""Talk to the model of any stage.

    python -m fourstage chat                       talk to the furthest stage trained so far
    python -m fourstage chat run=sft               another: a stage, an id, <stage>-<id>, a folder
    python -m fourstage chat run=sft prompt="Hi"   print one answer and nothing else

Other settings: temperature=0.7 (0: greedy), top_k=0, top_p=1, max_new_tokens=200, seed=0,
history=1 (earlier exchanges that the model sees; the demo's sft has no longer conversations),
outputs=outputs. Type /help while talking. run=random is the same model with untrained weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fourstage.errors import UserError
from fourstage.interruptions import run_command
from fourstage.ladder import LADDER, stages
from fourstage.settings import MOST_SEED, Bounded, at_least, between, from_arguments

if TYPE_CHECKING:  # PyTorch is imported when a model is needed, so that --help is quick
    from fourstage.sampling.generate import Sampling
    from fourstage.tokenizer import Tokenizer

PARTIAL = "\ufffd"  # how decoding shows a character whose bytes aren't all there
HELP = """\
/stage NAME  talk to another run: random, pretrain, sft, ppo, grpo, an id or a folder
/reset       forget the conversation
/help        this list
/quit        end (so do Ctrl-D and Ctrl-C; Ctrl-C during an answer ends the answer)"""


@dataclass(frozen=True, kw_only=True)
class ChatSettings(Bounded):
    """The command line."""

    run: str = ""  # empty: the furthest stage
    prompt: str | None = None
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = at_least(1, default=200)
    history: int = at_least(0, default=1)
    seed: int = between(0, MOST_SEED, default=0)
    outputs: str = "outputs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and not self.prompt.strip():
            raise UserError("prompt: it is empty: leave out prompt= to talk, or ask something")


@dataclass(frozen=True)
class Voice:
    """A model to talk to; `speak` streams the answer ids to prompt ids, drawn from a seed."""

    name: str
    tokenizer: Tokenizer
    max_seq_len: int
    speak: Callable[[list[int], int], Iterator[int]]


@dataclass
class Chat:
    """A conversation with one voice; `open_voice` finds another by its run's name."""

    settings: ChatSettings
    voice: Voice
    open_voice: Callable[[str], Voice]
    messages: list[dict[str, str]] = field(default_factory=list)
    turns: int = 0  # answers so far: each has a seed of its own

    def answer(self, text: str) -> Iterator[str]:
        """Streams the answer to `text` and adds both to the conversation. The model sees its last
        `history` exchanges, or as many as its context holds. Raises UserError if `text` alone
        outgrows that."""
        earlier = self.messages[-2 * self.settings.history :] if self.settings.history else []
        messages = [*earlier, {"role": "user", "content": text}]
        tokenizer = self.voice.tokenizer
        room = self.voice.max_seq_len - self.settings.max_new_tokens
        while len(prompt := tokenizer.prompt(messages)) > room and len(messages) > 1:
            messages = messages[2:]
        ids: list[int] = []
        whole = said = ""
        try:
            for token in self.voice.speak(prompt, self.settings.seed + self.turns):
                ids.append(token)
                whole = tokenizer.decode(ids)
                ready = whole.rstrip(PARTIAL)  # the next token may complete a character
                if len(ready) > len(said):
                    yield ready[len(said) :]
                    said = ready
            yield whole[len(said) :]
        finally:  # an interrupted answer counts as far as it got
            if ids:
                self.messages = [*messages, {"role": "assistant", "content": whole}]
                self.turns += 1

    def reset(self) -> None:
        self.messages, self.turns = [], 0

    def warning(self, text: str) -> str:
        """How many characters of `text` the model doesn't see; "" if it sees all."""
        tokenizer = self.voice.tokenizer
        unknown = tokenizer.count_unknown(tokenizer.encode(text))
        what, verb = ("character", "was") if unknown == 1 else ("characters", "were")
        return f"{unknown} {what} unknown to the tokenizer {verb} replaced" if unknown else ""

    def reply(self, line: str) -> Iterator[str]:
        """What to print for a line: a command's message, or the answer. Raises UserError."""
        if line.startswith("/"):
            yield self.command(line)
            return
        if warning := self.warning(line):
            yield f"({warning})\n"
        yield from self.answer(line)

    def command(self, line: str) -> str:
        """Carry out a line that begins with a slash; returns what to print. Raises UserError."""
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


def converse(chat: Chat, read: Callable[[], str], write: Callable[[str], None]) -> None:
    """Answer lines until /quit, or until `read` raises EOFError or KeyboardInterrupt."""
    try:
        write(f"({chat.voice.name}; /help for commands)\n")
        while (line := read().strip()) not in ("/quit", "/exit"):
            if not line:
                continue
            try:
                for piece in chat.reply(line):
                    write(piece)
            except UserError as error:
                write(f"error: {error}")
            except KeyboardInterrupt:  # ends the answer, not the chat
                write(" (stopped)")
            write("\n")
    except (EOFError, KeyboardInterrupt):
        write("\n")


def start(settings: ChatSettings) -> Chat:
    """A chat with a real model."""
    import torch

    torch.set_flush_denormal(True)
    sampling(settings, stop_id=0)  # refuses what is out of range before anything is loaded
    return Chat(settings, load_voice(settings, settings.run), partial(load_voice, settings))


def sampling(settings: ChatSettings, stop_id: int, seed: int = 0) -> Sampling:
    """How the answers are drawn. Raises UserError for a value out of range."""
    from fourstage.sampling.generate import Sampling

    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    chosen = {name: getattr(settings, name) for name in names}
    return Sampling(stop_id=stop_id, seed=seed, **chosen)


def load_voice(settings: ChatSettings, name: str) -> Voice:
    """The language model of a finished run, "" for the furthest stage, or "random". Raises
    UserError if there is no such run, or if it holds no language model."""
    import torch

    from fourstage.model import Transformer
    from fourstage.model.weights import load_policy
    from fourstage.runs.store import find_run
    from fourstage.sampling.generate import stream

    outputs = Path(settings.outputs)
    folder = furthest(outputs) if name in ("", "random") else find_run(outputs, name)
    model, tokenizer = load_policy(folder)
    shown = folder.name
    if name == "random":
        torch.manual_seed(settings.seed)
        model = Transformer(model.config, tokenizer.vocab_size)
        shown = f"untrained {model.config.name}"
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    def speak(prompt: list[int], seed: int) -> Iterator[int]:
        return stream(model, prompt, sampling(settings, tokenizer.eot_id, seed))

    return Voice(shown, tokenizer, model.config.max_seq_len, speak)


def furthest(outputs: Path) -> Path:
    """The latest finished run of the furthest stage that leaves a language model."""
    from fourstage.runs.store import find_run

    first, *others = [stage for stage in stages() if LADDER[stage].leaves == "policy"]
    for stage in reversed(others):
        with suppress(UserError):
            return find_run(outputs, stage)
    return find_run(outputs, first)


def main(arguments: list[str]) -> None:
    settings = from_arguments(ChatSettings, arguments)
    chat = start(settings)

    def write(text: str) -> None:
        print(text, end="", flush=True)

    if settings.prompt is None:
        with suppress(ImportError):
            import readline  # noqa: F401  line editing and history in input()
        converse(chat, lambda: input("> "), write)
        return
    if warning := chat.warning(settings.prompt):
        print(warning, file=sys.stderr)
    for piece in chat.answer(settings.prompt):
        write(piece)
    write("\n")


if __name__ == "__main__":
    run_command(main)
