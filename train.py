"""Climb the ladder up to a stage: python train.py stage=grpo model=moe_small (see --help)."""

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":  # nothing can be lost before there is a plan: Ctrl-C just ends train.py
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from hydra._internal import utils as reported
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fourstage.interruptions import AGAIN, one_line
from fourstage.lineage import jobs, words

CONF = str(Path(__file__).resolve().parent / "conf")
COMMAND = [sys.executable, str(Path(__file__).resolve())]


@hydra.main(config_path=CONF, config_name="config", version_base="1.3")
def main(config: DictConfig) -> float | None:
    return jobs.run_job(config, COMMAND)


def run() -> None:
    """main() with one line per error; Hydra's own report has several, and advises a plus sign for a
    misspelt setting."""
    sys.argv[1:] = words.as_hydra_reads(sys.argv[1:], CONF)
    reported.run_and_report = lambda call: call()
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(words.line_of(error, CONF))
    except OSError as error:  # at what Hydra itself writes: a full disk
        if os.environ.get("HYDRA_FULL_ERROR") == "1" or (line := one_line(error)) is None:
            raise
        sys.exit(line)
    except RuntimeError as error:
        if "srun" not in str(error):
            raise
        sys.exit(f"{error} Without SLURM, leave out sweep=slurm")
    except KeyboardInterrupt:  # between two jobs
        print(f"stopped by Ctrl-C: {AGAIN}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run()
