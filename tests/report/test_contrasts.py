"""What groups of runs differ by: means, differences, effects and their drawing."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourstage.evaluation import suite
from fourstage.report.charts import row_names
from fourstage.report.statistics import t_quantile
from tests.report.sweeps import ident, of_grpo, read, text, write_run, write_sweep

# --- differences


def test_unequal_seeds_are_paired_where_both_have_them(tmp_path: Path) -> None:
    figures = {(1e-4, "grpo", s): n for s, n in enumerate((3, 5, 4))}
    write_sweep(tmp_path, figures | {(1e-3, "grpo", 0): 4, (1e-3, "grpo", 1): 8})
    difference = of_grpo(read(tmp_path, "all"))["lr=1e-3"]["difference"]
    assert (difference["n"], difference["mean"]) == (2, 0.2)
    assert difference["how"] == "paired over 2 seeds, 1 without a partner"


def test_other_seeds_are_compared_by_welch(tmp_path: Path) -> None:
    """0.4, 0.6 against 0.1, 0.3: variances 0.02, error sqrt(0.02), df 2."""
    figures = {(1e-4, "grpo", 0): 1, (1e-4, "grpo", 1): 3}
    write_sweep(tmp_path, figures | {(1e-3, "grpo", 2): 4, (1e-3, "grpo", 3): 6})
    difference = of_grpo(read(tmp_path, "all"))["lr=1e-3"]["difference"]
    assert difference["how"] == "Welch's t" and difference["mean"] == 0.3
    assert difference["high"] == pytest.approx(0.3 + t_quantile(2) * 0.02**0.5, abs=1e-6)


def test_one_run_each_is_paired_over_items(tmp_path: Path) -> None:
    write_sweep(tmp_path, {(1e-4, "grpo", 0): 2, (1e-3, "grpo", 0): 9})
    found = of_grpo(read(tmp_path, "all"))
    low, high = suite.wilson(2, 10)
    row = found["lr=1e-4"]
    assert (row["n"], row["over"]) == (1, "items")
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=1e-6)
    difference = found["lr=1e-3"]["difference"]
    gains = suite.np.array([0.0] * 2 + [1.0] * 7 + [0.0])
    assert difference["how"] == "one run each, paired over 10 items"
    assert (difference["low"], difference["high"]) == pytest.approx(
        suite.padded_t(gains, (-1.0, 1.0)), abs=1e-6
    )
    assert (difference["p"], difference["verdict"]) == (None, "better")


def test_one_run_beside_several_of_its_seed(tmp_path: Path) -> None:
    figures = {(1e-4, "grpo", s): 2 + s for s in range(3)}
    write_sweep(tmp_path, figures | {(1e-3, "grpo", 1): 9})
    difference = of_grpo(read(tmp_path, "all"))["lr=1e-3"]["difference"]
    assert difference["how"] == "only seed 1, paired over 10 items"
    assert difference["mean"] == 0.6


def test_one_run_of_another_seed_has_no_interval(tmp_path: Path) -> None:
    figures = {(1e-4, "grpo", s): 2 for s in range(2)}
    write_sweep(tmp_path, figures | {(1e-3, "grpo", 5): 9})
    difference = of_grpo(read(tmp_path, "all"))["lr=1e-3"]["difference"]
    assert (difference["mean"], difference["low"], difference["verdict"]) == (0.7, None, "unclear")


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"suite_": "5"}, "different suites"),
        ({"ids": "other"}, "other held-out items"),
        ({"evaluation__max_new_tokens": 128}, "other held-out items"),
    ],
)
def test_what_is_not_comparable_is_not_compared(tmp_path: Path, changes, how) -> None:
    pretrain = write_run(tmp_path, "pretrain", 0)
    for at in range(4):
        options = {"parents": {"policy": pretrain}, "right": 2 + at, "seed": at % 2}
        write_run(
            tmp_path, "grpo", at, **options, lr=[1e-4, 1e-3][at // 2], **(changes if at > 1 else {})
        )
    found = read(tmp_path, "stage=grpo", "by=lr")
    difference = of_grpo(found)["lr=1e-3"]["difference"]
    assert (difference["how"], difference["mean"]) == (how, None)
    assert f"| – | {how} |" in text(tmp_path)


def test_intervals_of_shares_end_where_shares_do(tmp_path: Path) -> None:
    """With two seeds t is 12.7."""
    right = {1e-4: (0, 4), 1e-3: (6, 9)}
    write_sweep(
        tmp_path, {(lr, "grpo", s): n for lr, each in right.items() for s, n in enumerate(each)}
    )
    rows = of_grpo(read(tmp_path, "stage=grpo"))
    assert [(row["low"], row["high"]) for row in rows.values()] == [(0.0, 1.0), (0.0, 1.0)]
    difference = rows["lr=1e-3"]["difference"]
    half = t_quantile(1) * 0.05
    assert difference["mean"] == 0.55
    assert difference["low"] == pytest.approx(0.55 - half, abs=1e-6) and difference["high"] == 1.0


def test_a_mean_is_over_runs_of_one_suite(tmp_path: Path) -> None:
    """lr=1e-4 has a third run by an old suite, lr=1e-3 two by two old ones, which have no mean. Of
    the gains over pretrain, one has a start by an old suite and isn't known."""
    for n, (suite_, start, lr, right) in enumerate(
        [
            (suite.SUITE, suite.SUITE, 1e-4, 3),
            (suite.SUITE, "5", 1e-4, 5),
            ("5", "5", 1e-4, 9),
            ("5", "5", 1e-3, 3),
            ("4", "4", 1e-3, 4),
        ]
    ):
        of = {"seed": n % 3, "right": 1, "suite_": start}
        parents = {"policy": write_run(tmp_path, "pretrain", n, **of)}
        of = {"seed": n % 3, "right": right, "suite_": suite_}
        write_run(tmp_path, "grpo", n, lr=lr, parents=parents, **of)
    found = of_grpo(read(tmp_path, "all"))
    assert list(found) == ["lr=1e-4"]
    assert (found["lr=1e-4"]["mean"], found["lr=1e-4"]["values"]) == (0.4, {"0": 0.3, "1": 0.5})
    row = next(x for x in text(tmp_path).splitlines() if x.startswith("| lr=1e-4 | 2; not 1 of"))
    assert "| +20.0 points one seed, 1 of 2 runs |" in row
    rest = "| – | – | – | different suites |"
    assert f"| lr=1e-3 | 0; not 2 of another suite {rest}" in text(tmp_path)


