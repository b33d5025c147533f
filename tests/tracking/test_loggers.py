"""metrics.csv, and W&B: which mode, what a run says of itself, its table and its lineage."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger

from fourstage.errors import UserError
from fourstage.job import LoggerConfig, StageJob
from fourstage.lineage.climb import climb
from fourstage.runs.records import read_record
from fourstage.tracking import loggers
from fourstage.tracking.callbacks import Sample, SampleLog
from fourstage.tracking.loggers import MetricsCSV, build_loggers, finish_wandb, has_key, wandb_mode
from tests.fakes import FakeTrain, config, own_files


@pytest.fixture
def no_key(tmp_path, monkeypatch):
    """A user who never logged in, in a fresh process."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb"))
    loggers._say_offline.cache_clear()


@pytest.fixture
def job(tmp_path) -> StageJob:
    """An sft run that has just been started; its pretrain run is finished."""
    outputs = f"outputs={tmp_path}/outputs"
    tree = config("stage=sft", outputs, "model=moe_nano", *own_files(tmp_path / "files"), "seed=3")
    train = FakeTrain()
    climb(tree, train=train)
    return train.jobs[-1]


def test_metrics_csv_columns_and_half_written_rows(tmp_path) -> None:
    path = tmp_path / "metrics.csv"
    logger = MetricsCSV(path)
    logger.log_metrics({"a": 1.0, "epoch": 0}, 1)
    logger.log_metrics({"a": 0.1 + 0.2}, 2)
    logger.log_metrics({"val/loss": float("nan")}, 2)  # a new column, the same step
    logger.log_metrics({"a": 3.0, "val/loss": 0.5}, 3)
    assert path.read_text() == "step,a,val/loss\n1,1,\n2,0.3,nan\n3,3,0.5\n"
    with open(path, "a") as file:
        file.write("4,1.2")  # killed in the middle of a row
    resumed = MetricsCSV(path, resume=True)
    resumed.keep(2)
    resumed.log_metrics({"b": 7.0}, 3)
    assert path.read_text() == "step,a,val/loss,b\n1,1,,\n2,0.3,nan,\n3,,,7\n"
    MetricsCSV(path).log_metrics({"c": 1.0}, 1)  # no resume: the old rows go
    assert path.read_text() == "step,c\n1,1\n"


@pytest.mark.parametrize(
    ("config", "env", "key", "mode"),
    [
        ({}, None, False, ("offline", "no API key")),
        ({}, None, True, ("online", "")),
        ({}, "offline", True, ("offline", "")),
        ({}, "dryrun", True, ("offline", "")),
        ({}, "disabled", True, ("disabled", "")),
        ({"mode": "disabled"}, "online", True, ("disabled", "")),
        ({"mode": "offline"}, "online", True, ("offline", "")),
        ({"mode": "online"}, "offline", True, ("online", "")),
        ({"mode": "online"}, None, False, ("offline", "no API key")),
        ({"name": "none"}, "online", True, ("disabled", "")),
    ],
)
def test_mode(no_key, monkeypatch, config, env, key, mode) -> None:
    if env:
        monkeypatch.setenv("WANDB_MODE", env)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode(LoggerConfig(**config)) == mode


def test_where_a_key_is_found(no_key, monkeypatch, tmp_path) -> None:
    assert not has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert not has_key()
    (tmp_path / "netrc").write_text("machine wandb.example.org:8080 login user password secret\n")
    assert has_key()
    (tmp_path / "netrc").write_text("nonsense")
    assert not has_key()


def test_the_hint_survives_a_shell(tmp_path, capsys) -> None:
    folder = tmp_path / "my outputs" / "wandb"
    (folder / "offline-run-1").mkdir(parents=True)
    loggers._say_offline("no API key", folder)
    command = capsys.readouterr().out.strip().split("later: ")[1]
    words = subprocess.check_output(["sh", "-c", command.replace("wandb", "echo", 1)], text=True)
    assert words == f"sync {folder}/offline-run-1\n"


