"""train.py -m: what optimizers see, jobs of several processes, launchers, edited configs."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import CompactHydraException
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf

import train
from fourstage.evaluation import suite
from fourstage.interruptions import STOPS
from fourstage.ladder import LADDER
from fourstage.lineage import jobs, runner
from fourstage.report.files import Files
from fourstage.report.goals import goals
from fourstage.report.ladder import choose, read_rows, read_runs
from fourstage.report.ladder import ladder as runs_below
from fourstage.runs.records import read_record
from fourstage.runs.store import RunStore
from tests.fakes import CONF, FakeTrain, own_files

REPO = CONF.parent


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Runs a command of a train.py with a FakeTrain and its own copy of conf/; the exit code."""
    files = own_files(tmp_path / "files")
    shutil.copytree(CONF, tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    @hydra.main(config_path=str(tmp_path / "conf"), config_name="config", version_base="1.3")
    def main(config):
        return jobs.run_job(config, [])

    def run(*arguments: str, fake: FakeTrain) -> int:
        monkeypatch.setattr(runner, "train_stage", fake)
        words = ["model=moe_nano", "stage=pretrain", *files, *arguments]
        flags = [word for word in words if word.startswith("-")]
        words = [word for word in words if word not in flags]
        monkeypatch.setattr(sys, "argv", ["train.py", "-m", *flags, *words])
        GlobalHydra.instance().clear()
        before = [signal.getsignal(s) for s in STOPS]
        try:
            main()
        except SystemExit as exit:
            return exit.code
        finally:
            for s, handler in zip(STOPS, before, strict=True):
                signal.signal(s, handler)
        return 0

    return run


# --- the goal


def test_the_goal_of_every_stage_is_the_report_s(ladder) -> None:
    files = Files()
    runs = read_runs(ladder, files)
    line = runs_below(choose(runs, "grpo", ladder), runs, files)
    found = goals(read_rows(line, files))
    assert [goal.stage for goal in found] == list(LADDER)
    for goal in found:
        assert jobs.goal_of(RunStore(ladder).find(goal.stage)) == goal.after["value"]


@pytest.mark.parametrize(
    ("metrics", "found"),
    [
        ({"knowledge_answered": {"value": 0.5}, "well_formed": {"value": 1.0}}, 0.5),
        (
            {"knowledge_answered": {"value": None, "why": "no facts"}, "well_formed": {"value": 1}},
            1,
        ),
        ({"knowledge_answered": {"value": None, "why": "no facts"}}, "(no facts)"),
        ({}, "(not measured)"),
    ],
)
def test_a_goal_that_the_data_does_not_define(own_ladder, metrics, found) -> None:
    run = RunStore(own_ladder).find("sft")
    (run / "eval.json").write_text(json.dumps({"suite": "6", "metrics": metrics}))
    goal = jobs.goal_of(run)
    expected = f"{run.name} has no value of knowledge_answered {found}"
    assert goal == (expected if isinstance(found, str) else found)


def test_the_docs_say_which_way_each_goal_is_better() -> None:
    table = re.findall(
        r"^\| (\w+) \| `(\w+)`(?: \(or `(\w+)`\))? \| (\w+)imize \|$",
        (REPO / "docs" / "runs.md").read_text(),
        re.M,
    )
    ways = {"lower": "min", "higher": "max"}
    assert table == [
        (name, row.goal, row.instead, ways[suite.DEFINITIONS[row.goal].better])
        for name, row in LADDER.items()
    ]
    for row in LADDER.values():
        if row.instead:
            two = suite.DEFINITIONS[row.goal], suite.DEFINITIONS[row.instead]
            assert two[0].better == two[1].better


class Measured(FakeTrain):
    """Leaves an evaluation whose goal is the distance of the learning rate from 3; none at 9."""

    def __call__(self, job):
        cost = super().__call__(job)
        lr = job.settings.lr
        cell = {"value": None, "why": "no text"} if lr == 9 else {"value": abs(lr - 3)}
        metrics = {"suite": "6", "metrics": {"bits_per_char": cell}}
        (job.folder / "eval.json").write_text(json.dumps(metrics))
        return cost


@pytest.fixture
def halving(monkeypatch) -> list:
    """hydra/sweeper=halving, as a plugin makes it known; what it has seen, a pair for each job."""
    seen: list[tuple[float, float | str]] = []

    class Halving(Sweeper):
        """Minimizes over lr in [1, 9], from what jobs return: keeps the better half."""

        def setup(self, *, hydra_context, task_function, config) -> None:
            self.launcher = Plugins.instance().instantiate_launcher(
                hydra_context=hydra_context, task_function=task_function, config=config
            )

        def sweep(self, arguments) -> None:
            low, high, failed = 1.0, 9.0, False
            while high - low > 1:
                for lr in (low, high):
                    words = [*arguments, f"stages.pretrain.lr={lr}"]
                    (job,) = self.launcher.launch([words], initial_job_idx=len(seen))
                    try:
                        seen.append((lr, job.return_value))
                    except CompactHydraException as error:
                        failed = True
                        seen.append((lr, str(error)))
                (low, a), (high, b) = seen[-2:]
                middle = (low + high) / 2
                a_is_better = isinstance(b, str) or a <= b
                low, high = (low, middle) if a_is_better else (middle, high)
            if failed:
                raise CompactHydraException("a job failed")

    Halving.__module__, Halving.__qualname__ = "hydra_plugins.halving", "Halving"
    for name in ("hydra_plugins", "hydra_plugins.halving"):
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["hydra_plugins.halving"], "Halving", Halving, raising=False)
    Plugins.instance().register(Halving)
    node = {"_target_": "hydra_plugins.halving.Halving"}
    ConfigStore.instance().store(group="hydra/sweeper", name="halving", node=node)
    return seen


