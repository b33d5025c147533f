"""lm-eval: loads its tasks and measures a model in Hugging Face's format by them.

lm-eval is the EleutherAI Language Model Evaluation Harness. It is an extra: this is the only module
that imports it, and benchmark.py imports this one when the command runs.
"""

from __future__ import annotations

import io
import math
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from fourstage.errors import UserError, did_you_mean
from fourstage.runs.benchmarks import Benchmark

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a bootstrap forks


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars, logs and prints of lm-eval and what it stands on."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


with quiet():
    from lm_eval import evaluate
    from lm_eval.api.group import Group
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml
    from transformers.utils.logging import set_verbosity_error

set_verbosity_error()  # of prompts that are to be truncated it says that they will fail
VERSION = version("lm_eval")
SEED = 1234  # lm-eval's own
Z = 1.96  # of a 95 % interval
NO_STDERR = "lm-eval has no standard error for this metric"
GENERATED, ROLLING = "generate_until", "loglikelihood_rolling"
BY_CHOICE = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


# --- tasks


def load_tasks(names: Sequence[str], include_path: Path | None) -> dict[str, Task | Group]:
    """name -> task or group, with its data. A tag stands for its tasks.

    Raises UserError for a name that lm-eval doesn't know, a broken task, one that this command
    can't run, and data that can't be had.
    """
    try:
        with quiet():
            manager = TaskManager(include_path=include_path, include_defaults=False)
            if not set(names) <= set(manager.all_subtasks):  # all of lm-eval's take seconds
                manager = TaskManager(include_path=include_path)
    except TypeError as error:
        raise UserError(
            f"include_path: {include_path}: a name in a task file isn't text ({_first_line(error)})"
        ) from None
    known = manager.all_tasks
    for name in names:
        if name not in known:
            raise UserError(f"tasks: unknown task {name!r}: {_hint(name, known, include_path)}")
    found: dict[str, Task | Group] = {}
    for name in names:
        loaded = _load(manager, name)
        groups = loaded["groups"]
        is_group = name in groups and groups[name].has_aggregation
        found |= {name: groups[name]} if is_group else loaded["tasks"]
    for name, item in found.items():
        tasks = leaves(item)
        if any(getattr(task, "UNSAFE_CODE", False) for task in tasks):
            raise UserError(f"tasks: {name} runs code that the model writes: use lm-eval itself")
        if any(getattr(task, "MULTIMODAL", False) for task in tasks):
            raise UserError(f"tasks: {name} needs images or sound, and these models read text")
        kinds = {kind(task) for task in tasks}
        if GENERATED in kinds and len(kinds) > 1:
            raise UserError(
                f"tasks: {name} mixes tasks with and without generated answers: name them one by "
                f"one: {', '.join(task.task_name for task in tasks)}"
            )
    return found


def _hint(name: str, known: Sequence[str], include_path: Path | None) -> str:
    """What to do about an unknown name; a file that can't be read may be why."""
    for path in sorted(include_path.glob("**/*.yaml")) if include_path else []:
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:
            return f"{path} is broken ({_first_line(error)})"
    hint = did_you_mean(name, known)
    return hint if hint.startswith("did you") else "`lm_eval ls tasks` lists all of them"


def _load(manager: TaskManager, name: str) -> Any:
    try:
        with quiet():
            return manager.load([name])
    except ConnectionError as error:
        raise UserError(
            f"tasks: the data of {name} can't be had ({_first_line(error)}): download it where "
            "there is a network and set HF_HOME to that cache, or give a task of your own with "
            "include_path=FOLDER"
        ) from None
    except Exception as error:  # tasks are other people's files and code
        raise UserError(f"tasks: {name} can't be loaded ({_first_line(error)})") from error


def leaves(item: Task | Group) -> list[Task]:
    return item.get_all_tasks() if isinstance(item, Group) else [item]


def kind(task: Task) -> str | None:
    return task.OUTPUT_TYPE


def count_items(item: Task | Group, limit: int | None) -> int:
    sizes = [len(task.eval_docs) for task in leaves(item)]
    return sum(size if limit is None else min(size, limit) for size in sizes)


# --- the model


class Model(HFLM):
    """An exported folder. Knows which items' prompts its context didn't hold whole."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        super().__init__(
            pretrained=str(folder),
            device="cuda" if torch.cuda.is_available() else "cpu",
            dtype="float32",
            batch_size=batch_size,
        )
        self.truncated: set[tuple[str, int]] = set()

    def encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context == "":
            return [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
        return self._encode_pair(context, continuation)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        pairs = [self.encoded(*request.args) for request in requests]
        if any(len(continuation) > self.max_length for _, continuation in pairs):
            raise UserError(f"an answer is longer than the context of {self.max_length} tokens")
        self.note(requests, [len(x) + len(y) for x, y in pairs], self.max_length + 1)
        return super().loglikelihood(requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        room = min(self.max_length - answer_limit(request.args[1]) for request in requests)
        self.note(requests, lengths, room)
        return super().generate_until(requests, disable_tqdm)

    def note(self, requests: list[Instance], lengths: list[int], room: int) -> None:
        """Keep the items that lm-eval truncates on the left. Raises UserError if all are."""
        long = {
            (request.task_name, request.doc_id)
            for request, length in zip(requests, lengths, strict=True)
            if length > room
        }
        if len(long) == len({(request.task_name, request.doc_id) for request in requests}):
            raise UserError(
                f"no item fits into the context of {self.max_length} tokens: give fewer examples "
                "(num_fewshot=0), or leave the task out"
            )
        self.truncated |= long


def answer_limit(options: dict[str, Any]) -> int:
    """Tokens that a task lets an answer have; 256 is lm-eval's default."""
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    return int(next((options[name] for name in names if options.get(name) is not None), 256))


