"""Evaluates a run of a ladder on its held-out sets, with the models of its ancestors."""

import sys
from collections.abc import Callable, Mapping
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
from fourstage.files import read_json, read_jsonl, write_json, write_jsonl
from fourstage.job import EvaluationConfig, LoggerConfig, StageJob, Start, TrainerConfig
from fourstage.ladder import LADDER, REFERENCE, REWARD
from fourstage.model import ModelConfig, ScalarModel, Transformer
from fourstage.model.weights import load_policy, load_scalar
from fourstage.runs.records import Record, read_record, write_record
from fourstage.settings import build
from fourstage.stages.prepare import device_of, start_policy
from fourstage.stages.reward import stored_pairs
from fourstage.tokenizer import Tokenizer, TokenizerConfig

PAIRS_AT_ONCE = 128

# telling(name) is a context that yields tell(part), which shows what is being evaluated
Telling = Callable[[str], AbstractContextManager[Callable[[str], None]]]


def heldout_sets(config: data.DataConfig, tokenizer: Tokenizer, outputs: Path) -> HeldOut:
    """The held-out side of every source, or why there is none."""

    def side(load: Callable[[data.DataConfig], Any]) -> Any:
        try:
            return load(config).heldout or "nothing is held out"
        except UserError as error:
            return str(error)

    def chats(config: data.DataConfig) -> data.Chats:
        """The chat prompts of the conversations, else of the pairs."""
        try:
            return data.prompts_only(data.load_chat(config))
        except UserError:
            return data.load_prompts(config)

    def corpus() -> data.Tokens | str:
        try:
            return data.tokenized(data.load_corpus(config), tokenizer, outputs).heldout
        except UserError as error:
            return str(error)

    return HeldOut(
        corpus=corpus(),
        chats=side(chats),
        problems=side(data.load_reasoning),
        has_true_score=config.has_hidden_rule,
        facts=data.fact_questions(config),
        statements=[(f.beginning, f.sentence) for f in data.load_facts(config).heldout],
    )


