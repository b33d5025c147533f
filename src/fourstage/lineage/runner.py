"""Trains one stage of a plan: from networks and data to a finished run folder.

The weights are saved and evaluated, together with earlier rows that this stage makes measurable.
"""

import gc
import logging
import shlex
import warnings
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from fourstage import data
from fourstage.data.verify import verify_all
from fourstage.errors import UserError
from fourstage.evaluation.items import contains
from fourstage.evaluation.run import evaluate_run, evaluate_start
from fourstage.files import write_jsonl
from fourstage.interruptions import Stopped, advice, explained, held_back, lost_peer
from fourstage.job import StageJob
from fourstage.ladder import LADDER
from fourstage.lineage.resume import Checkpointer, ResumeIO
from fourstage.model import Transformer
from fourstage.model.weights import save_weights
from fourstage.parallel import strategies
from fourstage.rl.rollout import fitted_prompt
from fourstage.sampling.generate import Sampling, generate
from fourstage.stages.base import steps_done
from fourstage.stages.prepare import (
    Prepared,
    check_fetched,
    device_of,
    rank,
    say,
    world_size,
)
from fourstage.tracking.callbacks import (
    PlanProgress,
    RouterHealth,
    Sample,
    SampleLog,
    StepAxis,
    StepSeed,
    telling,
)
from fourstage.tracking.cost import CostMeter, peak_flops
from fourstage.tracking.loggers import build_loggers, check_loggers
from fourstage.tracking.wandb_run import SendSaved, abandon_wandb, finish_wandb


def train_stage(job: StageJob) -> dict[str, Any]:
    """Train (or resume), save and evaluate one stage in `job.folder`; returns its cost. Raises
    UserError, one line with the run and the step, for anything that is not a bug."""
    meter = CostMeter()
    trainer = None
    sees_pieces = job.settings.pieces(job.model, world_size(job)) is not None
    steps = lambda: steps_done(trainer) if trainer else 0  # noqa: E731
    with explained(job.name, job.stage, asdict(job.settings), steps, sees_pieces):
        torch.set_flush_denormal(True)  # denormal floats make a CPU step 4 to 10 times slower
        torch.manual_seed(job.seed)
        with held_back():
            gc.collect()  # networks of an earlier stage, which are in reference cycles
        quieten()
        check_loggers(job)
        check_fetched(job)
        prepared = LADDER[job.stage].code.prepare(job)
        for transformer in prepared.module.transformers():
            transformer.checkpoint_activations = job.trainer.checkpoint_activations
            transformer.records_steps = job.trainer.compile
            if job.trainer.compile:
                # each compilation takes a CPU 10 to 20 s, and one for all shapes is as fast
                transformer.compile_blocks(dynamic=job.trainer.accelerator == "cpu" or None)
        if measures_start(job):
            with meter.evaluating():
                evaluate_start(job, prepared.result, prepared.tokenizer, telling)
        if job.settings.as_is:
            return take_over(job, prepared, meter)
        notes = {**data.left_out(job.data, job.stage), **prepared.loaders.notes}
        notes = {name: n for name, n in notes.items() if not name.startswith(data.NOT_READ)}
        words = (f"{name.replace('_', ' ')} {count:,}" for name, count in notes.items())
        say("  data: " + ", ".join(words))
        try:
            loggers = build_loggers(job)
            trainer = build_trainer(job, prepared, meter, loggers)
            meter.peak = device_peak(trainer.strategy.root_device, job.trainer.precision)
            fit(trainer, job, prepared)
            with meter.evaluating():
                finish(job, prepared, trainer)
            cost = meter.cost(steps_done(trainer), trainer.world_size)
            cost |= {f"data_{name}": count for name, count in notes.items()}
            cost["skipped_steps"] = prepared.module.skipped_steps
            finish_wandb(job, loggers, cost)
        except BaseException as error:
            abandon_wandb(error)
            raise
    return cost


def take_over(job: StageJob, prepared: Prepared, meter: CostMeter) -> dict[str, Any]:
    """A checkpoint as it is becomes a finished run, by the first process alone: no step is taken,
    so that there is nothing to share and nothing to resume."""
    if rank() != 0:
        return {}
    try:
        loggers = build_loggers(job)
        loggers[0].keep(0)  # metrics.csv without a row
        save_weights(job.folder, prepared.result, prepared.tokenizer)
        with meter.evaluating():
            prepared.result.to(device_of(job))
            answers = [{"step": 0, **asdict(sample)} for sample in fixed_answers(job, prepared)]
            write_jsonl(job.folder / "samples.jsonl", answers)
            evaluate_run(job, prepared.result, prepared.tokenizer, telling)
        cost = meter.cost(steps=0, devices=1)
        finish_wandb(job, loggers, cost)
    except BaseException as error:
        abandon_wandb(error)
        raise
    return cost


def measures_start(job: StageJob) -> bool:
    """Whether this process does, before the ranks meet: rank zero of pre-training, once."""
    has_none = not (job.folder / "eval_random.json").exists()
    return not LADDER[job.stage].parents and rank() == 0 and has_none


