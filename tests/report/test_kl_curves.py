"""Scores against KL, by group: bins and means by hand, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fourstage.report import main
from fourstage.report.kl_curves import binned, rollouts, words
from fourstage.report.statistics import t_mean
from tests.report.sweeps import write_run

COLUMNS = {
    "train/kl": [(1, 0.1), (2, 0.7), (3, 3.0)],
    "train/score": [(1, 1.0), (2, 2.0), (3, 3.0), (4, 9.0)],  # step 4 has no KL
    "train/true_score": [(1, 1.5), (3, 0.5)],
}


def test_rollouts_without_a_kl_or_a_score_are_left_out():
    assert rollouts(COLUMNS) == [(0.1, [1.0, 1.5]), (3.0, [3.0, 0.5])]
    assert rollouts({"train/score": [(1, 1.0)]}) == rollouts({}) == []


def test_each_run_counts_once_in_a_bin():
    first = [(0.1, [1.0, 1.0]), (0.2, [3.0, 1.0]), (5.0, [4.0, 0.0])]
    second = [(-0.3, [4.0, 2.0]), (0.5, [7.0, 8.0])]
    found = binned([first, second])
    assert list(found) == ["below 0.5", "0.5 to 1", "4 to 8"]
    assert found["below 0.5"] == [t_mean([2.0, 4.0]), t_mean([1.0, 2.0])]
    assert [mean.value for mean in found["0.5 to 1"]] == [7.0, 8.0]
    assert words(9) == "from 128"


@pytest.mark.parametrize("has_truth", [True, False])
def test_the_page_has_them_where_the_true_score_is_known(tmp_path: Path, has_truth: bool, capsys):
    for n, coef in enumerate((0.0, 0.0, 0.2, 0.2)):
        run = write_run(tmp_path, "ppo", n, seed=n % 2, right=5, kl_coef=coef)
        truth = ",train/true_score" * has_truth
        rows = [f"1,0.25,{n}" + f",{n}" * has_truth, f"2,20,{n + 1}" + f",{-n}" * has_truth]
        text = "\n".join([f"step,train/kl,train/score{truth}", *rows, ""])
        (tmp_path / "runs" / f"ppo-{run}" / "metrics.csv").write_text(text)
    main(["compare", f"outputs={tmp_path}"])
    page = (tmp_path / "report" / "compare.md").read_text()
    assert ("Scores as KL grows in ppo" in page) is has_truth
    if has_truth:
        assert (
            "| kl_coef=0 | below 0.5 | 2 | 0.500 [-5.853, 6.853] | 0.500 [-5.853, 6.853] |" in page
        )
        assert "| kl_coef=0.2 | 16 to 32 | 2 | 3.500 " in page
    assert json.loads((tmp_path / "report" / "compare.json").read_text())["groups"]
