"""A job of train.py, by itself or one of a multirun: from the composed config to the goal's value.

Lightning starts the other processes of a job with the command that started the first one. In a
multirun that would be the multirun again, so a job of several processes is a command of its own,
in a process of its own: what it leaves (process groups, variables of ranks) ends with it, and so
does what happens to it (Lightning kills all processes if one of them dies). torchrun and srun have
started all processes already: there each process goes through all jobs by itself.
"""

import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import SearchPathElement
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fourstage.files import read_json, write_json
from fourstage.interruptions import (
    NO_READER,
    STOPS,
    Stopped,
    escape_output,
    handle_stops,
    held_back,
    one_line,
    stop_now,
)
from fourstage.ladder import LADDER
from fourstage.lineage.ranks import GRACE, check_environment, others_are_there
from fourstage.runs.records import read_record

RESOLVING = "UserError raised while resolving interpolation: "
# for the process of a job: where to leave its goal, and who waits for it
RESULT, WAITS = "FOURSTAGE_RESULT", "FOURSTAGE_WAITS"
STOP_CODES = {128 + signum for signum in (*STOPS, signal.SIGINT)}


def run_job(config: DictConfig, command: Sequence[str]) -> float | None:
    """Climb; in a multirun returns the value of the stage's own goal, for Hydra's optimizers.

    `command` starts train.py. Exits with one line for anything that is not a bug; in a multirun,
    which goes on with the next job, raises CompactHydraException.
    """
    handle_stops(stop_now)
    escape_output()
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # else a line for each request to a hub
    hydra_config = HydraConfig.get()
    is_one_of_many = hydra_config.mode == RunMode.MULTIRUN
    result, waits = os.environ.pop(RESULT, None), os.environ.pop(WAITS, None)
    if is_one_of_many and hydra_config.runtime.choices["hydra/launcher"] == "joblib":
        waits = os.getppid()
    idle = watched(int(waits)) if waits else threading.Event()
    idle.clear()
    try:
        check_environment()
        tree: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        is_apart = is_one_of_many and starts_others(tree["trainer"])
        goal = None
        if not is_apart:
            from fourstage.lineage.climb import climb  # after Hydra, so that --help is fast

            place = climb(tree, overrides=hydra_config.overrides.task)
            if is_one_of_many or result:
                goal = goal_of(place)
            if result:
                write_json(Path(result), goal)
    except Stopped as stopped:
        print(stopped.line, file=sys.stderr)
        sys.exit(stopped.code)
    except (KeyboardInterrupt, SystemExit) as ended:  # Lightning turns Ctrl-C into an exit
        if isinstance(ended.__context__, BrokenPipeError):  # so does rich a closed pipe
            sys.exit(NO_READER)
        print("stopped: the same command resumes", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        wrong_config = isinstance(error, OmegaConfBaseException)
        line = one_line(error)
        if wrong_config:
            line = str(error).splitlines()[0].removeprefix(RESOLVING)
        if is_one_of_many:  # the next jobs run; Hydra shows the first error
            compact = failed(hydra_config, line or repr(error))
            raise compact if line else error from error
        if line is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(line)
    finally:
        idle.set()
    if is_apart:
        goal = run_apart([*command, *words_of(hydra_config)], hydra_config)
    if isinstance(goal, str):  # the run itself is fine
        if (sweeper := hydra_config.runtime.choices["hydra/sweeper"]) != "basic":
            raise failed(hydra_config, f"{goal}, which hydra/sweeper={sweeper} needs")
        return math.nan
    return goal


def failed(hydra_config: DictConfig, line: str) -> CompactHydraException:
    """Say that the job failed; the error that makes Hydra go on with the next one."""
    print(f"job {hydra_config.job.num} failed: {line}", file=sys.stderr)
    return CompactHydraException(line)


def goal_of(run: Path) -> float | str:
    """The value of a finished run's own goal, as in the report; or, if the data doesn't define it,
    a str that says why."""
    from fourstage.evaluation.tables import read_summary

    stage = LADDER[read_record(run)["stage"]]
    metrics = read_summary(run / "eval.json")["metrics"]
    for name in (stage.goal, stage.instead):
        if metrics.get(name, {}).get("value") is not None:
            return float(metrics[name]["value"])
    why = metrics.get(stage.goal, {}).get("why", "not measured")
    return f"{run.name} has no value of {stage.goal} ({why})"


# --- a job in a process of its own


def starts_others(trainer: Mapping[str, Any]) -> bool:
    """Whether Lightning starts more processes for these settings, or leaves traces in its own."""
    one = (trainer["strategy"], trainer["devices"], trainer["num_nodes"]) == ("auto", 1, 1)
    return not one and not others_are_there()


def words_of(hydra_config: DictConfig) -> list[str]:
    """The job's own words, to be read by Hydra from the config files of the multirun."""
    files = [s for s in hydra_config.runtime.config_sources if s.schema == "file"]
    more = ",".join(f'"file://{source.path}"' for source in files if source.provider != "main")
    return [
        *(word for s in files if s.provider == "main" for word in ("-cp", s.path)),
        *("-cn", hydra_config.job.config_name),  # messages show the long ones, which a user typed
        "hydra.mode=RUN",
        *([f"hydra.searchpath=[{more}]"] if more else []),
        *hydra_config.overrides.task,
    ]


def run_apart(command: Sequence[str], hydra_config: DictConfig) -> Any:
    """Run the command of one job; returns what goal_of found. A signal goes on to its first
    process, which saves with the others. Raises CompactHydraException if it failed, and exits if
    it was stopped."""
    result = Path(hydra_config.runtime.output_dir, "goal.json")
    env = {**os.environ, RESULT: str(result), WAITS: str(os.getpid())}
    if {"NODE_RANK", "FOURSTAGE_JOB"} <= env.keys():
        env["FOURSTAGE_JOB"] += f".{hydra_config.job.num}"  # the nodes' processes meet by this name
    started: list[subprocess.Popen[bytes]] = []
    came: list[int] = []

    def forward(signum: int, frame: Any) -> None:
        if not started:
            stop_now(signum, frame)
        came.append(signum)
        started[0].send_signal(signum)

    before = signal.getsignal(signal.SIGINT)
    handle_stops(forward, and_ctrl_c=True)
    with held_back():  # a group of its own: Ctrl-C reaches it once
        started.append(
            subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, process_group=0)
        )
    code = started[0].wait()
    handle_stops(stop_now)
    signal.signal(signal.SIGINT, before)
    if code in STOP_CODES or came:
        sys.exit(code if code in STOP_CODES else 128 + came[0])
    if code == 0:
        return read_json(result)
    with suppress(ProcessLookupError):  # they would keep their memory for some seconds
        os.killpg(started[0].pid, signal.SIGKILL)
    by = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    raise failed(hydra_config, f"its process {by}: its own output says why")


