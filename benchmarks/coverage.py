"""How often the suite's 95 % intervals cover the truth, on invented items whose truth is known.

    python -m benchmarks.coverage [sizes=5,20,100,400] [repeats=4000]

Beside each, as a yardstick, the percentile bootstrap (400 resamples). The last line is one JSON
object with the suite's coverage; docs/evaluation.md has the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.common import print_json, print_table, read_arguments, start
from fourstage.evaluation.suite import Array, linear, padded_t, wilson

RESAMPLES = 400
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Options:
    sizes: tuple[int, ...] = (5, 20, 100, 400)
    repeats: int = 4000


@dataclass(frozen=True)
class Case:
    """`draw(rng, n)` gives an item's values [n], or (numerator, denominator) [n, 2]."""

    draw: Callable[[np.random.Generator, int], Array]
    truth: float
    interval: Callable[[Array], Interval]


def yes_no(values: Array) -> Interval:
    return wilson(values.sum(), len(values))


def share(values: Array) -> Interval:
    return padded_t(values, (0.0, 1.0))


def change_of_share(values: Array) -> Interval:
    return padded_t(values, (-1.0, 1.0))


def unbounded(values: Array) -> Interval:
    return padded_t(values, None)


def changes(gained: float, lost: float) -> Case:
    """Paired yes/no items: 1 for one that is gained, -1 for one that is lost."""
    chances = [gained, lost, 1 - gained - lost]
    return Case(
        lambda rng, n: rng.choice([1.0, -1.0, 0.0], n, p=chances), gained - lost, change_of_share
    )


def yes(p: float) -> Case:
    return Case(lambda rng, n: (rng.random(n) < p).astype(float), p, yes_no)


def blocks(rng: np.random.Generator, n: int) -> Array:
    """Bits and characters of n blocks of text."""
    chars = rng.integers(150, 250, n)
    return np.stack([chars * rng.gamma(20, 0.1, n), chars], 1)


# problems are solved with probabilities from Beta(0.1, 5): most never, some often
RARE = 1 - math.prod((5 + i) / (5.1 + i) for i in range(8))
CASES = {
    "yes/no, 2 %": yes(0.02),
    "yes/no, 50 %": yes(0.5),
    "paired yes/no, 2 % gained": changes(0.02, 0.0),
    "paired yes/no, 10 % gained, 10 % lost": changes(0.1, 0.1),
    "paired yes/no, 60 % gained, 5 % lost": changes(0.6, 0.05),
    "pass@8, 10 %": Case(
        lambda rng, n: (rng.binomial(8, rng.beta(0.1, 5, n)) > 0).astype(float), RARE, share
    ),
    "pass@1, 2 %": Case(lambda rng, n: rng.binomial(8, rng.beta(0.1, 5, n)) / 8, 0.1 / 5.1, share),
    "distinct words, 95 %": Case(lambda rng, n: rng.beta(20, 1, n), 20 / 21, share),
    "change of a win rate, 8 in 10 tie": Case(
        lambda rng, n: rng.choice([0.5, -0.5, 0.0], n, p=[0.1, 0.1, 0.8]), 0.0, change_of_share
    ),
    "mean, normal": Case(lambda rng, n: rng.normal(size=n), 0.0, unbounded),
    "mean, exponential": Case(lambda rng, n: rng.exponential(size=n), 1.0, unbounded),
    "mean, lognormal": Case(lambda rng, n: rng.lognormal(size=n), math.exp(0.5), unbounded),
    "change of a mean, exponential": Case(
        lambda rng, n: rng.exponential(size=n) - rng.exponential(size=n), 0.0, unbounded
    ),
    "bits per character": Case(blocks, 2.0, unbounded),
}


def coverage(case: Case, n: int, repeats: int) -> tuple[float, float]:
    """Shares of the repeats whose interval covers the truth: the suite's, and the bootstrap's."""
    rng = np.random.default_rng(0)
    covered = np.zeros(2)
    for _ in range(repeats):
        drawn = case.draw(rng, n)
        values = linear(drawn) if drawn.ndim == 2 else drawn
        means = values[rng.integers(0, n, (RESAMPLES, n))].mean(1)
        both = [case.interval(values), np.quantile(means, [0.025, 0.975])]
        covered += [low <= case.truth <= high for low, high in both]
    ours, bootstrap = covered / repeats
    return float(ours), float(bootstrap)


def main(arguments: list[str]) -> None:
    options = read_arguments(Options, arguments)
    rows, figures = [], {}
    for name, case in CASES.items():
        found = [coverage(case, n, options.repeats) for n in options.sizes]
        rows.append([name, *(f"{ours:.3f} ({bootstrap:.3f})" for ours, bootstrap in found)])
        figures |= {
            f"{name}, n {n}": ours for n, (ours, _) in zip(options.sizes, found, strict=True)
        }
    print_table(["suite (bootstrap)", *(f"n = {n}" for n in options.sizes)], rows)
    print_json("coverage", "cpu", {}, figures)


if __name__ == "__main__":
    start(main)
