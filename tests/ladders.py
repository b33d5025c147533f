"""Ladders of run folders with invented items, for the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fourstage.evaluation import suite

STAGES = ("pretrain", "sft", "reward", "ppo", "grpo")
PARENTS = {
    "pretrain": {},
    "sft": {"policy": "pretrain"},
    "reward": {"policy": "sft"},
    "ppo": {"policy": "sft", "reward": "reward"},
    "grpo": {"policy": "ppo"},
}
TASKS = ("chain_sum", "leg_counting")
# row -> bits a character, share of well-formed answers, share of problems right, true score
SKILL = {
    "random": (6.8, 0.0, 0.0, -2.0),
    "pretrain": (1.4, 0.05, 0.02, -1.2),
    "sft": (1.6, 0.9, 0.3, 0.8),
    "ppo": (1.7, 0.95, 0.25, 1.6),
    "grpo": (1.8, 0.96, 0.5, 1.5),
}
QUESTIONS = ("What is an LLM?", "26 + 4 = ?")


def run_id(stage: str, seed: int) -> str:
    """Ten letters, as real ids."""
    return f"{stage}{'abcdefgh'[seed]}xxxxxxxxxx"[:10]


def items(row: str, seed: int, n: int, experts: int = 4, layers: int = 2) -> list[dict[str, Any]]:
    """`n` items of each set that the row has; experts=1 is a dense model, without routers."""
    rng = np.random.default_rng([seed, list(("reward", *SKILL)).index(row)])
    if row == "reward":
        scores = rng.normal([1.0, 0.0], 0.7, (n, 2)).round(4).tolist()
        return [
            {"set": "pairs", "id": i, "chosen": c, "rejected": r} for i, (c, r) in enumerate(scores)
        ]
    bits, form, right, score = SKILL[row]
    found: list[dict[str, Any]] = []
    for i in range(n):
        level = suite.DIFFICULTIES[i % 3]
        problem = {"id": f"problem-{i}", "task": TASKS[i // 3 % 2], "difficulty": level}
        p = right * (1.4, 1.0, 0.6)[i % 3]
        found += [
            {
                "set": "corpus",
                "id": i,
                "bits": bits * 256 * rng.uniform(0.8, 1.2),
                "chars": 256,
                "bytes": 260,
            },
            {
                "set": "chat",
                "id": f"chat-{i}",
                "prompt": f"Say {i}",
                "answer": f"It is {i}.",
                "stopped": bool(rng.random() < form),
                "well_formed": bool(rng.random() < form),
                "distinct_1": 0.9,
                "distinct_2": 1.0,
                "true_score": round(rng.normal(score, 0.8), 4),
                "logprob": -9.0,
                "prompt_ids": [1, 2],
                "ids": [3] * int(rng.integers(4, 12)),
            },
            {
                "set": "chat_greedy",
                "id": f"chat-{i}",
                "answer": "It.",
                "exact": False,
                "contained": bool(rng.random() < right),
            },
            {
                "set": "reasoning",
                **problem,
                "prompt": f"{i} + 1 = ?",
                "answer": "#### 2",
                "stopped": True,
                "well_formed": bool(rng.random() < form),
                "correct": bool(rng.random() < p),
            },
            {
                "set": "reasoning_sampled",
                **problem,
                "samples": 4,
                "correct": int(rng.binomial(4, p)),
            },
        ]
        if experts > 1:
            load = rng.multinomial(512, rng.dirichlet([5.0] * experts), layers).tolist()
            drift = None if row == "random" else rng.uniform(0.1, 0.4, layers).tolist()
            found.append({"set": "router", "id": i, "tokens": 256, "load": load, "drift": drift})
    return found


def judged(row: str, found: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """What a reward model and an sft policy say of the row's chat answers."""
    rng = np.random.default_rng([seed, 99, list(SKILL).index(row)])
    return [
        {
            "set": "chat",
            "id": item["id"],
            "reward_model_score": round(item["true_score"] + rng.normal(0, 0.3), 4),
            "kl_to_sft": round(abs(rng.normal(9.0 if row in ("ppo", "grpo") else 0.1, 1.0)), 4),
            "win": float(rng.choice([0.0, 0.5, 1.0])),
            "win_learned": float(rng.choice([0.0, 1.0])),
        }
        for item in found
        if item["set"] == "chat"
    ]


