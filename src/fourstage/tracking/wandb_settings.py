"""Where W&B runs go and what they are called: the config, the WANDB_ variables, defaults.

What is typed counts more than a variable, and a variable more than a default. W&B itself would give
one run's id and name to every stage of a command, and to each job of a multirun; so it doesn't see
`OURS`, which are applied here: those of one run to the stage that the command names, those that
label runs to all of its stages (docs/dashboards.md has the table).
"""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fourstage.errors import UserError
from fourstage.job import LoggerConfig, StageJob
from fourstage.runs.store import RunStore

PROJECT = "fourstage"
OURS = tuple(
    f"WANDB_{name}"
    for name in (
        *("RUN_ID", "NAME", "RESUME", "SWEEP_ID", "SWEEP_PARAM_PATH"),
        *("RUN_GROUP", "JOB_TYPE", "TAGS", "NOTES", "PROJECT", "ENTITY", "DIR", "DISABLED"),
    )
)
RESUME = ("allow", "auto", "must", "never")
RESERVED = ":;,#?/'"  # which W&B refuses in an id
YES = ("1", "true", "t", "yes", "y", "on")


def variable(name: str) -> str | None:
    """A WANDB_ variable; None if it is empty or not set."""
    return os.environ.get(f"WANDB_{name}") or None


def project_of(config: LoggerConfig) -> str:
    return config.project or variable("PROJECT") or PROJECT


def entity_of(config: LoggerConfig) -> str | None:
    return config.entity or variable("ENTITY")


def wandb_folder(outputs: Path) -> Path:
    """Where runs are logged on the disk."""
    return Path(variable("DIR") or outputs).resolve() / "wandb"


def labels(group: str, stage: str, tags: list[str]) -> dict[str, Any]:
    """Options of wandb.init that a command's stages share, the user's before ours."""
    own = [tag.strip() for tag in (variable("TAGS") or "").split(",")]
    return {
        "group": variable("RUN_GROUP") or group,
        "job_type": variable("JOB_TYPE") or stage,
        "tags": list(dict.fromkeys([*tags, *filter(None, own)])),
        "notes": variable("NOTES"),
    }


def names(job: StageJob, stored: str | None) -> dict[str, Any]:
    """id, name, resume and sweep_id of a stage's W&B run, None where nothing is asked for.

    `stored`: the id of the W&B run that the stage has begun, which it keeps. Raises UserError for
    variables that make no sense, or that would make two stages one run.
    """
    if not job.is_named:
        return {"id": stored, "name": job.name, "resume": None, "sweep_id": None}
    asked, resume = variable("RUN_ID"), variable("RESUME")
    if resume not in (None, *RESUME):
        raise UserError(f"WANDB_RESUME: expected one of {', '.join(RESUME)}, got {resume!r}")
    if stored is None and asked is not None:
        check_id(job, asked)
    if stored is not None and asked not in (None, stored):
        print(f"W&B: {job.name} goes on in its run {stored}, not in WANDB_RUN_ID={asked}")
    return {
        "id": stored or asked,
        "name": variable("NAME") or job.name,
        "resume": resume if stored is None and resume in ("must", "never") else None,
        "sweep_id": variable("SWEEP_ID") if stored in (None, asked) else None,
    }


def check_id(job: StageJob, asked: str) -> None:
    """Raise UserError if W&B refuses an id, or if it is that of another stage's run."""
    if asked != asked.strip() or not set(asked).isdisjoint(RESERVED):
        raise UserError(f"WANDB_RUN_ID: an id has no spaces and none of {RESERVED}, got {asked!r}")
    for folder, record in RunStore(job.outputs).records().items():
        if record.get("wandb") == asked and folder != job.folder:
            raise UserError(
                f"WANDB_RUN_ID={asked}: the W&B run of {folder.name}: unset it, or take another id"
            )


@contextmanager
def hidden() -> Iterator[None]:
    """Inside, W&B doesn't see the variables that are applied here."""
    kept = {name: os.environ.pop(name) for name in OURS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def set_up_wandb(outputs: Path) -> Path:
    """Make W&B's folder and have it read its variables. Raises UserError for one it refuses.

    Not by wandb.setup(): that starts wandb-core with a lock held which W&B (0.31) takes again to
    report that it didn't start. wandb.init starts it without.
    """
    import wandb
    from pydantic import ValidationError
    from wandb.sdk import wandb_setup

    # a page for each line of its debug.log that a full disk refuses; W&B would log that page too
    logging.raiseExceptions = False
    folder = wandb_folder(outputs)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_DATA_DIR", str(folder))  # for artifacts; default: the home folder
    if os.path.expanduser("~") == "~":  # in a container, as a user that it doesn't know
        os.environ["HOME"] = str(folder)
    try:
        with hidden():
            wandb_setup.singleton().settings  # noqa: B018  it reads them once
    except (wandb.errors.UsageError, ValidationError) as error:
        wandb.teardown()  # or the next job of a multirun would get what was read until here
        if isinstance(error, wandb.errors.UsageError):
            reason = str(error).splitlines()[0]
            raise UserError(f"W&B: {reason}: correct its variable, or take logger=none") from None
        wrong = error.errors()[0]
        raise UserError(
            f"WANDB_{'_'.join(map(str, wrong['loc'])).upper()}: {wrong['msg']}, got "
            f"{wrong['input']!r}: correct it, unset it, or take logger=none"
        ) from None
    return folder


def wandb_mode(config: LoggerConfig) -> tuple[str, str]:
    """("online" | "offline" | "disabled", why it is offline if nobody asked for that).

    The config's mode comes first, then WANDB_DISABLED and WANDB_MODE, then whether there is a key;
    uses no network.
    """
    if config.name == "none":
        return "disabled", ""
    mode = config.mode
    if mode == "auto" and (variable("DISABLED") or "").lower() in YES:
        return "disabled", ""
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "auto").lower()
        mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
    if mode in ("offline", "disabled"):
        return mode, ""
    return ("online", "") if has_key() else ("offline", "no API key")


def has_key() -> bool:
    """Whether W&B would find a key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    named = os.environ.get("NETRC")
    for file in [named] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(file).authenticators(host):
                return True
    return False
