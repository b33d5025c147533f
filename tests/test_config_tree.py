"""conf/: what counts more than what, and that every shipped file makes a plan."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig

from fourstage.ladder import LADDER
from fourstage.lineage.plan import make_plan
from tests.fakes import CONF, composed, config, own_files
from tests.hub_tokenizers import chatml

REPO = CONF.parent


def test_command_line_over_debug_over_experiment_over_base(tmp_path) -> None:
    plain = composed("debug=fast", "experiment=no_preferences")
    assert (plain.stage, plain.stages.grpo.parent) == ("grpo", "sft")  # experiment over base
    assert plain.stages.grpo.max_steps == 2 and plain.debug == "fast"  # debug over base
    typed = composed(
        "experiment=no_preferences", "debug=fast", "stage=ppo", "stages.grpo.max_steps=9"
    )
    assert (typed.stage, typed.stages.grpo.max_steps) == ("ppo", 9)
    # all three write one key
    experiment = tmp_path / "experiment"
    experiment.mkdir()
    text = "# @package _global_\nstages: {grpo: {max_steps: 5, lr: 0.5, group_size: 16}}\n"
    (experiment / "mine.yaml").write_text(text)
    path = f"hydra.searchpath=[file://{tmp_path}]"
    all_of_them = composed(path, "experiment=mine", "debug=fast", "stages.grpo.max_steps=9")
    grpo = all_of_them.stages.grpo
    assert (grpo.max_steps, grpo.group_size, grpo.lr) == (9, 2, 0.5)
    without_debug: DictConfig = composed(path, "experiment=mine")
    assert without_debug.stages.grpo.max_steps == 5


@pytest.mark.parametrize(("name", "problems"), [("embedded", 50), ("public", 50), ("files", 0)])
def test_debug_asks_for_no_file_that_the_stage_does_not_need(name, problems) -> None:
    tree = config("debug=fast", f"data={name}")["data"]
    assert tree["corpus"]["problems"] == tree["chat"]["demonstrations"] == problems
    assert (
        config("debug=fast", f"data={name}", "data.corpus.problems=7")["data"]["corpus"]["problems"]
        == 7
    )


@pytest.mark.parametrize(
    ("name", "facts"), [("embedded", (30, 10)), ("public", (0, 0)), ("files", (0, 0))]
)
def test_debug_adds_no_built_in_facts_to_other_data(name, facts) -> None:
    knowledge = config("debug=fast", f"data={name}")["data"]["knowledge"]
    assert (knowledge["terms"], knowledge["functions"]) == facts


def options() -> list[str]:
    """Every choice of every config group, as an override."""
    found = []
    for file in sorted(CONF.glob("*/*.yaml")):
        group, name = file.parent.name, file.stem
        if group == "stages":
            group = f"stages@stages.{name.split('_')[0]}"
        if group not in ("sweep", "experiment"):  # several jobs; test_experiments.py
            found.append(f"{group}={name}")
    return found


@pytest.mark.parametrize("option", options())
def test_every_shipped_config_makes_a_plan(option, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # planning touches no GPU
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("fourstage.lineage.command.machine_memory", lambda: 10**15)
    base = ["stage=grpo", f"outputs={tmp_path}", *own_files(tmp_path / "files")]
    if option in ("data=embedded", "data=public"):
        base = [*base[:2], "debug=fast"]
    if option == "tokenizer=hf":
        base.append(f"tokenizer.path={chatml(tmp_path / 'hub')}")
    tree = config(*[o for o in base if o != option], option)
    if option == "data=files":
        return  # its paths are the user's: test_lineage
    plan = make_plan(tree)
    assert plan.runs[-1].stage == "grpo" and not any(r.status == "found" for r in plan.runs)


def test_stage_files_have_exactly_the_settings_of_their_class() -> None:
    tree = config()
    for stage in LADDER:
        assert set(tree["stages"][stage]) == {f.name for f in fields(LADDER[stage].code.Settings)}
    assert config("stages@stages.grpo=grpo_dapo")["stages"]["grpo"]["loss"] == "dapo"


def test_all_data_configs_have_the_same_keys() -> None:
    def keys(tree, prefix="") -> set[str]:
        found = set()
        for key, value in tree.items():
            found.add(prefix + key)
            if isinstance(value, dict) and key not in ("tasks", "terse"):  # a key is a task
                found |= keys(value, f"{prefix}{key}.")
        return found

    names = [file.stem for file in (CONF / "data").glob("*.yaml")]
    trees = [keys(config(f"data={name}")["data"]) for name in names]
    assert len(names) >= 2 and all(tree == trees[0] for tree in trees)


def test_groups_of_the_tests_are_the_groups_of_the_repo() -> None:
    from tests.fakes import GROUPS

    folders = {path.name for path in Path(CONF).iterdir() if path.is_dir()}
    assert folders == {*GROUPS, "stages", "sweep"}


def test_the_wandb_sweep_makes_plans(tmp_path) -> None:
    sweep = yaml.safe_load((REPO / "sweeps" / "wandb_grpo.yaml").read_text())
    fixed = [word for word in sweep["command"] if "=" in word]
    base = [*fixed, f"outputs={tmp_path}", *own_files(tmp_path / "files")]
    first = {"lr": set(), "loss": set(), "group_size": set()}
    for key, choice in sweep["parameters"].items():
        for value in choice["values"] if "values" in choice else (choice["min"], choice["max"]):
            target = make_plan(config(*base, f"{key}={value}")).runs[-1]
            first[key.removeprefix("stages.grpo.")].add(target.id)
    assert [len(ids) for ids in first.values()] == [2, 4, 3]
