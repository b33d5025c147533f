"""Plans, run ids, reuse, resume, force and locks, with a stage that trains in no time."""

from __future__ import annotations

import copy
import dataclasses
import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fourstage.errors import UserError
from fourstage.ladder import LADDER
from fourstage.lineage import climb as lineage
from fourstage.lineage import ranks
from fourstage.lineage.climb import climb, one_line
from fourstage.lineage.plan import make_plan, python_word
from fourstage.lineage.ranks import Ranks
from fourstage.lineage.runner import train_stage
from fourstage.runs.records import read_record, write_record
from fourstage.runs.store import RunStore
from tests.fakes import FakeTrain, config, own_files


@pytest.fixture
def base(tmp_path) -> list[str]:
    files = own_files(tmp_path / "files")
    return [f"outputs={tmp_path}/outputs", "model=moe_nano", "logger=none", *files]


def ids(overrides: list[str], stage: str = "grpo") -> dict[str, str]:
    return {run.stage: run.id for run in make_plan(config(*overrides, f"stage={stage}")).runs}


def run(overrides: list[str], stage: str = "grpo", train: FakeTrain | None = None) -> FakeTrain:
    train = train or FakeTrain()
    climb(config(*overrides, f"stage={stage}"), overrides=overrides, train=train)
    return train


# --- ids


def test_ids_are_letters_and_do_not_change(base) -> None:
    first = ids(base)
    assert list(first) == list(LADDER) and first == ids(base)
    assert len(set(first.values())) == 5
    assert all(re.fullmatch("[a-z]{10}", run_id) for run_id in first.values())


@pytest.mark.parametrize(
    ("model", "stages"),
    [
        ("model.balance=bias", []),
        ("model.z_loss_coef=0.1", []),
        ("model.balance=switch", ["pretrain", "sft"]),
        ("model.dropout=0.1", ["pretrain", "sft"]),
    ],
)
def test_the_size_of_a_piece_counts_where_the_weights_depend_on_it(base, model, stages) -> None:
    for stage in LADDER:
        one, other = (
            ids([*base, model, f"stages.{stage}.micro_batch_size={size}"], stage) for size in (2, 3)
        )
        assert (one[stage] != other[stage]) == (stage in stages), stage
    more = ids([*base, model, "trainer.devices=2"])
    assert (more["pretrain"] != ids([*base, model])["pretrain"]) == bool(stages)


@pytest.mark.parametrize("stage", LADDER)
def test_a_file_that_is_edited_after_the_plan_trains_nothing(base, tmp_path, stage) -> None:
    """Else its weights would be found later, under the id of the file as it was."""
    source = LADDER[stage].source
    path = next(tmp_path.glob(f"files/{source}.*"))
    kept = path.read_text()

    def edit_and_train(job):
        if job.stage == stage:
            path.write_text(
                kept.replace("Say 7", "Say 77").replace("lazy", "busy").replace("+ 1", "+ 2")
            )
        return train_stage(job)

    quick = [*base, "debug=fast", "data.corpus.problems=0", "data.chat.demonstrations=0"]
    with pytest.raises(UserError, match=f"data.{source} has changed since the plan was made"):
        climb(config(*quick, f"stage={stage}"), train=edit_and_train)
    (folder,) = tmp_path.glob(f"outputs/runs/{stage}-*")
    assert read_record(folder)["status"] == "failed"
    planned = {run.stage: run for run in make_plan(config(*quick, f"stage={stage}")).runs}
    assert planned[stage].id not in folder.name and planned[stage].status == "train"


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("seed=1", LADDER),
        ("model.d_expert=48", LADDER),
        ("debug=fast", LADDER),
        ("trainer.precision=bf16-mixed", LADDER),
        ("stages.pretrain.lr=0.00123", LADDER),
        ("stages.pretrain.optimizer=adamw", LADDER),
        ("stages.sft.batch_size=16", ("sft", "reward", "ppo", "grpo")),
        ("stages.reward.margin=0.5", ("reward", "ppo", "grpo")),
        ("stages.ppo.kl_coef=0.123", ("ppo", "grpo")),
        ("stages.grpo.loss=dapo", ("grpo",)),
        ("stages@stages.grpo=grpo_dapo", ("grpo",)),
        ("stages.grpo.parent=sft", ("grpo",)),
        # none of these moves a weight
        ("stages.pretrain.val_every=7", ()),
        ("stages.sft.micro_batch_size=4", ()),
        ("stages.grpo.checkpoint_every=1", ()),
        ("trainer.strategy=ddp", ()),
        ("trainer.devices=2", ()),
        ("logger=wandb", ()),
        ("force=true", ()),
        ("keep_checkpoints=true", ()),
        ("evaluation.max_pairs=5", ()),
        ("model.name=other", ()),
        ("stages.pretrain.lr=4e-3", ()),  # what it is, written otherwise
    ],
)
def test_what_determines_the_weights_determines_the_id(base, override, changed) -> None:
    before, after = ids(base), ids([*base, override])
    assert [stage for stage in after if after[stage] != before[stage]] == [
        stage for stage in changed if stage in after
    ]


