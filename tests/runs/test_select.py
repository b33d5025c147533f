"""Conditions on runs: stage=grpo seed=0,1 tag=sweep."""

from pathlib import Path

import pytest

from fourstage.errors import UserError
from fourstage.runs.select import matching, without


def run(stage: str, letter: str, seed: int, lr: float, **changes) -> tuple[Path, dict]:
    """A record by hand. Its policy parent is the sft run "b", its model moe_tiny."""
    settings = {"lr": lr, "parent": "sft", "max_time": None, "freeze": False, "kinds": ["a", "b"]}
    config = {
        "seed": seed,
        "debug": None,
        "model": {"name": changes.pop("model", "moe_tiny"), "d_model": 128},
        "data": {"name": "embedded"},
        "tokenizer": {"name": "char"},
        "stages": {stage: settings},
    }
    record = {
        "id": letter * 10,
        "stage": stage,
        "parents": {"policy": "b" * 10},
        "status": "finished",
        "debug": None,
        "config": config,
        **changes,
    }
    return Path(f"outputs/runs/{stage}-{letter * 10}"), record


RUNS = dict(
    [
        run("pretrain", "a", 0, 0.003, parents={}),
        run("sft", "b", 0, 0.001, parents={"policy": "a" * 10}),
        run("grpo", "c", 0, 0.001, tags=["lr_sweep", "first"]),
        run("grpo", "d", 1, 1e-5, tags=["lr_sweep"]),
        run("grpo", "e", 2, 1e-5, model="moe_nano", status="running", debug="fast"),
    ]
)


def letters(*conditions: str) -> str:
    return "".join(record["id"][0] for record in matching(RUNS, conditions).values())


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("stage=grpo", "cde"),
        ("stage=sft,pretrain", "ab"),
        ("stage!=grpo", "ab"),
        ("model=moe_nano", "e"),
        ("model.d_model=128", "abcde"),
        ("data=embedded", "abcde"),
        ("tokenizer!=char", ""),
        ("seed=0", "abc"),
        ("seed=0,2", "abce"),
        ("seed!=0", "de"),
        ("seed=0.0", "abc"),
        ("tag=lr_sweep", "cd"),
        ("tag=first,lr_sweep", "cd"),
        ("tag!=first", "abde"),
        ("debug=fast", "e"),
        ("debug=null", "abcd"),
        ("debug=true", "e"),
        ("debug=false", "abcd"),
        ("status=finished", "abcd"),
        ("parent=sft", "cde"),
        ("parent=sft-bbbbbbbbbb", "cde"),
        ("parent=bbbbbbbbbb", "cde"),
        ("parent=null", "a"),
        ("parent!=sft", "ab"),
        ("id=cccccccccc", "c"),
        ("id=grpo-dddddddddd", "d"),
        ("stages.grpo.lr=1e-3", "c"),
        ("stages.grpo.lr=0.00001", "de"),
        ("stages.grpo.lr!=1e-3", "de"),
        ("stages.grpo.max_time=null", "cde"),
        ("stages.grpo.freeze=False", "cde"),
        ("stages.grpo.freeze!=false", ""),
        ("stages.grpo.kinds=b", "cde"),
    ],
)
def test_a_condition_picks_runs(condition, expected) -> None:
    assert letters(condition) == expected


def test_all_conditions_must_hold() -> None:
    assert letters("stage=grpo", "seed=0,1", "stages.grpo.lr=1e-5") == "d"
    assert letters("stage=sft", "tag=first") == ""
    assert letters() == "abcde"


def test_no_runs_fulfil_anything() -> None:
    assert matching({}, ["stage=grpo", "nothing=1"]) == {}


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("stage=grop", "no run has stage=grop: did you mean grpo? (the runs have pretrain, sft"),
        ("seed=7", "no run has seed=7: the runs have 0, 1, 2"),
        ("seed=true", "no run has seed=true: the runs have 0, 1, 2"),
        ("tag=lr_swep", "no run has tag=lr_swep: did you mean lr_sweep?"),
        ("stages.grpo.freeze=0", "no run has stages.grpo.freeze=0: the runs have false"),
        ("debug=slow", "no run has debug=slow: the runs have null, fast"),
        ("modle=moe_nano", "no run has a setting 'modle': did you mean model?"),
        ("d_model=128", "no run has a setting 'd_model': did you mean model.d_model?"),
        ("stages.grpo=1", "no run has a setting 'stages.grpo': did you mean stages.grpo.lr"),
        ("stages.ppo.lr=1", "no run has a setting 'stages.ppo.lr': did you mean stages."),
        ("grpo", "'grpo': expected key=value"),
        ("=1", "'=1': expected key=value"),
        ("seed=", "'seed=': expected key=value"),
        ("seed=0,", "'seed=0,': expected key=value"),
    ],
)
def test_a_wrong_condition_is_one_line_with_what_there_is(condition, message) -> None:
    with pytest.raises(UserError) as error:
        letters(condition)
    assert str(error.value).startswith(message)


def test_the_first_of_many_values_are_named() -> None:
    many = {Path(f"runs/{seed}"): run("grpo", "c", seed, 0.1)[1] for seed in range(20)}
    with pytest.raises(UserError, match="seed=x: the runs have 0, 1, .*, 11 and 8 more$"):
        matching(many, ["seed=x"])


def test_no_tags_at_all() -> None:
    with pytest.raises(UserError, match="no run has tag=first: the runs have none"):
        matching(dict([run("grpo", "c", 0, 0.1)]), ["tag=first"])


def test_runs_of_a_version_without_a_setting() -> None:
    """grpo d and e have another key of the stage, sft b has none of it."""
    runs = dict([run("sft", "b", 0, 1.0), *(run("grpo", letter, 1, 1.0) for letter in "cde")])
    [*_, new], conditions = runs, ["seed=0,1", "stages.grpo.frozen=false"]
    with pytest.raises(UserError, match="no run has a setting 'stages.grpo.frozen'"):
        matching(runs, conditions)
    runs[new]["config"]["stages"]["grpo"]["frozen"] = False
    assert list(matching(runs, conditions)) == [new]
    assert without(runs, conditions) == {
        "seed=0,1": [],
        "stages.grpo.frozen=false": [folder for folder in runs if "grpo" in folder.name][:2],
    }
    with pytest.raises(UserError, match="the runs have false; 2 runs are of a version without"):
        matching(runs, ["stages.grpo.frozen=true"])
