"""The frozen evaluation suite: the same held-out sets and the same keys after every stage.

    bits_per_char        -log2 p of the held-out corpus, per character
    well_formed          share of answers that stop and have the form of an answer
    reasoning_accuracy   share of held-out problems that the verifier accepts, greedy decoding;
                         and reasoning_accuracy/<task>
    preference_score     the true, hidden rule (rl/rewards.py), answers sampled at temperature 1
    reward_model_score   the ladder's reward model on the same answers
    kl_to_sft            KL(policy || sft) in nats an answer, estimated from the same answers
    answer_tokens        mean length of these answers
    pair_accuracy        reward models only: share of held-out pairs that they order right

Each value has its n and a 95 % interval: Wilson (1927) for shares, a seeded percentile bootstrap
for means. A change of the sets, the prompts or a definition is a new SUITE. `python -m
fourstage.evaluation run=NAME` evaluates a finished run again, and gives the same bytes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fourstage.batch import PairBatch, Rollout
from fourstage.errors import UserError
from fourstage.generate import generate
from fourstage.job import read_jsonl, write_atomic
from fourstage.model import ScalarModel, Transformer
from fourstage.rl.ops import token_logprobs
from fourstage.rl.rewards import true_score, well_formed
from fourstage.rl.rollout import final_scores, fitted_prompt, pack, sample, score_tokens
from fourstage.tokenizer import Tokenizer
from fourstage.verify import Verifiable, verify

SUITE = "1"
BOOTSTRAPS = 2000
BATCH = 128

Metric = dict[str, Any]  # {"value", "n", "low", "high"}, or {"value": None, "why"}
Item = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """`evaluation` in the config: how many held-out items, and the seed of the sampled answers."""

    seed: int
    max_prompts: int  # chat prompts
    max_problems: int
    max_pairs: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        for name in ("max_prompts", "max_problems", "max_pairs", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class HeldOut:
    """What no stage trained on; a source that the data does not have is a str that says why."""

    corpus: list[str] | str
    chats: Sequence[Any] | str  # records with id and prompt_messages
    problems: Sequence[Any] | str  # the same, and Verifiable
    has_true_score: bool


# --- intervals


def wilson(successes: int, n: int) -> Metric:
    """A share with its 95 % Wilson score interval (Wilson 1927, eq. 4)."""
    z = 1.959964
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return _metric(p, n, max(0.0, centre - half), min(1.0, centre + half))


def bootstrap_mean(values: Sequence[float], seed: int) -> Metric:
    """A mean with its 95 % percentile bootstrap interval over the values (Efron 1979)."""
    return bootstrap_ratio(values, [1.0] * len(values), seed)


def bootstrap_ratio(numerators: Sequence[float], weights: Sequence[float], seed: int) -> Metric:
    """sum(numerators) / sum(weights) with a 95 % bootstrap interval over the items."""
    top, bottom = np.asarray(numerators, dtype=float), np.asarray(weights, dtype=float)
    rows = np.random.default_rng(seed).integers(0, len(top), (BOOTSTRAPS, len(top)))
    low, high = np.quantile(top[rows].sum(1) / bottom[rows].sum(1), [0.025, 0.975])
    return _metric(top.sum() / bottom.sum(), len(top), low, high)


def _metric(value: float, n: int, low: float, high: float) -> Metric:
    def rounded(x: float) -> float:
        return round(float(x), 6)

    return {"value": rounded(value), "n": n, "low": rounded(low), "high": rounded(high)}


def missing(why: str) -> Metric:
    """A cell that the data cannot fill."""
    return {"value": None, "why": why}


# --- the suite


def evaluate_policy(
    policy: Transformer,
    tokenizer: Tokenizer,
    heldout: HeldOut,
    config: EvaluationConfig,
    reward: ScalarModel | None = None,
    reference: Transformer | None = None,
) -> tuple[dict[str, Metric], list[Item]]:
    """All metrics of a language model, and the items they are made of.

    `reward` is the ladder's reward model and `reference` its sft policy, where they are known yet.
    """
    was_training = policy.training
    policy.eval()
    items: list[Item] = []
    if not isinstance(heldout.corpus, str):
        items += corpus_items(policy, tokenizer, heldout.corpus)
    if not isinstance(heldout.chats, str):
        items += chat_items(policy, tokenizer, heldout, config)
    if not isinstance(heldout.problems, str):
        items += problem_items(policy, tokenizer, heldout.problems, config)
    metrics = policy_metrics(items, heldout, config.seed)
    metrics |= model_based_metrics(items, tokenizer, config.seed, reward, reference)
    policy.train(was_training)
    return metrics, items


def policy_metrics(items: list[Item], heldout: HeldOut, seed: int) -> dict[str, Metric]:
    """The metrics that need no other model, from the items."""
    corpus, chats, problems = (
        [item for item in items if item["set"] == name] for name in ("corpus", "chat", "reasoning")
    )
    metrics: dict[str, Metric] = {}
    if corpus:
        bits, chars = [i["bits"] for i in corpus], [i["chars"] for i in corpus]
        metrics["bits_per_char"] = bootstrap_ratio(bits, chars, seed)
    else:
        metrics["bits_per_char"] = missing(str(heldout.corpus))
    answers = chats + problems
    if answers:
        metrics["well_formed"] = wilson(sum(i["well_formed"] for i in answers), len(answers))
    else:
        metrics["well_formed"] = missing(str(heldout.chats))
    if problems:
        metrics["reasoning_accuracy"] = wilson(sum(i["correct"] for i in problems), len(problems))
        for task in sorted({i["task"] for i in problems}):
            of_task = [i["correct"] for i in problems if i["task"] == task]
            metrics[f"reasoning_accuracy/{task}"] = wilson(sum(of_task), len(of_task))
    else:
        metrics["reasoning_accuracy"] = missing(str(heldout.problems))
    if chats and heldout.has_true_score:
        scores = [i["preference_score"] for i in chats]
        metrics["preference_score"] = bootstrap_mean(scores, seed)
    else:
        why = str(heldout.chats) if not chats else "the true score is known for data=embedded only"
        metrics["preference_score"] = missing(why)
    if chats:
        metrics["answer_tokens"] = bootstrap_mean([len(i["ids"]) for i in chats], seed)
    else:
        metrics["answer_tokens"] = missing(str(heldout.chats))
    return metrics


def model_based_metrics(
    items: list[Item],
    tokenizer: Tokenizer,
    seed: int,
    reward: ScalarModel | None,
    reference: Transformer | None,
) -> dict[str, Metric]:
    """The metrics of stored chat answers that need the reward model or the sft policy."""
    chats = [item for item in items if item["set"] == "chat"]
    metrics = {
        "reward_model_score": missing("no reward model on this ladder yet"),
        "kl_to_sft": missing("no sft policy on this ladder yet"),
    }
    if not chats:
        return {name: missing("the data has no chat prompts") for name in metrics}
    if reward is not None:
        scores = [
            score
            for part in _rollouts(chats, tokenizer)
            for score in _no_grad(final_scores, reward, part).tolist()
        ]
        metrics["reward_model_score"] = bootstrap_mean(scores, seed)
    if reference is not None:
        kls = []
        for part in _rollouts(chats, tokenizer):
            logp_BA = _no_grad(score_tokens, reference, part).logprobs
            kls += (part.logprobs.sum(1) - (logp_BA * part.mask).sum(1)).tolist()
        metrics["kl_to_sft"] = bootstrap_mean(kls, seed)
    return metrics


@torch.no_grad()
def _no_grad(function: Any, network: Any, rollout: Rollout) -> Any:
    network.eval()
    return function(network, rollout.to(next(network.parameters()).device))


def _rollouts(chats: list[Item], tokenizer: Tokenizer) -> list[Rollout]:
    """The stored answers as rollouts; the stored sum of log-probabilities is put on one token."""
    parts = []
    for at in range(0, len(chats), BATCH):
        rows = chats[at : at + BATCH]
        logprobs = [[row["logprob"]] + [0.0] * (len(row["ids"]) - 1) for row in rows]
        prompts, answers = [r["prompt_ids"] for r in rows], [r["ids"] for r in rows]
        stopped = [r["stopped"] for r in rows]
        parts.append(pack(prompts, answers, logprobs, stopped, tokenizer.pad_id))
    return parts


@torch.no_grad()
def corpus_items(policy: Transformer, tokenizer: Tokenizer, documents: list[str]) -> list[Item]:
    """Bits of each block of the held-out text; every character is predicted once."""
    device = next(policy.parameters()).device
    size = min(256, policy.config.max_seq_len)
    ids = torch.tensor(
        [t for text in documents for t in (tokenizer.bos_id, *tokenizer.encode(text))]
    )
    blocks = list(ids[1:].split(size))  # the first <bos> is given
    items = []
    for at in range(0, len(blocks), 16):
        targets = blocks[at : at + 16]
        padded = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-1)
        first = torch.stack([ids[(at + i) * size] for i in range(len(targets))])
        inputs = torch.cat([first[:, None], padded[:, :-1].clamp(min=0)], 1).to(device)
        valid = (padded >= 0).to(device)
        logits_BTV = policy.logits(policy(inputs, valid_BT=valid).hidden_BTD)
        logp_BT = token_logprobs(logits_BTV, padded.clamp(min=0).to(device)) * valid
        bits = (-logp_BT.sum(1) / math.log(2)).tolist()
        for i, target in enumerate(targets):
            chars = int((target != tokenizer.bos_id).sum())
            items.append({"set": "corpus", "id": at + i, "bits": round(bits[i], 4), "chars": chars})
    return items


def chat_items(
    policy: Transformer, tokenizer: Tokenizer, heldout: HeldOut, config: EvaluationConfig
) -> list[Item]:
    """Answers to held-out chat prompts, sampled at temperature 1 as the policy would in RL."""
    records = heldout.chats[: config.max_prompts]
    room = policy.config.max_seq_len - config.max_new_tokens
    prompts = [fitted_prompt(tokenizer, r.prompt_messages, room) for r in records]
    items = []
    for at in range(0, len(prompts), BATCH):
        rollout = sample(
            policy,
            prompts[at : at + BATCH],
            tokenizer,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed * 1_000_003 + at,
        )
        for row, record in enumerate(records[at : at + BATCH]):
            length, stopped = int(rollout.length[row]), bool(rollout.stopped[row])
            ids = rollout.answer_ids[row, :length].tolist()
            text = tokenizer.decode(ids)
            items.append(
                {
                    "set": "chat",
                    "id": record.id,
                    "prompt": record.prompt_messages[-1]["content"],
                    "answer": text,
                    "stopped": stopped,
                    "well_formed": well_formed(text, stopped, is_problem=False),
                    "preference_score": round(true_score(text, stopped), 6)
                    if heldout.has_true_score
                    else None,
                    "logprob": round(float(rollout.logprobs[row].sum()), 4),
                    "prompt_ids": prompts[at + row],
                    "ids": ids,
                }
            )
    return items


def problem_items(
    policy: Transformer,
    tokenizer: Tokenizer,
    problems: Sequence[Verifiable],
    config: EvaluationConfig,
) -> list[Item]:
    """Greedy answers to held-out problems, judged by the task's own verifier."""
    problems = problems[: config.max_problems]
    room = policy.config.max_seq_len - config.max_new_tokens
    items = []
    for at in range(0, len(problems), BATCH):
        some: Any = problems[at : at + BATCH]
        answers = generate(
            policy,
            [fitted_prompt(tokenizer, p.prompt_messages, room) for p in some],
            max_new_tokens=config.max_new_tokens,
            stop_id=tokenizer.eot_id,
            pad_id=tokenizer.pad_id,
            temperature=0.0,
        )
        for problem, ids, stopped in zip(some, answers.answer_ids, answers.stopped, strict=True):
            text = tokenizer.decode(ids)
            items.append(
                {
                    "set": "reasoning",
                    "id": problem.id,
                    "task": problem.task,
                    "prompt": problem.question,
                    "answer": text,
                    "stopped": stopped,
                    "well_formed": well_formed(text, stopped, is_problem=True),
                    "correct": stopped and verify(problem, text) == 1.0,
                }
            )
    return items


