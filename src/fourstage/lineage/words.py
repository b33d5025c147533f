"""What is typed after train.py: resolvers of the config, and each mistake in one line."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from fourstage.errors import UserError, did_you_mean

NAMELESS = re.compile(r"|null|true|false|[-+.\d]+", re.IGNORECASE)
OF_A_FOLDER = re.compile(r"""tokenizer=(["']?)hf:(.*)\1""", re.DOTALL)
FLAGS = {"-m", "--multirun"}
NO_RUN = {"--cfg", "-c", "--info", "-i", "--run", "-r", "--help", "-h", "--hydra-help"}
PLUGINS = {
    **dict.fromkeys(("ax", "nevergrad", "optuna"), "sweeper"),
    **dict.fromkeys(("joblib", "submitit"), "launcher"),
}  # Hydra's own: pip install hydra-NAME-KIND
WIDE = 384  # d_model from which a model's own tokenizer has the larger vocabulary


def as_hydra_reads(arguments: list[str], conf: str) -> list[str]:
    """The command's words, for Hydra. Exits with one line for those that it would misread."""
    refuse_nameless_groups(arguments, conf)
    found = name_folders(arguments)
    names_a_sweep = any(word.startswith("sweep=") for word in found)
    does_another = any(word.startswith("hydra.mode=") or word in NO_RUN for word in found)
    if names_a_sweep and not does_another:  # Hydra would not say that a sweep's plugin is missing
        found = ["--multirun", *(word for word in found if word not in FLAGS)]
    return found


def refuse_nameless_groups(arguments: list[str], conf: str) -> None:
    """One line for a group such as model=null, for which Hydra would show a traceback."""
    groups = {path.name for path in Path(conf).iterdir() if path.is_dir()}
    for argument in arguments:
        key, is_override, value = argument.lstrip("+").partition("=")
        group = key.partition("@")[0]
        if is_override and group in groups and NAMELESS.fullmatch(value):
            options = sorted(path.stem for path in Path(conf, group).glob("*.yaml"))
            sys.exit(f"{argument}: expected one of {', '.join(options)}; or leave {key} out")


def name_folders(arguments: list[str]) -> list[str]:
    """tokenizer=hf:FOLDER as Hydra reads it: tokenizer=hf and tokenizer.path=FOLDER, quoted."""
    sweeps = not FLAGS.isdisjoint(arguments)
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


def line_of(error: Exception, conf: str) -> str:
    """What is wrong with the words of a command."""
    text = str(error)
    if found := re.search(r"Could not override '([^']+)'", text):
        return no_such_setting(found[1], conf)
    if found := re.search(r"Could not find 'hydra/(\w+)/([^']+)'", text):
        kind, name = found.groups()
        plugin = name.split("_")[0]
        if PLUGINS.get(plugin) == kind:
            return f"hydra/{kind}={name}: not installed: pip install hydra-{plugin}-{kind}"
        return f"hydra/{kind}={name}: no such {kind} is installed"
    if found := re.search(r"Could not find '(\w+)/([^']+)'", text):
        group, name = found.groups()
        options = sorted(path.stem for path in Path(conf, group).glob("*.yaml"))
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


def no_such_setting(key: str, conf: str) -> str:
    """The first part of the key that doesn't exist, with the settings beside it."""
    if key.startswith("data.reasoning.tasks."):
        task = key.split(".")[3]
        return f"{key}: data.reasoning.only={{{task}: {{ARGUMENT: VALUE}}}} replaces the tasks"
    if key.startswith("hydra."):
        return f"{key}: Hydra has no such setting"
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(conf, version_base="1.3"):
        beside: Any = hydra.compose("config")
    known = ""
    for name in key.split("."):
        if not isinstance(beside, DictConfig) or name not in beside:
            names = sorted(map(str, beside)) if isinstance(beside, DictConfig) else []
            where = f"{known}.{name}".strip(".")
            return f"{where}: no such setting" + (f": {did_you_mean(name, names)}" if names else "")
        beside, known = beside[name], f"{known}.{name}".strip(".")
    return f"{key}: no such setting here"


# --- resolvers, as in ${below:${data.root},corpus.txt}


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


for resolver in (make_folder, bpe_vocab_size, where, below):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