def test_equal_values_and_missing_ones(tmp_path: Path) -> None:
    figures: dict = {(1e-4, "grpo", s): 3 for s in range(2)}
    figures |= {(1e-3, "grpo", s): 3 for s in range(2)} | {
        (0.01, "grpo", s): None for s in range(2)
    }
    write_sweep(tmp_path, figures)
    found = of_grpo(read(tmp_path, "all"))
    assert list(found) == ["lr=1e-4", "lr=1e-3"]
    assert found["lr=1e-3"]["difference"] | {"to": ""} == {
        **{"to": "", "n": 2, "mean": 0.0, "low": None, "high": None, "p": None, "p_holm": None},
        **{"how": "paired over 2 seeds", "verdict": "unclear"},
    }
    assert "| lr=0.01 | 0 | – | – | – | not measured |" in text(tmp_path)


def test_a_figure_that_is_not_a_number_is_left_out_and_named(tmp_path: Path) -> None:
    write_sweep(tmp_path, {(lr, "grpo", s): 3 for lr in (1e-4, 1e-3) for s in range(2)})
    path = tmp_path / "runs" / f"grpo-{ident('grpo', 0)}" / "eval.json"
    path.write_text(path.read_text().replace('"value": 0.3', '"value": NaN'))
    found = read(tmp_path, "all")
    assert of_grpo(found)["lr=1e-4"]["n"] == 1
    assert f"grpo-{ident('grpo', 0)}/eval.json has no value, n, low and high for" in text(tmp_path)


