"""Strengths and rates against a second implementation, by hand, and how often intervals hold."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from fourstage.arena.board import connected, rates, strengths, votes_needed
from fourstage.evaluation.suite import wilson

Z = 1.959963984540054


def cast(results: dict[tuple[str, str], tuple[float, float]]) -> dict[tuple[str, str], float]:
    """Wins from {(a, b): (won by a, won by b)}."""
    return {
        pair: won
        for (a, b), (first, second) in results.items()
        for pair, won in (((a, b), first), ((b, a), second))
    }


def drawn(rng: np.random.Generator, true: np.ndarray, n: int) -> dict[tuple[str, str], float]:
    """n votes of each pair of players with these strengths."""
    found = {}
    for i, k in combinations(range(len(true)), 2):
        won = float(rng.binomial(n, 1 / (1 + math.exp(true[k] - true[i]))))
        found[str(i), str(k)] = (won, n - won)
    return cast(found)


def fitted(wins: dict[tuple[str, str], float], runs: list[str]) -> np.ndarray:
    """Strengths of mean 0 at the maximum of the likelihood with Jeffreys' prior, by SciPy."""

    def loss(value: np.ndarray) -> float:
        total, information = 0.0, np.zeros((len(runs), len(runs)))
        for i, k in combinations(range(len(runs)), 2):
            a, b = runs[i], runs[k]
            if (a, b) not in wins:
                continue
            gap = value[i] - value[k]
            total += wins[a, b] * np.logaddexp(0, -gap) + wins[b, a] * np.logaddexp(0, gap)
            row = np.eye(len(runs))[i] - np.eye(len(runs))[k]
            weight = (wins[a, b] + wins[b, a]) / (2 + 2 * np.cosh(gap))
            information += weight * np.outer(row, row)
        return total - 0.5 * np.linalg.slogdet(information[1:, 1:])[1]

    optimize = pytest.importorskip("scipy.optimize", reason="needs scipy (make setup-dev)")
    found = optimize.minimize(loss, np.zeros(len(runs)), method="BFGS", options={"gtol": 1e-9})
    return found.x - found.x.mean()


# --- strengths


@pytest.mark.parametrize(("won", "lost"), [(3, 1), (0, 1), (7, 0), (2.5, 2.5), (1000, 1)])
def test_two_players_by_hand(won, lost):
    """Half a win more for each: the gap is log((w + 1/2) / (l + 1/2)), its variance the sum of the
    reciprocals, and each player has half of the gap and of its error."""
    first, second = sorted(strengths(cast({("a", "b"): (won, lost)}), "ab"), key=lambda s: s.run)
    gap = math.log((won + 0.5) / (lost + 0.5))
    half = Z * math.sqrt(1 / (won + 0.5) + 1 / (lost + 0.5)) / 2
    assert (first.n, second.n) == (won + lost, won + lost)
    for one, value in ((first, gap / 2), (second, -gap / 2)):
        assert [one.value, one.low, one.high] == pytest.approx([value, value - half, value + half])


@pytest.mark.parametrize("seed", range(8))
def test_strengths_are_those_of_another_implementation(seed):
    rng = np.random.default_rng(seed)
    runs = [str(i) for i in range(2 + seed)]
    wins = drawn(rng, rng.normal(0, 1.5, len(runs)), int(rng.integers(1, 30)))
    for pair in list(wins)[: 2 * (len(runs) // 3) : 2]:  # some never met
        del wins[pair], wins[pair[::-1]]
    assert len(connected(wins, runs)) == 1
    found = {one.run: one.value for one in strengths(wins, runs)}
    assert [found[run] for run in runs] == pytest.approx(fitted(wins, runs), abs=1e-5)


def test_everything_won_and_everything_lost():
    """As far apart as the votes say, and no further."""
    wins = cast({(str(i), str(k)): (500, 0) for i, k in combinations(range(6), 2)})
    found = strengths(wins, [str(i) for i in range(6)])
    assert [one.run for one in found] == ["0", "1", "2", "3", "4", "5"]
    expected = fitted(wins, [str(i) for i in range(6)])
    assert [one.value for one in found] == pytest.approx(expected, abs=1e-4)
    assert all(math.isfinite(x) for one in found for x in (one.low, one.high))


def test_groups_that_never_met_have_means_of_their_own():
    wins = cast({("a", "b"): (3, 1), ("c", "d"): (1, 9), ("d", "e"): (2, 2)})
    assert connected(wins, list("abcdef")) == [["a", "b"], ["c", "d", "e"]]
    found = {one.run: one.value for one in strengths(wins, "abcdef")}
    assert found.keys() == set("abcde")  # nobody has voted on f
    assert found["a"] + found["b"] == pytest.approx(0)
    assert found["c"] + found["d"] + found["e"] == pytest.approx(0)
    alone = strengths(cast({("a", "b"): (3, 1)}), "ab")
    assert found["a"] == alone[0].value


def test_no_votes():
    assert strengths({}, "ab") == rates({}, "ab") == []


def test_strengths_depend_on_no_order():
    wins = cast({("a", "b"): (5, 3), ("b", "c"): (4, 0), ("c", "a"): (1, 6)})
    one, other = strengths(wins, "abc"), strengths(dict(reversed(wins.items())), "cba")
    for x, y in zip(one, other, strict=True):
        assert (
            x.run == y.run and x.value == pytest.approx(y.value) and x.low == pytest.approx(y.low)
        )


@pytest.mark.parametrize("n", [5, 40])
@pytest.mark.parametrize("true", [(-1.2, -0.5, 0.3, 0.6, 0.8), (-3, -1, 1, 1.5, 1.5), (-0.5, 0.5)])
def test_intervals_cover_the_true_strengths(true, n):
    """400 boards of n votes a pair; among the stages are some that hardly ever win."""
    rng = np.random.default_rng(n)
    held = np.zeros((400, len(true)))
    for row in held:
        for one in strengths(drawn(rng, true, n), [str(i) for i in range(len(true))]):
            row[int(one.run)] = one.low <= true[int(one.run)] <= one.high
    assert 0.92 <= held.mean() <= 0.98  # of two stages and ten votes few intervals are possible
    assert (held.mean(0) >= 0.9).all()


# --- rates


def test_rates_of_each_pair_that_met():
    wins = cast({("a", "b"): (6, 2), ("c", "a"): (1.5, 2.5)})
    first, second = rates(wins, "abc")
    assert (first.first, first.second, first.n, first.value) == ("a", "b", 8, 0.75)
    assert (second.first, second.second, second.n, second.value) == ("a", "c", 4, 0.625)
    for one in (first, second):  # Wilson 1927, as the roots of (p - r)^2 = z^2 r (1 - r) / n
        z2 = Z * Z
        roots = np.roots([1 + z2 / one.n, -2 * one.value - z2 / one.n, one.value**2])
        assert [one.low, one.high] == pytest.approx(sorted(roots.real))


@pytest.mark.parametrize("n", [1, 3, 10, 60])
def test_votes_needed_are_the_first_at_which_the_interval_excludes_a_half(n):
    for won in np.arange(0, n + 0.5, 0.5):
        p = won / n
        more = votes_needed(p, n)
        if p == 0.5:
            assert more is None
            continue

        def is_apart(total: int, p: float = p) -> bool:
            low, high = wilson(p * total, total)
            return low > 0.5 or high < 0.5

        assert more == next(k for k in range(10**6) if is_apart(n + k)), won
