"""Evaluates a run of a ladder: on which held-out sets, and with which models of its ancestors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fourstage import data
from fourstage.batch import PairBatch
from fourstage.data.datamodule import reward_data
from fourstage.errors import UserError
from fourstage.evaluation import tables
from fourstage.evaluation.items import HeldOut
from fourstage.evaluation.judges import NO_SFT, Judges
from fourstage.evaluation.suite import Item
from fourstage.evaluation.tables import BY_REWARD, BY_SFT
from fourstage.job import EvaluationConfig, LoggerConfig, StageJob, TrainerConfig
from fourstage.ladder import LADDER, REFERENCE, REWARD
from fourstage.model import ModelConfig, ScalarModel, Transformer
from fourstage.model.weights import load_policy, load_scalar
from fourstage.runs.records import read_record, write_record
from fourstage.settings import build
from fourstage.stages.prepare import device_of
from fourstage.stages.reward import stored_pairs
from fourstage.tokenizer import Tokenizer, TokenizerConfig

PAIRS_AT_ONCE = 128

# of a name: a context, in which what an evaluation is at can be told
Telling = Callable[[str], AbstractContextManager[Callable[[str], None]]]


def heldout_sets(config: data.DataConfig) -> HeldOut:
    """The held-out side of every source; a source that is not there says why."""

    def side(load: Callable[[data.DataConfig], Any]) -> Any:
        try:
            return load(config).heldout or "nothing is held out"
        except UserError as error:
            return str(error)

    return HeldOut(
        corpus=side(data.load_corpus),
        chats=side(chat_prompts),
        problems=side(data.load_reasoning),
        has_true_score=config.has_hidden_rule,
        references=references(config),
    )


def chat_prompts(config: data.DataConfig) -> data.Chats:
    """The chat prompts of the evaluation: those of the conversations, else those of the pairs."""
    try:
        return data.prompts_only(data.load_chat(config))
    except UserError:
        return data.load_prompts(config)


def references(config: data.DataConfig) -> dict[str, list[str]]:
    """All held-out answers to each of these prompts, by the prompt's id; of pairs the chosen."""
    try:
        said = [(c.id, c.answer) for c in data.load_chat(config).heldout if c.kind == "chat"]
    except UserError:
        try:
            pairs = data.load_preference(config)
        except UserError:
            return {}
        said = [(pair.id, pair.chosen) for pair in pairs.heldout] if pairs else []
    found: dict[str, list[str]] = {}
    for prompt, answer in said:
        found.setdefault(prompt, []).append(answer)
    return found