# --- results


def measure(
    model: Model,
    name: str,
    item: Task | Group,
    *,
    is_chat: bool,
    limit: int | None,
    num_fewshot: int | None,
) -> list[Benchmark]:
    """Every metric of a task, or of a group as a whole.

    is_chat: the prompts of generated answers are conversations in the model's chat format, the
    few-shot examples its earlier turns. An answer has at most half the context, so that the other
    half is the question's. Raises UserError if lm-eval can't run it.
    """
    tasks = leaves(item)
    groups = [item, *item.get_all_groups()] if isinstance(item, Group) else []
    model.truncated.clear()
    try:
        max_gen_toks = prepare(tasks, model.max_length // 2, num_fewshot)
        with_template = is_chat and max_gen_toks is not None
        with quiet():
            results = evaluate(
                model,
                {"tasks": {x.task_name: x for x in tasks}, "groups": {x.name: x for x in groups}},
                limit=limit,
                apply_chat_template=with_template,
                fewshot_as_multiturn=True,  # as lm-eval's command has it
            )
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except (MemoryError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # tasks are other people's files and code
        raise UserError(f"{name}: lm-eval can't run it ({_first_line(error)})") from error
    found = []
    sides = results["higher_is_better"].get(name, {})
    for key, value in results["results"][name].items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        rows_of = {task: _samples(results, task, filter_name, metric) for task in tasks}
        having = {task: rows for task, rows in rows_of.items() if rows}
        samples, counts = list(having.values()), [len(rows) for rows in having.values()]
        values = [row[metric] for rows in samples for row in rows]
        is_share = all(isinstance(x, int | float) and 0 <= x <= 1 for x in values)
        stderr = results["results"][name].get(f"{metric}_stderr,{filter_name}")
        stderr = stderr if isinstance(stderr, float) and math.isfinite(stderr) else None
        low, high, why = _interval(value, stderr, is_share)
        guesses = [chance(model, task, metric, rows) for task, rows in having.items()]
        found.append(
            Benchmark(
                task=name,
                version=str(results["versions"].get(name)),
                metric=metric,
                filter=filter_name,
                n=sum(counts),
                few_shot=results["n-shot"].get(name),
                chat_template=with_template,
                limit=limit,
                value=_number(value),
                stderr=_number(stderr),
                low=low,
                high=high,
                chance=_number(_mean(guesses, counts)),
                better={True: "higher", False: "lower"}.get(sides.get(metric)),
                is_share=is_share,
                truncated=len(model.truncated),
                subtasks=len(having) if isinstance(item, Group) else None,
                max_gen_toks=max_gen_toks,
                why=why,
            )
        )
    if not found:
        raise UserError(f"{name}: lm-eval has no value for it: see metric_list in its file")
    return found


def prepare(tasks: Sequence[Task], room: int, num_fewshot: int | None) -> int | None:
    """What lm-eval's `simple_evaluate` does before it evaluates: seeds, and the few-shot examples.

    Returns the limit of generated answers, `room` at most; None for tasks that generate none. A
    perplexity has no examples, and a task whose file says that it has none gets none.
    """
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    limits = []
    for task in tasks:
        own = task.get_config("num_fewshot")
        fixed = own == 0 or kind(task) == ROLLING
        task.set_config("num_fewshot", (own or 0) if fixed or num_fewshot is None else num_fewshot)
        task.set_fewshot_seed(seed=SEED)
        if kind(task) == GENERATED:
            options = task.config.generation_kwargs or {}
            limits.append(min(answer_limit(options), room))
            task.set_config("generation_kwargs", {**options, "max_gen_toks": limits[-1]})
    return max(limits, default=None)


def _samples(results: Any, task: Task, filter_name: str, metric: str) -> list[dict[str, Any]]:
    """What lm-eval noted of each item: its document, its target, and the metric's share in it."""
    rows = results["samples"][task.task_name]
    return [row for row in rows if row["filter"] == filter_name and metric in row]


def _interval(
    value: float, stderr: float | None, is_share: bool
) -> tuple[float | None, float | None, str | None]:
    if _number(value) is None:
        return None, None, "it is not finite"
    if stderr is None:
        return None, None, NO_STDERR
    low, high = value - Z * stderr, value + Z * stderr
    if is_share:
        low, high = max(low, 0.0), min(high, 1.0)
    return _number(low), _number(high), None


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), 6)


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known, weights) if len(known) == len(values) and sum(weights) else None


def chance(
    model: Model, task: Task, metric: str, samples: Sequence[dict[str, Any]]
) -> float | None:
    """What guessing gives: one choice among all, a text that matches exactly (never), or every
    token of the vocabulary alike. None where it isn't known."""
    has_own = callable(task.config.process_results)  # what its `acc` means is not known then
    if kind(task) == "multiple_choice" and metric in BY_CHOICE and not has_own:
        return fmean(
            len(row["target"] if isinstance(row["target"], list) else [row["target"]])
            / len(task.doc_to_choice(row["doc"]))
            for row in samples
        )
    if (kind(task), metric) in ((GENERATED, "exact_match"), ("loglikelihood", "acc")):
        return 0.0
    if kind(task) in ("loglikelihood", ROLLING) and metric in PERPLEXITIES:
        bits = math.log(model.model.config.vocab_size)
        values = []
        for row in samples:
            if kind(task) == ROLLING:
                ids = model.tok_encode(row["arguments"][0][0], add_special_tokens=False)
                said: Any = -len(ids) * bits
            else:
                said = -len(model.encoded(*row["arguments"][0])[1]) * bits, False
            values.append(task.process_results(row["doc"], [said])[metric])
        return task.aggregation()[metric](values)
    return None


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
