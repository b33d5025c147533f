"""Which settings make groups, what the groups are called, and what they differ by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fourstage.errors import UserError
from fourstage.evaluation import suite
from fourstage.report import main
from fourstage.report.charts import row_names
from fourstage.report.comparison import compare
from fourstage.report.groups import WITHOUT_EFFECT, chosen, factors, number, short_names, typed
from fourstage.report.statistics import t_quantile
from fourstage.stages.base import StageSettings
from tests.ladders import write_json, write_lines

LETTERS = "abcdefghij"


def ident(stage: str, number: int) -> str:
    digits = "".join(LETTERS[int(digit)] for digit in f"{number:03}")
    return f"{stage[:4]}{digits}xxxxxxxxxx"[:10]


def write_run(
    outputs: Path,
    stage: str,
    n: int,
    *,
    seed: int = 0,
    parents: dict[str, str] | None = None,
    right: int | None = None,
    suite_: str = suite.SUITE,
    ids: str = "p",
    **settings: object,
) -> str:
    """A run whose goals are all `right` of ten items; its id. A setting with a dot is of the whole
    config (model.name), one without of the stage."""
    run_id = ident(stage, n)
    folder = outputs / "runs" / f"{stage}-{run_id}"
    config: dict = {
        "seed": seed,
        "model": {"name": "moe_nano"},
        "data": {"name": "embedded"},
        "evaluation": {"max_new_tokens": 64},
        "trainer": {"devices": 1, "precision": "32-true"},
        "stages": {stage: {"lr": 1e-4, "parent": "x", "log_every": 5}},
    }
    for key, value in settings.items():
        section, _, name = key.rpartition("__")
        (config[section] if section else config["stages"][stage])[name] = value
    record = {
        "id": run_id,
        "stage": stage,
        "parents": parents or {},
        "group": run_id,
        "status": "finished",
        "started": f"2026-01-01T{n:02}:00:00",
        "finished": f"2026-01-02T{n:02}:00:00",
        "debug": None,
        "git": {"commit": "abc"},
        "cost": {"seconds": 1.0},
        "config": config,
    }
    write_json(folder / "run.json", record)
    items = [
        {
            "set": "reasoning",
            "id": f"{ids}{at}",
            "task": "sums",
            "difficulty": "easy",
            "correct": at < (right or 0),
            "well_formed": True,
        }
        for at in range(10)
    ]
    metrics = suite.metrics(items, {}, 0) if right is not None else {}
    write_json(folder / "eval.json", {"suite": suite_, "seed": 0, "metrics": metrics})
    write_lines(folder / "eval_items.jsonl", items)
    (folder / "metrics.csv").write_text("step\n")
    write_lines(folder / "samples.jsonl", [])
    if stage == "pretrain":
        write_json(folder / "eval_random.json", {"suite": suite_, "seed": 0, "metrics": {}})
        write_lines(folder / "eval_items_random.jsonl", [])
    return run_id


def write_sweep(outputs: Path, figures: dict[tuple[float, str, int], int], **more: object) -> None:
    """grpo on one pretrain run a seed, {(lr, loss, seed): right of ten}."""
    for at, ((lr, loss, seed), right) in enumerate(figures.items()):
        pretrain = write_run(outputs, "pretrain", seed, seed=seed)
        parents = {"policy": pretrain}
        options = {"seed": seed, "parents": parents, "right": right, "lr": lr, "loss": loss}
        write_run(outputs, "grpo", at, **options, **more)


def read(outputs: Path, *words: str) -> dict:
    main(["compare", *words, f"outputs={outputs}"])
    return json.loads((outputs / "report" / "compare.json").read_text())


def text(outputs: Path) -> str:
    return (outputs / "report" / "compare.md").read_text()


def of_grpo(found: dict) -> dict[str, dict]:
    rows = found["comparisons"]
    return {
        row["group"]: row
        for row in rows
        if (row["stage"], row["key"]) == ("grpo", "reasoning_accuracy")
    }


# --- names


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.001, "1e-3"), (0.05, "0.05"), (0.01, "0.01"), (3.5e-4, "3.5e-4"), (1.0, "1"), (0.0, "0")]
    + [(1e5, "1e5"), (0.1, "0.1"), (-0.0005, "-5e-4"), (1e-07, "1e-7"), (123.25, "123.25")],
)
def test_a_float_is_written_as_one_types_it(value, expected) -> None:
    assert number(value) == expected and float(expected) == value


def test_other_values_are_written_as_one_types_them() -> None:
    assert [typed(v) for v in (None, True, 40000, "dapo", (0.001, None))] == [
        *("null", "true", "40000", "dapo", "1e-3, null")
    ]


def test_names_are_as_short_as_they_can_be() -> None:
    keys = ["stages.sft.lr", "stages.grpo.lr", "stages.grpo.loss", "model.name", "model.d_model"]
    assert list(short_names(keys).values()) == ["sft.lr", "grpo.lr", "loss", "model", "d_model"]
    assert short_names(["stages.grpo.lr"]) == {"stages.grpo.lr": "lr"}


def test_what_follows_from_a_name_is_not_said() -> None:
    nano = {"model.name": "nano", "model.d_model": 32, "stages.sft.lr": 1e-3}
    tiny = {"model.name": "tiny", "model.d_model": 128, "stages.sft.lr": 1e-4}
    [factor] = factors([nano, tiny])
    assert factor.said(0) == "model=nano, lr=1e-3"  # they can't be told apart
    wide = nano | {"model.d_model": 64}
    found = factors([nano, tiny, wide])
    assert [factor.names for factor in found] == [("model", "lr"), ("d_model",)]


def test_a_setting_that_a_ladder_lacks_makes_no_difference() -> None:
    assert factors([{"seed": 0, "a": 1}, {"seed": 1, "a": 1, "b": 2}]) == []


def test_what_has_no_effect_is_what_the_ids_leave_out() -> None:
    assert WITHOUT_EFFECT == StageSettings.NOT_HASHED


def test_by_takes_the_end_of_a_key() -> None:
    units = [
        {"stages.sft.lr": a, "stages.grpo.lr": b, "model.name": "x"} for a in (1, 2) for b in (1, 2)
    ]
    assert chosen(units, ["sft.lr"]) == ["stages.sft.lr"]
    for name, says in (("lr", "several: stages.sft.lr, stages.grpo.lr"), ("model", "don't differ")):
        with pytest.raises(UserError, match=says):
            chosen(units, [name])


# --- groups


def test_two_learning_rates_and_three_seeds_by_hand(tmp_path: Path) -> None:
    """Differences 0.2, 0.3, 0.1: mean 0.2, sd 0.1, t(2) 4.3027, so p = 0.0742."""
    right = {1e-3: (5, 7, 6), 1e-4: (3, 4, 5)}
    write_sweep(
        tmp_path, {(lr, "grpo", s): n for lr, each in right.items() for s, n in enumerate(each)}
    )
    found = read(tmp_path, "stage=grpo")
    assert found["groups"] == [
        {
            "label": f"lr={lr}",
            "seeds": ["0", "1", "2"],
            "ladders": [f"lr={lr}, seed {seed}" for seed in range(3)],
        }
        for lr in ("1e-4", "1e-3")
    ]
    rows = of_grpo(found)
    assert rows["lr=1e-4"]["mean"] == 0.4 and "difference" not in rows["lr=1e-4"]
    assert rows["lr=1e-3"]["values"] == {"0": 0.5, "1": 0.7, "2": 0.6}
    difference = rows["lr=1e-3"]["difference"]
    half = t_quantile(2) * 0.1 / 3**0.5
    assert (difference["to"], difference["n"], difference["mean"]) == ("lr=1e-4", 3, 0.2)
    ends = pytest.approx((0.2 - half, 0.2 + half), abs=1e-6)
    assert (difference["low"], difference["high"]) == ends
    assert difference["p"] == difference["p_holm"] == pytest.approx(0.07418, abs=1e-5)
    assert (difference["how"], difference["verdict"]) == ("paired over 3 seeds", "unclear")
    assert "There is one p value here, which Holm's correction leaves as it is: a" in text(tmp_path)
    assert found["effects"] == []  # it is the groups' difference
    assert "+20.0 points [-4.8, +44.8] p 0.074, Holm 0.074 | paired over 3 seeds |" in text(
        tmp_path
    )


def test_what_cannot_change_a_figure_makes_no_group(tmp_path: Path) -> None:
    pretrain = write_run(tmp_path, "pretrain", 0)
    for at in range(2):
        options = {"parents": {"policy": pretrain}, "right": 3 + at, "seed": at}
        write_run(tmp_path, "grpo", at, **options, trainer__devices=1 + at, log_every=at)
    found = read(tmp_path, "all")
    assert [group["label"] for group in found["groups"]] == ["all"]
    assert found["differs"]["trainer.devices"] == ["1", "1, 2"]


def test_the_commit_is_said_and_makes_no_group(tmp_path: Path) -> None:
    write_sweep(tmp_path, {(1e-3, "grpo", 0): 5, (1e-3, "grpo", 1): 6})
    path = tmp_path / "runs" / f"grpo-{ident('grpo', 1)}" / "run.json"
    write_json(path, json.loads(path.read_text()) | {"git": {"commit": "def"}})
    assert len(read(tmp_path, "all")["groups"]) == 1
    assert "Not all were made by the same code, which makes no group: git.commit abc, def." in text(
        tmp_path
    )


def test_a_branch_is_named_by_its_route(tmp_path: Path) -> None:
    """sft → grpo beside sft → ppo → grpo: the shared runs count once."""
    for seed in (0, 1):
        pretrain = write_run(tmp_path, "pretrain", seed, seed=seed, right=0)
        sft = write_run(tmp_path, "sft", seed, seed=seed, parents={"policy": pretrain}, right=2)
        ppo = write_run(tmp_path, "ppo", seed, seed=seed, parents={"policy": sft}, right=2)
        for at, parent in enumerate((sft, ppo)):
            options = {"seed": seed, "parents": {"policy": parent}, "right": 4 + at + seed}
            write_run(tmp_path, "grpo", 2 * at + seed, **options)
    found = read(tmp_path, "stage=grpo")
    assert [group["label"] for group in found["groups"]] == ["sft → ppo → grpo", "sft → grpo"]
    assert of_grpo(found)["sft → grpo"]["difference"]["mean"] == -0.1
    assert of_grpo(found)["sft → grpo"]["difference"]["p"] is None  # both seeds differ by as much
    [sft] = [row for row in found["comparisons"] if row["stage"] == "sft"]
    assert (sft["group"], sft["n"]) == ("all", 2)
    assert "-10.0 points; all the same: no interval" in text(tmp_path).replace(
        " all the", "; all the"
    )
    assert len(read(tmp_path, "stage=grpo", "parent=ppo")["groups"]) == 1


def test_ladders_by_an_ancestors_setting(tmp_path: Path) -> None:
    for at, lr in enumerate((1e-3, 1e-3, 1e-4)):
        pretrain = write_run(tmp_path, "pretrain", at, seed=at, lr=lr)
        write_run(tmp_path, "grpo", at, seed=at, parents={"policy": pretrain}, right=at)
    found = read(tmp_path, "stages.pretrain.lr=1e-3")
    assert [one["label"] for one in found["ladders"]] == ["seed 0", "seed 1"]
    found = read(tmp_path, "stage=grpo", "stages.pretrain.lr=1e-3,1e-4")
    assert [group["label"] for group in found["groups"]] == ["lr=1e-4", "lr=1e-3"]


def test_debug_runs_only_if_asked_for(tmp_path: Path) -> None:
    write_sweep(tmp_path, {(1e-3, "grpo", s): 5 for s in range(4)})
    for n in (2, 3):
        path = tmp_path / "runs" / f"grpo-{ident('grpo', n)}" / "run.json"
        write_json(path, json.loads(path.read_text()) | {"debug": "fast"})
    assert len(read(tmp_path, "stage=grpo")["ladders"]) == 2
    assert len(read(tmp_path, "stage=grpo", "debug=false")["ladders"]) == 2
    found = read(tmp_path, "stage=grpo", "debug=true")
    assert found == read(tmp_path, "stage=grpo", "debug=fast")
    assert [one["label"] for one in found["ladders"]] == ["seed 2", "seed 3"]
    assert len(read(tmp_path, "stage=grpo", "debug=fast,null")["groups"]) == 2


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
    assert "The 2 p values here are each given after Holm's correction for their number" in text(
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
    assert difference["high"] == pytest.approx(0.3 + half, abs=1e-6)
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


def test_groups_are_rows_however_many_they_are(tmp_path: Path) -> None:
    pretrain = write_run(tmp_path, "pretrain", 0)
    for at in range(20):
        write_run(tmp_path, "grpo", at, parents={"policy": pretrain}, right=at % 9, lr=0.001 + at)
    found = compare(tmp_path, ["all"])
    assert len(found.groups) == 20
    read(tmp_path, "all")
    assert max(line.count("|") for line in text(tmp_path).splitlines()) < 10


def test_a_setting_that_older_runs_lack_makes_groups_only_where_it_must(tmp_path: Path) -> None:
    """Two runs that are alike in all else would be one if the new value were the default."""
    for n, seed in enumerate((0, 1)):
        write_run(tmp_path / "new seeds", "sft", n, seed=seed, **({"frozen": True} if n else {}))
        for m, more in enumerate(({}, {"frozen": True})):
            write_run(tmp_path / "both", "sft", 2 * n + m, seed=seed, **more)
            write_run(tmp_path / "null", "sft", 2 * n + m, seed=seed, **more, model__frozen=None)
    assert [group.label for group in compare(tmp_path / "new seeds", []).groups] == ["all"]
    for name in ("both", "null"):
        groups = compare(tmp_path / name, []).groups
        assert [group.label for group in groups] == ["frozen=default", "frozen=true"]
        assert [list(group.blocks) for group in groups] == [["0", "1"]] * 2


def test_runs_of_a_version_without_a_setting_are_counted(tmp_path: Path) -> None:
    for n in range(5):
        pretrain = write_run(
            tmp_path, "pretrain", n, seed=n, **({"frozen": False} if n > 2 else {})
        )
        write_run(tmp_path, "grpo", n, seed=n, parents={"policy": pretrain})
    assert len(read(tmp_path, "stages.pretrain.frozen=false")["ladders"]) == 2
    note = "stages.pretrain.frozen=false: 3 runs are of a version without it: they aren't chosen"
    assert f"- {note}\n" in text(tmp_path)
    with pytest.raises(
        UserError, match=r"got 1 for .* \(stages.pretrain.frozen=false: 1 run is of"
    ):
        read(tmp_path, "stages.pretrain.frozen=false", "seed=2,3")
