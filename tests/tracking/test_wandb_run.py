"""A W&B run: online or not, what it says of itself, its rows, its tables and its lineage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb

from fourstage.errors import UserError
from fourstage.files import write_json
from fourstage.interruptions import Stopped
from fourstage.job import LoggerConfig, StageJob
from fourstage.lineage.climb import climb
from fourstage.runs.records import read_record, write_record
from fourstage.tracking import wandb_content, wandb_run
from fourstage.tracking.callbacks import Sample, SampleLog
from fourstage.tracking.loggers import MetricsCSV, build_loggers
from fourstage.tracking.wandb_core import end_core
from fourstage.tracking.wandb_run import HeldRows, SendSaved, abandon_wandb, finish_wandb
from fourstage.tracking.wandb_settings import has_key, names, wandb_mode
from tests.fakes import FakeTrain, config, own_files
from tests.stand_in_wandb import cores

REPO = Path(__file__).parents[2]


@pytest.fixture
def no_key(tmp_path, monkeypatch):
    """A user who never logged in, in a fresh process."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb"))
    wandb_run._say_offline.cache_clear()


@pytest.fixture
def job(tmp_path) -> StageJob:
    """An sft run that has just been started; its pretrain run is finished."""
    outputs = f"outputs={tmp_path}/outputs"
    tree = config("stage=sft", outputs, "model=moe_nano", *own_files(tmp_path / "files"), "seed=3")
    train = FakeTrain()
    climb(tree, train=train)
    return train.jobs[-1]


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
    wandb_run._say_offline("no API key", folder)
    command = capsys.readouterr().out.strip().split("later: ")[1]
    words = subprocess.check_output(["sh", "-c", command.replace("wandb", "echo", 1)], text=True)
    assert words == f"sync {folder}/offline-run-1\n"


def test_without_a_key_it_logs_offline_and_says_so_once(no_key, job, capsys) -> None:
    job.logger = LoggerConfig()
    csv, held = build_loggers(job)
    assert isinstance(csv, MetricsCSV) and isinstance(held, HeldRows)
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

    # the answers of a step are a table of its row, which waits for its turn
    said = [Sample("p", "Hi", "Yes", True, None), Sample("q", "1 + 1?", "#### 2", True, True)]
    log = SampleLog(job.folder / "samples.jsonl", lambda: said, every=1)
    for done in (1, 2):
        progress = SimpleNamespace(total=SimpleNamespace(processed=done))
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
        log.take(SimpleNamespace(fit_loop=loop, is_global_zero=True, loggers=[csv, held]))
    assert not list(folder.rglob("*.table.json"))
    held.send(2)
    job.debug = "fast"
    build_loggers(job)  # the next run of the process
    assert {"debug", "debug-fast"} <= set(wandb.run.tags) and wandb.run.id != run.id
    abandon_wandb(ValueError())
    assert wandb.run is None and capsys.readouterr().out == ""  # not said again
    tables = [json.loads(file.read_text()) for file in folder.rglob("*.table.json")]
    assert {tuple(table["columns"]) for table in tables} == {
        ("step", "prompt_id", "prompt", "answer", "stopped", "right")
    }
    assert sorted(table["data"] for table in tables) == [
        [[done, "p", "Hi", "Yes", True, None], [done, "q", "1 + 1?", "#### 2", True, True]]
        for done in (1, 2)
    ]


