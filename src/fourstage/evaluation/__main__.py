"""Evaluate a finished run again, by the frozen suite (suite.py).

    python -m fourstage evaluation run=NAME [ladder=true] [evaluation.KEY=NUMBER…] [outputs=outputs]

For example:

    python -m fourstage evaluation run=grpo ladder=true
    python -m fourstage evaluation run=sft evaluation.max_problems=800

It trains nothing and gives the same bytes again. ladder=true evaluates the run's ancestors too,
from the bottom up, on the run's held-out data and with its evaluation settings, so that all rows
are comparable; it also brings a ladder of an older suite up to date. Changed settings are recorded.
"""

from pathlib import Path

from fourstage.errors import UserError
from fourstage.interruptions import run_command
from fourstage.runs.store import RunStore


def main(arguments: list[str]) -> None:
    """Evaluate a finished run again. Raises UserError for an unknown run or argument."""
    from fourstage.evaluation.run import evaluate_again
    from fourstage.lineage.messages import gain
    from fourstage.tracking.callbacks import telling

    values = dict(argument.partition("=")[::2] for argument in arguments)
    changes: dict[str, int | str] = {}  # EvaluationConfig refuses the text that is no number
    for key in [key for key in values if key.startswith("evaluation.")]:
        text = values.pop(key)
        changes[key.removeprefix("evaluation.")] = int(text) if text.isdecimal() else text
    if set(values) - {"run", "outputs", "ladder"} or not values.get("run"):
        raise UserError("name a run, as in run=sft, and no other keys than --help lists")
    ladder = values.get("ladder", "false")
    if ladder not in ("true", "false"):
        raise UserError(f"ladder: expected true or false, got {ladder!r}")
    store = RunStore(Path(values.get("outputs", "outputs")))
    folder = store.find(values["run"])
    ancestors = list(store.ancestors(folder).values()) if ladder == "true" else []
    for run in (*ancestors, folder):  # from the bottom up: each judges the rows below it
        like = None if run == folder else folder
        evaluate_again(run, store.ancestors(run), store.outputs, telling, changes, like)
        print(f"evaluated {run.name}: {run / 'eval.json'}", flush=True)
    print(gain(store.outputs, folder.name))


if __name__ == "__main__":
    run_command(main)
