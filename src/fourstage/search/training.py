"""How a search reaches train.py: a process for each run, as if its words were typed."""

import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fourstage.errors import UserError
from fourstage.interruptions import STOPS

SCRIPT = Path(__file__).parents[3] / "train.py"
PLACE = "run: "  # how the line begins in which train.py names the run's folder
STOPPED = {128 + signum for signum in (*STOPS, signal.SIGINT)}


class TrialFailed(UserError):
    """train.py ended with an error, whose line this is."""


@dataclass(frozen=True)
class Trainer:
    """settings(words): the config that train.py makes of them. train(words, log): the folder of the
    finished run; what it printed is in the file `log`. Both raise UserError."""

    settings: Callable[[Sequence[str]], Mapping[str, Any]]
    train: Callable[[Sequence[str], Path], Path]


def settings(words: Sequence[str]) -> Mapping[str, Any]:
    """Raises UserError with train.py's own line for a setting that doesn't exist."""
    if not SCRIPT.is_file():
        raise UserError(f"{SCRIPT}: not there: a search needs a checkout of the repository")
    command = [sys.executable, str(SCRIPT), *words, "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(last_line(done.stderr))
    return yaml.safe_load(done.stdout)


def train(words: Sequence[str], log: Path) -> Path:
    """Raises TrialFailed if it fails, and UserError if somebody stopped it.

    It is a session of its own, so that Ctrl-C reaches it once: as the SIGTERM that it gets if this
    process is asked to stop. It saves its state then, and this waits for it.
    """
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    said = log.read_text(encoding="utf-8", errors="replace")
    if code in STOPPED:
        raise UserError(f"{last_line(said)} (of the search)")
    places = [line.removeprefix(PLACE) for line in said.splitlines() if line.startswith(PLACE)]
    if code or not places:
        raise TrialFailed(last_line(said) or f"train.py ended with code {code}")
    return Path(places[-1])


def last_line(text: str) -> str:
    """The last one with words in it, where an error stands."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


TRAINER = Trainer(settings, train)
