"""How a search reaches train.py: a process for each run, as if its words were typed.

python -m fourstage.search.training < JSON    checks [[words, config]...] as train.py does
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fourstage.errors import UserError
from fourstage.interruptions import AGAIN, STOPS, run_command

SCRIPT = Path(__file__).parents[3] / "train.py"
PLACE = "run: "  # how the line begins in which train.py names the run's folder
STOPPED = {128 + signum for signum in (*STOPS, signal.SIGINT)}
CHECK = [sys.executable, "-m", "fourstage.search.training"]
PASSING = (AGAIN, "free space", "no checkpoints left to drop")  # what a full disk, or a lost
# process, makes train.py say: the settings are not to blame


class TrialFailed(UserError):
    """train.py ended with an error, whose line this is."""


@dataclass(frozen=True)
class Trainer:
    """settings(commands): checks the words of each; the config that train.py makes of the first.
    train(words, log): the folder of the finished run; what it printed is in the file `log`. Both
    raise UserError."""

    settings: Callable[[Sequence[Sequence[str]]], Mapping[str, Any]]
    train: Callable[[Sequence[str], Path], Path]


def settings(commands: Sequence[Sequence[str]]) -> Mapping[str, Any]:
    """Raises UserError with train.py's own line for a setting that doesn't exist, or a value that
    it doesn't allow."""
    if not SCRIPT.is_file():
        raise UserError(f"{SCRIPT}: not there: a search needs a checkout of the repository")
    configs = []
    for words in commands:
        said = output([sys.executable, str(SCRIPT), *words, "--cfg", "job", "--resolve"])
        configs.append(yaml.safe_load(said))
    output(CHECK, json.dumps(list(zip(commands, configs, strict=True))))
    return configs[0]


def output(command: Sequence[str], given: str = "") -> str:
    """What a command prints. Raises UserError with its last line if it fails."""
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    if done.returncode:
        raise UserError(last_line(done.stderr).removeprefix("error: "))
    return done.stdout


def main(arguments: list[str]) -> None:
    """The check: in a process of its own, as it loads PyTorch. Raises UserError."""
    from fourstage.lineage.plan import make_plan

    for words, config in json.load(sys.stdin):
        make_plan(config, words)


def train(words: Sequence[str], log: Path) -> Path:
    """Raises TrialFailed if it fails, and UserError if somebody stopped it, or if it failed for
    want of space or of another process, which says nothing about the words.

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
    line = last_line(said) or f"train.py ended with code {code}"
    is_passing = any(words in line for words in PASSING) and "out of memory" not in said
    if code in STOPPED or (code and is_passing):
        raise UserError(f"{line} (of the search)")
    places = [line.removeprefix(PLACE) for line in said.splitlines() if line.startswith(PLACE)]
    if code or not places:
        with open(log, "a", encoding="utf-8") as file:  # an error if train.py had no space for one
            file.write(f"train.py ended with code {code}\n")
        raise TrialFailed(line)
    return Path(places[-1])


def last_line(text: str) -> str:
    """The last one with words in it, where an error stands."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


TRAINER = Trainer(settings, train)

if __name__ == "__main__":
    run_command(main)