def test_only_the_source_that_a_stage_reads_counts(base, tmp_path) -> None:
    before = ids(base)
    more = {"prompt": "Say 99", "chosen": "It is 99.", "rejected": "No."}
    with open(tmp_path / "files" / "preference.jsonl", "a") as file:
        file.write(json.dumps(more) + "\n")
    after = ids(base)
    assert [stage for stage in after if after[stage] != before[stage]] == ["reward", "ppo", "grpo"]
    files = tmp_path / "files"
    files.rename(tmp_path / "moved")  # the content counts, not where it lies
    moved = [override.replace("/files/", "/moved/") for override in base]
    assert ids(moved) == after


def test_every_hashed_setting_of_every_stage_changes_the_id(base) -> None:
    tree, plain = config(*base, "stage=grpo"), ids(base)
    for stage in LADDER:
        kind = LADDER[stage].code.Settings
        for field in dataclasses.fields(kind):
            value = tree["stages"][stage][field.name]
            if isinstance(value, bool):
                other = not value
            elif isinstance(value, int | float):
                other = value / 2 if isinstance(value, float) and value else value + 2
            else:
                continue  # parents, max_time, words
            changed = copy.deepcopy(tree) | {"stage": stage}
            changed["stages"][stage][field.name] = other
            differs = make_plan(changed).runs[-1].id != plain[stage]
            assert differs == (field.name not in kind.NOT_HASHED), (
                stage,
                field.name,
            )


# --- climbing


def test_a_whole_ladder(base, tmp_path) -> None:
    train = run(base)
    store = RunStore(tmp_path / "outputs")
    assert train.stages == list(LADDER)
    folders = {f.name.split("-")[0]: f for f in store.folders()}
    records = {stage: read_record(folder) for stage, folder in folders.items()}
    of = {stage: record["id"] for stage, record in records.items()}
    assert of == ids(base)
    assert {stage: record["parents"] for stage, record in records.items()} == {
        "pretrain": {},
        "sft": {"policy": of["pretrain"]},
        "reward": {"policy": of["sft"]},
        "ppo": {"policy": of["sft"], "reward": of["reward"]},
        "grpo": {"policy": of["ppo"]},
    }
    grpo = records["grpo"]
    assert grpo["name"] == folders["grpo"].name and grpo["status"] == "finished"
    assert grpo["started"] <= grpo["finished"] and grpo["debug"] is None
    assert grpo["cost"]["steps"] == 7 and grpo["cost"]["seconds"] >= 0
    assert grpo["data"]["source"] == "reasoning" and grpo["data"]["digest"]
    assert list(grpo["config"]["stages"]) == ["grpo"] and grpo["config"]["stage"] == "grpo"
    assert {"fourstage", "python", "torch"} <= set(grpo["versions"])
    assert grpo["device"].startswith("cpu (") and "kernels)" in grpo["device"]
    assert {record["group"] for record in records.values()} == {of["pretrain"]}
    for stage, folder in folders.items():
        files = {"run.json", "model.safetensors"}
        assert {path.name for path in folder.iterdir()} == files, stage

    job = train.jobs[3]
    assert job.parents == {"policy": folders["sft"], "reward": folders["reward"]}
    assert job.ancestors == {s: folders[s] for s in ("pretrain", "sft", "reward")}
    assert [stage for stage, _ in job.plan_left] == ["grpo"] and not job.resume
    assert list(train.jobs[4].ancestors) == ["pretrain", "sft", "reward", "ppo"]
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {"runs", "locks"}
    assert not list((tmp_path / "outputs" / "locks").glob("*.decisions"))


def test_finished_runs_are_reused_and_a_changed_setting_is_a_new_run(base, tmp_path) -> None:
    run(base)
    assert run(base).stages == []
    assert run([*base, "stages.grpo.lr=3e-4"]).stages == ["grpo"]
    assert run([*base, "stages.reward.lr=1e-4"], "ppo").stages == ["reward", "ppo"]
    assert len(RunStore(tmp_path / "outputs").folders()) == 8


def test_a_found_target_needs_no_ancestors(base, tmp_path) -> None:
    run(base, "sft")
    store = RunStore(tmp_path / "outputs")
    store.remove(store.find("pretrain"), force=True)
    assert run(base, "sft").stages == []
    assert run(base, "reward").stages == ["pretrain", "reward"]


def test_other_parents(base, tmp_path) -> None:
    run(base)
    of = ids(base)
    assert run([*base, "stages.grpo.parent=sft"]).stages == ["grpo"]
    store = RunStore(tmp_path / "outputs")
    for name in (of["sft"], f"sft-{of['sft']}", store.folder("sft", of["sft"])):
        again = make_plan(config(*base, "stage=grpo", f"stages.grpo.parent={name}"))
        assert [r.stage for r in again.runs] == ["grpo"] and again.runs[0].status == "found"
    again = run([*base, f"stages.ppo.reward_parent={of['reward']}", "stages.ppo.lr=1e-5"], "ppo")
    assert again.stages == ["ppo"]
    longer = run([*base, f"stages.grpo.parent={of['grpo']}", "seed=5"])  # grpo goes on
    assert longer.stages == ["grpo"]
    assert longer.jobs[0].parents == {"policy": store.folder("grpo", of["grpo"])}
    assert longer.jobs[0].group == of["pretrain"]


