"""Trains one stage of a plan: networks and data in, a finished run folder out.

Lineage decides which stages, in which order and where; here one of them is trained with Lightning,
its weights are saved, and it is evaluated together with what it makes measurable in earlier rows.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from fourstage import data, evaluation
from fourstage.callbacks import (
    Checkpointer,
    PlanProgress,
    Sample,
    SampleLog,
    StepAxis,
    StepSeed,
    ThroughputLog,
)
from fourstage.checkpoint import load_policy, load_scalar, save_weights
from fourstage.data.datamodule import (
    LoaderPair,
    pretrain_data,
    prompt_data,
    reward_data,
    sft_data,
)
from fourstage.errors import UserError
from fourstage.generate import generate
from fourstage.job import (
    LoggerConfig,
    StageJob,
    TrainerConfig,
    read_jsonl,
    read_record,
    write_atomic,
)
from fourstage.loggers import build_loggers, finish_wandb
from fourstage.model import ModelConfig, ScalarModel, Transformer
from fourstage.rl.rewards import true_score
from fourstage.rl.rollout import fitted_prompt
from fourstage.settings import build
from fourstage.stages import (
    SETTINGS,
    GRPOModule,
    PPOModule,
    PretrainModule,
    RewardModule,
    SFTModule,
    StageModule,
)
from fourstage.stages.on_policy import check_rollout_fits
from fourstage.stages.reward import sample_pairs
from fourstage.tokenizer import Tokenizer, TokenizerConfig

ENDLESS = 10**9  # batches of a run whose budget is a time
PAIR_FILES = ("pairs.jsonl", "pairs_heldout.jsonl")  # train and held-out side


@dataclass
class Prepared:
    """A stage ready to train: what is trained, on what, and which network is the result."""

    module: StageModule
    loaders: LoaderPair
    result: Transformer | ScalarModel
    tokenizer: Tokenizer


def train_stage(job: StageJob) -> dict[str, Any]:
    """Train, save and evaluate one stage in `job.folder`; returns its cost.

    Resumes from the job's checkpoint where `job.resume` says so.
    """
    started = time.monotonic()
    torch.set_flush_denormal(True)  # denormal floats make a CPU step 4 to 10 times slower
    torch.manual_seed(job.seed)
    quieten()
    prepared = PREPARE[job.stage](job)
    notes = prepared.loaders.notes
    print("  data: " + ", ".join(f"{n.replace('_', ' ')} {count:,}" for n, count in notes.items()))
    try:
        trainer = build_trainer(job, prepared)
        train_started = time.monotonic()
        fit(trainer, job, prepared)
        train_seconds = time.monotonic() - train_started
        finish(job, prepared, trainer)
    finally:
        finish_wandb(job)
    return {
        "seconds": round(time.monotonic() - started, 1),
        "train_seconds": round(train_seconds, 1),
        "steps": prepared.module.steps_done,
        "tokens": prepared.module.tokens_seen,
        "peak_memory_mib": peak_memory_mib(),
        **{f"data_{name}": count for name, count in notes.items()},
    }


def quieten() -> None:
    """No advertisements, and no warnings about what is meant to be so."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*isinstance.treespec, LeafSpec.*",
        "Your `IterableDataset` has `__len__` defined",
        "You defined a `validation_step` but have no `val_dataloader`",
        "The '.*_dataloader' does not have many workers",
    ):
        warnings.filterwarnings("ignore", message=message)


def fit(trainer: L.Trainer, job: StageJob, prepared: Prepared) -> None:
    """Train to the end of the budget, and validate the final weights."""
    module, loaders = prepared.module, prepared.loaders
    module.trainer = trainer  # with max_steps=0 nothing else would attach it
    if job.settings.max_steps != 0 or job.settings.max_time:
        checkpoint = str(job.checkpoint) if job.resume else None
        during = loaders.val if job.settings.val_every else None
        trainer.fit(module, loaders.train, during, ckpt_path=checkpoint, weights_only=True)
    if loaders.val is not None and module.validated_at != module.steps_done:
        trainer.validate(module, loaders.val, verbose=False)


