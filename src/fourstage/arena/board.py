"""Who wins how often: Bradley-Terry strengths and win rates with 95 % intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fourstage.evaluation.suite import Z, wilson

Wins = Mapping[tuple[str, str], float]  # (a, b) -> how often a won against b; a tie is half a win
STEPS, TOLERANCE = 100, 1e-10  # of Newton's method


@dataclass(frozen=True)
class Rate:
    """How often `first` won against `second`, over n votes. more: further votes after which the
    interval would exclude a half, if the rate stayed; 0 if it does, None for a rate of a half."""

    first: str
    second: str
    n: int
    value: float
    low: float
    high: float
    more: int | None


@dataclass(frozen=True)
class Strength:
    """Log-odds against the mean of the runs that it can be compared with, over n votes."""

    run: str
    n: int
    value: float
    low: float
    high: float


def rates(wins: Wins, runs: Sequence[str]) -> list[Rate]:
    """Of each pair of runs that met, in their order, with Wilson intervals."""
    found = []
    for i, first in enumerate(runs):
        for second in runs[i + 1 :]:
            won = wins.get((first, second), 0.0)
            n = round(won + wins.get((second, first), 0.0))
            if n:
                low, high = wilson(won, n)
                found.append(Rate(first, second, n, won / n, low, high, votes_needed(won / n, n)))
    return found


def votes_needed(rate: float, n: int) -> int | None:
    """How many votes more until the Wilson interval of this rate excludes a half: it does when
    |p - 1/2| > z sqrt(1/4 / n), as the interval holds what the score test doesn't reject."""
    gap = (2 * rate - 1) ** 2
    return max(0, math.floor(Z * Z / gap) + 1 - n) if gap else None


def strengths(wins: Wins, runs: Sequence[str]) -> list[Strength]:
    """Of each run that met another, the strongest first.

    P(a beats b) = 1 / (1 + exp(s_b - s_a)) (Bradley and Terry 1952, Biometrika 39, 324). Without a
    penalty a run that never lost would be infinitely strong; with Jeffreys' prior (Firth 1993,
    Biometrika 80, 27) strengths have little bias, and for two runs it is half a win for each.
    Intervals are from the inverse of the information. Runs of which no chain of votes leads from
    one to the other have no common scale: each group has its own mean of 0.
    """
    found = []
    for group in connected(wins, runs):
        value, spread = _fitted(wins, group)
        for run, x, sd in zip(group, value, spread, strict=True):
            n = round(sum(v for pair, v in wins.items() if run in pair))
            found.append(Strength(run, n, float(x), float(x - Z * sd), float(x + Z * sd)))
    return sorted(found, key=lambda one: -one.value)


def connected(wins: Wins, runs: Sequence[str]) -> list[list[str]]:
    """The groups of runs that votes connect, those that met no other left out."""
    rest, groups = list(runs), []
    while rest:
        group = [rest.pop(0)]
        for run in group:
            met = [other for other in rest if (run, other) in wins or (other, run) in wins]
            group += met
            rest = [other for other in rest if other not in met]
        if len(group) > 1:
            groups.append(group)
    return groups


def _fitted(wins: Wins, runs: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Strengths [N] with mean 0, and their standard errors, by Newton's method."""
    won_NN = np.array([[wins.get((a, b), 0.0) for b in runs] for a in runs])
    played_NN = won_NN + won_NN.T
    value_N = np.zeros(len(runs))
    for _ in range(STEPS):
        chance_NN = 1 / (1 + np.exp(value_N[None] - value_N[:, None]))
        vary_NN = chance_NN * (1 - chance_NN)
        cov_NN = np.linalg.pinv(_information(played_NN * vary_NN))
        var_N = np.diag(cov_NN)
        # of each pair, the part in the fit: Firth's penalty adds half of it to the wins of both
        leverage_NN = played_NN * vary_NN * (var_N[:, None] + var_N - 2 * cov_NN)
        more_NN = played_NN + leverage_NN
        slope_N = (won_NN + leverage_NN / 2 - more_NN * chance_NN).sum(1)
        cov_NN = np.linalg.pinv(_information(more_NN * vary_NN))
        step_N = np.clip(cov_NN @ slope_N, -1, 1)  # else it may overshoot
        value_N = value_N + step_N
        if np.abs(step_N).max() < TOLERANCE:
            break
    return value_N - value_N.mean(), np.sqrt(np.diag(cov_NN))


def _information(weight_NN: np.ndarray) -> np.ndarray:
    return np.diag(weight_NN.sum(1)) - weight_NN