def test_a_ladder_without_preferences_needs_no_preference_data(base) -> None:
    overrides = [o for o in base if "preference" not in o]
    assert run([*overrides, "experiment=no_preferences"]).stages == ["pretrain", "sft", "grpo"]


class Evaluated(FakeTrain):
    """Leaves an eval.json too: a tenth well-formed after pretrain, nine tenths after sft."""

    def __call__(self, job):
        value = {"pretrain": 0.1, "sft": 0.9}.get(job.stage)
        cell = {"value": value, "n": 50, "low": value, "high": 0.95} if value else {"value": None}
        cell |= {} if value else {"why": "no pairs"}
        metrics = {"pair_accuracy" if job.stage == "reward" else "well_formed": cell}
        evaluation = {"suite": "2", "seed": 0, "metrics": metrics}
        (job.folder / "eval.json").write_text(json.dumps(evaluation))
        return super().__call__(job)


def test_the_end_says_what_it_came_to_where_it_is_and_what_comes_next(
    base, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: sys.executable)
    of, place = ids(base), base[0].removeprefix("outputs=")
    run(base, "sft", Evaluated())
    expected = f"""\
sft: well-formed answers 10.0 % [10.0, 95.0] (pretrain) → 90.0 % [90.0, 95.0] (95 % intervals)
run: {place}/runs/sft-{of["sft"]}
next:
  python -m fourstage chat run=sft-{of["sft"]} outputs={place}
  python -m fourstage report run=sft-{of["sft"]} outputs={place}
  python train.py stage=reward {" ".join(base)}
"""
    assert capsys.readouterr().out.endswith(expected)
    run(base, "sft")  # found
    assert capsys.readouterr().out.endswith(expected)
    run(base, "reward", Evaluated())
    said = capsys.readouterr().out
    assert "\nreward: held-out pairs ordered right not measured: no pairs\nrun: " in said
    assert "fourstage chat" not in said
    run(base, "grpo", Evaluated())
    assert "train.py" not in capsys.readouterr().out


def test_the_next_command_goes_where_the_ladder_goes(base, capsys) -> None:
    run([*base, "experiment=no_preferences"], "sft")
    assert f"  {python_word()} train.py stage=grpo " in capsys.readouterr().out
    only_text = [o for o in base if "chat" not in o]
    run(only_text, "pretrain")
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"  {python_word()} train.py stage=sft {' '.join(only_text)} data.chat.path=FILE"


def test_a_parent_that_did_not_train_on_this_data_is_warned_of(base, tmp_path, capsys) -> None:
    run(base, "pretrain")
    parent = ids(base, "pretrain")["pretrain"]
    named = f"stages.sft.parent=pretrain-{parent}"
    run([*base, named], "sft")
    assert "warning:" not in capsys.readouterr().out
    without = [o for o in base if "corpus" not in o]
    run([*without, named, "seed=2"], "sft")
    assert (
        f"warning: pretrain-{parent} may have trained on what is held out now: with these data "
        "settings there is no corpus that it could have trained on\n"
    ) in capsys.readouterr().out
    (tmp_path / "other.txt").write_text("Another text altogether, of many words.\n" * 40)
    run([*base, named, f"data.corpus.path={tmp_path}/other.txt", "seed=3"], "sft")
    assert "its corpus is another than it was trained on" in capsys.readouterr().out


def test_the_next_command_names_the_script_and_its_config_folder(base, capsys, monkeypatch) -> None:
    script = ["/elsewhere/train.py", "--config-dir=mine", "stage=pretrain"]
    monkeypatch.setattr("sys.argv", script)
    run(base, "pretrain")
    said = capsys.readouterr().out.splitlines()[-1]
    assert " /elsewhere/train.py --config-dir=mine stage=sft " in said


def test_own_files_among_embedded_data_are_said(base, capsys) -> None:
    files = [o for o in base if o != "data=files"]
    run(files, "pretrain")
    said = "data embedded with files of corpus, chat, preference, reasoning, seed 0"
    assert said in capsys.readouterr().out


def test_equal_times_are_one_run(base) -> None:
    times = ("00:00:02:00", "0:0:2:0", "00:00:01:60", "00:00:03:00")
    of = [ids([*base, f"stages.pretrain.max_time={t}"], "pretrain")["pretrain"] for t in times]
    assert of[0] == of[1] == of[2] != of[3]


def test_one_item_is_no_interval(base, capsys) -> None:
    class One(Evaluated):
        def __call__(self, job):
            found = super().__call__(job)
            path = job.folder / "eval.json"
            path.write_text(path.read_text().replace('"high": 0.95', '"high": 0.9'))
            return found

    run(base, "sft", One())
    assert "→ 90.0 % [90.0, 90.0] (95 % intervals; an interval without width)" in (
        capsys.readouterr().out
    )


# --- what goes wrong


