"""Evaluate a finished run again, by the frozen suite (suite.py).

    python -m fourstage evaluation run=NAME [ladder=true] [evaluation.KEY=NUMBER…] [outputs=outputs]

For example:

    python -m fourstage evaluation run=grpo ladder=true
    python -m fourstage evaluation run=sft evaluation.max_problems=800

It trains nothing and gives the same bytes again. ladder=true evaluates the run's ancestors too,
from the bottom up, on the run's held-out data and with its evaluation settings, so that all rows
compare; it also brings a ladder of an older suite to this one. Changed settings are recorded.
"""

from __future__ import annotations

from pathlib import Path

from fourstage.errors import UserError
from fourstage.interruptions import run_command
from fourstage.runs.store import RunStore

USAGE = (
    "usage: python -m fourstage evaluation run=NAME [ladder=true] [evaluation.KEY=NUMBER…] "
    "[outputs=outputs]"
)


def whole_number(text: str) -> int | str:
    """The number; a text that is none stays one, and is refused where a number is expected."""
    try:
        return int(text)
    except ValueError:
        return text


def main(arguments: list[str]) -> None:
    """Evaluate a finished run again. Raises UserError for an unknown run or argument."""
    from fourstage.evaluation.run import evaluate_again
    from fourstage.lineage.climb import gain
    from fourstage.tracking.callbacks import telling

    values = dict(argument.partition("=")[::2] for argument in arguments)
    changed = [key for key in values if key.startswith("evaluation.")]
    changes = {key.removeprefix("evaluation."): whole_number(values.pop(key)) for key in changed}
    if set(values) - {"run", "outputs", "ladder"} or not values.get("run"):
        raise UserError(USAGE)
    ladder = values.get("ladder", "false")
    if ladder not in ("true", "false"):
        raise UserError(f"ladder: expected true or false, got {ladder!r}")
    store = RunStore(Path(values.get("outputs", "outputs")))
    folder = store.find(values["run"])
    ancestors = list(store.ancestors(folder).values()) if ladder == "true" else []
    for run in (*ancestors, folder):  # each judges rows below it, so from the bottom up
        like = None if run == folder else folder
        evaluate_again(run, store.ancestors(run), store.outputs, telling, changes, like)
        print(f"evaluated {run.name}: {run / 'eval.json'}", flush=True)
    print(gain(store.outputs, folder.name))


if __name__ == "__main__":
    run_command(main)