def start_weights(job: StageJob, tokenizer: Tokenizer) -> Transformer:
    """The weights that the ladder's pre-training starts from: its checkpoint's, or drawn again from
    the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        return start_policy(job, tokenizer.vocab_size)


def evaluate_start(
    job: StageJob, policy: Transformer, tokenizer: Tokenizer, telling: Telling
) -> None:
    """Evaluate what pre-training starts from, before its first step."""
    policy.to(device_of(job))
    heldout = heldout_sets(job.data, tokenizer, job.outputs)
    name = job.start.name if job.start else "random weights"
    no_parent = f"{name} {'has' if job.start else 'have'} no parent"
    with telling(name) as tell:
        table, items = tables.evaluate_policy(
            policy, tokenizer, heldout, job.evaluation, None, no_parent, tell
        )
    policy.cpu()  # training expects it there
    tables.write_evaluation(job.folder, table, items, job.evaluation.seed, "_random")


def evaluate_run(job: StageJob, result: nn.Module, tokenizer: Tokenizer, telling: Telling) -> None:
    """eval.json and eval_items.jsonl of the run, from it and its ancestors only; and, if the run
    makes earlier rows measurable, ladder_eval.json and ladder_eval_items.jsonl. A checkpoint that
    was taken as it is has been evaluated as the start."""
    seed = job.evaluation.seed
    if job.settings.as_is:
        write_json(job.folder / "eval.json", read_json(job.folder / "eval_random.json"))
        items = read_jsonl(job.folder / "eval_items_random.jsonl")
        write_jsonl(job.folder / "eval_items.jsonl", items)
        return
    with telling(job.stage) as tell:
        if isinstance(result, ScalarModel):
            tell("held-out pairs")
            judges = Judges(reward=result)
            pairs = heldout_pairs(job, tokenizer)
            table, items = tables.evaluate_reward_model(result, pairs, job.evaluation)
        else:
            assert isinstance(result, Transformer)
            judges = known_judges(job, result)
            heldout = heldout_sets(job.data, tokenizer, job.outputs)
            parent = parent_policy(job, tokenizer)
            table, items = tables.evaluate_policy(
                result, tokenizer, heldout, job.evaluation, judges, parent, tell
            )
        tables.write_evaluation(job.folder, table, items, seed)
        if job.stage in (REFERENCE, REWARD):
            tell("the answers of earlier stages")
            names = BY_SFT if job.stage == REFERENCE else BY_REWARD
            judges = replace(
                judges, sft_chats=sft_chats(job)
            )  # the sft run's own are stored by now
            rows = earlier_rows(job)
            found, late = tables.evaluate_ancestors(rows, tokenizer, seed, judges, names)
            write_jsonl(job.folder / "ladder_eval_items.jsonl", late)
            write_json(job.folder / "ladder_eval.json", found)


def heldout_pairs(job: StageJob, tokenizer: Tokenizer) -> list[PairBatch]:
    """The held-out pairs of a reward run, max_pairs at most."""
    pairs = (data.load_preference(job.data) or stored_pairs(job.folder)).heldout
    some = pairs[: job.evaluation.max_pairs]
    size, longest = PAIRS_AT_ONCE, job.settings.max_tokens
    loaders = reward_data(
        some, some, tokenizer, max_tokens=longest, batch_size=size, n_batches=1, seed=0
    )
    return list(loaders.val)


def evaluate_again(
    folder: Path,
    ancestors: dict[str, Path],
    outputs: Path,
    telling: Telling,
    changes: Mapping[str, Any],
    like: Path | None = None,
) -> None:
    """Evaluate a finished run with the config in its record: eval.json gets the same bytes.

    `changes` to the config's `evaluation` are recorded, so that the next time agrees again. So is
    what the run takes from the run `like`: its `evaluation`, and its `data` if this run would train
    on the same under it (else it may have trained on what is held out there).
    Raises UserError if the data has changed since, and there is an eval.json to lose.
    """
    torch.set_flush_denormal(True)  # as in training: it is faster, and the digits are the same
    record = read_record(folder)
    # the number of threads decides the last digits of sums; older records don't have it
    torch.set_num_threads(record.get("threads", torch.get_num_threads()))
    stage = record["stage"]
    config = checked_config(folder, record)
    if like is not None:
        theirs = read_record(like)["config"]
        config["evaluation"] = theirs["evaluation"]
        if why := other_data(record, theirs["data"]):
            print(
                f"{folder.name} keeps its own held-out data: under that of {like.name} {why}, so "
                "it may have trained on what is held out there",
                file=sys.stderr,
            )
        else:
            config["data"] = theirs["data"]
    config["evaluation"] = {**config["evaluation"], **changes}
    job = recorded_job(folder, record, config, ancestors, outputs)
    job.evaluation.check_room(config["model"]["max_seq_len"])
    for run in (folder, *ancestors.values()):
        own = read_record(run)
        why = other_data(own, own["config"]["data"])
        is_there = why and not why.startswith("there is no")  # heldout_sets says what is missing
        if is_there and (folder / "eval.json").exists():
            source = LADDER[own["stage"]].source
            whose = f"its {source}" if run == folder else f"the {source} of {run.name}"
            raise UserError(
                f"{folder.name}: {whose} has changed since it was trained, so it may have trained "
                f"on what is held out now: {folder / 'eval.json'} is kept; remove the file to have "
                "it written anyway"
            )
    if not LADDER[stage].parents:
        tokenizer = Tokenizer.from_folder(folder)
        evaluate_start(job, start_weights(job, tokenizer), tokenizer, telling)
    network, tokenizer = (load_scalar if LADDER[stage].leaves == "scalar" else load_policy)(folder)
    evaluate_run(job, network.to(device_of(job)), tokenizer, telling)
    if config != record["config"]:
        write_record(folder, config={"evaluation": asdict(job.evaluation), "data": config["data"]})


def checked_config(folder: Path, record: Record) -> dict[str, Any]:
    """A copy of the config in a run's record. Raises UserError if a part that jobs need is not
    there."""
    for key in ("data", "tokenizer", "trainer", "evaluation"):
        if key not in record["config"]:
            raise UserError(f"{folder / 'run.json'}: it has no config.{key}: train the run again")
    return dict(record["config"])


def recorded_job(
    folder: Path,
    record: Record,
    config: Mapping[str, Any],
    ancestors: dict[str, Path],
    outputs: Path,
) -> StageJob:
    """The job of a finished run, as its record and a `config` like the one in it say."""
    stage = record["stage"]
    return StageJob(
        stage=stage,
        run_id=record["id"],
        folder=folder,
        outputs=outputs,
        settings=build(LADDER[stage].code.Settings, config["stages"][stage], f"stages.{stage}"),
        model=build(ModelConfig, config["model"], "model"),
        tokenizer=build(TokenizerConfig, config["tokenizer"], "tokenizer"),
        data=data_config(folder.name, config["data"]),
        digest=record.get("data", {}).get("digest", ""),
        trainer=build(TrainerConfig, config["trainer"], "trainer"),
        logger=LoggerConfig(name="none"),
        evaluation=build(EvaluationConfig, config["evaluation"], "evaluation"),
        seed=record["config"]["seed"],
        parents={
            role: path
            for role, parent in record["parents"].items()
            for path in folder.parent.glob(f"*-{parent}")
        },
        ancestors=ancestors,
        group=record["group"],
        start=recorded_start(record),
    )


def recorded_start(record: Mapping[str, Any]) -> Start | None:
    """The checkpoint of a first stage's run. Raises UserError if it isn't there any more."""
    if (kept := record.get("start")) is None:
        return None
    start = Start(**{**kept, "folder": Path(kept["folder"])})
    if not start.folder.is_dir():
        raise UserError(
            f"{start.folder}: the checkpoint that {record['stage']}-{record['id']} started from is "
            "not there any more: put it back"
        )
    return start


def data_config(name: str, values: Any) -> data.DataConfig:
    """A run's data settings. Raises UserError if they are of another version."""
    try:
        return build(data.DataConfig, values, "data")
    except UserError as error:
        raise UserError(
            f"{name}: {error}: another version of fourstage trained it, so it can't be evaluated "
            "again: train it again"
        ) from None