def device_peak(device: torch.device, precision: str) -> float | None:
    """The device's peak FLOP/s, if known."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)  # of an earlier stage of this command
    return peak_flops(torch.cuda.get_device_name(device), precision)


def quieten() -> None:
    """No advertisements, and no warnings about what is intended."""
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    for message in (
        ".*isinstance.treespec, LeafSpec.*",
        "Your `IterableDataset` has `__len__` defined",
        "You defined a `validation_step` but have no `val_dataloader`",
        "The '.*_dataloader' does not have many workers",
        "The number of training batches .* is smaller than the logging interval",
        "It is recommended to use `self.log.*sync_dist=True",  # these are already synchronised
        ".*(all_gather_into|reduce_scatter)_tensor. is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)


def fit(trainer: L.Trainer, job: StageJob, prepared: Prepared) -> None:
    """Train to the end of the budget, and validate the final weights."""
    module, loaders = prepared.module, prepared.loaders
    checkpoint = str(job.checkpoint) if job.resume else None
    during = loaders.val if job.settings.val_every else None
    try:
        trainer.fit(module, loaders.train, during, ckpt_path=checkpoint, weights_only=True)
    except Exception as error:
        asked = trainer.checkpoint_callback.signum
        if asked and lost_peer(error):  # it was asked too, and has ended before its first step
            raise Stopped(asked) from error
        started = trainer.checkpoint_callback.saved_at is not None
        known = isinstance(error, UserError) or advice(error, "", asdict(job.settings))
        if checkpoint is None or started or known:
            raise
        raise UserError(
            f"{checkpoint}: broken, or not of this run and version: remove it to train the "
            f"stage from the start: rm -r {shlex.quote(checkpoint)}"
        ) from error
    if loaders.val is not None and module.validated_at != steps_done(trainer):
        trainer.validate(module, loaders.val, verbose=False)


def build_trainer(
    job: StageJob, prepared: Prepared, meter: CostMeter, loggers: list[Logger]
) -> L.Trainer:
    """Lightning's Trainer for one pass over a loader whose length is the step budget."""
    settings = job.settings
    callbacks = [
        StepSeed(job.seed, job.stage),
        meter,
        StepAxis(),
        RouterHealth(prepared.heldout_rows, settings.log_every),
        PlanProgress(job.stage, job.plan_left),
        Checkpointer(job.checkpoint, settings.checkpoint_every, job.trainer.words),
    ]
    if isinstance(prepared.result, Transformer):
        samples = SampleLog(
            job.folder / "samples.jsonl",
            lambda: fixed_answers(job, prepared),
            every=settings.sample_every,
            at_start=not LADDER[job.stage].parents,
        )
        callbacks.append(samples)
    callbacks.append(SendSaved())
    options = strategies.trainer_options(job.trainer, settings.clip_norm)
    options["plugins"] = [*options.get("plugins", []), ResumeIO()]
    trainer = L.Trainer(
        **options,
        max_epochs=1,
        max_time=settings.max_time,
        val_check_interval=settings.val_every or None,
        check_val_every_n_epoch=None if settings.val_every else 1,
        log_every_n_steps=settings.log_every,
        logger=loggers,
        callbacks=callbacks,
        default_root_dir=str(job.folder),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    check_order(trainer.callbacks)
    return trainer


def check_order(callbacks: list[L.Callback]) -> None:
    """Assert what the callbacks rely on: CostMeter must see a step before other callbacks run the
    networks, whose FLOPs and time are not the step's; Checkpointer must save what all others have
    counted and logged in the step."""
    order = [type(callback) for callback in callbacks]
    of_networks = [order.index(kind) for kind in (RouterHealth, SampleLog) if kind in order]
    assert order.index(CostMeter) < min(of_networks), "CostMeter would count other callbacks' work"
    assert order[-1] is Checkpointer, "the resume state would lack what later callbacks do"


def finish(job: StageJob, prepared: Prepared, trainer: L.Trainer) -> None:
    """Save and evaluate the final weights."""
    prepared.module.check_trained()
    result = prepared.result
    with strategies.others_wait():
        if trainer.is_global_zero:
            save_weights(job.folder, result, prepared.tokenizer)
            result.to(trainer.strategy.root_device)
            evaluate_run(job, result, prepared.tokenizer, telling)


def fixed_answers(job: StageJob, prepared: Prepared) -> list[Sample]:
    """Greedy answers to the prompts that every stage is asked, "What is an LLM?" first."""
    tokenizer, prompts = prepared.tokenizer, data.sample_prompts(job.data)
    new = job.evaluation.max_new_tokens
    sampling = Sampling(max_new_tokens=new, stop_id=tokenizer.eot_id, temperature=0.0)
    with strategies.gathered(prepared.result) as policy:
        room = policy.config.max_seq_len - new
        ids = [fitted_prompt(tokenizer, prompt.messages, room) for prompt in prompts]
        answers = generate(policy, ids, sampling)
    return [
        judged(prompt, tokenizer.decode(ids), stopped)
        for prompt, ids, stopped in zip(prompts, answers.answer_ids, answers.stopped, strict=True)
    ]


def judged(prompt: data.SamplePrompt, answer: str, stopped: bool) -> Sample:
    """The answer, and whether it is right: the verifier gives it full marks, or it contains what a
    reference says; a truncated one is wrong, and None means that nothing says what is right."""
    right = None
    if prompt.problem is not None:
        right = stopped and verify_all([prompt.problem], [answer]) == [1.0]
    elif prompt.references:
        right = stopped and any(contains(answer, sentence) for sentence in prompt.references)
    return Sample(prompt.id, prompt.messages[-1]["content"], answer, stopped, right)
