"""Evaluates a run of a ladder: on which held-out sets, and with which models of its ancestors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fourstage import data, evaluation
from fourstage.checkpoint import load_policy, load_scalar
from fourstage.data.datamodule import reward_data
from fourstage.errors import UserError
from fourstage.job import LoggerConfig, StageJob, TrainerConfig, read_record, write_atomic
from fourstage.model import ModelConfig, ScalarModel, Transformer
from fourstage.prepare import has_true_score, stored_pairs
from fourstage.settings import build
from fourstage.stages import SETTINGS
from fourstage.tokenizer import Tokenizer, TokenizerConfig


def heldout_sets(config: data.DataConfig) -> evaluation.HeldOut:
    """The held-out side of every source; a source that is not there says why."""

    def side(load: Callable[[data.DataConfig], Any]) -> Any:
        try:
            return load(config).heldout
        except UserError as error:
            return str(error)

    return evaluation.HeldOut(
        corpus=side(data.load_corpus),
        chats=side(chat_prompts),
        problems=side(data.load_reasoning),
        has_true_score=has_true_score(config),
    )


def chat_prompts(config: data.DataConfig) -> data.Chats:
    """The chat prompts of the evaluation: those of the conversations, else those of the pairs."""
    try:
        return data.load_chat(config).prompts_only()
    except UserError:
        return data.load_prompts(config)


def evaluate_random(job: StageJob, policy: Transformer, tokenizer: Tokenizer) -> None:
    """The row of random weights, measured before the first step of pre-training."""
    print("  random weights: evaluating")
    metrics, items = evaluation.evaluate_policy(
        policy, tokenizer, heldout_sets(job.data), job.evaluation
    )
    evaluation.write_evaluation(job.folder, metrics, items, job.evaluation.seed, "_random")


def evaluate_run(job: StageJob, result: nn.Module, tokenizer: Tokenizer) -> None:
    """eval.json and eval_items.jsonl of the run, from it and its ancestors only; and, where the
    run makes earlier rows measurable, ladder_eval.json."""
    if isinstance(result, ScalarModel):
        pairs = data.load_preference(job.data) or stored_pairs(job.folder)
        batches = reward_data(
            pairs.heldout[: job.evaluation.max_pairs],
            pairs.heldout[: job.evaluation.max_pairs],
            tokenizer,
            max_tokens=job.settings.max_tokens,
            batch_size=evaluation.BATCH,
            n_batches=1,
            seed=0,
        ).val
        metrics, items = evaluation.evaluate_reward_model(result, list(batches), job.evaluation)
    else:
        assert isinstance(result, Transformer)
        metrics, items = evaluation.evaluate_policy(
            result, tokenizer, heldout_sets(job.data), job.evaluation, **known_models(job, result)
        )
    evaluation.write_evaluation(job.folder, metrics, items, job.evaluation.seed)
    if job.stage in ("sft", "reward"):
        earlier = earlier_rows(job)
        judge = {"reference" if job.stage == "sft" else "reward": result}
        found = evaluation.evaluate_ancestors(earlier, tokenizer, job.evaluation.seed, **judge)
        write_atomic(job.folder / "ladder_eval.json", json.dumps(found, indent=1) + "\n")


def evaluate_again(folder: Path, ancestors: dict[str, Path], outputs: Path) -> None:
    """Evaluate a finished run with the config in its record: eval.json gets the same bytes."""
    record = read_record(folder)
    config, stage = record["config"], record["stage"]
    job = StageJob(
        stage=stage,
        run_id=record["id"],
        folder=folder,
        outputs=outputs,
        settings=build(SETTINGS[stage], config["stages"][stage], f"stages.{stage}"),
        model=build(ModelConfig, config["model"], "model"),
        tokenizer=build(TokenizerConfig, config["tokenizer"], "tokenizer"),
        data=build(data.DataConfig, config["data"], "data"),
        trainer=build(TrainerConfig, config["trainer"], "trainer").resolved(),
        logger=LoggerConfig(name="none"),
        evaluation=build(evaluation.EvaluationConfig, config["evaluation"], "evaluation"),
        seed=record["config"]["seed"],
        ancestors=ancestors,
        group=record["group"],
    )
    if stage == "pretrain":
        torch.manual_seed(job.seed)
        tokenizer = Tokenizer.from_config(job.tokenizer)
        evaluate_random(job, Transformer(job.model, tokenizer.vocab_size), tokenizer)
    network, tokenizer = (load_scalar if stage == "reward" else load_policy)(folder)
    evaluate_run(job, network, tokenizer)


def known_models(job: StageJob, policy: Transformer) -> dict[str, Any]:
    """The reward model and the sft policy of this ladder, as far as it has come."""
    device = next(policy.parameters()).device
    known: dict[str, Any] = {}
    if "reward" in job.ancestors:
        known["reward"] = load_scalar(job.ancestors["reward"])[0].to(device)
    if job.stage == "sft":
        known["reference"] = policy
    elif "sft" in job.ancestors:
        known["reference"] = load_policy(job.ancestors["sft"])[0].to(device)
    return known


def earlier_rows(job: StageJob) -> dict[str, tuple[Path, str]]:
    """The rows below this run: "random" and the ancestors' ids, with their folder and suffix."""
    rows = {}
    if "pretrain" in job.ancestors:
        rows["random"] = (job.ancestors["pretrain"], "_random")
    for folder in job.ancestors.values():
        rows[folder.name.split("-", 1)[1]] = (folder, "")
    return rows