def test_holm_counts_all_differences_of_the_goals(tmp_path: Path) -> None:
    """lr 1e-3 gains 0.3, 0.4 and 0.01 gains 0.1, 0.3: two p values."""
    gains = {1e-4: (1, 1), 1e-3: (4, 5), 0.01: (2, 4)}
    write_sweep(
        tmp_path, {(lr, "grpo", s): n for lr, each in gains.items() for s, n in enumerate(each)}
    )
    found = of_grpo(read(tmp_path, "all"))
    small, large = found["lr=1e-3"]["difference"], found["lr=0.01"]["difference"]
    assert small["p"] < large["p"]
    assert small["p_holm"] == pytest.approx(2 * small["p"])
    assert large["p_holm"] == pytest.approx(max(large["p"], 2 * small["p"]))
    assert "Each of the 2 p values is also given after Holm's correction for 2 tests" in text(
        tmp_path
    )


# --- effects


def test_the_effect_of_each_setting_by_hand(tmp_path: Path) -> None:
    """lr: per seed the mean of two differences, 0.2 and 0.4; loss: 0.1 and 0.1, without spread.
    lr=0.01 was run with one loss only, and is compared with that one."""
    right = {
        (1e-4, "grpo"): (1, 2),
        (1e-4, "dapo"): (2, 3),
        (1e-3, "grpo"): (3, 6),
        (1e-3, "dapo"): (4, 7),
        (0.01, "grpo"): (1, 1),
    }
    write_sweep(
        tmp_path, {(*key, seed): n for key, each in right.items() for seed, n in enumerate(each)}
    )
    found = read(tmp_path, "all")
    assert [group["label"] for group in found["groups"]] == [
        *("loss=grpo, lr=1e-4", "loss=grpo, lr=1e-3", "loss=grpo, lr=0.01"),
        *("loss=dapo, lr=1e-4", "loss=dapo, lr=1e-3"),
    ]
    effects = {(e["setting"], e["to"]): e for e in found["effects"] if e["key"] != "bits_per_char"}
    assert list(effects) == [("loss", "loss=dapo"), ("lr", "lr=1e-3"), ("lr", "lr=0.01")]
    lr = effects["lr", "lr=1e-3"]
    assert (lr["mean"], lr["n"], lr["from"]) == (0.3, 2, "lr=1e-4")
    assert lr["how"] == "over 2 seeds, each with 2 settings of the others"
    assert lr["high"] == pytest.approx(0.3 + t_quantile(1) * 0.1, abs=1e-6)
    loss = effects["loss", "loss=dapo"]
    assert (loss["mean"], loss["low"], loss["verdict"]) == (0.1, None, "unclear")
    assert effects["lr", "lr=0.01"]["how"] == "over 2 seeds, each with 1 setting of the others"
    assert "## The effect of each setting" in text(tmp_path)
    assert "| lr | lr=1e-3 − lr=1e-4 | grpo: reasoning accuracy |" in text(tmp_path)
    by = read(tmp_path, "all", "by=loss")
    assert [group["label"] for group in by["groups"]] == ["loss=grpo", "loss=dapo"]
    assert of_grpo(by)["loss=dapo"]["difference"]["how"] == (
        "paired over 2 seeds (4 pairs), 2 without a partner"
    )