def test_an_optimizer_sees_the_goals_and_which_job_has_none(call, halving, capsys) -> None:
    fake = Measured()
    assert call("hydra/sweeper=halving", fake=fake) == 1
    none = r"pretrain-\w+ has no value of bits_per_char \(no text\), which hydra/sweeper=halving "
    assert re.match(none, str(halving.pop(1)[1]))
    assert halving == [(1, 2), (1, 2), (5, 2), (1, 2), (3, 0)]
    assert len(fake.jobs) == 4  # a repeated trial trains nothing
    assert re.search(f"job 1 failed: {none}", capsys.readouterr().err)


def test_without_an_optimizer_a_job_without_a_goal_is_fine(call, monkeypatch) -> None:
    returned = []
    run_job = jobs.run_job
    monkeypatch.setattr(jobs, "run_job", lambda *a: returned.append(run_job(*a)) or returned[-1])
    assert call("stages.pretrain.lr=2,9", fake=Measured()) == 0
    assert returned[0] == 1 and math.isnan(returned[1])


class StopsOnce(FakeTrain):
    """Is stopped in its second job, as by Ctrl-C."""

    def __call__(self, job):
        if len(self.jobs) == 1:
            self.jobs.append(job)
            raise KeyboardInterrupt
        return super().__call__(job)


def test_ctrl_c_ends_a_multirun_and_the_same_command_goes_on(call, tmp_path, capsys) -> None:
    fake = StopsOnce()
    assert call("seed=0,1,2", fake=fake) == 130
    assert capsys.readouterr().err == "stopped: the same command resumes\n"
    assert [job.seed for job in fake.jobs] == [0, 1]
    assert call("seed=0,1,2", fake=fake) == 0
    assert [job.seed for job in fake.jobs[2:]] == [1, 2]
    assert len(finished(tmp_path / "outputs")) == 3


def test_ctrl_c_between_two_jobs(monkeypatch, capsys) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "main", main)
    monkeypatch.setattr(sys, "argv", ["train.py", "sweep=seeds"])
    monkeypatch.setattr(train.reported, "run_and_report", None)
    with pytest.raises(SystemExit) as caught:
        train.run()
    assert caught.value.code == 130 and sys.argv[1:] == ["--multirun", "sweep=seeds"]
    line = "stopped by Ctrl-C: run the same command again: it resumes\n"
    assert capsys.readouterr().err == line


def test_a_disk_that_is_full_before_the_first_job(monkeypatch) -> None:
    def main() -> None:  # as Hydra at its multirun.yaml
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "main", main)
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=0,1"])
    monkeypatch.setattr(train.reported, "run_and_report", None)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit) as caught:
        train.run()
    assert caught.value.code == "disk full: free space and run the same command again: it resumes"


# --- the config files as they were at the start


class Edits(FakeTrain):
    """Edits files while the first job trains."""

    def __init__(self, *files: Path) -> None:
        super().__init__()
        self.files = files

    def __call__(self, job):
        for file in self.files:
            file.write_text(file.read_text().replace("11", "22"))
        return super().__call__(job)


def test_an_edited_file_changes_nothing_in_a_multirun(call, tmp_path) -> None:
    text = "# @package _global_\nstages: {{{}: {{max_steps: 11}}}}\n"
    places = [tmp_path / name / "experiment" for name in ("conf", "mine", "more")]
    files = [place / f"{name}.yaml" for place, name in zip(places, "abc", strict=True)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.format("pretrain"))
    fake = Edits(*files)
    words = [f"--config-dir={tmp_path}/mine", f"hydra.searchpath=[file://{tmp_path}/more]"]
    assert call(*words, "experiment=a,b,c", "seed=1,2", fake=fake) == 0
    assert [job.settings.max_steps for job in fake.jobs] == [11, 11]
    assert all("22" in file.read_text() for file in files)
    (kept,) = tmp_path.glob("outputs/hydra/*/conf-*")
    assert len(list(kept.rglob("experiment/[abc].yaml"))) == 3
    assert call(*words, "experiment=a", fake=fake) == 0
    assert fake.jobs[-1].settings.max_steps == 22  # in the next one it counts


