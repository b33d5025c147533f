"""The typed form of conf/data/*.yaml: every data config has these keys."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from fourstage.data.files import Paths, files_of
from fourstage.data.hub import HubSplit, on_hub, splits
from fourstage.errors import UserError
from fourstage.settings import Bounded, at_least, between, share

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Bounded):
    """What every source has: a user's files, each a path or a list of them; or a set on the hub,
    hf:OWNER/NAME, which has the four settings from `revision` on."""

    path: Paths | None = None
    heldout_path: Paths | None = None
    columns: dict[str, str] | None = None  # {name in the schema: name in the user's files}
    revision: str | None = None  # a commit
    subset: str | list[str] | None = None
    split: str | None = None
    heldout_split: str | None = None
    max_records: int | None = at_least(1, default=None)  # the first usable ones of each side

    def __post_init__(self) -> None:
        super().__post_init__()
        if on_hub(self.heldout_path):
            raise UserError("heldout_path: expected files; of a set on the hub, set heldout_split")
        if on_hub(self.path):
            if self.heldout_path is not None and self.heldout_split is not None:
                raise UserError("heldout_split: heldout_path is given too: leave one of them out")
            self.on_hub(heldout=False)
            return
        for name in ("revision", "subset", "split", "heldout_split"):
            if getattr(self, name) is not None:
                raise UserError(f"{name}: only for a set on the hub (path=hf:OWNER/NAME)")

    def on_hub(self, heldout: bool) -> HubSplit | None:
        """The split on the hub that this side of the source is; None if it isn't on the hub."""
        if not on_hub(self.path):
            return None
        assert isinstance(self.path, str)
        named = (self.revision, self.subset, self.split, self.heldout_split)
        train, held = splits(self.path, *named)
        return train if not heldout else held if self.heldout_path is None else None

    def splits(self) -> list[HubSplit]:
        """The splits on the hub that the source has."""
        return [split for held in (False, True) if (split := self.on_hub(held)) is not None]

    @property
    def has_heldout(self) -> bool:
        """True if the held-out side is given, rather than split off."""
        return self.heldout_path is not None or self.on_hub(heldout=True) is not None

    @property
    def local_paths(self) -> list[Paths]:
        """The paths that aren't on the hub."""
        return [p for p in (self.path, self.heldout_path) if p is not None and not on_hub(p)]


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(SourceConfig):
    """Text for pretrain; its last `heldout` is held out by position, records by their hash."""

    heldout: float = share(default=0.1)
    problems: int = at_least(0, default=0)  # worked train problems as documents, at most
    # share of the language reference's topics, without a path
    reference: float = between(0, 1, default=1.0)
    max_tokens: int | None = at_least(1, default=None)  # to train on: the first ones
    max_heldout: int | None = at_least(1, default=2_000_000)  # characters


@dataclass(frozen=True, kw_only=True)
class ChatConfig(SourceConfig):
    """Conversations for sft."""

    max_answer_chars: int | None = at_least(1, default=None)  # longer ones are left out
    max_prompt_chars: int | None = at_least(1, default=None)
    demonstrations: int = at_least(0, default=0)  # worked train problems, at most
    # task -> share of its demonstrations that give the answer without the steps
    terse: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for task, part in self.terse.items():
            if not 0 <= part <= 1:
                raise UserError(f"terse.{task}: must be a share between 0 and 1, got {part}")


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(SourceConfig):
    """Preference pairs; without a path, data=embedded samples them from the sft model."""


@dataclass(frozen=True, kw_only=True)
class ReasoningConfig(SourceConfig):
    """Problems: a file, or without one `size` and `heldout_size` from tasks of reasoning-gym.

    A task has its keyword arguments, and may have `weight`, its part of both sizes (1). `only`
    takes the place of `tasks`: names, whose arguments are those in `tasks`, or {name: arguments},
    or one name.
    """

    tasks: dict[str, Any] = field(default_factory=dict)
    only: list[Any] | dict[str, Any] | str | None = None
    size: int = at_least(1, default=4000)
    heldout_size: int = at_least(1, default=400)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.only is None:
            return
        if self.path is not None:
            raise UserError(
                "only: the problems come from data.reasoning.path: leave one of them out"
            )
        if not (self.only and all(isinstance(entry, str | dict) for entry in self._named)):
            raise UserError(
                "only: expected tasks of reasoning-gym, [NAME, ...] or {NAME: {ARGUMENT: VALUE}}, "
                f"got {self.only!r}"
            )

    @property
    def _named(self) -> list[Any]:
        return self.only if isinstance(self.only, list) else [self.only]

    @property
    def where(self) -> str:
        """The key that names the tasks, for messages."""
        return "data.reasoning.tasks" if self.only is None else "data.reasoning.only"

    @property
    def chosen(self) -> dict[str, Any]:
        """{task: arguments} of the tasks that problems are drawn from."""
        if self.only is None:
            return self.tasks
        chosen: dict[str, Any] = {}
        for entry in self._named:
            named = entry if isinstance(entry, dict) else {entry: self.tasks.get(entry, {})}
            chosen |= {str(task): settings or {} for task, settings in named.items()}
        return chosen

    @property
    def has_problems(self) -> bool:
        return self.path is not None or bool(self.chosen)


