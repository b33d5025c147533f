"""The trials of a search, in a journal that survives a kill and that several commands can share.

A trial's settings depend only on the search's seed, its number and the results before it, so a
search that is killed and goes on has the trials of one that wasn't. Sampler: TPE (Watanabe 2023,
arXiv 2304.11127), as Optuna (Akiba et al. 2019, arXiv 1907.10902) has it, or random.
"""

import shlex
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from fourstage.errors import UserError
from fourstage.search.space import Range
from fourstage.search.training import TrialFailed

if TYPE_CHECKING:
    from optuna.study import Study

WORDS, SPACE, RESULT = "words", "space", "result"  # keys of what is stored
HOPELESS = 3  # failures in a row, from the first trial on, after which a search gives up
Sampler = Literal["tpe", "random"]


@dataclass(frozen=True)
class Result:
    """A trial: its overrides, and what came of them. value: None if it failed, which `why` says;
    runs: a run for each seed."""

    number: int
    words: list[str]
    value: float | None
    runs: list[str]
    why: str


@dataclass(frozen=True)
class Measured:
    """What words came to: the mean over their seeds."""

    value: float
    runs: list[str]


def open_study(folder: Path, better: Literal["higher", "lower"], space: dict[str, Any]) -> "Study":
    """The study in a folder, begun if it isn't there. Raises UserError if that one searches
    something else, or if Optuna isn't installed."""
    optuna = import_optuna()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "journal.log"
    with FileLock(folder / "search.lock"):
        mend(path)
        try:
            backend = optuna.storages.journal.JournalFileBackend(str(path))
            study = optuna.create_study(
                study_name=folder.name,
                storage=optuna.storages.JournalStorage(backend),
                direction="maximize" if better == "higher" else "minimize",
                load_if_exists=True,
            )
        except (ValueError, KeyError) as error:
            raise UserError(f"{path}: broken ({error}): remove {folder}") from None
        stored = study.user_attrs.get(SPACE)
        if stored is None:
            study.set_user_attr(SPACE, space)
        elif stored != space:
            its = shlex.join([*stored["words"], *stored["ranges"]])
            rest = ", ".join(f"{k}={v}" for k, v in stored.items() if k not in ("words", "ranges"))
            raise UserError(
                f"{folder} is another search: {its} ({rest}): choose another name=, or repeat that"
            )
    return study


def import_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("a search needs Optuna: pip install 'fourstage[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def mend(path: Path) -> None:
    """Cut off a last line that a kill or a full disk left without its end."""
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])


def ask(study: "Study", ranges: Sequence[Range], sampler: Sampler, seed: int) -> tuple[int, list]:
    """A new trial's number in the study, and its overrides."""
    samplers = import_optuna().samplers
    own = zlib.crc32(f"{seed} {len(real(study))}".encode())
    is_tpe = sampler == "tpe"
    study.sampler = (
        samplers.TPESampler(seed=own, multivariate=True) if is_tpe else samplers.RandomSampler(own)
    )
    trial = study.ask()
    words = [r.suggest(trial) for r in ranges]
    trial.set_user_attr(WORDS, words)
    return trial.number, words


def real(study: "Study") -> list[Any]:
    """The trials, but for those that a kill left before they had their words."""
    return [trial for trial in study.get_trials(deepcopy=False) if WORDS in trial.user_attrs]


def run_trials(
    study: "Study",
    folder: Path,
    ranges: Sequence[Range],
    measure: Callable[[Sequence[str], Path], Measured],
    *,
    trials: int,
    sampler: Sampler,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Run trials until there are so many, also those that a killed command left; wait for the last
    ones of other commands. Raises UserError if the first ones all fail."""
    told = False
    while True:
        taken = take(study, folder, ranges, trials, sampler, seed)
        if taken is None:
            left = [t for t in real(study) if not t.state.is_finished()]
            if not left:
                return
            if not told:
                numbers = ", ".join(str(trial.number) for trial in left)
                say(f"waiting for trial {numbers}, which another command is running")
            told = True
            time.sleep(1.0)
            continue
        number, words, lock = taken
        try:
            say(f"trial {number}: {' '.join(words)}")
            say(f"  {finish(study, number, words, folder, measure)}")
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
        failed = [result for result in results(study) if result.value is None]
        if len(failed) == HOPELESS == len([t for t in real(study) if t.state.is_finished()]):
            why = f"{failed[-1].why}: to begin again, remove {folder}"
            raise UserError(f"the first {HOPELESS} trials failed: {why}")


def take(
    study: "Study",
    folder: Path,
    ranges: Sequence[Range],
    trials: int,
    sampler: Sampler,
    seed: int,
) -> tuple[int, list[str], FileLock] | None:
    """A trial that nobody is running, with the lock that says so: one that a killed command left,
    or a new one. None if there are enough."""
    with FileLock(folder / "search.lock"):
        for trial in study.get_trials(deepcopy=False):
            if trial.state.is_finished():
                continue
            lock = FileLock(folder / f"trial-{trial.number}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            if WORDS in trial.user_attrs:
                return trial.number, trial.user_attrs[WORDS], lock
            fail(study, trial.number)  # it never began
            lock.release()
        if len(real(study)) >= trials:
            return None
        number, words = ask(study, ranges, sampler, seed)
        lock = FileLock(folder / f"trial-{number}.lock")
        lock.acquire()
        return number, words, lock


def finish(
    study: "Study",
    number: int,
    words: list[str],
    folder: Path,
    measure: Callable[[Sequence[str], Path], Measured],
) -> str:
    """Measure a trial and tell the study; what to say. The same words as before train nothing."""
    same = (r for r in results(study) if r.words == words and r.value is not None)
    if (known := next(same, None)) is not None:
        value, runs, why = known.value, known.runs, ""
    else:
        try:
            measured = measure(words, folder / f"trial-{number}.log")
            value, runs, why = measured.value, measured.runs, ""
        except TrialFailed as error:
            value, runs, why = None, [], str(error)
    study.set_user_attr(f"{RESULT} {number}", {"runs": runs, "why": why})
    if value is None:
        fail(study, number)
        return f"failed: {why}"
    study.tell(number, value)
    best = study.best_trial
    again = f" (as trial {known.number})" if known else ""
    return f"{value:.6g}{again}; the best is {best.value:.6g}, of trial {best.number}"


def fail(study: "Study", number: int) -> None:
    study.tell(number, state=import_optuna().trial.TrialState.FAIL)


def results(study: "Study") -> list[Result]:
    """The finished trials, in their order."""
    stored, found = study.user_attrs, []
    for trial in real(study):
        if trial.state.is_finished():
            more = stored.get(f"{RESULT} {trial.number}", {"runs": [], "why": ""})
            found.append(Result(trial.number, trial.user_attrs[WORDS], trial.value, **more))
    return found
