"""train.py -m in real processes: several in a job, jobs at once, kills. Slow."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fakes import CONF, ids
from tests.test_multirun import finished, is_alive

REPO = CONF.parent
SMALL = ["model=moe_nano", "debug=fast", "logger=none"]
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.devices=2"]


def start(script: list[str], *words: str, log: Path) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPO / 'src'}:{REPO}"}
    with open(log, "w") as file:
        return subprocess.Popen(
            [sys.executable, *script, "-m", *SMALL, *words],
            cwd=REPO,
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def processes(word: str) -> dict[int, str]:
    """Their command lines, of those that have a word in it."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if word in line and is_alive(int(path.parent.name)):
            found[int(path.parent.name)] = line
    return found


def session(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "zero2"])
def test_two_processes_and_two_jobs(trainer, tmp_path) -> None:
    outputs, log = tmp_path / "outputs", tmp_path / "log"
    shutil.copytree(CONF, tmp_path / "conf")
    shutil.copy(REPO / "train.py", tmp_path)
    mine = tmp_path / "conf" / "experiment" / "mine.yaml"
    mine.write_text("# @package _global_\nstages: {pretrain: {lr: 1e-3}}\n")
    script, words = [str(tmp_path / "train.py")], [*TWO, "experiment=mine"]
    if trainer == "zero2":  # of the repository
        script = ["-m", "tests.train_on_cpus"]
        words = ["trainer=zero2", "trainer.devices=2", "stages.pretrain.lr=1e-3"]
    process = start(script, "stage=pretrain", *words, "seed=0,1", f"outputs={outputs}", log=log)
    wait_for(lambda: any(outputs.glob("hydra/*/0")) or process.poll() is not None)
    mine.write_text("# @package _global_\nstages: {pretrain: {lr: 2e-3}}\n")
    assert process.wait(timeout=300) == 0, log.read_text()
    base = [*SMALL, "trainer=cpu", "stages.pretrain.lr=1e-3"]
    expected = {f"pretrain-{ids([*base, f'seed={s}'], 'pretrain')['pretrain']}" for s in (0, 1)}
    assert finished(outputs) == expected
    (sweep,) = outputs.glob("hydra/*")
    for at in (0, 1):
        assert json.loads((sweep / str(at) / "goal.json").read_text()) > 0
    assert not processes(str(tmp_path))
    said = log.read_text()
    assert said.count("training pretrain-") == 2 and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("who", ["a rank", "the multirun", "the multirun, at once"])
def test_a_kill_in_the_middle(who, tmp_path) -> None:
    outputs, log = tmp_path / "outputs", tmp_path / "log"
    script = [str(REPO / "train.py")]
    words = ["stage=pretrain", *TWO, "stages.pretrain.checkpoint_every=5", f"outputs={outputs}"]
    words += ["stages.pretrain.max_steps=100000,3"]
    process = start(script, *words, log=log)
    wait_for(lambda: any(outputs.glob("runs/*/checkpoints/last.ckpt")))
    pids = processes(str(tmp_path))
    assert len(pids) == 3
    (rank,) = [pid for pid, line in pids.items() if "train_ddp_process_1" in line]
    if who == "a rank":
        os.kill(rank, signal.SIGKILL)
        assert process.wait(timeout=120) == 1
        said = log.read_text()
        assert said.count("job 0 failed: its process ") == 1
        assert len(finished(outputs)) == 1  # job 1
    else:
        signum = signal.SIGTERM if who == "the multirun" else signal.SIGKILL
        process.send_signal(signum)
        assert process.wait(timeout=120) == (143 if who == "the multirun" else -9)
        wait_for(lambda: not processes(str(tmp_path)), seconds=60)
        said = log.read_text()
        assert re.search(r"pretrain-\w+, step \d+: stopped by SIGTERM: run the same command", said)
        assert not finished(outputs) and "Traceback" not in said
    assert not processes(str(tmp_path))


@pytest.mark.slow
def test_torchrun_goes_on_after_a_job_that_failed(tmp_path) -> None:
    """Each of its processes is a multirun of its own."""
    outputs, log = tmp_path / "outputs", tmp_path / "log"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["stage=pretrain", *TWO, "seed=0,abc,1", f"outputs={outputs}"]
    process = start([*torchrun, str(REPO / "train.py")], *words, log=log)
    assert process.wait(timeout=300) == 1
    assert len(list(outputs.glob("runs/*/model.safetensors"))) == 2
    assert not processes(str(tmp_path))


needs_joblib = pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins") is None
    or importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None,
    reason="needs hydra-joblib-launcher",
)
needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="needs hydra-submitit-launcher"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(["sweep=joblib"], marks=needs_joblib),
        pytest.param(["hydra/launcher=submitit_local"], marks=needs_submitit),
        pytest.param(["sweep=slurm", "hydra/launcher=submitit_local"], marks=needs_submitit),
    ],
)
def test_jobs_at_once_train_their_ancestor_once(launcher, tmp_path) -> None:
    outputs, log = tmp_path / "outputs", tmp_path / "log"
    words = [*launcher, "stage=sft", "trainer=cpu", "stages.sft.lr=1e-3,2e-3,-1"]
    process = start([str(REPO / "train.py")], *words, f"outputs={outputs}", log=log)
    assert process.wait(timeout=300) == 1
    said = log.read_text() + "".join(
        file.read_text() for file in outputs.glob("hydra/*/.submitit/*/*_log.*")
    )
    assert "job 2 failed: stages.sft.lr: must be above 0, got -1" in said
    assert said.count("training pretrain-") == 1 and said.count("training sft-") == 2
    assert "\nstages.sft.lr: must be above 0, got -1" in log.read_text()
    assert len(finished(outputs)) == 3
    assert not processes(str(tmp_path))


@pytest.mark.slow
@needs_joblib
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_jobs_at_once_are_stopped(signum, tmp_path) -> None:
    """Ctrl-C reaches all processes; SIGTERM the command, whose end the workers notice."""
    outputs, log = tmp_path / "outputs", tmp_path / "log"
    words = ["sweep=joblib", "stage=pretrain", "trainer=cpu", f"outputs={outputs}"]
    words += ["stages.pretrain.checkpoint_every=5", "stages.pretrain.max_steps=100000,100001,3"]
    process = start([str(REPO / "train.py")], *words, log=log)
    wait_for(lambda: len(list(outputs.glob("runs/*/checkpoints/last.ckpt"))) == 2)
    send = os.killpg if signum == signal.SIGINT else os.kill
    send(process.pid, signum)
    code = process.wait(timeout=60)
    assert code in ((-2, 130) if signum == signal.SIGINT else (-15, 143))
    wait_for(lambda: not session(process.pid), seconds=60)
    assert not finished(outputs) and log.read_text().count("run the same command again") == 2
