"""Means over seeds and their differences: Student's t, Welch's t, Holm's correction.

SciPy isn't a dependency: Student's t distribution is computed here, from the continued fraction of
the incomplete beta function (DLMF 8.17.22). Values that are all equal say nothing of the spread, so
their mean has neither interval nor p value.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean of n values, its interval, and the two-sided p value of a mean of 0; None where n or
    the values' spread gives none."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None
    p: float | None = None


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), for a, b > 0 and 0 <= x <= 1."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1.0 - incomplete_beta(b, a, 1.0 - x)
    # 1 / (1 + d1 / (1 + d2 / ...)) by Lentz's method
    tiny, value, c, d = 1e-300, 1.0, 1.0, 0.0
    for n in range(1000):
        m = n // 2
        if n == 0:
            step = 1.0
        elif n % 2:
            step = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            step = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1.0 / (1.0 + step * d or tiny)
        c = 1.0 + step / c or tiny
        value *= c * d
        if n and abs(c * d - 1.0) < 1e-15:
            break
    log = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(log + a * math.log(x) + b * math.log1p(-x)) / a
    return front * (value - 1.0)


def t_p(t: float, df: float) -> float:
    """P(|T| >= |t|) of Student's t with df > 0 degrees of freedom (Abramowitz and Stegun 1964,
    26.5.27)."""
    return incomplete_beta(df / 2, 0.5, df / (df + t * t))


def t_quantile(df: float, confidence: float = CONFIDENCE) -> float:
    """The t that |T| exceeds with probability 1 - confidence, by bisection."""
    low, high = 0.0, 1.0
    while t_p(high, df) > 1 - confidence:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_p(middle, df) > 1 - confidence else (low, middle)
    return high


def are_equal(values: Sequence[float]) -> bool:
    """Whether the values are all the same, but for the rounding of a subtraction: the computed
    deviation of equal values need not be 0."""
    return max(values) - min(values) <= 1e-9 * max(map(abs, values))


def t_mean(values: Sequence[float]) -> Mean:
    """The mean of independent values with Student's t interval (Student 1908); of one value, or of
    values that are all equal, without."""
    n = len(values)
    if are_equal(values):
        return Mean(values[0], n)
    return _tested(fmean(values), n, stdev(values) / math.sqrt(n), n - 1)


def paired(after: Mapping[str, float], before: Mapping[str, float]) -> Mean:
    """after - before over the keys of both, with Student's t interval of the differences."""
    return t_mean([after[key] - before[key] for key in after if key in before])


def welch(after: Sequence[float], before: Sequence[float]) -> Mean:
    """mean(after) - mean(before) of independent samples of two values or more each, with unequal
    variances (Welch 1947): degrees of freedom by Welch and Satterthwaite."""
    a, b = variance(after) / len(after), variance(before) / len(before)
    difference, n = fmean(after) - fmean(before), len(after) + len(before)
    if are_equal(after) and are_equal(before):
        return Mean(after[0] - before[0], n)
    df = (a + b) ** 2 / (a**2 / (len(after) - 1) + b**2 / (len(before) - 1))
    return _tested(difference, n, math.sqrt(a + b), df)


def _tested(value: float, n: int, error: float, df: float) -> Mean:
    half = t_quantile(df) * error
    return Mean(value, n, value - half, value + half, t_p(value / error, df))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """The p values adjusted for their number (Holm 1979): each may be held against 0.05, and the
    chance of any false alarm among them stays below it. None stays None, and isn't counted."""
    known = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    found: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, at) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        found[at] = largest
    return found
