"""Trains one stage of a plan: networks and data in, a finished run folder out.

Lineage decides which stages, in which order and where; here one of them is trained with Lightning,
its weights are saved, and it is evaluated together with what it makes measurable in earlier rows.
"""

from __future__ import annotations

import gc
import logging
import shlex
import warnings
from dataclasses import asdict
from typing import Any

import lightning as L
import torch

from fourstage import data
from fourstage.errors import UserError
from fourstage.evaluation.run import evaluate_random, evaluate_run
from fourstage.interruptions import FREE_SETTINGS, advice, explained, held_back
from fourstage.job import StageJob
from fourstage.ladder import LADDER
from fourstage.lineage.resume import Checkpointer, ResumeIO, began_with, kind_of
from fourstage.model import Transformer
from fourstage.model.weights import save_weights
from fourstage.parallel import strategies
from fourstage.rl.rollout import fitted_prompt
from fourstage.sampling.generate import Sampling, generate
from fourstage.stages.prepare import Prepared, rank, say, world_size
from fourstage.tokenizer import Tokenizer
from fourstage.tracking.callbacks import (
    PlanProgress,
    RouterHealth,
    Sample,
    SampleLog,
    StepAxis,
    StepSeed,
    steps_done,
    telling,
)
from fourstage.tracking.cost import CostMeter, peak_flops
from fourstage.tracking.loggers import build_loggers, finish_wandb


def train_stage(job: StageJob) -> dict[str, Any]:
    """Train, save and evaluate one stage in `job.folder`; returns its cost.

    Resumes from the job's checkpoint where `job.resume` says so. Raises UserError, one line that
    names the run and the step, for whatever ends it that is no bug.
    """
    meter = CostMeter()
    trainer = None
    settings = asdict(job.settings)
    sees_pieces = job.settings.pieces(job.model, world_size(job)) is not None
    free = () if sees_pieces else FREE_SETTINGS
    steps = lambda: steps_done(trainer) if trainer else 0  # noqa: E731
    with explained(job.name, job.stage, settings, steps, free):
        torch.set_flush_denormal(True)  # denormal floats make a CPU step 4 to 10 times slower
        torch.manual_seed(job.seed)
        with held_back():
            gc.collect()  # an earlier stage's networks, which hang in cycles
        quieten()
        prepared = LADDER[job.stage].code.prepare(job)
        for transformer in prepared.module.transformers():
            transformer.checkpoint_activations = job.trainer.checkpoint_activations
            transformer.records_steps = job.trainer.compile
            if job.trainer.compile:
                # a CPU takes 10 to 20 s for each compilation, and is no slower with one for all
                transformer.compile_blocks(dynamic=job.trainer.accelerator == "cpu" or None)
        if is_first_look(job):
            with meter.evaluating():
                evaluate_random(job, prepared.result, prepared.tokenizer, telling)
        notes = {**data.left_out(job.data, job.stage), **prepared.loaders.notes}
        notes = {name: n for name, n in notes.items() if not name.startswith(data.NOT_READ)}
        words = (f"{name.replace('_', ' ')} {count:,}" for name, count in notes.items())
        say("  data: " + ", ".join(words))
        cost = None  # where the stage fails
        try:
            trainer = build_trainer(job, prepared, meter)
            meter.peak = device_peak(trainer.strategy.root_device, job.trainer.precision)
            fit(trainer, job, prepared)
            with meter.evaluating():
                finish(job, prepared, trainer)
            cost = meter.cost(prepared.module.steps_done, trainer.world_size)
            cost |= {f"data_{name}": count for name, count in notes.items()}
            cost["skipped_steps"] = prepared.module.skipped_steps
        finally:
            finish_wandb(job, cost)
    return cost


def is_first_look(job: StageJob) -> bool:
    """Whether this process measures random weights: the first one of pre-training, before the
    processes meet. (The others would do the same on the same GPU.)"""
    has_none = not (job.folder / "eval_random.json").exists()
    return not LADDER[job.stage].parents and rank() == 0 and has_none