def build_trainer(job: StageJob, prepared: Prepared) -> L.Trainer:
    """Lightning's Trainer for one pass over a loader that is as long as the budget."""
    settings, where = job.settings, job.trainer
    callbacks = [
        StepSeed(job.seed, job.stage),
        ThroughputLog(),
        StepAxis(),
        PlanProgress(job.stage, job.plan_left),
        Checkpointer(job.checkpoint, settings.checkpoint_every),
    ]
    if isinstance(prepared.result, Transformer):
        samples = SampleLog(
            job.folder / "samples.jsonl",
            lambda: fixed_answers(job, prepared.result, prepared.tokenizer),
            every=settings.sample_every,
            at_start=job.stage == "pretrain",
        )
        callbacks.append(samples)
    return L.Trainer(
        accelerator=where.accelerator,
        devices=where.devices,
        num_nodes=where.num_nodes,
        strategy=where.strategy,
        precision=where.precision,
        max_epochs=1,
        max_time=settings.max_time,
        val_check_interval=settings.val_every or None,
        check_val_every_n_epoch=None if settings.val_every else 1,
        log_every_n_steps=settings.log_every,
        logger=build_loggers(job),
        callbacks=callbacks,
        default_root_dir=str(job.folder),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def finish(job: StageJob, prepared: Prepared, trainer: L.Trainer) -> None:
    """Plain weights and evaluation: what stays of a stage."""
    result = prepared.result
    kind = "scalar" if isinstance(result, ScalarModel) else "policy"
    if trainer.is_global_zero:
        save_weights(job.folder, result.state_dict(), job.model, prepared.tokenizer, kind)
        evaluate_run(job, result.to(trainer.strategy.root_device), prepared.tokenizer)
    trainer.strategy.barrier()


def fixed_answers(job: StageJob, policy: Transformer, tokenizer: Tokenizer) -> list[Sample]:
    """Greedy answers to the prompts that every stage is asked, "What is an LLM?" first."""
    prompts = data.sample_prompts(job.data)
    room = job.model.max_seq_len - job.evaluation.max_new_tokens
    answers = generate(
        policy,
        [fitted_prompt(tokenizer, prompt["messages"], room) for prompt in prompts],
        max_new_tokens=job.evaluation.max_new_tokens,
        stop_id=tokenizer.eot_id,
        pad_id=tokenizer.pad_id,
        temperature=0.0,
    )
    return [
        Sample(prompt["id"], prompt["messages"][-1]["content"], tokenizer.decode(ids), stopped)
        for prompt, ids, stopped in zip(prompts, answers.answer_ids, answers.stopped, strict=True)
    ]


def peak_memory_mib() -> int:
    """The most memory this process held so far (bytes on macOS, KiB elsewhere)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


# --- what each stage needs


def _steps(job: StageJob) -> int:
    return ENDLESS if job.settings.max_time else job.settings.max_steps


def _loader_options(job: StageJob) -> dict[str, Any]:
    """Each rank makes its own rows of the global batch."""
    world = world_size(job)
    if job.settings.batch_size % world:
        raise UserError(
            f"stages.{job.stage}.batch_size: {job.settings.batch_size} rows cannot be shared "
            f"evenly by {world} processes"
        )
    return {
        "batch_size": job.settings.batch_size // world,
        "n_batches": _steps(job),
        "seed": job.seed,
        "rank": rank(),
        "world": world,
    }


def rank() -> int:
    """This process' rank; 0 before the processes have met."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) or 0


def world_size(job: StageJob) -> int:
    """Processes of this job, over all nodes."""
    devices = job.trainer.devices
    if devices == -1:
        devices = torch.cuda.device_count() if job.trainer.accelerator == "gpu" else 1
    return devices * job.trainer.num_nodes


def check_context(job: StageJob, tokens: int, key: str) -> None:
    """Raise UserError where rows are longer than the model's context."""
    if tokens > job.model.max_seq_len:
        raise UserError(
            f"stages.{job.stage}.{key}: {tokens} is more than the model's context of "
            f"{job.model.max_seq_len} tokens"
        )


def parent_policy(job: StageJob) -> tuple[Transformer, Tokenizer]:
    policy, tokenizer = load_policy(job.parents["policy"])
    policy.train()
    return policy, tokenizer


def prepare_pretrain(job: StageJob) -> Prepared:
    check_context(job, job.settings.block_size, "block_size")
    tokenizer = Tokenizer.from_config(job.tokenizer)
    policy = Transformer(job.model, tokenizer.vocab_size)
    if not (job.folder / "eval_random.json").exists():
        evaluate_random(job, policy, tokenizer)
    corpus = data.load_corpus(job.data)
    loaders = pretrain_data(
        corpus, tokenizer, block_size=job.settings.block_size, **_loader_options(job)
    )
    chars = sum(map(len, corpus.heldout))
    return Prepared(
        PretrainModule(policy, job.settings, job.seed, chars), loaders, policy, tokenizer
    )


def prepare_sft(job: StageJob) -> Prepared:
    check_context(job, job.settings.max_tokens, "max_tokens")
    policy, tokenizer = parent_policy(job)
    chats = data.load_chat(job.data)
    loaders = sft_data(
        chats.train,
        chats.heldout,
        tokenizer,
        max_tokens=job.settings.max_tokens,
        **_loader_options(job),
    )
    return Prepared(SFTModule(policy, job.settings, job.seed), loaders, policy, tokenizer)


def prepare_reward(job: StageJob) -> Prepared:
    check_context(job, job.settings.max_tokens, "max_tokens")
    policy, tokenizer = parent_policy(job)
    pairs = data.load_preference(job.data) or sampled_pairs(job, policy, tokenizer)
    loaders = reward_data(
        pairs.train,
        pairs.heldout,
        tokenizer,
        max_tokens=job.settings.max_tokens,
        **_loader_options(job),
    )
    reward = ScalarModel(policy)
    return Prepared(RewardModule(reward, job.settings, job.seed), loaders, reward, tokenizer)


def sampled_pairs(job: StageJob, policy: Transformer, tokenizer: Tokenizer) -> data.Pairs:
    """The pairs of data=embedded: two answers of the sft policy, one preferred by the hidden rule.

    Sampled once and kept as pairs.jsonl and pairs_heldout.jsonl, which a resumed run reads.
    """
    prompts = data.load_prompts(job.data)
    for draw, (name, records) in enumerate(
        zip(PAIR_FILES, (prompts.train, prompts.heldout), strict=True)
    ):
        path = job.folder / name
        if path.exists():
            continue
        print(f"  sampling two answers to each of {len(records):,} prompts for {name}")
        room = job.settings.max_tokens - job.settings.max_new_tokens
        ids = [fitted_prompt(tokenizer, record.prompt_messages, room) for record in records]
        seed = 2 * job.seed + draw
        rows, skipped = sample_pairs(policy, tokenizer, ids, true_score, job.settings, seed)
        print(f"  {len(rows):,} pairs; skipped because both answers are as good: {skipped:,}")
        write_jsonl(path, ({**r, "prompt": records[r["prompt"]].prompt_messages} for r in rows))
    return stored_pairs(job.folder)


def stored_pairs(folder: Path) -> data.Pairs:
    """The pairs that a reward run sampled."""
    sides = []
    for name in PAIR_FILES:
        rows = read_jsonl(folder / name)
        sides.append([data.Pair(r["prompt"], r["chosen"], r["rejected"]) for r in rows])
    return data.Pairs(*sides, digest="", notes={})


def prepare_ppo(job: StageJob) -> Prepared:
    check_rollout_fits(job.settings, job.model.max_seq_len)
    policy, tokenizer = parent_policy(job)
    reward, _ = load_scalar(job.parents["reward"])
    module = PPOModule(
        policy,
        value=deepcopy(reward).train(),
        reference=deepcopy(policy),
        reward=reward,
        tokenizer=tokenizer,
        settings=job.settings,
        seed=job.seed,
        judge=true_score if has_true_score(job.data) else None,
    )
    prompts = data.load_prompts(job.data).train
    return Prepared(module, prompt_loaders(job, prompts, tokenizer), policy, tokenizer)


def prepare_grpo(job: StageJob) -> Prepared:
    check_rollout_fits(job.settings, job.model.max_seq_len)
    policy, tokenizer = parent_policy(job)
    problems = data.load_reasoning(job.data)
    module = GRPOModule(policy, deepcopy(policy), tokenizer, job.settings, job.seed)
    return Prepared(module, prompt_loaders(job, problems.train, tokenizer), policy, tokenizer)


def prompt_loaders(job: StageJob, records: Sequence[Any], tokenizer: Tokenizer) -> LoaderPair:
    return prompt_data(
        records,
        tokenizer,
        max_prompt_tokens=job.settings.max_prompt_tokens,
        **_loader_options(job),
    )


PREPARE: dict[str, Callable[[StageJob], Prepared]] = {
    "pretrain": prepare_pretrain,
    "sft": prepare_sft,
    "reward": prepare_reward,
    "ppo": prepare_ppo,
    "grpo": prepare_grpo,
}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, atomically."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# --- evaluation


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


def has_true_score(config: data.DataConfig) -> bool:
    """Whether preferences come from the hidden rule; a user's own pairs have no known rule."""
    return config.embedded and config.preference.path is None


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