def test_without_a_key_it_logs_offline_and_says_so_once(no_key, job, capsys) -> None:
    job.logger = LoggerConfig()
    csv, wandb_logger = build_loggers(job)
    assert isinstance(csv, MetricsCSV) and isinstance(wandb_logger, WandbLogger)
    run = wandb.run
    said = capsys.readouterr()
    folder = job.outputs / "wandb"
    line = f"W&B: no API key: logging offline; to send it later: wandb sync {folder}/offline-run-*"
    assert (said.out, said.err) == (line + "\n", "")
    assert run.offline and Path(run.dir).parent.parent == folder
    assert (run.name, run.group, run.job_type) == (job.name, job.group, "sft")
    assert set(run.tags) == {"sft", "moe_nano", "files", "seed3"}
    assert run.config["parents"] == {"policy": job.parents["policy"].name}
    assert run.config["stages"]["sft"]["lr"] == job.settings.lr
    assert run.config["run"] == job.run_id and read_record(job.folder)["wandb"] == run.id

    # the table of samples holds its whole history, each time it is logged
    said = [Sample("p", "Hi", "Yes", True, None), Sample("q", "1 + 1?", "#### 2", True, True)]
    log = SampleLog(job.folder / "samples.jsonl", lambda: said, every=1)
    for done in (1, 2):
        progress = SimpleNamespace(total=SimpleNamespace(processed=done))
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
        log.take(SimpleNamespace(fit_loop=loop, is_global_zero=True, loggers=[csv, wandb_logger]))
    job.debug = "fast"
    build_loggers(job)  # the next run of the process
    assert {"debug", "debug-fast"} <= set(wandb.run.tags) and wandb.run.id != run.id
    finish_wandb(job)
    assert wandb.run is None and capsys.readouterr().out == ""  # not said again
    tables = [json.loads(file.read_text()) for file in folder.rglob("*.table.json")]
    assert {len(table["data"]) for table in tables} == {2, 4}
    longest = max(tables, key=lambda t: len(t["data"]))
    assert longest["columns"] == ["step", "prompt_id", "prompt", "answer", "stopped", "right"]
    assert longest["data"][2:] == [
        [2, "p", "Hi", "Yes", True, None],
        [2, "q", "1 + 1?", "#### 2", True, True],
    ]


@pytest.mark.parametrize(("name", "value"), [("MODE", "of"), ("SILENT", "x"), ("BASE_URL", "x")])
def test_a_variable_that_wandb_refuses_is_named(no_key, job, monkeypatch, name, value) -> None:
    wandb.teardown()  # it reads them once a process
    monkeypatch.setenv(f"WANDB_{name}", value)
    job.logger = LoggerConfig()
    with pytest.raises(UserError, match=f"^WANDB_{name}: .*, got '{value}': correct it") as error:
        build_loggers(job)
    assert "\n" not in str(error.value)


def test_a_resumed_run_is_the_same_run_of_wandb(no_key, job) -> None:
    job.logger = LoggerConfig(mode="offline")
    build_loggers(job)
    first = wandb.run.id
    job.resume = True
    build_loggers(job)
    assert wandb.run.id == first
    finish_wandb(job)


def test_switched_off(job) -> None:
    for off in (LoggerConfig(name="none"), LoggerConfig(mode="disabled")):
        job.logger = off
        assert [type(logger) for logger in build_loggers(job)] == [MetricsCSV]
    assert wandb.run is None
    finish_wandb(job)


def test_a_server_that_does_not_answer(no_key, job, monkeypatch, capsys) -> None:
    modes = []

    def start(job: StageJob, mode: str):
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("timed out\nlong story")
        return SimpleNamespace()

    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr(loggers, "start_wandb", start)
    assert len(build_loggers(job)) == 2 and modes == ["online", "offline"]
    assert capsys.readouterr().out.startswith("W&B: timed out: logging offline")


class Online:
    """A W&B run with a server."""

    offline = False
    name = "sft-x"
    id = "abc"

    def __init__(self) -> None:
        self.used, self.logged, self.tables, self.summary = [], [], {}, {}

    def log(self, tables: dict) -> None:
        self.tables |= tables

    def finish(self, exit_code=None) -> None:
        pass

    def define_metric(self, *args, **kwargs) -> None:
        pass

    def use_artifact(self, name: str) -> None:
        if "missing" in name:
            raise wandb.errors.CommError("not found")
        self.used.append(name)

    def log_artifact(self, artifact) -> None:
        self.logged.append(artifact)


