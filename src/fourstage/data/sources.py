"""Which stage reads which source, the digests of their contents, and the sample prompts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fourstage.data.chat import load_chat
from fourstage.data.config import DataConfig
from fourstage.data.corpus import load_corpus
from fourstage.data.identity import commits, held_out, is_fetched, made_from
from fourstage.data.knowledge import known_answers
from fourstage.data.preference import load_preference, load_prompts
from fourstage.data.reasoning import load_reasoning
from fourstage.data.records import Message, Problem, Split
from fourstage.errors import UserError
from fourstage.ladder import LADDER

QUESTIONS = (
    "What is an LLM?",
    "Explain RoPE.",
    "What is GRPO?",
    "What does len do?",
    "Hello, how are you?",
)
PROBLEMS = 3
LOAD: dict[str, Callable[[DataConfig], Split[Any] | None]] = {
    "corpus": load_corpus,
    "chat": load_chat,
    "preference": load_preference,
    "reasoning": load_reasoning,
}


def digest(config: DataConfig, stage: str) -> str:
    """12 hexadecimal digits of the content of the one source that a stage reads.

    That is only the prompts if preferences are sampled, or only prompts are needed. Where a set on
    the hub is used, they are of what the source is made from, and nothing is fetched.

    Raises:
        UserError: the source is missing or its file is bad.
    """
    if waits(config, stage):
        return made_from(config, LADDER[stage].source)
    source = None if LADDER[stage].from_prompts else _read(config, stage)
    return (load_prompts(config) if source is None else source).digest


def waits(config: DataConfig, stage: str) -> bool:
    """Whether a stage's data is only read when the stage is prepared, as it is on the hub."""
    return is_fetched(config, LADDER[stage].source)


def fetched(config: DataConfig, stage: str) -> dict[str, Any]:
    """For the record of a stage whose data's digest doesn't show it: {"heldout": digits of what is
    taken out of the data, "hub": the commit of each set}."""
    held = held_out(config) if waits(config, stage) else None
    at = commits(config, LADDER[stage].source)
    return {**({"heldout": held} if held else {}), **({"hub": at} if at else {})}


def other_source(config: DataConfig, record: Mapping[str, Any]) -> str | None:
    """Why the run of a record would train on other data under this config; None if on the same.

    A text that was read under another config may hold what this one holds out.
    """
    stage = record["stage"]
    name = LADDER[stage].source
    if record.get("data", {}).get("digest") == "":  # a checkpoint as it is, which read none
        return None
    try:
        now = digest(config, stage)
    except UserError:
        return f"there is no {name} to compare with its own (data.{name}.path names one)"
    before = record.get("data", {})
    if now != before.get("digest", now):  # missing in older records
        return f"its {name} is another than it was trained on"
    if fetched(config, stage).get("heldout") != before.get("heldout"):
        return f"other held-out prompts were taken out of its {name}"
    return None


def left_out(config: DataConfig, stage: str) -> dict[str, int]:
    """What of a stage's source was left out when it was read: {reason: items}."""
    source = _read(config, stage)
    return {name: count for name, count in source.notes.items() if count} if source else {}


def kept(config: DataConfig, stage: str) -> int:
    """The items of a stage's source on both sides of the split."""
    source = _read(config, stage)
    return len(source.train) + len(source.heldout) if source else 0


def _read(config: DataConfig, stage: str) -> Split[Any] | None:
    """The source of a stage; None for preferences that are sampled."""
    return LOAD[LADDER[stage].source](config)


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt that every stage answers, and what is known of the right answer."""

    id: str
    messages: list[Message]
    references: tuple[str, ...] = ()  # sentences of which a right answer contains one
    problem: Problem | None = None


def sample_prompts(config: DataConfig) -> list[SamplePrompt]:
    """Fixed prompts that every stage answers, "What is an LLM?" first.

    Questions, then held-out problems of different tasks if there are problems.
    """
    known = known_answers(config)
    prompts = [
        SamplePrompt(f"question-{i}", [{"role": "user", "content": text}], known.get(text, ()))
        for i, text in enumerate(QUESTIONS, start=1)
    ]
    if not config.reasoning.has_problems:
        return prompts
    heldout = load_reasoning(config).heldout
    one_a_task = list({p.task: p for p in reversed(heldout)}.values())[::-1]
    others = [p for p in heldout if p not in one_a_task]
    problems = [*one_a_task, *others][:PROBLEMS]
    return prompts + [
        SamplePrompt(f"problem-{i}", p.prompt_messages, problem=p)
        for i, p in enumerate(problems, start=1)
    ]
