"""Climb the ladder up to a stage: python train.py stage=grpo model=moe_small (see --help)."""

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # nothing can be lost before there is a plan: Ctrl-C just ends it
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF = str(Path(__file__).resolve().parent / "conf")
GROUPS = {path.name for path in Path(CONF).iterdir() if path.is_dir()}
NAMELESS = re.compile(r"|null|true|false|[-+.\d]+", re.IGNORECASE)


@hydra.main(config_path=CONF, config_name="config", version_base="1.3")
def main(config: DictConfig) -> None:
    from fourstage.interruptions import Stopped, escape_output, handle_stops, one_line, stop_now
    from fourstage.ranks import check_environment

    handle_stops(stop_now)
    escape_output()
    hydra_config = HydraConfig.get()
    try:
        check_environment()
        from fourstage.lineage import climb  # after Hydra, so that --help is fast

        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        climb(tree, overrides=hydra_config.overrides.task)
    except Stopped as stopped:
        print(stopped.line, file=sys.stderr)
        sys.exit(stopped.code)
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, which Lightning turns into an exit
        print("stopped: the same command resumes", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        wrong_config = isinstance(error, OmegaConfBaseException)
        line = str(error).splitlines()[0] if wrong_config else one_line(error)
        if hydra_config.mode == RunMode.MULTIRUN:  # goes on; Hydra shows the first error at the end
            print(f"job {hydra_config.job.num} failed: {line or repr(error)}", file=sys.stderr)
            raise CompactHydraException(line) if line else error from error
        if line is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(line)


def make_folder(outputs: Any) -> str:
    """Hydra makes its folder before main() runs; where it cannot, one line says why."""
    if not isinstance(outputs, str) or not outputs:
        sys.exit(f"outputs: expected a folder, got {outputs!r}")
    path = Path(outputs, "hydra")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}: free space, or choose another outputs=FOLDER")
    return str(path)


def refuse_nameless_groups(arguments: list[str]) -> None:
    """One line for a group such as model=null, where Hydra would show a traceback."""
    for argument in arguments:
        key, is_override, value = argument.lstrip("+").partition("=")
        group = key.partition("@")[0]
        if is_override and group in GROUPS and NAMELESS.fullmatch(value):
            options = sorted(path.stem for path in Path(CONF, group).glob("*.yaml"))
            sys.exit(f"{argument}: expected one of {', '.join(options)}; or leave {key} out")


OmegaConf.register_new_resolver("make_folder", make_folder, replace=True)

if __name__ == "__main__":
    refuse_nameless_groups(sys.argv[1:])
    main()