def test_a_full_disk_at_the_start_of_a_multirun(call, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(shutil, "copyfile", full)
    assert call("seed=0,1", fake=FakeTrain()).startswith("disk full at x: free space and run")


# --- a job in a process of its own


@pytest.mark.parametrize(
    ("changes", "env", "starts"),
    [
        ({}, {}, False),
        ({"devices": 2}, {}, True),
        ({"devices": -1}, {}, True),
        ({"strategy": "ddp"}, {}, True),
        ({"devices": 2, "strategy": "ddp"}, {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}, False),
    ],
)
def test_which_jobs_get_a_process_of_their_own(changes, env, starts, monkeypatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    trainer = {"strategy": "auto", "devices": 1, "num_nodes": 1} | changes
    assert jobs.starts_others(trainer) is starts


def test_the_words_of_a_job() -> None:
    sources = [
        {"schema": "pkg", "path": "hydra.conf", "provider": "hydra"},
        {"schema": "file", "path": "/a b/0", "provider": "main"},
        {"schema": "file", "path": "/a b/1", "provider": "command-line"},
    ]
    task = ["seed=1", 'tokenizer.path="x,y"']
    words = jobs.words_of(
        OmegaConf.create(
            {
                "job": {"config_name": "config"},
                "runtime": {"config_sources": sources},
                "overrides": {"task": task, "hydra": ["hydra/launcher=joblib"]},
            }
        )
    )
    assert words[:5] == ["-cp", "/a b/0", "-cn", "config", "hydra.mode=RUN"]
    assert words[-2:] == task and len(words) == 8
    parsed = OverridesParser.create().parse_override(words[5])
    assert (parsed.key_or_group, parsed.value()) == ("hydra.searchpath", ["file:///a b/1"])


@pytest.fixture
def run_apart(tmp_path, monkeypatch):
    """Runs Python code as job 3."""
    config = OmegaConf.create({"job": {"num": 3}, "runtime": {"output_dir": str(tmp_path)}})
    monkeypatch.setenv("NODE_RANK", "0")
    monkeypatch.setenv("FOURSTAGE_JOB", "word")
    before = [signal.getsignal(s) for s in (*STOPS, signal.SIGINT)]
    yield lambda code: jobs.run_apart([sys.executable, "-c", f"import os\n{code}"], config)
    after = [signal.getsignal(s) for s in (*STOPS, signal.SIGINT)]
    assert after[-1] == before[-1]
    for s, handler in zip((*STOPS, signal.SIGINT), before, strict=True):
        signal.signal(s, handler)


def test_a_job_hands_its_goal_over(run_apart) -> None:
    check = "assert os.environ['FOURSTAGE_JOB'] == 'word.3'\n"
    check += "assert int(os.environ['FOURSTAGE_WAITS']) == os.getppid() and os.getpgrp()"
    check += " == os.getpid()\n"
    leave = "open(os.environ['FOURSTAGE_RESULT'], 'w').write('{}')"
    assert run_apart(check + leave.format("0.5")) == 0.5
    assert run_apart(check + leave.format('"why"')) == "why"


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("exit('no')", "its process exited with code 1: its own output says why"),
        ("os.kill(os.getpid(), 9)", "its process was killed by SIGKILL: its own output says why"),
    ],
)
def test_a_job_that_fails_is_one_line_and_leaves_no_process(run_apart, code, line, capfd) -> None:
    sleep = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True)\n"
    with pytest.raises(CompactHydraException, match=line):
        run_apart(sleep + code)
    out, err = capfd.readouterr()
    assert f"job 3 failed: {line}\n" in err
    end = time.monotonic() + 10
    while is_alive(int(out)):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("saves", [True, False])
def test_a_signal_goes_on_to_the_job_and_ends_the_multirun(run_apart, signum, saves) -> None:
    code = 128 + signum if saves else 0  # 0: it had just finished
    stop = f"import signal, time; signal.signal({signum:d}, lambda *_: os._exit({code}))"
    with pytest.raises(SystemExit) as caught:
        run_apart(f"{stop}\nos.kill(os.getppid(), {signum:d})\ntime.sleep(60)")
    assert caught.value.code == 128 + signum


def finished(outputs: Path) -> set[str]:
    runs = outputs.glob("runs/*")
    return {run.name for run in runs if read_record(run)["status"] == "finished"}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