def other_data(record: Mapping[str, Any], config: Any) -> str | None:
    """Why a run would not train on the same under a `data` config; None if it would."""
    return data.other_source(data_config(f"{record['stage']}-{record['id']}", config), record)


def known_judges(job: StageJob, policy: Transformer) -> Judges:
    """The ladder's reward model, sft policy and sft answers, as far as they exist."""
    device = next(policy.parameters()).device
    reward = load_scalar(job.ancestors[REWARD])[0] if REWARD in job.ancestors else None
    reference = policy if job.stage == REFERENCE else None
    if REFERENCE in job.ancestors:
        reference = load_policy(job.ancestors[REFERENCE])[0]
    return Judges(reward, reference, sft_chats(job), device)


def sft_chats(job: StageJob) -> list[Item] | str:
    """The chat items of the ladder's sft policy, or why there are none."""
    folder = job.folder if job.stage == REFERENCE else job.ancestors.get(REFERENCE)
    return NO_SFT if folder is None else tables.stored_chats(folder)


def parent_policy(job: StageJob, tokenizer: Tokenizer) -> Transformer | str:
    """The policy that the run started from, on the CPU, or why there is none."""
    if not LADDER[job.stage].parents:
        return start_weights(job, tokenizer)
    if "policy" not in job.parents:
        return "the parent run is not there any more"
    return load_policy(job.parents["policy"])[0]


def earlier_rows(job: StageJob) -> dict[str, tuple[Path, str]]:
    """The rows below this run: "random" and the ancestors' ids, with their folder and suffix."""
    rows = {}
    for stage, folder in job.ancestors.items():
        if not LADDER[stage].parents:
            rows["random"] = (folder, "_random")
        rows[folder.name.split("-", 1)[1]] = (folder, "")
    return rows