def curves(stage: str, seed: int, steps: int) -> str:
    """A metrics.csv; without any column for no steps."""
    if steps == 0:
        return "step\n"
    rng = np.random.default_rng([seed, STAGES.index(stage), 7])
    x = np.arange(1, steps + 1)
    fall = 1.4 + 3.0 * np.exp(-x / (0.2 * steps)) + rng.normal(0, 0.05, steps)
    rise = 1 - np.exp(-x / (0.4 * steps))
    columns = {
        "router/load_entropy": 0.9 + 0.05 * rise,
        "router/drift": 0.3 * rise,
        "router/max_over_mean": 2.5 - rise,
        "speed/tokens_per_s": 9000 + 0 * x,
    }
    columns |= {
        "pretrain": {"train/loss": fall, "val/loss": fall + 0.1},
        "sft": {"train/loss": fall / 2, "val/loss": fall / 2 + 0.1},
        "reward": {"train/loss": 0.7 - 0.3 * rise, "train/accuracy": 0.5 + 0.3 * rise},
        "ppo": {
            "train/score": 2.5 * rise + rng.normal(0, 0.1, steps),
            "train/true_score": 0.8 + 3 * rise * (1.2 - rise) + rng.normal(0, 0.1, steps),
            "train/kl": 12 * rise**2 + rng.normal(0, 0.1, steps),
            "train/answer_length": 40 + 10 * rise,
        },
        "grpo": {
            "train/reward": 0.4 + 0.3 * rise,
            "train/pass_at_1": 0.3 + 0.3 * rise,
            "train/kl": rise,
        },
    }[stage]
    lines = [",".join(["step", *columns])]
    lines += [
        ",".join([str(n + 1), *(f"{column[n]:.6g}" for column in columns.values())])
        for n in range(steps)
    ]
    return "\n".join(lines) + "\n"


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def write_evaluation(folder: Path, row: str, found: list[dict], late: list[dict]) -> None:
    """eval<suffix>.json and its items, `late` judgements among them."""
    suffix = "_random" if row == "random" else ""
    found = suite.joined(found, late)
    reasons = (
        {}
        if row == "reward"
        else {
            "win_rate": "no sft policy on this ladder yet",
            "reward_model_score": "no reward model on this ladder yet",
            "router": "a dense model has no routers",
        }
    )
    metrics = suite.metrics(found, reasons, 0)
    write_json(folder / f"eval{suffix}.json", {"suite": suite.SUITE, "seed": 0, "metrics": metrics})
    write_lines(folder / f"eval_items{suffix}.jsonl", found)


def write_ladder(
    outputs: Path,
    seed: int = 0,
    *,
    n: int = 30,
    steps: int = 30,
    experts: int = 4,
    layers: int = 2,
    stages: tuple[str, ...] = STAGES,
    config: dict[str, Any] | None = None,
) -> Path:
    """The whole ladder of one seed; its last run's folder."""
    last_row = {row: items(row, seed, n, experts, layers) for row in ("reward", *SKILL)}
    said = {row: judged(row, last_row[row], seed) for row in SKILL}
    folder = outputs
    for hour, stage in enumerate(stages):
        folder = outputs / "runs" / f"{stage}-{run_id(stage, seed)}"
        record = {
            "id": run_id(stage, seed),
            "stage": stage,
            "name": folder.name,
            "parents": {role: run_id(parent, seed) for role, parent in PARENTS[stage].items()},
            "group": run_id(stages[-1], seed),
            "config": {
                "seed": seed,
                "model": {"name": "moe_tiny"},
                "data": {"name": "embedded"},
                **(config or {}),
                "stages": {stage: {"lr": 0.001}} | (config or {}).get("stages", {}),
            },
            "git": {"commit": "abc"},
            "device": "cpu",
            "started": "2026-01-01T09:00:00+00:00",
            "finished": f"2026-01-01T{10 + hour}:00:{seed:02}+00:00",
            "status": "finished",
            "cost": {
                "seconds": 61.2 + seed,
                "train_seconds": 50.1,
                "eval_seconds": 9.0,
                "steps": steps,
                "tokens": 123456,
                "flops": 1.25e12,
                "tokens_per_s": 2464.0,
                "peak_memory_mib": 900,
                "data_dropped": 7,
            }
            | ({"tokens_generated": 4321} if stage in ("ppo", "grpo") else {}),
            "debug": None,
        }
        write_json(folder / "run.json", record)
        (folder / "metrics.csv").write_text(curves(stage, seed, steps), "utf-8")
        samples = []
        for row in ("random", stage) if stage == "pretrain" else (stage,):
            # judged already where the models were there
            known = said[row] if row in ("ppo", "grpo") else []
            write_evaluation(folder, row, last_row[row], known)
            samples += [
                {
                    "step": 0 if row == "random" else steps,
                    "prompt_id": question,
                    "prompt": question,
                    "answer": f"{row} says {question}",
                    "stopped": row != "random",
                }
                for question in QUESTIONS
            ]
        write_lines(folder / "samples.jsonl", [] if stage == "reward" else samples)
        if stage in ("sft", "reward"):
            fields = {"sft": ("kl_to_sft", "win"), "reward": ("reward_model_score", "win_learned")}
            earlier = {"random": "random", "pretrain": run_id("pretrain", seed)}
            earlier |= {"sft": run_id("sft", seed)} if stage == "reward" else {}
            late = [
                {"row": key, "set": "chat", "id": item["id"]} | {f: item[f] for f in fields[stage]}
                for row, key in earlier.items()
                for item in said[row]
            ]
            write_lines(folder / "ladder_eval_items.jsonl", late)
            cells = {
                key: {
                    name: cell
                    for name, cell in suite.metrics(
                        suite.joined(last_row[row], [i for i in late if i["row"] == key]), {}, 0
                    ).items()
                    if name
                    in (
                        "kl_to_sft",
                        "win_rate",
                        "win_rate_ties",
                        "reward_model_score",
                        "win_rate_learned",
                    )
                }
                for row, key in earlier.items()
            }
            write_json(folder / "ladder_eval.json", cells)
    return folder


# --- to look at what was written


def folder(outputs: Path, stage: str) -> Path:
    """A run of seed 0."""
    return outputs / "runs" / f"{stage}-{run_id(stage, 0)}"


def stages(outputs: Path) -> dict[str, dict]:
    """The rows of stages.json."""
    table = json.loads((outputs / "report" / "stages.json").read_text())
    return {row["stage"]: row for row in table["rows"]}


def section(outputs: Path, heading: str) -> str:
    """A section of report.md."""
    text = (outputs / "report" / "report.md").read_text()
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


def read_items(path: Path) -> dict[tuple, dict]:
    """By set and id."""
    rows = map(json.loads, path.read_text().splitlines())
    return {(row["set"], row["id"]): row for row in rows}