@torch.no_grad()
def evaluate_reward_model(
    reward: ScalarModel, batches: Sequence[PairBatch], config: EvaluationConfig
) -> tuple[dict[str, Metric], list[Item]]:
    """Accuracy of a reward model on held-out pairs: strictly higher for the chosen answer."""
    reward.eval()
    items: list[Item] = []
    for batch in batches:
        scores = [
            _score_rows(reward, ids, length)
            for ids, length in (
                (batch.chosen_ids, batch.chosen_len),
                (batch.rejected_ids, batch.rejected_len),
            )
        ]
        for chosen, rejected in zip(*scores, strict=True):
            item = {"set": "pairs", "id": len(items), "chosen": chosen, "rejected": rejected}
            items.append(item)
    items = items[: config.max_pairs]
    if not items:
        return {"pair_accuracy": missing("no held-out pairs")}, items
    right = sum(item["chosen"] > item["rejected"] for item in items)
    margins = [item["chosen"] - item["rejected"] for item in items]
    return {
        "pair_accuracy": wilson(right, len(items)),
        "pair_margin": bootstrap_mean(margins, config.seed),
    }, items


def _score_rows(reward: ScalarModel, ids_BT: Tensor, length_B: Tensor) -> list[float]:
    device = next(reward.parameters()).device
    ids_BT, length_B = ids_BT.to(device), length_B.to(device)
    valid_BT = torch.arange(ids_BT.shape[1], device=device) < length_B[:, None]
    scores_BT = reward(ids_BT, valid_BT=valid_BT).float()
    return scores_BT.gather(1, length_B[:, None] - 1).squeeze(1).tolist()