class Logged:
    """A W&B run that notes what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict]] = []

    def log(self, values: dict, step: int, commit: bool) -> None:
        assert commit
        self.rows.append((step, values))


def test_rows_wait_for_their_state_and_none_is_sent_twice() -> None:
    held = HeldRows(run := Logged(), sent=2)
    for step in (2, 3, 4, 3, 5):  # 2 was sent by an earlier start; a validation follows 3
        held.log_metrics({f"loss{len(held.rows)}": 1.0, "epoch": 0}, step)
    held.send(1)
    assert run.rows == []
    held.send(4)
    x = "trainer/global_step"
    assert run.rows == [(3, {x: 3, "loss0": 1.0, "loss2": 1.0}), (4, {x: 4, "loss1": 1.0})]
    held.log_metrics({"late": 1.0}, 4)
    held.send(9)
    assert run.rows[2:] == [(5, {x: 5, "loss2": 1.0})]


@pytest.mark.parametrize(
    ("sent", "again"), [(-1, [0, 1, 2, 3]), (1, [2, 3]), (3, []), (4, []), (wandb_run.ALL, [])]
)
def test_a_resumed_run_sends_what_is_missing(tmp_path, sent, again) -> None:
    """The state is of step 4: the rows before it come from the files, its own may get more."""
    metrics = MetricsCSV(tmp_path / "metrics.csv")
    for step in (1, 2, 3, 4, 5):  # 5: of the killed start, after its state
        metrics.log_metrics({"loss": step / 8}, step)
    held = HeldRows(run := Logged(), sent)
    held.hold_samples([{"step": 0, "prompt_id": "p", "prompt": "?", "answer": "!"}])
    progress = SimpleNamespace(total=SimpleNamespace(processed=4))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    state = SimpleNamespace(saved_at=4, written=False)
    trainer = SimpleNamespace(fit_loop=loop, loggers=[metrics, held], checkpoint_callback=state)
    send = SendSaved()
    send.on_train_start(trainer, None)
    assert [step for step, _ in run.rows] == again
    assert all(row["loss"] == step / 8 for step, row in run.rows if step)
    held.log_metrics({"val/loss": 1.0}, 4)
    held.log_metrics({"loss": 1.0}, 5)
    state.saved_at, state.written = 6, True  # in its place only with the next step
    send.on_train_batch_start(trainer)
    assert [step for step, _ in run.rows] == again
    state.written = False
    send.on_train_batch_start(trainer)
    last = [5] if sent == 4 else [4, 5]
    assert [step for step, _ in run.rows] == [*again, *last]
    if last == [4, 5]:
        assert run.rows[-2][1]["val/loss"] == 1.0


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
    record = {**read_record(job.folder), "wandb": "older"}
    del record["wandb_online"]  # begun by an earlier version: its rows have other numbers
    write_json(job.folder / "run.json", record)
    held = build_loggers(job)[1]
    assert held.run.id not in (first, "older") and held.sent == -1
    abandon_wandb(ValueError())


def test_a_run_that_was_online_takes_it_that_the_server_has_its_rows(no_key, job) -> None:
    job.logger, job.resume = LoggerConfig(mode="offline"), True
    write_record(job.folder, wandb="abc", wandb_online=True)
    held = build_loggers(job)[1]
    assert (held.run.id, held.sent) == ("abc", wandb_run.ALL)
    assert read_record(job.folder)["wandb_online"]
    abandon_wandb(ValueError())


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_wandb_core_that_ended_between_runs_is_started_again(no_key, job, signum) -> None:
    job.logger = LoggerConfig(mode="offline")
    for held in (build_loggers(job)[1] for _ in range(3)):
        held.run.log({"loss": 1.0})
        abandon_wandb(ValueError())
        assert wandb.run is None
        for core in cores(os.getpid()):
            os.kill(core, signum)
    end_core()


KILLED_AT_THE_END = """
import os, signal, sys
from fourstage.tracking.wandb_core import begin_run
from tests.stand_in_wandb import cores
begin_run(id="abc", mode="offline", dir=sys.argv[1]).finish()
[core] = cores(os.getpid())
os.kill(core, signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_wandb_core_that_ended_before_the_process_is_no_traceback(tmp_path) -> None:
    command = [sys.executable, "-c", KILLED_AT_THE_END, str(tmp_path)]
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    done = subprocess.run(command, cwd=REPO, env=own, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_switched_off(job) -> None:
    for off in (LoggerConfig(name="none"), LoggerConfig(mode="disabled")):
        job.logger = off
        assert [type(logger) for logger in build_loggers(job)] == [MetricsCSV]
    assert wandb.run is None
    abandon_wandb(ValueError())


def test_a_server_that_does_not_answer(no_key, job, monkeypatch, capsys) -> None:
    modes = []

    def start(job: StageJob, mode: str, asked: dict):
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("timed out\nlong story")
        return SimpleNamespace()

    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr(wandb_run, "start_wandb", start)
    assert len(build_loggers(job)) == 2 and modes == ["online", "offline"]
    assert capsys.readouterr().out.startswith("W&B: timed out: logging offline")


class Online:
    """A W&B run with a server."""

    offline = False
    name = "sft-x"
    id = "abc"

    def __init__(self) -> None:
        self.used, self.logged, self.tables, self.summary = [], [], {}, {}

    def log(self, tables: dict, step: int, commit: bool) -> None:
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
    (job.folder / "metrics.csv").write_text("step,train/loss\n1,2\n2,\n")
    wandb_run.start_wandb(job, "online", names(job, None))
    assert run.used == [f"{parent.name}:latest"]
    assert "W&B: the server has no artifact of reward-missing" in capsys.readouterr().out
    finish_wandb(job, [HeldRows(run)], {"steps": 7})
    [artifact] = run.logged
    files = {"model.safetensors", "config.json", "tokenizer.json", "run.json"}
    assert (artifact.name, artifact.type, set(artifact.manifest.entries)) == (
        job.name,
        "model",
        files,
    )
    assert artifact.metadata["parents"] == {"policy": parent.name, "reward": "reward-missing"}
    assert (
        run.summary == {"cost/steps": 7, "train/loss": 2.0} and not run.tables
    )  # this stage evaluated nothing
    weights = artifact.manifest.entries["model.safetensors"].local_path
    assert weights == str(job.folder / "model.safetensors")


def test_weights_that_are_about_to_move_are_copied(no_key, job, tmp_path) -> None:
    """force=true trains in a folder of its own, which then takes the old run's place."""
    (tmp_path / "retrain").mkdir()
    job.folder = job.folder.rename(tmp_path / "retrain" / job.name)
    for name in ("config.json", "tokenizer.json"):
        (job.folder / name).write_text("{}")
    run = Online()
    wandb_content.log_model(run, job)
    copy = Path(run.logged[0].manifest.entries["model.safetensors"].local_path)
    assert copy.parent.parent.name == "artifacts"
    assert copy.read_text() == (job.folder / "model.safetensors").read_text()


@pytest.mark.parametrize(
    ("error", "closed"),
    [
        (ValueError("a bug"), ["finish 1"]),
        (UserError("disk full"), ["finish 1"]),
        (Stopped(signal.SIGTERM), ["preempting", "finish 143"]),
        (Stopped(signal.SIGUSR1), ["preempting", f"finish {128 + signal.SIGUSR1}"]),
        (KeyboardInterrupt(), ["preempting", "finish 130"]),
    ],
)
def test_a_stopped_stage_is_preempted_and_any_other_failed(monkeypatch, error, closed) -> None:
    told = []
    run = SimpleNamespace(
        mark_preempting=lambda: told.append("preempting"),
        finish=lambda exit_code: told.append(f"finish {exit_code}"),
    )
    monkeypatch.setattr(wandb, "run", run)
    abandon_wandb(error)
    assert told == closed


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
            | ({"right": name == "a"} if step else {})  # files of earlier versions have none
            for step, name, answer in answers.get(stage, [])
        ]
        if rows:
            lines = [json.dumps(row) + "\n" for row in rows]
            (folder / "samples.jsonl").write_text("".join(lines))
    ppo = folders.pop("ppo")
    job = SimpleNamespace(stage="ppo", folder=ppo, ancestors=folders)
    columns, rows = wandb_content.samples_by_stage(job)
    assert columns[:4] == ["prompt_id", "prompt", "random", "random: right"]
    assert columns[4:] == ["pretrain", "pretrain: right", "ppo", "ppo: right"]
    assert rows == [
        ["a", "A", "?", None, "z", True, "fine", True],
        ["b", "B", "!", None, "y", False, None, None],
        ["c", "C", None, None, None, None, "new", False],
    ]
    reward = SimpleNamespace(stage="reward", folder=folders.pop("reward"), ancestors=folders)
    assert wandb_content.samples_by_stage(reward)[1] == []


def test_the_summary_leaves_out_what_was_not_measured(tmp_path) -> None:
    cells = {
        "well_formed": {"value": 0.5, "n": 4, "low": 0.1, "high": 0.9},
        "bits_per_char": {"value": None, "why": "no corpus"},
    }
    (tmp_path / "eval.json").write_text(json.dumps({"metrics": cells}))
    assert wandb_content.summary(tmp_path, {"steps": 3}) == {
        "cost/steps": 3,
        "eval/well_formed": 0.5,
        "eval_low/well_formed": 0.1,
        "eval_high/well_formed": 0.9,
    }
    job = SimpleNamespace(stage="sft", run_id="abc", folder=tmp_path, ancestors={})
    assert wandb_content.ladder_table(job)[1] == [["sft", "abc", "well_formed", 0.5, 0.1, 0.9, 4]]
