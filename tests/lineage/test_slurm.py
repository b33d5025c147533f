"""sweeps/slurm.sbatch with stand-ins for srun and scontrol: a warning saves and requeues."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "sweeps" / "slurm.sbatch"
SRUN = """#!/bin/bash
trap 'kill $!; exit {code}' USR1
echo "$@" > started
sleep {seconds} & wait $!
"""


@pytest.fixture
def submit(tmp_path: Path):
    """Starts the script as SLURM would, with an srun that exits `code` at the warning."""

    def start(code: int, seconds: float) -> subprocess.Popen:
        tools = {"srun": SRUN.format(code=code, seconds=seconds)}
        tools["scontrol"] = '#!/bin/bash\necho "$@" > requeued\n'
        for name, text in tools.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        slurm = {"SLURM_NNODES": "4", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_ID": "17"}
        env = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        job = subprocess.Popen(["bash", SCRIPT, "stage=sft", "seed=1"], cwd=tmp_path, env=env)
        while not (tmp_path / "started").exists():
            assert job.poll() is None
            time.sleep(0.01)
        return job

    return start


def test_the_command_of_each_process(submit, tmp_path: Path) -> None:
    assert submit(code=138, seconds=0).wait() == 0
    words = "trainer.num_nodes=4 trainer.devices=8 stage=sft seed=1"
    said = (tmp_path / "started").read_text()
    assert said == f"--kill-on-bad-exit=1 .venv/bin/python train.py {words}\n"
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("code", "requeued"), [(138, True), (143, True), (0, False)])
def test_a_warning_reaches_the_processes_and_requeues_what_is_not_finished(
    submit, tmp_path: Path, code: int, requeued: bool
) -> None:
    job = submit(code, seconds=60)
    job.send_signal(signal.SIGUSR1)
    assert job.wait() == code
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"