def random_weights(job: StageJob, tokenizer: Tokenizer) -> Transformer:
    """The weights that the ladder's pre-training starts from, again from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        return Transformer(job.model, tokenizer.vocab_size)


def evaluate_random(
    job: StageJob, policy: Transformer, tokenizer: Tokenizer, telling: Telling
) -> None:
    """The row of random weights, measured before the first step of pre-training."""
    policy.to(device_of(job))
    with telling("random weights") as tell:
        table, items = tables.evaluate_policy(
            policy, tokenizer, heldout_sets(job.data), job.evaluation, tell=tell
        )
    policy.cpu()  # where training takes it from
    tables.write_evaluation(job.folder, table, items, job.evaluation.seed, "_random")


def evaluate_run(job: StageJob, result: nn.Module, tokenizer: Tokenizer, telling: Telling) -> None:
    """eval.json and eval_items.jsonl of the run, from it and its ancestors only; and, where the
    run makes earlier rows measurable, ladder_eval.json and ladder_eval_items.jsonl."""
    with telling(job.stage) as tell:
        _evaluate_run(job, result, tokenizer, tell)


def _evaluate_run(
    job: StageJob, result: nn.Module, tokenizer: Tokenizer, tell: Callable[[str], None]
) -> None:
    if isinstance(result, ScalarModel):
        tell("held-out pairs")
        judges = Judges(reward=result, sft_chats=sft_chats(job))
        table, items = tables.evaluate_reward_model(
            result, heldout_pairs(job, tokenizer), job.evaluation
        )
    else:
        assert isinstance(result, Transformer)
        judges = known_judges(job, result)
        table, items = tables.evaluate_policy(
            result,
            tokenizer,
            heldout_sets(job.data),
            job.evaluation,
            judges,
            parent_policy(job, tokenizer),
            tell,
        )
    tables.write_evaluation(job.folder, table, items, job.evaluation.seed)
    if job.stage in (REFERENCE, REWARD):
        tell("the answers of earlier stages")
    if job.stage == REFERENCE:
        judge_earlier_rows(job, tokenizer, replace(judges, sft_chats=sft_chats(job)), BY_SFT)
    elif job.stage == REWARD:
        judge_earlier_rows(job, tokenizer, judges, BY_REWARD)


def judge_earlier_rows(
    job: StageJob, tokenizer: Tokenizer, judges: Judges, names: Sequence[str]
) -> None:
    """What this run makes measurable in the rows below it."""
    seed = job.evaluation.seed
    found, late = tables.evaluate_ancestors(earlier_rows(job), tokenizer, seed, judges, names)
    tables.write_ladder_evaluation(job.folder, found, late)


def heldout_pairs(job: StageJob, tokenizer: Tokenizer) -> list[PairBatch]:
    """The held-out pairs of a reward run, max_pairs at most."""
    pairs = (data.load_preference(job.data) or stored_pairs(job.folder)).heldout
    some = pairs[: job.evaluation.max_pairs]
    loaders = reward_data(
        some,
        some,
        tokenizer,
        max_tokens=job.settings.max_tokens,
        batch_size=PAIRS_AT_ONCE,
        n_batches=1,
        seed=0,
    )
    return list(loaders.val)


def evaluate_again(
    folder: Path,
    ancestors: dict[str, Path],
    outputs: Path,
    telling: Telling,
    changes: Mapping[str, Any] | None = None,
    like: Path | None = None,
) -> None:
    """Evaluate a finished run with the config in its record: eval.json gets the same bytes.

    `changes` of `evaluation` in that config are recorded, so that the next time agrees again; so is
    what the run takes from the run `like`: its `evaluation`, and its `data` where this run would
    train on the same under it (else what is held out there it may have trained on).
    Raises UserError where the data has changed since, and there is an eval.json to lose.
    """
    torch.set_flush_denormal(True)  # as in training: it is faster, and the digits are the same
    record = read_record(folder)
    # other threads give sums other last digits; older records do not say how many there were
    torch.set_num_threads(record.get("threads", torch.get_num_threads()))
    stage = record["stage"]
    config = dict(record["config"])
    if like is not None:
        theirs = read_record(like)["config"]
        config["evaluation"] = theirs["evaluation"]
        if (why := unlike(record, theirs["data"])) is None:
            config["data"] = theirs["data"]
        else:
            print(
                f"{folder.name} keeps its own held-out data: under that of {like.name} {why}, and "
                "what is held out there it may have trained on",
                file=sys.stderr,
            )
    config["evaluation"] = {**config["evaluation"], **(changes or {})}
    job = StageJob(
        stage=stage,
        run_id=record["id"],
        folder=folder,
        outputs=outputs,
        settings=build(LADDER[stage].code.Settings, config["stages"][stage], f"stages.{stage}"),
        model=build(ModelConfig, config["model"], "model"),
        tokenizer=build(TokenizerConfig, config["tokenizer"], "tokenizer"),
        data=build(data.DataConfig, config["data"], "data"),
        digest=record.get("data", {}).get("digest", ""),
        trainer=build(TrainerConfig, config["trainer"], "trainer"),
        logger=LoggerConfig(name="none"),
        evaluation=built_evaluation(config),
        seed=record["config"]["seed"],
        parents={
            role: path
            for role, parent in record["parents"].items()
            for path in folder.parent.glob(f"*-{parent}")
        },
        ancestors=ancestors,
        group=record["group"],
    )
    changed = [f for f in (folder, *ancestors.values()) if has_other_data(read_record(f))]
    if changed and (folder / "eval.json").exists():
        source = LADDER[read_record(changed[0])["stage"]].source
        whose = f"its {source}" if changed[0] == folder else f"the {source} of {changed[0].name}"
        raise UserError(
            f"{folder.name}: {whose} has changed since it was trained, and what is held out now it "
            "may have trained on: "
            f"{folder / 'eval.json'} is kept; remove the file to have it written all the same"
        )
    if not LADDER[stage].parents:
        tokenizer = Tokenizer.from_config(job.tokenizer)
        evaluate_random(job, random_weights(job, tokenizer), tokenizer, telling)
    network, tokenizer = (load_scalar if LADDER[stage].leaves == "scalar" else load_policy)(folder)
    evaluate_run(job, network.to(device_of(job)), tokenizer, telling)
    if config != record["config"]:
        evaluated = asdict(job.evaluation)
        write_record(folder, config={"evaluation": evaluated, "data": config["data"]})


def built_evaluation(config: Mapping[str, Any]) -> EvaluationConfig:
    """Raises UserError where its answers would leave no room for a prompt."""
    built = build(EvaluationConfig, config["evaluation"], "evaluation")
    built.check_room(config["model"]["max_seq_len"])
    return built


def has_other_data(record: dict[str, Any]) -> bool:
    """Whether the source that a run trained on reads otherwise now; not where it is missing, which
    `heldout_sets` says."""
    config = build(data.DataConfig, record["config"]["data"], "data")
    why = data.other_source(config, record)
    return why is not None and not why.startswith("there is no")


def unlike(record: dict[str, Any], config: Any) -> str | None:
    """Why a run would not train on the same under this `data`, of another run's record."""
    return data.other_source(build(data.DataConfig, config, "data"), record)


def known_judges(job: StageJob, policy: Transformer) -> Judges:
    """The reward model, the sft policy and its answers, as far as this ladder has come."""
    device = next(policy.parameters()).device
    reward = reference = None
    if REWARD in job.ancestors:
        reward = load_scalar(job.ancestors[REWARD])[0]
    if job.stage == REFERENCE:
        return Judges(reward, reference=policy, device=device)
    if REFERENCE in job.ancestors:
        reference = load_policy(job.ancestors[REFERENCE])[0]
    return Judges(reward, reference, sft_chats(job), device)


def sft_chats(job: StageJob) -> list[Item] | str:
    """What the ladder's sft policy answered, or why that is not known."""
    folder = job.folder if job.stage == REFERENCE else job.ancestors.get(REFERENCE)
    return NO_SFT if folder is None else tables.stored_chats(folder)


def parent_policy(job: StageJob, tokenizer: Tokenizer) -> Transformer | str:
    """The policy that the run started from, on the CPU, or why there is none."""
    if not LADDER[job.stage].parents:
        return random_weights(job, tokenizer)
    if "policy" not in job.parents:
        return "the parent run is not there any more"
    return load_policy(job.parents["policy"])[0]


def earlier_rows(job: StageJob) -> dict[str, tuple[Path, str]]:
    """The rows below this run: "random" and the ancestors' ids, with their folder and suffix."""
    rows = {}
    for stage, folder in job.ancestors.items():
        if not LADDER[stage].parents:
            rows["random"] = (folder, "_random")
    for folder in job.ancestors.values():
        rows[folder.name.split("-", 1)[1]] = (folder, "")
    return rows