def test_online_the_artifacts_draw_the_lineage(no_key, job, monkeypatch, capsys) -> None:
    run = Online()
    for name in ("config.json", "tokenizer.json"):
        (job.folder / name).write_text("{}")
    monkeypatch.setattr(wandb, "init", lambda **kwargs: run)
    parent = job.parents["policy"]
    job.parents["reward"] = parent.with_name("reward-missing")
    loggers.start_wandb(job, "online")
    assert run.used == [f"{parent.name}:latest"]
    assert "W&B: the server has no artifact of reward-missing" in capsys.readouterr().out
    monkeypatch.setattr(wandb, "run", run)
    finish_wandb(job, {"steps": 7})
    [artifact] = run.logged
    files = {"model.safetensors", "config.json", "tokenizer.json", "run.json"}
    assert (artifact.name, artifact.type, set(artifact.manifest.entries)) == (
        job.name,
        "model",
        files,
    )
    assert artifact.metadata["parents"] == {"policy": parent.name, "reward": "reward-missing"}
    assert run.summary == {"cost/steps": 7} and not run.tables  # this stage evaluated nothing
    weights = artifact.manifest.entries["model.safetensors"].local_path
    assert weights == str(job.folder / "model.safetensors")


def test_weights_that_are_about_to_move_are_copied(no_key, job, tmp_path) -> None:
    """force=true trains in a folder of its own, which then takes the old run's place."""
    (tmp_path / "retrain").mkdir()
    job.folder = job.folder.rename(tmp_path / "retrain" / job.name)
    for name in ("config.json", "tokenizer.json"):
        (job.folder / name).write_text("{}")
    run = Online()
    loggers._log_model(run, job)
    copy = Path(run.logged[0].manifest.entries["model.safetensors"].local_path)
    assert copy.parent.parent.name == "artifacts"
    assert copy.read_text() == (job.folder / "model.safetensors").read_text()


def test_a_stage_that_failed_is_closed_as_failed(no_key, job, monkeypatch) -> None:
    codes = []
    monkeypatch.setattr(wandb, "run", Online())
    monkeypatch.setattr(wandb, "finish", lambda exit_code=None: codes.append(exit_code))
    finish_wandb(job)
    assert codes == [1] and not wandb.run.logged and not wandb.run.summary


def test_samples_by_stage_takes_the_last_answers_and_skips_what_answers_nothing(tmp_path) -> None:
    answers = {
        "pretrain": [(0, "a", "?"), (0, "b", "!"), (5, "a", "x"), (5, "b", "y"), (9, "a", "z")],
        "ppo": [(2, "a", "fine"), (2, "c", "new")],
    }
    folders = {stage: tmp_path / f"{stage}-abc" for stage in ("pretrain", "reward", "ppo")}
    for stage, folder in folders.items():
        folder.mkdir()
        rows = [
            {"step": step, "prompt_id": name, "prompt": name.upper(), "answer": answer}
            for step, name, answer in answers.get(stage, [])
        ]
        if rows:
            lines = [json.dumps(row) + "\n" for row in rows]
            (folder / "samples.jsonl").write_text("".join(lines))
    ppo = folders.pop("ppo")
    job = SimpleNamespace(stage="ppo", folder=ppo, ancestors=folders)
    columns, rows = loggers.samples_by_stage(job)
    assert columns == ["prompt_id", "prompt", "random", "pretrain", "ppo"]
    assert rows == [
        ["a", "A", "?", "z", "fine"],
        ["b", "B", "!", "y", None],
        ["c", "C", None, None, "new"],
    ]
    reward = SimpleNamespace(stage="reward", folder=folders.pop("reward"), ancestors=folders)
    assert loggers.samples_by_stage(reward)[1] == []


def test_the_summary_leaves_out_what_was_not_measured(tmp_path) -> None:
    cells = {
        "well_formed": {"value": 0.5, "n": 4, "low": 0.1, "high": 0.9},
        "bits_per_char": {"value": None, "why": "no corpus"},
    }
    (tmp_path / "eval.json").write_text(json.dumps({"metrics": cells}))
    assert loggers.summary(tmp_path, {"steps": 3}) == {
        "cost/steps": 3,
        "eval/well_formed": 0.5,
        "eval_low/well_formed": 0.1,
        "eval_high/well_formed": 0.9,
    }
    job = SimpleNamespace(stage="sft", run_id="abc", folder=tmp_path, ancestors={})
    assert loggers.ladder_table(job)[1] == [["sft", "abc", "well_formed", 0.5, 0.1, 0.9, 4]]
