"""What a search found: the winner and the default settings on fresh seeds, a table and a plot."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fourstage.files import write_atomic, write_json
from fourstage.report import charts
from fourstage.report.statistics import Mean, t_mean
from fourstage.search.training import TrialFailed
from fourstage.search.trials import Measured, Result

DEFAULT, WINNER = "default", "winner"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """fresh: for each of the two settings, its value by seed; None where it failed."""

    name: str
    stage: str
    goal: str
    better: str
    sampler: str
    words: list[str]  # of every run
    ranges: list[str]
    trial_seeds: list[int]
    trials: list[Result]
    fresh: dict[str, dict[int, float | None]]
    runs: dict[str, list[str]]

    @property
    def best(self) -> Result:
        return best_of(self.trials, self.better)

    @property
    def means(self) -> dict[str, Mean | None]:
        """Of the two settings, and the winner's paired difference to the default."""
        values = {k: [v for v in own.values() if v is not None] for k, own in self.fresh.items()}
        pairs = zip(self.fresh[WINNER].values(), self.fresh[DEFAULT].values(), strict=True)
        values["difference"] = [a - b for a, b in pairs if a is not None and b is not None]
        return {key: t_mean(own) if own else None for key, own in values.items()}


def best_of(trials: Sequence[Result], better: str) -> Result:
    """The first of the best ones."""
    sign = 1 if better == "higher" else -1
    return max((t for t in trials if t.value is not None), key=lambda t: sign * (t.value or 0.0))


def train_again(
    words: Sequence[str],
    seeds: Sequence[int],
    measure: Callable[[Sequence[str], Sequence[int], Path], Measured],
    folder: Path,
    say: Callable[[str], None],
) -> tuple[dict[str, dict[int, float | None]], dict[str, list[str]]]:
    """The values of the default settings and of the winner's `words` on fresh seeds, and the runs;
    a failure is said."""
    fresh: dict[str, dict[int, float | None]] = {DEFAULT: {}, WINNER: {}}
    runs: dict[str, list[str]] = {DEFAULT: [], WINNER: []}
    for seed in seeds:
        for name, own in ((DEFAULT, []), (WINNER, list(words))):
            log = folder / f"{name}-{seed}.log"
            try:
                found = measure(own, [seed], log)
            except TrialFailed as error:
                fresh[name][seed] = None
                say(f"{name}, seed {seed}: failed: {error}")
                continue
            fresh[name][seed] = found.value
            runs[name] += found.runs
            say(f"{name}, seed {seed}: {found.value:.6g}")
    return fresh, runs


def write(outcome: Outcome, folder: Path) -> str:
    """search.json, search.md and its two drawings; returns the text of search.md."""
    text = markdown(outcome)
    write_json(folder / "search.json", summary(outcome))
    write_atomic(folder / "search.md", text)
    write_atomic(folder / "search.svg", plot(outcome))
    if any(outcome.means.values()):
        write_atomic(folder / "fresh.svg", comparison(outcome))
    return text


def summary(outcome: Outcome) -> dict[str, Any]:
    """Plain values, without times: the same trials give the same bytes."""
    means = {key: mean and asdict(mean) for key, mean in outcome.means.items()}
    settings = {DEFAULT: [], WINNER: outcome.best.words}
    return {
        **{k: v for k, v in vars(outcome).items() if k not in ("trials", "fresh", "runs")},
        "best_trial": outcome.best.number,
        "fresh_seeds": list(outcome.fresh[WINNER]),
        **{
            key: {
                "settings": settings[key],
                "values": list(outcome.fresh[key].values()),
                "mean": means[key],
                "runs": outcome.runs[key],
            }
            for key in (DEFAULT, WINNER)
        },
        "difference": means["difference"],
        "trials": [asdict(trial) for trial in outcome.trials],
    }