def test_a_failed_run_starts_again_and_an_interrupted_one_resumes(base, tmp_path) -> None:
    with pytest.raises(RuntimeError, match="nan"):
        run(base, "sft", FakeTrain(fail_in="sft"))
    folder = next((tmp_path / "outputs" / "runs").glob("sft-*"))
    assert read_record(folder)["status"] == "failed"
    (folder / "junk").touch()
    with pytest.raises(KeyboardInterrupt):
        run(base, "sft", FakeTrain("sft", KeyboardInterrupt(), checkpoint=True))
    before = read_record(folder)
    assert before["status"] == "running" and not (folder / "junk").exists()
    write_record(folder, cost={"seconds": 100.0})
    plan = make_plan(config(*base, "stage=sft"))
    assert [r.status for r in plan.runs] == ["found", "resume"]
    resumed = run(base, "sft")
    assert [(job.stage, job.resume) for job in resumed.jobs] == [("sft", True)]
    after = read_record(folder)
    assert (after["status"], after["started"]) == ("finished", before["started"])
    assert after["cost"]["seconds"] >= 100
    assert not (folder / "checkpoints").exists()


def test_keep_checkpoints(base, tmp_path) -> None:
    run([*base, "keep_checkpoints=true"], "pretrain", FakeTrain(checkpoint=True))
    assert list((tmp_path / "outputs" / "runs").glob("pretrain-*/checkpoints/last.ckpt"))


def test_force_keeps_the_old_run_until_the_new_one_is_finished(base, tmp_path) -> None:
    run(base, "sft")
    place = next((tmp_path / "outputs" / "runs").glob("sft-*"))
    write_record(place, note="old")
    forced = [*base, "force=true"]
    with pytest.raises(RuntimeError):
        run(forced, "sft", FakeTrain("sft", checkpoint=True))
    assert read_record(place)["note"] == "old" and read_record(place)["status"] == "finished"
    assert run(base, "sft").stages == []

    resumed = run(forced, "sft")  # the same command again
    assert [(job.stage, job.resume) for job in resumed.jobs] == [("sft", True)]
    assert resumed.jobs[0].folder == tmp_path / "outputs" / "retrain" / place.name
    assert "note" not in read_record(place) and read_record(place)["status"] == "finished"
    assert not list((tmp_path / "outputs" / "retrain").iterdir())
    again = run(forced, "sft")  # and once more: trained again
    assert [(job.stage, job.resume) for job in again.jobs] == [("sft", False)]


def test_a_forced_run_that_was_killed_before_the_swap(base, tmp_path) -> None:
    run(base, "pretrain")
    place = next((tmp_path / "outputs" / "runs").glob("pretrain-*"))
    new = tmp_path / "outputs" / "retrain" / place.name
    new.parent.mkdir()
    place.rename(new)
    write_record(new, note="new")
    run(base, "pretrain")
    assert run([*base, "force=true"], "pretrain").stages == []
    assert read_record(place)["note"] == "new"


def test_another_commit_is_said(base, capsys, monkeypatch) -> None:
    monkeypatch.setattr(lineage, "git_state", lambda: {"commit": "a" * 40, "dirty": False})
    run(base, "pretrain")
    run(base, "pretrain")
    assert "warning" not in capsys.readouterr().out
    monkeypatch.setattr(lineage, "git_state", lambda: {"commit": "b" * 40, "dirty": False})
    assert run(base, "pretrain").stages == []
    assert "was made by commit aaaaaaaa, this is bbbbbbbb" in capsys.readouterr().out


def test_ancestors_require(base) -> None:
    overrides = [*base, "seed=3", "ancestors=require"]
    with pytest.raises(UserError) as caught:
        run(overrides, "ppo")
    command = str(caught.value).split("python train.py ")[1]
    assert command.startswith("stage=reward outputs=") and command.endswith("seed=3")
    assert "pretrain, sft, reward must be trained first" in str(caught.value)
    run([*base, "seed=3"], "reward")
    assert run(overrides, "ppo").stages == ["ppo"]


def test_a_command_to_paste_survives_the_shell(base, tmp_path) -> None:
    files = own_files(tmp_path / "my texts, [a]")
    path = f'data.corpus.path="{tmp_path}/my texts, [a]/corpus.txt"'  # as Hydra wants it
    tree = config(*[o for o in files if "corpus" not in o and "my texts" not in o], path, *base)
    with pytest.raises(UserError) as caught:
        climb(tree | {"stage": "sft", "ancestors": "require"}, overrides=["stage=sft", path])
    command = str(caught.value).split("trained first: ")[1]
    assert shlex.split(command) == [python_word(), "train.py", "stage=pretrain", path]


def test_a_command_to_paste_names_this_interpreter(tmp_path, monkeypatch) -> None:
    python = tmp_path / ".venv" / "bin" / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    for found, here, word in (
        (str(python), tmp_path, "python"),  # activated
        ("/usr/bin/python", tmp_path, ".venv/bin/python"),
        (None, Path("/"), str(python)[1:]),
        (None, Path(__file__).parents[1], str(python)),
    ):
        monkeypatch.setattr("shutil.which", lambda name, found=found: found)
        monkeypatch.chdir(here)
        assert python_word() == word