@cache  # a worker has several jobs
def watched(parent: int) -> threading.Event:
    """What says whether this process has no job, to a thread that ends it with its parent."""
    idle = threading.Event()
    threading.Thread(target=end_with, args=(parent, idle), daemon=True).start()
    return idle


def end_with(parent: int, idle: threading.Event) -> None:
    """Stop this process in good order when the one that waits for its job is gone. The job may have
    got a signal too and be saving: a second one would keep it from that."""
    while os.getppid() == parent:
        time.sleep(1.0)
    if not idle.wait(GRACE):
        os.kill(os.getpid(), signal.SIGTERM)
        idle.wait()
    os._exit(1)  # a worker would wait for the next job


# --- the config of a multirun


class KeepConf(Callback):
    """Gives a multirun a copy of its config files, in its folder: Hydra composes each job when it
    starts it, and a file that is edited in between would change the jobs to come."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        loader = GlobalHydra.instance().config_loader()
        try:
            kept = list(keep(config))
        except OSError as error:
            sys.exit(one_line(error) or f"{error.filename}: {error.strerror}")
        loader.get_search_path().get_path()[:] = kept
        loader.repository.initialize_sources(loader.get_search_path())
        with open_dict(config.hydra):  # what it named is in the path by now
            named = config.hydra.overrides.hydra
            named[:] = [word for word in named if not word.startswith("hydra.searchpath=")]


def keep(config: DictConfig) -> Iterator[SearchPathElement]:
    """Copy the folders of config files into the multirun's; the search path over the copies."""
    place = Path(config.hydra.sweep.dir).absolute()
    place.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="conf-", dir=place))  # torchrun: one for each process
    for at, source in enumerate(config.hydra.runtime.config_sources):
        path = source.path
        if source.schema == "file":
            path = place / str(at)
            copy_yaml(Path(source.path), path, but=Path(config.outputs).absolute())
        yield SearchPathElement(source.provider, f"{source.schema}://{path}")


def copy_yaml(folder: Path, to: Path, but: Path) -> None:
    """Copy the YAML files of a folder, except those in `but`."""
    to.mkdir()
    for file in [file for file in folder.rglob("*.y*ml") if but not in file.absolute().parents]:
        copy = to / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