def device_peak(device: torch.device, precision: str) -> float | None:
    """FLOP/s that the device can do at best, where they are known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    torch.cuda.reset_peak_memory_stats(device)  # those of an earlier stage of this command
    return peak_flops(name, precision)


def quieten() -> None:
    """No advertisements, and no warnings about what is meant to be so."""
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    for message in (
        ".*isinstance.treespec, LeafSpec.*",
        "Your `IterableDataset` has `__len__` defined",
        "You defined a `validation_step` but have no `val_dataloader`",
        "The '.*_dataloader' does not have many workers",
        "It is recommended to use `self.log.*sync_dist=True",  # these are synchronised already
        ".*all_gather_into_tensor. is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)


def fit(trainer: L.Trainer, job: StageJob, prepared: Prepared) -> None:
    """Train to the end of the budget, and validate the final weights."""
    module, loaders = prepared.module, prepared.loaders
    checkpoint = str(job.checkpoint) if job.resume else None
    if checkpoint:
        check_resumable(job)
    during = loaders.val if job.settings.val_every else None
    try:
        trainer.fit(module, loaders.train, during, ckpt_path=checkpoint, weights_only=True)
    except Exception as error:
        started = trainer.checkpoint_callback.saved_at is not None
        known = isinstance(error, UserError) or advice(error, "", asdict(job.settings))
        if checkpoint is None or started or known:
            raise
        raise UserError(
            f"{checkpoint}: broken, or not of this run and version: remove it to train the "
            f"stage from its start: rm -r {shlex.quote(checkpoint)}"
        ) from error
    if loaders.val is not None and module.validated_at != module.steps_done:
        trainer.validate(module, loaders.val, verbose=False)


def check_resumable(job: StageJob) -> None:
    """Raise UserError where a trainer that this one cannot take over from wrote the state."""
    began, goes_on = began_with(job.checkpoint), kind_of(job.trainer.strategy, world_size(job))
    if began not in (None, goes_on):
        raise UserError(
            f"begun with {began}, from which {goes_on} cannot go on: take the former, or train it "
            f"from its start: rm -r {shlex.quote(str(job.folder))}"
        )


def build_trainer(job: StageJob, prepared: Prepared, meter: CostMeter) -> L.Trainer:
    """Lightning's Trainer for one pass over a loader that is as long as the budget."""
    settings = job.settings
    callbacks = [
        StepSeed(job.seed, job.stage),
        meter,
        StepAxis(),
        RouterHealth(prepared.heldout_rows, settings.log_every),
        PlanProgress(job.stage, job.plan_left),
        Checkpointer(job.checkpoint, settings.checkpoint_every),
    ]
    if isinstance(prepared.result, Transformer):

        def answers() -> list[Sample]:
            with strategies.whole(prepared.result) as policy:
                return fixed_answers(job, policy, prepared.tokenizer)

        samples = SampleLog(
            job.folder / "samples.jsonl",
            answers,
            every=settings.sample_every,
            at_start=not LADDER[job.stage].parents,
        )
        callbacks.append(samples)
    options = strategies.trainer_options(job.trainer, settings.clip_norm)
    if job.trainer.strategy not in strategies.ZERO:  # DeepSpeed writes its own
        options["plugins"] = [ResumeIO()]
    return L.Trainer(
        **options,
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
    prepared.module.check_trained()
    result = prepared.result
    with strategies.others_wait():
        if trainer.is_global_zero:
            save_weights(job.folder, result, prepared.tokenizer)
            result.to(trainer.strategy.root_device)
            evaluate_run(job, result, prepared.tokenizer, telling)


def fixed_answers(job: StageJob, policy: Transformer, tokenizer: Tokenizer) -> list[Sample]:
    """Greedy answers to the prompts that every stage is asked, "What is an LLM?" first."""
    prompts = data.sample_prompts(job.data)
    room = policy.config.max_seq_len - job.evaluation.max_new_tokens
    ids = [fitted_prompt(tokenizer, prompt["messages"], room) for prompt in prompts]
    new = job.evaluation.max_new_tokens
    sampling = Sampling(max_new_tokens=new, stop_id=tokenizer.eot_id, temperature=0.0)
    answers = generate(policy, ids, sampling)
    return [
        Sample(prompt["id"], prompt["messages"][-1]["content"], tokenizer.decode(ids), stopped)
        for prompt, ids, stopped in zip(prompts, answers.answer_ids, answers.stopped, strict=True)
    ]
