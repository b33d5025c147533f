"""A run's metrics, from its model and its ladder's judges, and the files that hold them.

eval.json           {"suite", "seed", "metrics"} of a run, from it and its ancestors only
eval_items.jsonl    the items that the metrics are computed from
ladder_eval.json    in sft and reward runs: the metrics that they make measurable in earlier rows,
                    {"random" or a run's id: metrics}; ladder_eval_items.jsonl has the items
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fourstage.batch import PairBatch
from fourstage.errors import UserError
from fourstage.evaluation.items import HeldOut, askable, policy_items
from fourstage.evaluation.judges import NO_REWARD, NO_SFT, Judges, judged, pair_items
from fourstage.evaluation.suite import SUITE, Item, Metric, joined, metrics
from fourstage.files import read_json, read_jsonl, write_json, write_jsonl
from fourstage.job import EvaluationConfig
from fourstage.model import ScalarModel, Transformer
from fourstage.sampling.generate import Sampler
from fourstage.tokenizer import Tokenizer

NO_TRUE_SCORE = "the true score is known for data=embedded only"
# the metrics that the sft run and the reward run add to earlier rows
BY_SFT = ("kl_to_sft", "win_rate", "win_rate_ties")
BY_REWARD = ("reward_model_score", "win_rate_learned")
FIELDS = {"win_rate": "win", "win_rate_learned": "win_learned"}  # of items; else as the metric

Table = dict[str, Metric]
Rows = dict[str, tuple[Path, str]]  # a row's folder, and the suffix of its files


def evaluate_policy(
    policy: Transformer,
    tokenizer: Tokenizer,
    heldout: HeldOut,
    config: EvaluationConfig,
    judges: Judges | None = None,
    parent: Transformer | str = "random weights have no parent",
    tell: Callable[[str], None] = lambda what: None,
    sampler: Sampler | None = None,
) -> tuple[Table, list[Item]]:
    """All metrics of a language model, and the items they are computed from.

    `judges` are the ladder's other models so far; for the sft policy the reference is the policy
    itself. `parent` is the policy that this one started from, or why there is none. `tell` is
    called with the name of each part. `sampler` answers for the policy, by default itself.
    """
    judges = judges or Judges()
    heldout = askable(heldout, tokenizer, policy.config.max_seq_len - config.max_new_tokens)
    was_training = policy.training
    policy.eval()
    both = [m.config for m in (policy, parent) if isinstance(m, Transformer)]
    if len({(config.n_layers, config.num_experts) for config in both}) > 1:
        parent = "the parent has other routers"
    start = None if isinstance(parent, str) else parent.eval()
    items = policy_items(policy, tokenizer, heldout, config, start, tell, sampler)
    tell("what other stages say of the answers")
    chats = [item for item in items if item["set"] == "chat"]
    if judges.reference is policy:
        judges = replace(judges, sft_chats=chats)
    items = joined(items, judged(chats, tokenizer, judges))
    policy.train(was_training)
    reasons = missing_reasons(heldout, judges)
    if policy.config.dense:
        reasons["router"] = "a dense model has no router"
    elif isinstance(parent, str) and "router" not in reasons:
        reasons["router_drift"] = parent
    return metrics(items, reasons, config.seed), items


def missing_reasons(heldout: HeldOut, judges: Judges) -> dict[str, str]:
    """Why keys have no items, by item set or by key."""
    corpus, chats, problems = heldout.corpus, heldout.chats, heldout.problems
    reasons: dict[str, str] = {}
    if isinstance(corpus, str):
        reasons["corpus"] = corpus
        if isinstance(chats, str):
            reasons["router"] = corpus
    if isinstance(problems, str):
        reasons |= dict.fromkeys(("reasoning", "reasoning_sampled"), problems)
    if isinstance(chats, str):
        return reasons | dict.fromkeys(("chat", "chat_greedy"), chats)
    distinct = {"distinct_1": "no answer has a word", "distinct_2": "no answer has two words"}
    return reasons | distinct | judge_reasons(heldout.has_true_score, judges)


def judge_reasons(has_true_score: bool, judges: Judges) -> dict[str, str]:
    """Why keys are null that other models or the hidden rule judge."""
    unlike = judges.sft_chats if isinstance(judges.sft_chats, str) else "no sft answers to compare"
    reasons = {"kl_to_sft": NO_SFT, "reward_model_score": NO_REWARD}
    reasons["win_rate_learned"] = NO_REWARD if judges.reward is None else unlike
    if has_true_score:
        return reasons | dict.fromkeys(("win_rate", "win_rate_ties"), unlike)
    ruled = ("true_score", "friendly", "win_rate", "win_rate_ties")
    return reasons | dict.fromkeys(ruled, NO_TRUE_SCORE)


def evaluate_reward_model(
    reward: ScalarModel, batches: Sequence[PairBatch], config: EvaluationConfig
) -> tuple[Table, list[Item]]:
    """The metrics of a reward model on held-out pairs, and their items."""
    items = pair_items(reward, batches)[: config.max_pairs]
    return metrics(items, {"pairs": "no held-out pairs"}, config.seed), items


def evaluate_ancestors(
    rows: Rows, tokenizer: Tokenizer, seed: int, judges: Judges, names: Sequence[str]
) -> tuple[dict[str, Table], list[Item]]:
    """New judges on the stored answers of earlier rows: for each the metrics `names`, and the items
    with the row's name. A row without an evaluation by this suite is left out; a line says so."""
    found: dict[str, Table] = {}
    late: list[Item] = []
    for row, (folder, suffix) in rows.items():
        items = stored_items(folder, suffix)
        if isinstance(items, str):
            print(f"  not judged: {items}")
            continue
        chats = [item for item in items if item["set"] == "chat"]
        said = judged(chats, tokenizer, judges)
        has_true_score = any(item["true_score"] is not None for item in chats)
        reasons = judge_reasons(has_true_score, judges)
        reasons = reasons if chats else {"chat": "the data has no chat prompts"}
        table = metrics(joined(chats, said), reasons, seed)
        found[row] = {name: table[name] for name in names}
        kept = {"set", "id", *(FIELDS.get(name, name) for name in names)}
        late += [{"row": row, **{k: v for k, v in item.items() if k in kept}} for item in said]
    return found, late