# --- files


def write_evaluation(
    folder: Path, metrics: dict[str, Metric], items: list[Item], seed: int, suffix: str = ""
) -> None:
    """eval<suffix>.json and eval_items<suffix>.jsonl in a run's folder, atomically."""
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    write_atomic(folder / f"eval_items{suffix}.jsonl", lines)
    summary = {"suite": SUITE, "seed": seed, "metrics": metrics}
    write_atomic(folder / f"eval{suffix}.json", json.dumps(summary, indent=1) + "\n")


def read_items(folder: Path, suffix: str = "") -> list[Item]:
    """The items of an earlier evaluation; [] where there is none."""
    path = folder / f"eval_items{suffix}.jsonl"
    return read_jsonl(path) if path.exists() else []


def evaluate_ancestors(
    rows: dict[str, tuple[Path, str]],
    tokenizer: Tokenizer,
    seed: int,
    reward: ScalarModel | None = None,
    reference: Transformer | None = None,
) -> dict[str, dict[str, Metric]]:
    """What a new model says of the stored answers of earlier rows, {row: (folder, suffix)}."""
    found = {}
    for row, (folder, suffix) in rows.items():
        items = read_items(folder, suffix)
        if items:
            metrics = model_based_metrics(items, tokenizer, seed, reward, reference)
            found[row] = {name: m for name, m in metrics.items() if m["value"] is not None}
    return found


def main(arguments: list[str]) -> None:
    from fourstage.run_evaluation import evaluate_again
    from fourstage.runs import RunStore

    values = dict(argument.partition("=")[::2] for argument in arguments)
    if set(values) - {"run", "outputs"} or "run" not in values:
        raise UserError("usage: python -m fourstage.evaluation run=NAME [outputs=outputs]")
    store = RunStore(Path(values.get("outputs", "outputs")))
    folder = store.find(values["run"])
    evaluate_again(folder, store.ancestors(folder), store.outputs)
    print(f"evaluated {folder.name}: {folder / 'eval.json'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
