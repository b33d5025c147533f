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
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fourstage.errors import UserError
from fourstage.job import LoggerConfig, StageJob
from fourstage.runs.records import Record, read_record
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
NOT_IN_PROJECT = "/\\#?%:"
LONGEST, LONGEST_TAG = 128, 64
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


def begun(folder: Path, resume: bool) -> Record:
    """The record of a stage that goes on in the W&B run that it has begun, else none. One of an
    earlier version, whose `_step` counted calls, begins a new one, which gets all rows."""
    record = read_record(folder) if resume else {}
    return record if "wandb_online" in record else {}


def names(job: StageJob, stored: str | None) -> dict[str, Any]:
    """id, name, resume and sweep_id of a stage's W&B run, None where nothing is asked for.

    `stored`: the id of the W&B run that the stage has begun, which it keeps. Raises UserError for
    variables that make no sense, or that would make two stages one run.
    """
    if not job.is_named:
        return {"id": stored, "name": job.name, "resume": None, "sweep_id": None}
    check_variables(job.logger, job.outputs, job.folder, stored)
    asked, resume = variable("RUN_ID"), variable("RESUME")
    if stored is not None and asked not in (None, stored):
        print(f"W&B: {job.name} goes on in its run {stored}, not in WANDB_RUN_ID={asked}")
    return {
        "id": stored or asked,
        "name": variable("NAME") or job.name,
        "resume": resume if stored is None and resume in ("must", "never") else None,
        "sweep_id": variable("SWEEP_ID") if stored in (None, asked) else None,
    }


def check_variables(config: LoggerConfig, outputs: Path, folder: Path, stored: str | None) -> None:
    """Raise UserError for what W&B would refuse of names, labels and the id of the run in `folder`,
    or for an id that is another run's. Doesn't import W&B."""
    if wandb_mode(config)[0] == "disabled":
        return
    for name in ("RUN_ID", "NAME", "SWEEP_ID", "RUN_GROUP", "JOB_TYPE", "TAGS", "NOTES", "ENTITY"):
        check_characters(f"WANDB_{name}", variable(name) or "", lines=name == "NOTES")
    resume, asked, sweep = variable("RESUME"), variable("RUN_ID"), variable("SWEEP_ID") or ""
    if resume not in (None, *RESUME):
        raise UserError(f"WANDB_RESUME: expected one of {', '.join(RESUME)}, got {resume!r}")
    if sweep != sweep.strip():
        raise UserError(f"WANDB_SWEEP_ID: an id has no spaces around it, got {sweep!r}")
    for tag in (variable("TAGS") or "").split(","):
        if len(tag.strip()) > LONGEST_TAG:
            raise UserError(f"WANDB_TAGS: a tag has at most {LONGEST_TAG} characters, got {tag!r}")
    check_project(config)
    if stored is None and asked is not None:
        check_id(outputs, folder, asked)


def check_characters(name: str, text: str, *, lines: bool = False) -> None:
    """Raise UserError for control characters, and for bytes that are not text."""
    allowed = "\n\t" if lines else ""
    if any(unicodedata.category(c) in ("Cc", "Cs") and c not in allowed for c in text):
        raise UserError(f"{name}: has control characters or broken UTF-8: {text[:LONGEST]!r}")


def check_project(config: LoggerConfig) -> None:
    """Raise UserError for a project's name that W&B refuses."""
    name, project = "logger.project" if config.project else "WANDB_PROJECT", project_of(config)
    check_characters(name, project)
    if len(project) > LONGEST or not set(project).isdisjoint(NOT_IN_PROJECT):
        raise UserError(
            f"{name}: at most {LONGEST} characters and none of {NOT_IN_PROJECT}, "
            f"got {project[:LONGEST]!r}"
        )


def check_id(outputs: Path, folder: Path, asked: str) -> None:
    """Raise UserError if W&B refuses an id, or if it is that of another stage's run."""
    if len(asked) > LONGEST:
        raise UserError(f"WANDB_RUN_ID: at most {LONGEST} characters, got {len(asked)}")
    if asked != asked.strip() or not set(asked).isdisjoint(RESERVED):
        raise UserError(f"WANDB_RUN_ID: an id has no spaces and none of {RESERVED}, got {asked!r}")
    for other, record in RunStore(outputs).records().items():
        if record.get("wandb") == asked and other != folder:
            raise UserError(
                f"WANDB_RUN_ID={asked}: the W&B run of {other.name}: unset it, or take another id"
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