@dataclass(frozen=True, kw_only=True)
class KnowledgeConfig(Bounded):
    """Facts for corpus and chat (knowledge.py): how many, and how often they are stated."""

    terms: int = at_least(0, default=0)  # of docs/glossary.md
    functions: int = at_least(0, default=0)  # of Python, by their docstrings
    heldout: float = share(default=0.25)  # share of the facts that nothing asks about
    statements: int = at_least(0, default=40)  # of each fact in the corpus
    answers: int = at_least(0, default=10)  # of each of the others: answered questions in it

    @property
    def has_facts(self) -> bool:
        return self.terms + self.functions > 0


@dataclass(frozen=True, kw_only=True)
class DataConfig(Bounded):
    """One data config. All sources hold out the same share of prompts and problems, so that none
    trains on what another holds out."""

    name: str
    heldout: float = share(default=0.1)
    corpus: CorpusConfig
    chat: ChatConfig
    preference: PreferenceConfig
    reasoning: ReasoningConfig
    knowledge: KnowledgeConfig = field(default_factory=KnowledgeConfig)
    # folder of mirrors of sets on the hub, OWNER/NAME in it; they are the same sets
    root: str | None = field(default=None, compare=False)

    @property
    def embedded(self) -> bool:
        """True if sources without a path come from installed packages."""
        return self.name == "embedded"

    def check_given(self, source: str) -> None:
        """Raise UserError if a stage's source is neither named nor built in."""
        has_chats = self.chat.path or (self.embedded and self.knowledge.has_facts)
        problems = "data.reasoning.path=FILE (a file in gsm8k's schema)"
        needs = {
            "corpus": (
                self.corpus.path or self.embedded,
                "stages.pretrain needs data.corpus.path=FILE (text to learn from)",
            ),
            "chat": (
                has_chats,
                "stages.sft needs data.chat.path=FILE (conversations to learn from)"
                + ", or facts to ask about (data.knowledge.terms and functions)" * self.embedded,
            ),
            "preference": (
                self.preference.path or self.has_hidden_rule,
                "stages.reward and stages.ppo need data.preference.path=FILE "
                "(prompts with a chosen and a rejected answer)",
            ),
            "reasoning": (self.reasoning.has_problems, f"stages.grpo needs {problems}"),
        }
        is_given, message = needs[source]
        if not is_given:
            raise UserError(message)
        takes = (source == "corpus" and self.corpus.problems) or (
            source == "chat" and self.chat.demonstrations
        )
        if takes and not self.reasoning.has_problems:
            raise UserError(
                "data.corpus.problems and data.chat.demonstrations take problems from the "
                f"reasoning source: give {problems}, or "
                "data.corpus.problems=0 data.chat.demonstrations=0"
            )

    @property
    def title(self) -> str:
        """The config's name, and which of the embedded sources come from files instead."""
        own = [name for name, source in vars(self).items() if getattr(source, "path", None)]
        return f"{self.name} with files of {', '.join(own)}" if self.embedded and own else self.name

    @property
    def has_hidden_rule(self) -> bool:
        """True if preferences come from the hidden rule rather than a user's own pairs."""
        return self.embedded and self.preference.path is None

    def fingerprint(self, *names: str) -> tuple[Any, ...]:
        """Changes with the settings or files of the named sources."""
        chosen = [getattr(self, name) for name in names]
        sources = [source for source in chosen if isinstance(source, SourceConfig)]
        named = [path for source in sources for path in source.local_paths]
        stats = [Path(file).stat() for path in named for file in files_of(path)]
        files = [(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats]
        return self.name, self.root, self.heldout, repr(chosen), *files


def cached(*names: str) -> Callable[[Callable[[DataConfig], T]], Callable[[DataConfig], T]]:
    """Load a source once a process, until the settings or files that it reads change."""

    def decorate(load: Callable[[DataConfig], T]) -> Callable[[DataConfig], T]:
        kept: dict[tuple[Any, ...], T] = {}

        @wraps(load)
        def loader(config: DataConfig) -> T:
            key = config.fingerprint(*names)
            if key not in kept:
                kept[key] = load(config)
            return kept[key]

        return loader

    return decorate
