"""Search for settings: Bayesian (TPE, by Optuna) or random; each trial is a run of train.py.

    python -m fourstage search name=NAME RANGE... [SETTING...] [trials=20] [seeds=3]
        [trial_seeds=1] [sampler=tpe | random]

For example:

    python -m fourstage search name=lr stage=grpo model=moe_nano trials=20 \\
        'stages.grpo.lr=tag(log,interval(1e-5,1e-3))' 'stages.grpo.group_size=choice(4,8,16)'

RANGE is a setting with one of Hydra's words: interval(1e-5,1e-3), evenly by the logarithm with
tag(log,...), whole numbers with int(...); choice(4,8,16); range(1,5). SETTING is any other word of
train.py. A trial's value is the stage's own goal, of seed `seed` (trial_seeds=N: the mean of N).
Then the best trial's settings and the default ones are trained on `seeds` fresh seeds.

The same command goes on after a kill, and several at once share the trials. Settings that a trial
had before train nothing. Everything is in outputs/search/NAME; the runs have tag=NAME.
Needs Optuna: pip install 'fourstage[search]'.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from filelock import FileLock

from fourstage.errors import UserError
from fourstage.evaluation.suite import definition
from fourstage.files import locked
from fourstage.interruptions import Stopped, handle_stops, run_command, stop_now
from fourstage.ladder import LADDER
from fourstage.runs.listing import goal_of
from fourstage.search import outcome
from fourstage.search.outcome import Outcome, best_of
from fourstage.search.space import split_words
from fourstage.search.training import TRAINER, Trainer, TrialFailed
from fourstage.search.trials import (
    Measured,
    Sampler,
    import_optuna,
    open_study,
    results,
    run_trials,
)
from fourstage.settings import Bounded, at_least, from_arguments, given_once

CHOSEN_HERE = ("seed", "tag", "force")  # words of train.py that a trial gets from the search


@dataclass(frozen=True, kw_only=True)
class Options(Bounded):
    """The words that aren't train.py's."""

    name: str
    trials: int = at_least(1, default=20)
    seeds: int = at_least(2, default=3)  # fresh ones, for the winner and the default
    trial_seeds: int = at_least(1, default=1)
    sampler: Sampler = "tpe"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise UserError(f"name: expected one word, such as name=lr, got {self.name[:40]!r}")


def search(arguments: Sequence[str], trainer: Trainer = TRAINER) -> Path:
    """Search; returns the folder. Raises UserError for a mistake in the words, before anything
    trains."""
    known = {field.name for field in fields(Options)}
    is_own = [argument.partition("=")[0] in known for argument in arguments]
    named = [a for a, own in zip(arguments, is_own, strict=True) if own]
    if not any(word.startswith("name=") for word in named):
        raise UserError("name: missing: what to call the search, such as name=lr (see --help)")
    given_once(named)
    options = from_arguments(Options, named)
    words, ranges = split_words([a for a, own in zip(arguments, is_own, strict=True) if not own])
    for word in words:
        if word.partition("=")[0] in ("tag", "force"):
            raise UserError(f"{word}: a search tags its runs with its name, and repeats none")
    import_optuna()
    ends = [[*words, *(r.ends[end] for r in ranges)] for end in (0, 1)]
    config = trainer.settings([words, *ends])
    stage, first = config["stage"], config["seed"]
    if stage not in LADDER:
        raise UserError(f"stage: expected one of {', '.join(LADDER)}, got {stage!r}")
    goal = LADDER[stage].goal
    if (better := definition(goal).better) is None:
        raise UserError(f"stage={stage}: no side of its goal, {goal}, is better")
    fixed = [word for word in words if word.partition("=")[0] not in CHOSEN_HERE]
    trial_seeds = list(range(first, first + options.trial_seeds))
    fresh = [trial_seeds[-1] + 1 + n for n in range(options.seeds)]
    folder = Path(config["outputs"], "search", options.name)
    say = lambda line: print(line, flush=True)  # noqa: E731

    def measure(own: Sequence[str], seeds: Sequence[int], log: Path) -> Measured:
        """Train words on seeds. Raises TrialFailed."""
        values, runs = [], []
        for seed in seeds:
            run = trainer.train([*fixed, *own, f"seed={seed}", f"tag='{options.name}'"], log)
            value = goal_of(run, stage)["value"]
            if value is None:
                raise TrialFailed(f"{run.name}: its eval.json has no value of {goal}")
            values.append(value)
            runs.append(run.name)
        return Measured(sum(values) / len(values), runs)

    space = {
        "words": sorted(fixed),
        "ranges": [r.word for r in ranges],
        "sampler": options.sampler,
        "seed": first,
        "trial_seeds": options.trial_seeds,
    }
    study = open_study(folder, better, space)
    run_trials(
        study,
        folder,
        ranges,
        lambda own, log: measure(own, trial_seeds, log),
        trials=options.trials,
        sampler=options.sampler,
        seed=first,
        say=say,
    )
    done = results(study)
    if all(result.value is None for result in done):
        raise UserError(f"all trials failed: {done[-1].why}: to begin again, remove {folder}")
    best = best_of(done, better)
    with locked(FileLock(folder / "fresh.lock"), f"{folder.name}'s fresh seeds", "training"):
        values, runs = outcome.train_again(best.words, fresh, measure, folder, say)
    found = Outcome(
        name=options.name,
        stage=stage,
        goal=goal,
        better=better,
        sampler=options.sampler,
        words=fixed,
        ranges=space["ranges"],
        trial_seeds=trial_seeds,
        trials=done,
        fresh=values,
        runs=runs,
    )
    say("\n" + outcome.write(found, folder))
    return folder


def main(arguments: list[str]) -> int:
    """Search, and say where the result is. Raises UserError for a mistake in the words."""
    handle_stops(stop_now)
    try:
        folder = search(arguments)
    except Stopped as stopped:
        print(stopped.line, file=sys.stderr)
        return int(stopped.code or 1)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C: the same command goes on", file=sys.stderr)
        return 130
    print(f"search: {folder / 'search.md'}")
    return 0


if __name__ == "__main__":
    run_command(main)