def test_runs_of_one_seed_are_one_value(tmp_path: Path) -> None:
    """by=loss over three lr's: lr differences 1, 2, 3 of seed 0 and 3, 4, 5 of seed 1 have seed
    means of 0.2 and 0.4, so n is 2, and t(1) with a standard error of 0.1."""
    right = {
        (1e-4, "grpo"): (1, 1),
        (1e-3, "grpo"): (1, 1),
        (0.01, "grpo"): (4, 4),
        (1e-4, "dapo"): (2, 4),
        (1e-3, "dapo"): (3, 5),
        (0.01, "dapo"): (7, 9),
    }
    write_sweep(
        tmp_path, {(*key, seed): n for key, each in right.items() for seed, n in enumerate(each)}
    )
    found = of_grpo(read(tmp_path, "all", "by=loss"))
    dapo, half = found["loss=dapo"], t_quantile(1) * 0.1
    assert (dapo["mean"], dapo["n"], len(dapo["values"])) == (0.5, 2, 6)
    assert (dapo["low"], dapo["high"]) == (0.0, 1.0)  # 0.5 -+ 1.27, cut
    assert (found["loss=grpo"]["n"], found["loss=grpo"]["low"]) == (2, None)
    difference = dapo["difference"]
    assert (difference["mean"], difference["n"]) == (0.3, 2)
    assert difference["low"] == pytest.approx(0.3 - half, abs=1e-6)
    assert difference["how"] == "paired over 2 seeds (6 pairs)"
    assert "| loss=dapo | 6 runs of 2 seeds | 50.0 %" in text(tmp_path)
    assert "| loss=dapo | 6 | 0; 1 | grpo |" in text(tmp_path)


def test_groups_without_common_settings_are_paired_by_the_means_of_seeds(tmp_path: Path) -> None:
    figures = {(lr, "grpo", s): n for lr, n in ((1e-4, 1), (1e-3, 3)) for s in range(2)}
    figures |= {(0.01, "dapo", 0): 5, (0.01, "dapo", 1): 7}
    write_sweep(tmp_path, figures)
    difference = of_grpo(read(tmp_path, "all", "by=loss"))["loss=dapo"]["difference"]
    assert (difference["mean"], difference["n"]) == (0.4, 2)
    assert difference["how"] == "paired over the means of 2 seeds"


def test_two_single_runs_of_other_seeds_have_no_verdict(tmp_path: Path) -> None:
    write_sweep(tmp_path, {(1e-4, "grpo", 0): 2, (1e-3, "grpo", 1): 9})
    difference = of_grpo(read(tmp_path, "all"))["lr=1e-3"]["difference"]
    assert difference["how"] == "one run each, of other seeds"
    assert (difference["mean"], difference["low"], difference["verdict"]) == (0.7, None, "unclear")


def test_the_drawing_has_a_panel_for_each_goal_and_a_row_for_each_group(tmp_path: Path) -> None:
    write_sweep(tmp_path, {(lr, "grpo", s): 3 + s for lr in (1e-4, 1e-3) for s in range(2)})
    (tmp_path / "report" / "figures").mkdir(parents=True)
    kept = tmp_path / "report" / "figures" / "of-the-report.svg"
    kept.write_text("")
    read(tmp_path, "all")
    svg = (tmp_path / "report" / "compare" / "goals-by-group.svg").read_text()
    assert "grpo: reasoning accuracy, %" in svg and ">lr=1e-4<" in svg and ">lr=1e-3<" in svg
    assert kept.exists()
    assert "![Goals by group](compare/goals-by-group.png)" in text(tmp_path)
    first = (tmp_path / "report" / "compare.html").read_bytes()
    read(tmp_path, "stage=grpo")
    assert first == (tmp_path / "report" / "compare.html").read_bytes()


def test_names_in_the_drawing_show_what_differs() -> None:
    shared = "data.reasoning.only={a: 1, b: 2}, "
    assert row_names(["loss=dapo, lr=1", "loss=dapo, lr=2"]) == [
        "loss=dapo, lr=1",
        "loss=dapo, lr=2",
    ]
    long = [f"{shared}loss=dapo, lr={n}" for n in (1, 2)]
    assert row_names(long) == ["lr=1", "lr=2"]
    assert row_names([f"{shared}loss=dapo", f"{shared}loss=dapo, lr=1"])[1] == "lr=1"
    [cut] = row_names([f"{shared}loss=dapo, lr=1e-3"])
    assert cut == "data.reasoning.only=… loss=dapo, lr=1e-3" and len(cut) == 40
