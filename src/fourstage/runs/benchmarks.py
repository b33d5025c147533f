"""benchmark.json in a run's folder: what public benchmarks say of its model.

What a ladder starts from has its results in benchmark_random.json of the first stage's run.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from fourstage.files import locked, read_json, write_json
from fourstage.settings import build

FILE, START_FILE = "benchmark.json", "benchmark_random.json"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One metric of one task, as lm-eval measured it.

    filter: how the answer was read off what the model said. n: items; truncated: those of them
    whose prompt the context doesn't hold whole. subtasks: of how many tasks a group's value is the
    mean. max_gen_toks: the limit of a generated answer.
    low, high: the 95 % interval, 1.96 stderr wide on each side, None where lm-eval has no standard
    error, which `why` says.
    chance: what guessing gives, None if that isn't known. is_share: between 0 and 1.
    """

    task: str
    version: str
    metric: str
    filter: str
    n: int
    few_shot: int | None
    chat_template: bool
    limit: int | None
    value: float | None
    low: float | None
    high: float | None
    chance: float | None
    better: Literal["higher", "lower"] | None
    is_share: bool
    stderr: float | None = None
    truncated: int = 0
    subtasks: int | None = None
    max_gen_toks: int | None = None
    why: str | None = None

    @property
    def key(self) -> str:
        """benchmark/<task>/<metric>, with what it must not be confused with another by."""
        parts = (
            f",{self.filter}" * (self.filter != "none"),
            f"/{self.few_shot}-shot" * bool(self.few_shot),
            f"/limit {self.limit}" * (self.limit is not None),
        )
        return f"benchmark/{self.task}/{self.metric}{''.join(parts)}"

    @property
    def cell(self) -> dict[str, float | int | None]:
        """The figures, as metrics of the suite have them; with what guessing gives."""
        names = ("value", "n", "low", "high", "chance")
        return {name: getattr(self, name) for name in names}

    @property
    def shown_metric(self) -> str:
        """The metric for readers."""
        return self.metric + f" ({self.filter})" * (self.filter != "none")

    @property
    def measured(self) -> str:
        """The value and its interval for readers: 31.5 % [24.7, 38.3]."""
        if self.low is None or self.high is None:
            return self.shown(self.value)
        low, high = (self.shown(end).removesuffix(" %") for end in (self.low, self.high))
        return f"{self.shown(self.value)} [{low}, {high}]"

    @property
    def guessed(self) -> str:
        """What guessing gives, for readers."""
        return self.shown(self.chance)

    def shown(self, value: float | None) -> str:
        """A value of this metric for readers."""
        if value is None:
            return "?"
        return f"{100 * value:.1f} %" if self.is_share else f"{value:.4g}"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What the file holds: results of one version of lm-eval."""

    lm_eval: str
    tasks: list[Benchmark]


def parse_benchmarks(content: Any) -> Stored:
    """Raises UserError if it isn't what `add_benchmarks` writes."""
    return build(Stored, content, "")


def read_benchmarks(path: Path) -> list[Benchmark]:
    """The results in a file, none if it isn't there. Raises OSError, or ValueError for a broken
    one."""
    return parse_benchmarks(read_json(path)).tasks if path.exists() else []


def add_benchmarks(path: Path, lm_eval: str, found: Sequence[Benchmark]) -> list[Benchmark]:
    """Write new results into the file, in place of earlier ones with the same key; returns those
    that were dropped, as they are of another version of lm-eval.

    Raises OSError, or ValueError for a broken file.
    """
    lock = path.with_name(f".{path.name}.lock")
    with locked(FileLock(lock), str(path)):  # else one of two commands at once would lose its own
        try:
            before = parse_benchmarks(read_json(path)) if path.exists() else None
            old = before.tasks if before else []
            dropped = old if before and before.lm_eval != lm_eval else []
            merged = {one.key: one for one in (*old, *found) if one not in dropped}
            tasks = [asdict(merged[key]) for key in sorted(merged)]
            write_json(path, {"lm_eval": lm_eval, "tasks": tasks})
        finally:
            lock.unlink(missing_ok=True)
    return list(dropped)