def write_evaluation(
    folder: Path, table: Table, items: list[Item], seed: int, suffix: str = ""
) -> None:
    """eval<suffix>.json and eval_items<suffix>.jsonl in a run's folder, atomically.

    Raises UserError, and writes nothing, if a metric that had a value would become null: what it
    was measured on (the data, an ancestor) is gone, and the old value is worth more.
    """
    path = folder / f"eval{suffix}.json"
    before = read_summary(path)["metrics"]
    for name, cell in table.items():
        if cell["value"] is None and before.get(name, cell)["value"] is not None:
            raise UserError(
                f"{path} has a value for {name}, which can no longer be measured ({cell['why']}): "
                "the file is kept; remove it to have it written anyway"
            )
    write_jsonl(folder / f"eval_items{suffix}.jsonl", items)
    write_json(path, {"suite": SUITE, "seed": seed, "metrics": table})


def read_summary(path: Path) -> dict[str, Any]:
    """An eval.json; without a suite and metrics if it is missing or broken."""
    try:
        summary = read_json(path)
        if all("value" in cell for cell in summary["metrics"].values()):
            return {"suite": None, **summary}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {"suite": None, "metrics": {}}


def stored_items(folder: Path, suffix: str = "") -> list[Item] | str:
    """The items of an earlier evaluation by this suite, or a str that says why there are none."""
    summary, path = folder / f"eval{suffix}.json", folder / f"eval_items{suffix}.jsonl"
    suite = read_summary(summary)["suite"]
    if suite is None:
        return f"{folder.name} has no {summary.name}"
    if suite != SUITE:
        return (
            f"{folder.name}/{summary.name} is of suite {suite}, not {SUITE} "
            "(to evaluate again: python -m fourstage evaluation run=NAME ladder=true)"
        )
    try:
        return read_jsonl(path)
    except (OSError, ValueError):
        return f"{folder.name}/{path.name} is missing or broken"


def stored_chats(folder: Path) -> list[Item] | str:
    """The chat items of a run, or why there are none."""
    items = stored_items(folder)
    if isinstance(items, str):
        return items
    chats = [item for item in items if item["set"] == "chat"]
    return chats or f"{folder.name}/eval_items.jsonl has no chat answers"
