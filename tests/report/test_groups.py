"""Which settings make groups, and what the groups are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fourstage.errors import UserError
from fourstage.report.comparison import compare
from fourstage.report.groups import WITHOUT_EFFECT, chosen, factors, number, short_names, typed
from fourstage.report.statistics import t_quantile
from fourstage.stages.base import StageSettings
from tests.ladders import write_json
from tests.report.sweeps import ident, of_grpo, read, text, write_run, write_sweep

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


def test_two_learning_rates_and_three_seeds_by_hand(tmp_path: Path, capsys) -> None:
    """Differences 0.2, 0.3, 0.1: mean 0.2, sd 0.1, t(2) 4.3027, so p = 0.0742."""
    right = {1e-3: (5, 7, 6), 1e-4: (3, 4, 5)}
    write_sweep(
        tmp_path, {(lr, "grpo", s): n for lr, each in right.items() for s, n in enumerate(each)}
    )
    found = read(tmp_path, "stage=grpo")
    assert capsys.readouterr().out.splitlines()[:3] == [
        "grpo: reasoning accuracy",
        "  lr=1e-4  40.0 % [15.2, 64.8]  the first",
        "  lr=1e-3  60.0 % [35.2, 84.8]  +20.0 points [-4.8, +44.8] p 0.074, Holm 0.074",
    ]
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
    assert "There is one p value, which Holm's correction leaves as it is: a" in text(tmp_path)
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
    found = read(tmp_path, "stage=grpo", "base=sft->grpo")
    assert of_grpo(found)["sft → ppo → grpo"]["difference"]["to"] == "sft → grpo"


def test_the_base_is_what_the_others_are_compared_with(tmp_path: Path) -> None:
    right = {(1e-3, "grpo"): 7, (1e-4, "grpo"): 3, (1e-3, "dapo"): 9, (1e-4, "dapo"): 4}
    write_sweep(tmp_path, {(*own, s): n for own, n in right.items() for s in (0, 1)})
    typed = {
        "base=lr=0.001": "loss=grpo, lr=1e-3",
        "base=stages.grpo.lr=1e-3": "loss=grpo, lr=1e-3",
        "base=loss=dapo": "loss=dapo, lr=1e-4",
        "base=lr=1e-3, loss=dapo": "loss=dapo, lr=1e-3",
    }
    for word, label in typed.items():
        found = read(tmp_path, "stage=grpo", word)
        assert found["groups"][0]["label"] == label
        rows = of_grpo(found)
        others = {name: row["difference"] for name, row in rows.items() if name != label}
        assert {difference["to"] for difference in others.values()} == {label}
        for name, difference in others.items():
            assert difference["mean"] == pytest.approx(rows[name]["mean"] - rows[label]["mean"])
    effects = {(e["setting"], e["from"], e["to"]): e["mean"] for e in found["effects"]}
    assert effects == {
        ("loss", "loss=dapo", "loss=grpo"): -0.15,
        ("lr", "lr=1e-3", "lr=1e-4"): -0.45,
    }
    refused = {
        "base=lr=1": r"base=stages.grpo.lr=1: no group has it: there are loss=grpo, lr=1e-4; loss",
        "base=x=1": "base=x=1: the groups don't differ in it, but in loss, lr",
        "base=seed=1": "base=seed=1: the groups don't differ in it, but in loss, lr",
        "base=": "base=: a value is missing",
        "base=lr=": "base=lr=: a value is missing",
        "base=sft->grpo": "base=sft->grpo: the groups don't differ in it",
        "base=lr=1e-3,lr=1e-4": "base: lr is given twice",
    }
    for word, line in refused.items():
        with pytest.raises(UserError, match=f"^{line}"):
            read(tmp_path, "stage=grpo", word)
    with pytest.raises(UserError, match="^base: lr is given twice"):
        read(tmp_path, "stage=grpo", "base=lr=1e-3", "base=lr=1e-4")


def test_a_base_is_a_group_where_settings_are_not_crossed(tmp_path: Path) -> None:
    right = {(1e-4, "grpo"): 3, (1e-3, "grpo"): 7, (1e-3, "dapo"): 9}
    write_sweep(tmp_path, {(*own, s): n for own, n in right.items() for s in (0, 1)})
    found = read(tmp_path, "stage=grpo", "base=loss=dapo")
    assert found["groups"][0]["label"] == "loss=dapo, lr=1e-3"
    differences = {g: r["difference"] for g, r in of_grpo(found).items() if "difference" in r}
    assert {difference["to"] for difference in differences.values()} == {"loss=dapo, lr=1e-3"}
    assert differences["loss=grpo, lr=1e-4"]["mean"] == -0.6
    with pytest.raises(
        UserError, match="^base=stages.grpo.lr=1e-4,stages.grpo.loss=dapo: no group"
    ):
        read(tmp_path, "stage=grpo", "base=lr=1e-4,loss=dapo")


def test_a_base_by_its_route_and_by_an_ancestors_setting(tmp_path: Path) -> None:
    """The tips' routes are told from each other later than those of grpo alone."""
    for seed in (0, 1):
        pretrain = write_run(tmp_path, "pretrain", seed, seed=seed, right=0)
        for at, lr in enumerate((1e-4, 1e-3)):
            n = 2 * at + seed
            options = {"seed": seed, "lr": lr, "right": 2 + at}
            sft = write_run(tmp_path, "sft", n, parents={"policy": pretrain}, **options)
            ppo = write_run(tmp_path, "ppo", n, seed=seed, parents={"policy": sft}, right=2)
            for other, parent in enumerate((sft, ppo)):
                options = {"seed": seed, "parents": {"policy": parent}, "right": 4 + other + at}
                write_run(
                    tmp_path, "grpo", 2 * n + other, **options, only=['["a, lr=3"]', '["b"]'][at]
                )
        write_run(tmp_path, "ppo", 9 - seed, seed=seed, parents={"policy": pretrain}, right=1)
    words = ["all", "base=pretrain->sft->grpo", "base=stages.sft.lr=1e-3"]
    rows = of_grpo(read(tmp_path, *words))
    assert len(rows) == 4
    (first,) = (label for label, row in rows.items() if "difference" not in row)
    assert first.startswith("sft → grpo") and "lr=1e-3" in first
    others = [row["difference"] for label, row in rows.items() if label != first]
    assert {difference["to"] for difference in others} == {first}
    for word in ("sft.lr=0.001,sft -> grpo", "sft->grpo,sft.lr=1e-3", 'route=sft->grpo,only=["b"]'):
        found = of_grpo(read(tmp_path, "stage=grpo", f"base={word}"))
        assert [label for label, row in found.items() if "difference" not in row] == [first]
    found = read(tmp_path, "stage=grpo", 'base=only=["a, lr=3"]')
    assert found["groups"][0]["label"].endswith('lr=1e-4, only=["a, lr=3"]')


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
