"""Climb the ladder up to a stage: python train.py stage=grpo model=moe_small (see --help)."""

import logging
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # nothing can be lost before there is a plan: Ctrl-C just ends train.py
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from hydra._internal import utils as reported
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fourstage.errors import UserError, did_you_mean

CONF = str(Path(__file__).resolve().parent / "conf")
GROUPS = {path.name for path in Path(CONF).iterdir() if path.is_dir()}
NAMELESS = re.compile(r"|null|true|false|[-+.\d]+", re.IGNORECASE)
OF_A_FOLDER = re.compile(r"""tokenizer=(["']?)hf:(.*)\1""", re.DOTALL)
RESOLVING = "UserError raised while resolving interpolation: "
WIDE = 384  # d_model from which a model's own tokenizer has the larger vocabulary


@hydra.main(config_path=CONF, config_name="config", version_base="1.3")
def main(config: DictConfig) -> None:
    from fourstage.interruptions import (
        NO_READER,
        Stopped,
        escape_output,
        handle_stops,
        one_line,
        stop_now,
    )
    from fourstage.lineage.ranks import check_environment

    handle_stops(stop_now)
    escape_output()
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # else a line for each request to a hub
    hydra_config = HydraConfig.get()
    try:
        check_environment()
        from fourstage.lineage.climb import climb  # after Hydra, so that --help is fast

        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        climb(tree, overrides=hydra_config.overrides.task)
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
        if hydra_config.mode == RunMode.MULTIRUN:  # the next jobs run; Hydra shows the first error
            print(f"job {hydra_config.job.num} failed: {line or repr(error)}", file=sys.stderr)
            raise CompactHydraException(line) if line else error from error
        if line is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(line)


def make_folder(outputs: Any) -> str:
    """Make Hydra's folder before Hydra does, so that a failure is one line."""
    if not isinstance(outputs, str) or not outputs:
        sys.exit(f"outputs: expected a folder, got {outputs!r}")
    path = Path(outputs, "hydra")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}: free space, or choose another outputs=FOLDER")
    return str(path)


def refuse_nameless_groups(arguments: list[str]) -> None:
    """One line for a group such as model=null, for which Hydra would show a traceback."""
    for argument in arguments:
        key, is_override, value = argument.lstrip("+").partition("=")
        group = key.partition("@")[0]
        if is_override and group in GROUPS and NAMELESS.fullmatch(value):
            options = sorted(path.stem for path in Path(CONF, group).glob("*.yaml"))
            sys.exit(f"{argument}: expected one of {', '.join(options)}; or leave {key} out")


def bpe_vocab_size(d_model: int) -> int:
    """The tokens of tokenizer=bpe for a model: more would be most of a small one's parameters."""
    return 32_768 if d_model >= WIDE else 4096


def where(value: str, is_this: str, then: int, otherwise: int) -> int:
    """A setting that depends on another one."""
    return then if value == is_this else otherwise


def below(root: str | None, name: str) -> str:
    """A file in data.root, for an experiment that needs several. Raises UserError without it."""
    if root is None:
        raise UserError(
            f"data.root: not set: data.root=FOLDER names the folder with {name} and the "
            "experiment's other files"
        )
    return f"{root}/{name}"


def name_folders(arguments: list[str]) -> list[str]:
    """tokenizer=hf:FOLDER as Hydra reads it: tokenizer=hf and tokenizer.path=FOLDER, quoted."""
    sweeps = not {"-m", "--multirun"}.isdisjoint(arguments)
    found = []
    for argument in arguments:
        named = OF_A_FOLDER.fullmatch(argument)
        if named is None:
            if re.match(r"tokenizer=.*,\s*hf:", argument):
                sys.exit(f"{argument}: a sweep can't hold hf:FOLDER: run each tokenizer by itself")
            found.append(argument)
            continue
        quote, folder = named.groups()
        if sweeps and not quote and "," in folder:
            sys.exit(
                f"{argument}: a sweep can't hold hf:FOLDER: run each tokenizer by itself (or "
                f"quote a folder with a comma: 'tokenizer=\"hf:{folder}\"')"
            )
        escaped = re.sub(r"""(\\*)("|$)""", lambda m: m[1] * 2 + m[2].replace('"', '\\"'), folder)
        found += ["tokenizer=hf", f'tokenizer.path="{escaped}"']
    return found


def run() -> None:
    """main() with one line per error; Hydra's own report has several, and advises a plus sign for a
    misspelt setting."""
    sys.argv[1:] = name_folders(sys.argv[1:])
    refuse_nameless_groups(sys.argv[1:])
    reported.run_and_report = lambda call: call()
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(line_of(error))


def line_of(error: Exception) -> str:
    """What is wrong with the words of a command."""
    text = str(error)
    if found := re.search(r"Could not override '([^']+)'", text):
        return no_such_setting(found[1])
    if found := re.search(r"Could not find '(\w+)/([^']+)'", text):
        group, name = found.groups()
        options = sorted(path.stem for path in Path(CONF, group).glob("*.yaml"))
        return f"{group}={name}: no such {group}: {did_you_mean(name, options)}"
    if found := re.search(r"Multiple values for (\w+)\.", text):
        return f"{found[1]} is given already: leave out the plus sign"
    if found := re.search(r"Ambiguous value for argument '(.+?)'", text, re.DOTALL):
        key, _, value = found[1].partition("=")
        return f"{found[1]}: to run each, add -m; for one value with a comma, '{key}=\"{value}\"'"
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        if value and re.fullmatch(r"\+*[\w.@/]+", key):
            escaped = value.replace('"', '\\"')
            quoted = shlex.quote(f'{key}="{escaped}"')
            return f"{error.override}: Hydra can't read the value: quote it: {quoted}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines[:2] if not line.startswith(("See ", "full_key:"))]
    return ": ".join(said) or repr(error)


def no_such_setting(key: str) -> str:
    """The first part of the key that doesn't exist, with the settings beside it."""
    if key.startswith("data.reasoning.tasks."):
        task = key.split(".")[3]
        return f"{key}: data.reasoning.only={{{task}: {{ARGUMENT: VALUE}}}} replaces the tasks"
    if key.startswith("hydra."):
        return f"{key}: Hydra has no such setting"
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        beside: Any = hydra.compose("config")
    known = ""
    for name in key.split("."):
        if not isinstance(beside, DictConfig) or name not in beside:
            names = sorted(map(str, beside)) if isinstance(beside, DictConfig) else []
            where = f"{known}.{name}".strip(".")
            return f"{where}: no such setting" + (f": {did_you_mean(name, names)}" if names else "")
        beside, known = beside[name], f"{known}.{name}".strip(".")
    return f"{key}: no such setting here"


OmegaConf.register_new_resolver("make_folder", make_folder, replace=True)
OmegaConf.register_new_resolver("below", below, replace=True)
OmegaConf.register_new_resolver("where", where, replace=True)
OmegaConf.register_new_resolver("bpe_vocab_size", bpe_vocab_size, replace=True)

if __name__ == "__main__":
    run()
