"""Student's t, Welch's t and Holm's correction, by hand, by tables and against SciPy."""

from __future__ import annotations

import pytest

from fourstage.report.statistics import (
    Mean,
    holm,
    incomplete_beta,
    paired,
    t_mean,
    t_p,
    t_quantile,
    welch,
)


@pytest.mark.parametrize(
    ("df", "expected"),  # printed tables of the 97.5 % quantile
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (10, 2.228), (30, 2.042)]
    + [(120, 1.980), (100_000, 1.960)],
)
def test_quantiles_of_the_tables(df, expected) -> None:
    assert t_quantile(df) == pytest.approx(expected, abs=5e-4)


def test_the_incomplete_beta_function_in_closed_form() -> None:
    for x in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert incomplete_beta(1, 1, x) == pytest.approx(x)
        assert incomplete_beta(3, 1, x) == pytest.approx(x**3)
        assert incomplete_beta(1, 4, x) == pytest.approx(1 - (1 - x) ** 4)
    assert incomplete_beta(2.5, 2.5, 0.5) == pytest.approx(0.5)


def test_p_values_in_closed_form() -> None:
    assert t_p(0.0, 3) == 1.0
    assert t_p(1.0, 1) == pytest.approx(0.5)  # Cauchy's quartiles
    assert t_p(-1.0, 1) == pytest.approx(0.5)
    assert t_p(2.0, 2) == pytest.approx(1 - 2 / 6**0.5)
    assert 0 <= t_p(1e8, 2) < 1e-12


def test_a_mean_by_hand() -> None:
    """1, 2, 3: sd 1, error 1 / sqrt 3, t(2) 4.3027."""
    found = t_mean([1.0, 2.0, 3.0])
    assert (found.value, found.n) == (2.0, 3)
    assert found.low == pytest.approx(2 - 2.48414, abs=1e-5)
    assert found.high == pytest.approx(2 + 2.48414, abs=1e-5)
    assert found.p == pytest.approx(0.07418, abs=1e-5)


@pytest.mark.parametrize("values", [[0.1], [0.1] * 8, [0.0, 0.0]])
def test_values_without_spread_have_no_interval(values) -> None:
    assert t_mean(values) == Mean(values[0], len(values))


def test_equal_differences_are_equal_after_a_subtraction_too() -> None:
    """0.3 - 0.2 and 0.2 - 0.1 are not the same float."""
    found = paired({"0": 0.3, "1": 0.2}, {"0": 0.2, "1": 0.1})
    assert (found.n, found.low, found.p) == (2, None, None)


def test_a_pair_is_a_key_that_both_have() -> None:
    found = paired({"0": 3.0, "1": 5.0, "2": 9.0}, {"1": 4.0, "0": 1.0, "7": 0.0})
    assert (found.value, found.n) == (1.5, 2)
    assert found.high == pytest.approx(1.5 + 12.7062 * 0.5, abs=1e-4)


def test_welch_by_hand() -> None:
    """Variances 1 and 4 of three each: error sqrt(5/3), df (5/3)^2 / ((1/9 + 16/9) / 2)."""
    found = welch([4.0, 5.0, 6.0], [0.0, 2.0, 4.0])
    assert (found.value, found.n) == (3.0, 6)
    df = (5 / 3) ** 2 / (17 / 18)
    half = t_quantile(df) * (5 / 3) ** 0.5
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half))
    assert df == pytest.approx(2.941, abs=1e-3) and 3.18 < t_quantile(df) < 3.25


def test_welch_of_equal_values() -> None:
    assert welch([0.1] * 3, [0.3] * 8) == Mean(0.1 - 0.3, 11)
    assert welch([0.1] * 3, [0.3, 0.4]).p is not None


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02, None, 0.5]) == [0.04, None, 0.5]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == [] and holm([None]) == [None]


def test_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for df in (1, 1.7, 2.941, 5, 28.3, 400):
        assert t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-9)
        assert t_quantile(df, 0.9) == pytest.approx(stats.t.ppf(0.95, df), rel=1e-9)
        for t in (0.01, 0.7, 2.5, 9.0, 60.0):
            assert t_p(t, df) == pytest.approx(2 * stats.t.sf(t, df), rel=1e-8)
    a, b = [0.31, 0.28, 0.4, 0.33], [0.2, 0.29, 0.21]
    exact = stats.ttest_ind(a, b, equal_var=False)
    found = welch(a, b)
    interval = exact.confidence_interval(0.95)
    expected = (exact.pvalue, interval.low, interval.high)
    assert (found.p, found.low, found.high) == pytest.approx(expected)
    exact = stats.ttest_rel(a[:3], b)
    found = paired(dict(zip("xyz", a, strict=False)), dict(zip("xyz", b, strict=True)))
    interval = exact.confidence_interval(0.95)
    expected = (exact.pvalue, interval.low, interval.high)
    assert (found.p, found.low, found.high) == pytest.approx(expected)