MISTAKES = [
    ("stage=foo", "stage: expected one of pretrain, sft, reward, ppo, grpo, got 'foo'"),
    ("seed=1.5", "seed: expected a whole number, got 1.5"),
    ("seed=abc", "seed: expected a whole number, got 'abc'"),
    ("seed=-1", "seed: must be between 0 and 4294967295, got -1"),
    ("seed=99999999999999999999", "seed: must be at most 9223372036854775807 in size, got 99999"),
    ("evaluation.seed=-1", "evaluation.seed: must be between 0 and 4294967295, got -1"),
    ("stages.grpo=null", "stages.grpo: expected keys and values, got None"),
    ("+stages.dpo={lr: 1}", "stages.dpo: unknown key"),
    ("evaluation=null", "evaluation: expected keys and values, got None"),
    ("model.d_model=30", "d_model: must be a multiple of 4 in 32-true, got 30: take 28 or 32, or"),
    ("model.d_expert=3", "model.d_expert: must be a multiple of 4 in 32-true, got 3: take 4, or"),
    ("model.n_layers=1000000000000", "stages.pretrain: 37,312,000,000,013,248 parameters"),
    (
        "model.num_experts=1000000000000",
        "2,048 tokens at once take at least 185,012,817 GiB of memory",
    ),
    (
        "stages.pretrain.batch_size=1000000000000",
        "87,872 parameters and 256,000,000,000,000 tokens",
    ),
    ("stages.grpo.group_size=1000000000000", "87,872 parameters and 10,240,000,000,000,000 tokens"),
    ("stages.sft.batch_size=100000000000000000000", "must be at most 9223372036854775807 in size"),
    ("stages.reward.pairs_per_prompt=1000000000000", "stages.reward: 87,872 parameters and"),
    ("evaluation.samples=1000000000000", "evaluation.samples: must be at most 1000, got"),
    ("stages.grpo.temperature=1e-40", "stages.grpo.temperature: must be at least 0.01, got 1e-40"),
    ("stages.ppo.max_steps=0", "stages.ppo.max_steps: must be at least 1, got 0"),
    ("evaluation.max_new_tokens=505", "505 tokens leave no room for a prompt in model.max_seq_len"),
    ("stages.sft.max_tokens=10", "no train record fits into stages.sft.max_tokens=10"),
    ("stages.reward.max_tokens=8", "no train record fits into stages.reward.max_tokens=8"),
    ("stages.ppo.max_prompt_tokens=3", "stages.ppo.max_prompt_tokens: none of"),
    ("stages.grpo.max_prompt_tokens=3", "stages.grpo.max_prompt_tokens: none of"),
    ("ancestors=no", "ancestors: expected one of train, require, got"),
    ("model.num_experts=0", "model.num_experts: must be at least 1, got 0"),
    ("+model.width=3", "model.width: unknown key"),
    ("trainer.devices=0", "trainer.devices: must be at least 1"),
    ("trainer.devices=3", "rows cannot be shared evenly by 3"),
    ("trainer.precision=16-mixed", "trainer.precision: no 16-mixed on a CPU: take 32-true"),
    ("trainer.precision=bf16-true", "trainer.precision: expected one of auto, 32-true, 16-mixed,"),
    ("trainer.strategy=zero9", "trainer.strategy: expected one of auto, ddp, zero1, zero2, zero3,"),
    ("trainer.accelerator=tpu", "trainer.accelerator: expected one of"),
    ("evaluation.max_pairs=0", "evaluation.max_pairs: must be at least 1"),
    ("stages.grpo.group_size=1", "stages.grpo.group_size: must be at least 2, got 1"),
    ("stages.sft.lr=-1", "stages.sft.lr: must be above 0, got -1.0"),
    ("stages.ppo.max_time=later", "stages.ppo.max_time: expected DD:HH:MM:SS"),
    ("stages.reward.lr=fast", "stages.reward.lr: expected a number, got 'fast'"),
    ("stages.pretrain.block_size=513", "513 tokens do not fit model.max_seq_len=512"),
    ("stages.grpo.max_new_tokens=500", "max_prompt_tokens + max_new_tokens: 596 tokens do not fit"),
    ("stages.pretrain.parent=sft", "stages.pretrain.parent: must be null"),
    ("stages.sft.parent=grpo", "stages.sft.parent: sft cannot descend from grpo"),
    ("stages.grpo.parent=grpo", "stages.grpo.parent: grpo cannot descend from grpo"),
    ("stages.grpo.parent=reward", "stages.grpo.parent: reward will not do, expected a language"),
    ("stages.ppo.reward_parent=sft", "stages.ppo.reward_parent: sft will not do, expected a rew"),
    ("stages.ppo.parent=nope", "stages.ppo.parent: unknown run 'nope'"),
    ("stages.ppo.parent=12345", "stages.ppo.parent: expected text or null, got 12345"),
    ("data.corpus.path=null", "stages.pretrain needs data.corpus.path=FILE"),
    ("data.reasoning.path=/nope.jsonl", "/nope.jsonl: no such file"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line_before_anything_trains(base, tmp_path, override, message) -> None:
    stage = [] if override.startswith("stage=") else ["stage=grpo"]
    train = FakeTrain()
    with pytest.raises(UserError) as caught:
        climb(config(*base, *stage, override), train=train)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert train.jobs == [] and not (tmp_path / "outputs" / "runs").exists()


@pytest.mark.parametrize("group", ["stages.grpo", "stages", "model", "data.chat", "evaluation"])
def test_a_deleted_group_is_one_line(base, group) -> None:
    """As `~stages.grpo` deletes it."""
    tree = config(*base)
    parent, _, key = group.rpartition(".")
    del (tree[parent] if parent else tree)[key]
    with pytest.raises(UserError, match=f"^{group}: missing, expected keys and values$"):
        make_plan(tree)


def test_half_precision_wants_wider_rows_and_the_loop_none(base) -> None:
    half = [*base, "trainer.precision=bf16-mixed"]
    with pytest.raises(UserError) as caught:
        ids([*half, "model.d_expert=36"], "pretrain")
    assert str(caught.value) == (
        "model.d_expert: must be a multiple of 8 in bf16-mixed, got 36: take 32 or 40, or "
        "model.expert_path=loop, which is slower"
    )
    assert ids([*base, "model.d_expert=36"], "pretrain")
    assert ids([*half, "model.d_expert=3", "model.expert_path=loop"], "pretrain")
    dense = ["model.num_experts=1", "model.top_k=1", "model.d_expert=3"]
    assert ids([*half, *dense], "pretrain")


def test_a_stage_that_cannot_fit_is_refused_until_it_is_there(base, monkeypatch) -> None:
    monkeypatch.setattr("fourstage.lineage.plan.machine_memory", lambda: 87_872 * 16 + 8 * 8 * 256)
    assert run(base, "pretrain").stages == ["pretrain"]  # 16 bytes a parameter, 8 a token
    monkeypatch.setattr(
        "fourstage.lineage.plan.machine_memory", lambda: 87_872 * 16 + 8 * 8 * 256 - 1
    )
    assert run(base, "pretrain").stages == []
    with pytest.raises(UserError, match="^stages.pretrain: 87,872 parameters and 2,048 tokens at"):
        run([*base, "seed=1"], "pretrain")


def test_an_unfinished_run_with_another_budget_is_named(base, capsys) -> None:
    stopped = FakeTrain("pretrain", KeyboardInterrupt(), checkpoint=True)
    with pytest.raises(KeyboardInterrupt):
        run([*base, "stages.pretrain.max_steps=40"], "pretrain", stopped)
    capsys.readouterr()
    longer = [*base, "stages.pretrain.max_steps=80"]
    assert "note:" not in capsys.readouterr().out
    run([*longer, "seed=1"], "pretrain")  # differs in more
    assert "note:" not in capsys.readouterr().out
    assert run([*longer, "stages.pretrain.max_time=00:00:01:00"], "pretrain").stages
    timed = capsys.readouterr().out
    assert "stages.pretrain.max_steps=40 stages.pretrain.max_time=null goes on with it" in timed
    assert run(longer, "pretrain").stages == ["pretrain"]
    line = f"note: {stopped.jobs[0].run_id} is unfinished and differs in its budget alone: "
    assert f"{line}stages.pretrain.max_steps=40 goes on with it" in capsys.readouterr().out
    assert run(longer, "pretrain").stages == [] and "note:" not in capsys.readouterr().out


def test_other_settings_of_a_stored_evaluation_are_named(base, tmp_path, capsys) -> None:
    run(base, "sft")
    run([*base, "seed=0"], "sft")
    assert "note:" not in capsys.readouterr().out
    fewer = [*base, "evaluation.max_problems=9", "evaluation.samples=4"]
    assert run(fewer, "sft").stages == []
    of = ids(base, "sft")
    assert (
        f"note: pretrain-{of['pretrain']}, sft-{of['sft']} were evaluated with other settings: "
        f"{python_word()} -m fourstage evaluation run=sft-{of['sft']} ladder=true "
        f"evaluation.max_problems=9 evaluation.samples=4 outputs={tmp_path}/outputs\n"
    ) in capsys.readouterr().out


def test_other_data_of_a_stored_evaluation_is_named(base, tmp_path, capsys) -> None:
    run(base, "pretrain")
    shorter = [*base, "data.chat.max_answer_chars=50"]
    assert run(shorter, "sft").stages == ["sft"]
    of = ids(shorter, "sft")
    assert (
        f"note: pretrain-{of['pretrain']} was evaluated on other held-out data: when this is done, "
        f"{python_word()} -m fourstage evaluation run=sft-{of['sft']} ladder=true "
        f"outputs={tmp_path}/outputs\n"
    ) in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler (g++)")
def test_a_cpu_compiles_in_float32(base) -> None:
    (job,) = run([*base, "trainer.compile=true"], "pretrain").jobs
    assert (job.trainer.compile, job.trainer.precision) == (True, "32-true")


def test_sampled_pairs_need_room_for_a_prompt(base) -> None:
    embedded = [o for o in base if not o.startswith("data")]
    with pytest.raises(UserError, match="^stages.reward.max_new_tokens: 60 tokens leave no room"):
        run([*embedded, "debug=fast", "stages.reward.max_new_tokens=60"], "reward")
    run([*base, "stages.reward.max_new_tokens=250"], "reward")  # pairs of a file are not sampled


def test_a_mistake_in_a_stage_that_is_not_needed_is_one_too(base) -> None:
    with pytest.raises(UserError, match=r"^stages\.grpo\.lr: must be above 0, got -1\.0$"):
        run([*base, "stages.grpo.lr=-1"], "pretrain")


def test_a_parent_of_another_model_or_tokenizer(base, tmp_path) -> None:
    run(base, "sft")
    folder = RunStore(tmp_path / "outputs").find("sft")
    parent = f"stages.grpo.parent={folder.name}"
    with pytest.raises(UserError, match=r"is of another model \(moe_nano: d_expert 32, not 48\)"):
        run([*base, parent, "model.d_expert=48"])
    write_record(folder, config={"tokenizer": {"name": "bpe"}})
    with pytest.raises(UserError, match="has another tokenizer"):
        run([*base, parent])
    with pytest.raises(UserError, match="stages.grpo.parent: .*this run is not finished"):
        write_record(folder, status="running")
        run([*base, parent])


def test_one_line() -> None:
    full = OSError(28, "No space left on device", "x/last.ckpt")
    assert one_line(full).startswith("disk full at x/last.ckpt: free space")
    try:
        try:
            raise full
        except OSError as error:
            raise RuntimeError("could not save") from error
    except RuntimeError as error:
        assert one_line(error).startswith("disk full")
    assert one_line(ValueError("I/O error: No space left on device (os error 28)"))
    assert one_line(UserError("lr: no")) == "lr: no"
    for error in (
        PermissionError(13, "Permission denied", "/x"),
        FileExistsError(17, "Exists", "/x"),
    ):
        assert one_line(error).startswith("/x: ") and "another outputs=" in one_line(error)
    assert one_line(ValueError("a bug")) is None and one_line(FileNotFoundError(2, "x")) is None


# --- several processes


def test_two_processes_train_a_shared_ancestor_once(base, capsys) -> None:
    class Slow(FakeTrain):
        def __call__(self, job):
            started.set()
            assert may_finish.wait(10)
            return super().__call__(job)

    started, may_finish = threading.Event(), threading.Event()
    tree = config(*base, "stage=pretrain")
    slow, second = Slow(), FakeTrain()
    one = threading.Thread(target=climb, args=(tree,), kwargs={"train": slow})
    two = threading.Thread(target=climb, args=(tree,), kwargs={"train": second})
    one.start()
    assert started.wait(10)
    two.start()
    out = ""
    while "waiting for pretrain-" not in out:
        out += capsys.readouterr().out
        assert two.is_alive()
    may_finish.set()
    one.join(10)
    two.join(10)
    assert slow.stages == ["pretrain"] and second.stages == []


@pytest.fixture
def launch(base, tmp_path, monkeypatch) -> Path:
    """What is left of a launch whose first rank trained up to sft: the files of its first job."""
    monkeypatch.setattr(Ranks, "_key", "launch")
    monkeypatch.setattr(Ranks, "_jobs", iter([1, 0]))
    monkeypatch.setattr(Ranks, "_parent", os.getppid(), raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    run([*base], "sft", FakeTrain())
    monkeypatch.setenv("LOCAL_RANK", "1")  # from here on
    return tmp_path / "outputs" / "locks" / "launch.0.decisions"


@contextmanager
def holding(lock: Path) -> Iterator[None]:
    """What the first process of a launch does while it lives."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def unfinish(outputs: Path, stage: str) -> str:
    """Make a run one that still has to be trained; its id."""
    folder = RunStore(outputs).find(stage)
    write_record(folder, status="running")
    return read_record(folder)["id"]


def test_other_ranks_follow_the_first(base, tmp_path, launch) -> None:
    sft = unfinish(tmp_path / "outputs", "sft")
    follower = FakeTrain()
    launch.write_text(json.dumps({sft: "resume"}))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    with holding(launch.with_suffix(".lock")):
        run(base, "sft", follower)
    assert [(job.stage, job.resume) for job in follower.jobs] == [("sft", True)]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}


def test_other_ranks_need_nobody_where_nothing_is_to_do(base, launch) -> None:
    assert run(base, "sft").stages == []


def test_decisions_of_an_earlier_launch_do_not_count(base, tmp_path, launch, monkeypatch) -> None:
    launch.write_text(json.dumps({unfinish(tmp_path / "outputs", "sft"): "train"}))
    monkeypatch.setattr(ranks, "PATIENCE", 0.5)
    with pytest.raises(UserError, match="no word from the first process of this job in 0 s: do"):
        run(base, "sft")


def test_a_parent_that_died_before_its_child_began(base, tmp_path, launch, monkeypatch) -> None:
    unfinish(tmp_path / "outputs", "sft")
    monkeypatch.setattr(Ranks, "_parent", 99999999)
    with pytest.raises(UserError, match="the first process of this job has ended"):
        run(base, "sft")


@pytest.mark.parametrize("left", ["failed", "killed", "finished"])
def test_the_first_rank_ends_while_another_waits(base, tmp_path, launch, left) -> None:
    sft = unfinish(tmp_path / "outputs", "sft")
    launch.write_text("{}")
    held = holding(launch.with_suffix(".lock"))
    held.__enter__()

    def end() -> None:
        if left == "failed":
            launch.write_text(json.dumps({"end": "failed"}))
        elif left == "finished":
            launch.unlink()
        held.__exit__(None, None, None)  # as the system does for a killed process

    timer = threading.Timer(0.5, end)
    timer.start()
    if left == "finished":  # by then another job had trained it
        assert run(base, "sft").stages == []
    else:
        with pytest.raises(UserError, match="the first process of this job has ended"):
            run(base, "sft")
    timer.join()
    assert read_record(RunStore(tmp_path / "outputs").find(sft, finished=False))["id"] == sft


def test_the_first_rank_tells_what_it_does_and_that_it_failed(base, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Ranks, "_key", "launch")
    monkeypatch.setattr(Ranks, "_jobs", iter([0, 1]))
    run(base, "pretrain")
    with pytest.raises(RuntimeError):
        run(base, "sft", FakeTrain("sft"))
    told = json.loads((tmp_path / "outputs" / "locks" / "launch.1.decisions").read_text())
    assert told == {ids(base, "sft")["sft"]: "train", "end": "failed"}


def test_a_second_job_of_one_name_is_refused(base, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Ranks, "_key", "launch")
    monkeypatch.setattr(Ranks, "_jobs", iter([0]))
    monkeypatch.setattr(ranks, "PATIENCE", 0.1)
    (tmp_path / "outputs" / "locks").mkdir(parents=True)
    with (
        holding(tmp_path / "outputs" / "locks" / "launch.0.lock"),
        pytest.raises(UserError, match="held by another job of this name: .* another --rdzv-id"),
    ):
        run(base, "pretrain")


def test_a_file_system_without_locks(base, launch, tmp_path, monkeypatch) -> None:
    def flock(file, kind) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    sft = unfinish(tmp_path / "outputs", "sft")
    launch.write_text(json.dumps({sft: "train"}))
    launch.with_suffix(".lock").touch()
    assert Ranks(tmp_path / "outputs").wait_for(sft) == "train"
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(Ranks, "_jobs", iter([0]))
    with Ranks(tmp_path / "outputs").job():
        pass


TORCHRUN = {
    "LOCAL_RANK": "0",
    "TORCHELASTIC_RUN_ID": "a",
    "MASTER_ADDR": "b",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RESTART_COUNT": "0",
}


@pytest.mark.parametrize(
    ("env", "first", "key"),
    [
        ({}, True, "[0-9a-f]{16}"),
        ({"LOCAL_RANK": "1", "FOURSTAGE_JOB": "77"}, False, "77"),
        ({"NODE_RANK": "1", "FOURSTAGE_JOB": "77"}, False, "77"),
        ({"RANK": "8", **TORCHRUN}, False, "a-b-1-0"),
        ({"RANK": "0", **TORCHRUN}, True, "a-b-1-0"),
        ({"SLURM_PROCID": "2", "SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0"}, False, "5-0"),
    ],
)
def test_ranks_of_every_launcher(tmp_path, monkeypatch, env, first, key) -> None:
    names = "RANK NODE_RANK SLURM_PROCID SLURM_JOB_ID SLURM_STEP_ID FOURSTAGE_JOB"
    monkeypatch.setenv("FOURSTAGE_PARENT", "5")
    for name in [*names.split(), *TORCHRUN]:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Ranks, "_key", None)
    monkeypatch.setattr(Ranks, "_parent", None, raising=False)
    found = Ranks(tmp_path)
    assert found.is_first is first and re.fullmatch(key, Ranks._key)
    is_child_of_lightning = env == {"LOCAL_RANK": "1", "FOURSTAGE_JOB": "77"}
    assert Ranks._parent == (5 if is_child_of_lightning else os.getppid())
    assert os.environ["FOURSTAGE_PARENT"] == str(os.getpid())


# --- estimates


def test_time_left_is_estimated_from_runs_of_the_same_kind(base, tmp_path) -> None:
    run([*base, "stages.sft.max_steps=100"], "sft")
    folder = RunStore(tmp_path / "outputs").find("sft")
    write_record(folder, cost={"seconds": 50.0, "eval_seconds": 20.0})  # 30 s for 100 steps
    before = RunStore(tmp_path / "outputs").find("pretrain")
    write_record(before, cost={"seconds": 90.0, "eval_seconds": 40.0})
    plan = make_plan(config(*base, "seed=1", "stage=reward", "stages.sft.max_steps=300"))
    assert [r.estimate for r in plan.runs][1:] == [110.0, None]
    timed = config(*base, "seed=1", "stages.pretrain.max_time=00:00:02:00")
    assert make_plan(timed).runs[0].estimate == 120.0 + 40.0
    train = run([*base, "seed=1", "stages.sft.max_steps=300"], "reward")
    assert train.jobs[0].plan_left == [("sft", 110.0), ("reward", None)]


def test_paths_of_a_relative_outputs_folder(base, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    train = run(["outputs=elsewhere", *base[1:]], "pretrain")
    assert train.jobs[0].folder.parent == Path("elsewhere/runs")
    assert (tmp_path / "elsewhere" / "runs").is_dir()
