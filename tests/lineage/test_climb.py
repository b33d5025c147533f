"""Which runs are trained, reused, resumed and replaced, with a stage that trains in no time."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from fourstage.errors import UserError
from fourstage.ladder import LADDER
from fourstage.lineage.climb import climb
from fourstage.lineage.plan import make_plan
from fourstage.lineage.runner import train_stage
from fourstage.runs.records import read_record, write_record
from fourstage.runs.store import RunStore
from tests.fakes import FakeTrain, config, ids, run


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


def test_a_whole_ladder(base, tmp_path) -> None:
    train = run(base)
    store = RunStore(tmp_path / "outputs")
    assert train.stages == list(LADDER)
    folders = {f.name.split("-")[0]: f for f in store.records()}
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
    assert len(RunStore(tmp_path / "outputs").records()) == 8


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
    assert longer.jobs[0].group == longer.jobs[0].run_id  # a second grpo run: another ladder


def test_a_group_holds_one_run_of_each_stage(base, tmp_path) -> None:
    def groups(*overrides: str, stage: str = "grpo") -> dict[str, str]:
        return {job.stage: job.group for job in run([*base, *overrides], stage).jobs}

    of = ids(base)
    first = of["pretrain"]
    assert groups() == dict.fromkeys(LADDER, first)
    branch = groups("stages.sft.lr=1e-5")  # from the same pretrain run: another ladder
    sft = ids([*base, "stages.sft.lr=1e-5"])["sft"]
    assert branch == dict.fromkeys(("sft", "reward", "ppo", "grpo"), sft)
    reward = ids([*base, "stages.reward.lr=1e-5"], "reward")["reward"]
    assert groups("stages.reward.lr=1e-5", stage="reward") == {"reward": reward}
    # a run that goes on, or is trained again, keeps its group, and so do records of before
    folder = RunStore(tmp_path / "outputs").folder("sft", sft)
    write_record(folder, group=first)
    again = groups("stages.sft.lr=1e-5", "force=true", stage="sft")
    assert again == {"sft": first} and read_record(folder)["group"] == first
    train = FakeTrain("sft", RuntimeError("killed"), checkpoint=True)
    with pytest.raises(RuntimeError):
        run([*base, "stages.sft.lr=2e-5"], "sft", train)
    write_record(train.jobs[0].folder, group="abcdefghij")
    assert groups("stages.sft.lr=2e-5", stage="sft") == {"sft": "abcdefghij"}


def test_two_jobs_that_begin_at_once_do_not_join_one_group(base, tmp_path) -> None:
    run(base, "pretrain")
    both = threading.Barrier(2)

    class Together(FakeTrain):
        def __call__(self, job):
            both.wait(60)
            return super().__call__(job)

    def other(lr: str) -> None:
        run([*base, f"stages.sft.lr={lr}"], "sft", Together())

    threads = [threading.Thread(target=other, args=(lr,)) for lr in ("1e-5", "2e-5")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sft = [r for r in RunStore(tmp_path / "outputs").records().values() if r["stage"] == "sft"]
    assert len(sft) == 2 and len({record["group"] for record in sft}) == 2
    assert ids(base)["pretrain"] in {record["group"] for record in sft}


def test_a_ladder_without_preferences_needs_no_preference_data(base) -> None:
    overrides = [o for o in base if "preference" not in o]
    assert run([*overrides, "experiment=no_preferences"]).stages == ["pretrain", "sft", "grpo"]


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


def test_what_a_kill_left_in_the_middle_of_a_write_goes(base, tmp_path) -> None:
    with pytest.raises(RuntimeError):
        run(base, "pretrain", FakeTrain("pretrain", checkpoint=True))
    (folder,) = (tmp_path / "outputs" / "runs").iterdir()
    for name in (".run.json.4021", ".metrics.csv.7", ".mine", ".mine.txt"):
        (folder / name).write_text("{")
    run(base, "pretrain")
    assert sorted(path.name for path in folder.glob(".*")) == [".mine", ".mine.txt"]


def test_a_run_that_begins_anew_leaves_no_log_that_wandb_cannot_read(base, tmp_path) -> None:
    outputs = tmp_path / "outputs"
    logs = [outputs / "wandb" / f"offline-run-20260101_00000{n}-abc" for n in range(3)]
    for log, data in zip(logs, (None, b"", b":W&B\x1e\xbe\x00"), strict=True):
        log.mkdir(parents=True)
        if data is not None:
            (log / "run-abc.wandb").write_bytes(data)
    with pytest.raises(KeyboardInterrupt):
        run(base, "pretrain", FakeTrain("pretrain", KeyboardInterrupt()))
    [folder] = (outputs / "runs").iterdir()
    write_record(folder, wandb="abc")
    run(base, "pretrain")
    assert not list((outputs / "wandb").iterdir()) and "wandb" not in read_record(folder)


def test_a_folder_that_is_removed_while_it_is_trained(base, tmp_path) -> None:
    class Removed(FakeTrain):
        def __call__(self, job):
            shutil.rmtree(job.outputs)
            (job.folder / "metrics.csv").touch()

    with pytest.raises(UserError, match="pretrain-[a-z]{10}: removed while it was trained: run it"):
        run(base, "pretrain", Removed())
    assert not list((tmp_path / "outputs").rglob("run.json"))
    assert run(base, "pretrain").stages == ["pretrain"]


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


def test_ancestors_require(base) -> None:
    overrides = [*base, "seed=3", "ancestors=require"]
    with pytest.raises(UserError) as caught:
        run(overrides, "ppo")
    command = str(caught.value).split("python train.py ")[1]
    assert command.startswith("stage=reward outputs=") and command.endswith("seed=3")
    assert "pretrain, sft, reward must be trained first" in str(caught.value)
    run([*base, "seed=3"], "reward")
    assert run(overrides, "ppo").stages == ["ppo"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler (g++)")
def test_a_cpu_compiles_in_float32(base) -> None:
    (job,) = run([*base, "trainer.compile=true"], "pretrain").jobs
    assert (job.trainer.compile, job.trainer.precision) == (True, "32-true")


def test_paths_of_a_relative_outputs_folder(base, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    train = run(["outputs=elsewhere", *base[1:]], "pretrain")
    assert train.jobs[0].folder.parent == Path("elsewhere/runs")
    assert (tmp_path / "elsewhere" / "runs").is_dir()
