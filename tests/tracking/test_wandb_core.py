"""A wandb-core that ends, or hangs, before it has started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import wandb

REPO = Path(__file__).parents[2]
CORE = """#!/bin/sh
echo start >> "$0.starts"
if [ $(wc -l < "$0.starts") -gt {broken} ]; then exec "{real}" "$@"; fi
{how}
"""
A_RUN = """
import sys
from pathlib import Path
from fourstage.errors import UserError
from fourstage.tracking.wandb_core import begin_run
from fourstage.tracking.wandb_settings import set_up_wandb
from wandb.sdk.lib.service import service_process

folder = Path(sys.argv[1])
service_process.get_core_path = lambda: str(folder / "core")
for job in range(2):
    try:
        set_up_wandb(folder)
        begin_run(id="abc", mode="offline", dir=folder).finish()
        print("finished")
    except UserError as error:
        print(error)
"""
HANGS = "exec sleep 20 > /dev/null 2>&1"
AGAIN = "run the same command again: it resumes; or take logger=none"
KILLED = f"W&B's process wandb-core does not start (wandb-core exited with code -9): {AGAIN}"
LATE = "wandb-core does not start (Failed to read port info after 1.0 seconds"


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize(
    ("broken", "how", "said", "starts"),
    [
        (1, "kill -9 $$", ["finished", "finished"], 2),  # a second try
        (2, "kill -9 $$", [KILLED, "finished"], 3),  # the next job of a multirun has another one
        (9, "kill -9 $$", [KILLED, KILLED], 4),
        (1, HANGS, ["finished", "finished"], 2),
        (2, HANGS, [LATE, "finished"], 3),
    ],
)
def test_a_core_that_does_not_start_is_one_line(tmp_path, broken, how, said, starts) -> None:
    real = Path(wandb.__file__).parent / "bin" / "wandb-core"
    core = tmp_path / "core"
    core.write_text(CORE.format(broken=broken, real=real, how=how))
    core.chmod(0o755)
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    own |= {"WANDB__SERVICE_WAIT": "1", "WANDB_SILENT": "true"} if how == HANGS else {}
    command = [sys.executable, "-c", A_RUN, str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, env=own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert [found in line for found, line in zip(said, lines, strict=True)] == [True, True]
    assert (tmp_path / "core.starts").read_text().count("start") == starts
