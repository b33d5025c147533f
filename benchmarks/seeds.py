"""The stages' own goals over several ladders, as the Markdown table of the README.

    python train.py -m stage=grpo seed=0,1,2
    python -m benchmarks.seeds [outputs=outputs]

Reads the finished, non-debug grpo runs of one outputs folder and what their reports read; trains
nothing. The last line is one JSON object with the figures.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fourstage.report import GOALS, compare
from fourstage.report_files import Files, ladder, read_rows, read_runs

NAMES = {
    "bits_per_char": "bits per character",
    "well_formed": "well-formed answers",
    "pair_accuracy": "held-out pairs",
    "preference_score": "true preference score",
    "reasoning_accuracy": "held-out problems",
}


def cell(metric: dict) -> str:
    """value [low, high]"""
    return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**metric)


def goals(outputs: Path) -> list[dict]:
    """One entry for each seed and stage: the goal before and after, and whether they are apart."""
    files = Files()
    runs = read_runs(outputs, files)
    found = []
    for tip in runs.values():
        if tip.stage != "grpo" or tip.is_debug:
            continue
        rows = {row.id: row for row in read_rows(ladder(tip, runs, files), files)}
        for row in rows.values():
            if row.run is None:
                continue
            name = GOALS[row.stage]
            coin = {"value": 0.5, "low": 0.5, "high": 0.5}
            parent = rows.get(row.run.parents.get("policy"))
            before = coin if row.stage == "reward" else parent.metrics[name]
            after = row.metrics[name]
            found.append(
                {
                    "seed": tip.record["config"]["seed"],
                    "stage": row.stage,
                    "goal": name,
                    "before": before,
                    "after": after,
                    "verdict": compare(name, before, after)[1],
                    "kl": (row.metrics.get("kl_to_sft") or {}).get("value"),
                    "seconds": row.run.costs().get("seconds"),
                }
            )
    return sorted(found, key=lambda entry: (list(GOALS).index(entry["stage"]), entry["seed"]))


def main(arguments: list[str]) -> None:
    values = dict(argument.partition("=")[::2] for argument in arguments)
    entries = goals(Path(values.get("outputs", "outputs")))
    print("| stage | its goal | seed | before | after | 95 % intervals | time |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for e in entries:
        goal = NAMES[e["goal"]] + (f" (KL {e['kl']:.1f} nats)" if e["stage"] == "ppo" else "")
        print(
            f"| {e['stage']} | {goal} | {e['seed']} | {cell(e['before'])} | {cell(e['after'])} "
            f"| {e['verdict']} | {e['seconds']:.0f} s |"
        )
    figures = {f"{e['stage']}_seed{e['seed']}": e["after"]["value"] for e in entries}
    print(json.dumps({"benchmark": "seeds", "device": "cpu", "ratios": {}, "figures": figures}))


if __name__ == "__main__":
    main(sys.argv[1:])
