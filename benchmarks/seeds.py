"""The stages' own goals over several ladders, and what the others made of them, as the Markdown
tables of the README.

    python train.py -m stage=grpo seed=0,1,2
    python -m benchmarks.seeds [outputs=outputs]

Reads the latest finished, non-debug grpo run of each seed in one outputs folder and what their
reports read; trains nothing. The last line is one JSON object with the figures.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.common import start
from fourstage.ladder import place
from fourstage.report.files import Files
from fourstage.report.goals import goals
from fourstage.report.keys import NONE
from fourstage.report.ladder import Row, ladder, read_rows, read_runs

NAMES = {
    "bits_per_char": "bits per character",
    "well_formed": "well-formed answers",
    "knowledge_completed": "held-out facts completed",
    "knowledge_answered": "held-out facts answered",
    "knowledge_reworded": "reworded questions answered",
    "pair_accuracy": "held-out pairs",
    "true_score": "true score",
    "friendly": "friendly answers",
    "reward_model_score": "reward-model score",
    "reasoning_accuracy": "held-out problems",
}
KEPT = ("knowledge_completed", "knowledge_answered", "knowledge_reworded", "friendly")
KEPT += ("reasoning_accuracy",)  # of every stage


def cell(metric: dict) -> str:
    """value [low, high]; a mark where it is not measured"""
    if metric["value"] is None:
        return NONE
    return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**metric)


def ladders(outputs: Path) -> dict[int, dict[str, Row]]:
    """{seed: {stage: row}} of the latest finished grpo run of each seed."""
    files = Files()
    runs = read_runs(outputs, files)
    tips = {
        tip.config["seed"]: tip
        for tip in sorted(runs.values(), key=lambda run: run.rank)
        if tip.stage == "grpo" and tip.is_finished and not tip.is_debug
    }
    return {
        seed: {row.stage: row for row in read_rows(ladder(tips[seed], runs, files), files)}
        for seed in sorted(tips)
    }


def entries(found_ladders: dict[int, dict[str, Row]]) -> list[dict]:
    """One for each seed and stage: the goal before and after, and whether they are apart."""
    found = []
    for seed, rows in found_ladders.items():
        for goal in goals(list(rows.values())):
            row = rows[goal.stage]
            kl = row.metrics.get("kl_to_sft", {}).get("value")
            seconds = row.run.costs().get("seconds")
            found.append(
                {
                    "seed": seed,
                    "device": row.run.record["device"],
                    "goal": goal,
                    "kl": kl if goal.stage == "ppo" else None,
                    "seconds": seconds,
                }
            )
    return sorted(found, key=lambda e: (place(e["goal"].stage), e["seed"]))


def main(arguments: list[str]) -> None:
    values = dict(argument.partition("=")[::2] for argument in arguments)
    if unknown := set(values) - {"outputs"}:
        sys.exit(f"unknown argument {min(unknown)!r}: python -m benchmarks.seeds [outputs=outputs]")
    outputs = Path(values.get("outputs", "outputs"))
    by_seed = ladders(outputs)
    found = entries(by_seed)
    if not found:
        sys.exit(f"no finished grpo run under {outputs / 'runs'}: python train.py stage=grpo")
    print("| stage | its goal | seed | before | after | 95 % intervals | time |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for e in found:
        goal = e["goal"]
        name = NAMES[goal.name] + ("" if e["kl"] is None else f" (KL {e['kl']:.1f} nats)")
        print(
            f"| {goal.stage} | {name} | {e['seed']} | {cell(goal.before)} | {cell(goal.after)} "
            f"| {goal.verdict} | {e['seconds']:.0f} s |"
        )
    stages = [stage for stage in next(iter(by_seed.values())) if stage != "reward"]
    print(f"\n| key | seed | {' | '.join(stages)} |\n|{' --- |' * (len(stages) + 2)}")
    for key in KEPT:
        for seed, rows in by_seed.items():
            cells = [cell(rows[s].metrics.get(key, {"value": None})) for s in stages if s in rows]
            print(f"| {NAMES[key]} | {seed} | {' | '.join(cells)} |")
    figures = {f"{e['goal'].stage}_seed{e['seed']}": e["goal"].after["value"] for e in found}
    device = ", ".join(dict.fromkeys(e["device"] for e in found))
    print(json.dumps({"benchmark": "seeds", "device": device, "ratios": {}, "figures": figures}))


if __name__ == "__main__":
    start(main)