def markdown(outcome: Outcome) -> str:
    best, means = outcome.best, outcome.means
    seeds = list(outcome.fresh[WINNER])
    rows = [
        [name, *(number(outcome.fresh[name][seed]) for seed in seeds), *cells(means[name])]
        for name in (DEFAULT, WINNER)
    ]
    differences = [
        None if a is None or b is None else a - b
        for a, b in zip(*(outcome.fresh[name].values() for name in (WINNER, DEFAULT)), strict=True)
    ]
    side = "above" if outcome.better == "higher" else "below"
    label = f"winner - default ({side} 0 is better)"
    rows.append([label, *map(signed, differences), *cells(means["difference"], True)])
    head = ["", *(f"seed {seed}" for seed in seeds), "mean", "95 % interval"]
    failed = sum(trial.value is None for trial in outcome.trials)
    on = ", ".join(map(str, outcome.trial_seeds))
    what = f"{outcome.goal} of {outcome.stage} ({outcome.better} is better)"
    upwards = "too high" if outcome.better == "higher" else "too low"
    trials = [
        [str(t.number), f"`{' '.join(t.words)}`", number(t.value), ", ".join(t.runs) or t.why]
        for t in outcome.trials
    ]
    return "\n".join(
        [
            f"# Search {outcome.name}: {what}",
            "",
            f"{len(outcome.trials)} trials by {outcome.sampler} on seed {on}"
            + f", of which {failed} failed" * bool(failed)
            + f", over {', '.join(f'`{word}`' for word in outcome.ranges)}.",
            "",
            f"The winner is trial {best.number}: `{shlex.join(best.words)}`",
            "",
            *table(head, rows),
            "",
            f"These runs have seeds that no trial had. The winner's own trial had "
            f"{number(best.value)}, which is the best of {len(outcome.trials) - failed} and so, by "
            f"chance, {upwards} on average. Intervals are Student's t over the seeds, of the "
            "difference paired by seed; trials and rows have the same held-out items.",
            "",
            *["![The two on fresh seeds, with 95 % intervals](fresh.svg)", ""]
            * any(means.values()),
            "![Each trial's value, and the best so far](search.svg)",
            "",
            *table(["trial", "settings", "value", "runs"], trials),
            "",
        ]
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *([c.replace("|", "\\|") for c in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def number(value: float | None) -> str:
    return "failed" if value is None else f"{value:.4g}"


def signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4g}"


def cells(mean: Mean | None, is_difference: bool = False) -> list[str]:
    """A mean and its interval; an interval needs two seeds that differ."""
    shown = signed if is_difference else number
    if mean is None:
        return ["", ""]
    has_interval = mean.low is not None and mean.high is not None
    return [
        shown(mean.value),
        f"[{shown(mean.low)}, {shown(mean.high)}]" if has_interval else "none",
    ]


def plot(outcome: Outcome) -> bytes:
    """Each trial's value, and the best so far."""
    points = [(float(t.number), t.value) for t in outcome.trials if t.value is not None]
    choose = max if outcome.better == "higher" else min
    best = [(x, choose(y for _, y in points[: n + 1])) for n, (x, _) in enumerate(points)]
    drawing = charts.lines("trial", outcome.goal, {"value": points, "best so far": best})
    return drawing.files(f"Search {outcome.name}")["svg"]


def comparison(outcome: Outcome) -> bytes:
    """The means of the default and the winner on fresh seeds, with their intervals."""
    cells = [mean and cell(mean) for mean in (outcome.means[DEFAULT], outcome.means[WINNER])]
    drawing = charts.intervals([DEFAULT, WINNER], outcome.goal, {"fresh seeds": cells})
    return drawing.files(f"Search {outcome.name}: fresh seeds")["svg"]


def cell(mean: Mean) -> dict[str, float]:
    """As the report's charts take it; without an interval, of no width."""
    low = mean.value if mean.low is None else mean.low
    high = mean.value if mean.high is None else mean.high
    return {"value": mean.value, "n": mean.n, "low": low, "high": high}
