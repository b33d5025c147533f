"""Tasks for lm-eval, and what a benchmark of a ladder by them has stored."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from fourstage.evaluation.benchmark import main
from fourstage.files import read_json
from fourstage.model.weights import load_policy
from fourstage.sampling.generate import Sampling, stream

ANSWER = 24  # tokens of a generated answer
CHOICES = [
    ("2 + 3 = ?", ["5", "6"], 0),
    ("Is water wet?", ["no", "yes"], 1),
    ("What is an LLM?", ["a large language model", "a tree", "a small river"], 0),
    ("Who trains?", ["the optimizer", "nobody", "the loss", "a cat"], 0),
    ("10 - 4 = ?", ["14", "4", "6"], 2),
    ("Which is longest?", ["one", "three hundred", "ten"], 1),
    ("Say x.", ["x", "y", "z", "w"], 3),
]
TEXTS = ["The optimizer changes the weights.", "A network is a function.", "Hello there, you two."]
ACC, NORM, EXACT = (
    {"metric": name, "aggregation": "mean", "higher_is_better": True}
    for name in ("acc", "acc_norm", "exact_match")
)


def write_task(folder: Path, name: str, rows: list[dict], **config: object) -> None:
    """A task's YAML, and its items in the format of `datasets`."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "metadata": {"version": 1.0},
        **config,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def write_choice(folder: Path, name: str = "own_choice", rows=CHOICES, text: str = "") -> None:
    write_task(
        folder,
        name,
        [dict(zip(("q", "choices", "answer"), row, strict=True)) for row in rows],
        output_type="multiple_choice",
        doc_to_text=text or "Question: {{q}}\nAnswer:",
        doc_to_choice="choices",
        doc_to_target="answer",
        metric_list=[ACC, NORM],
    )


def write_talk(
    folder: Path, rows: list[tuple[str, str]], name: str = "own_talk", **options
) -> None:
    write_task(
        folder,
        name,
        [{"q": q, "a": a} for q, a in rows],
        output_type="generate_until",
        doc_to_text="{{q}}",
        doc_to_target="{{a}}",
        generation_kwargs={"until": ["\n\n"], "do_sample": False, **options},
        metric_list=[EXACT],
    )


def greedy(folder: Path, question: str, is_chat: bool) -> str:
    """What the run answers, by our own sampler: to a chat prompt, or after the text."""
    network, tokenizer = load_policy(folder)
    prompt = tokenizer.encode(question)
    if is_chat:
        prompt = tokenizer.prompt([{"role": "user", "content": question}])
    sampling = Sampling(max_new_tokens=ANSWER, stop_id=tokenizer.eot_id, temperature=0)
    special = {tokenizer.unk_id, tokenizer.bos_id, tokenizer.eot_id, tokenizer.pad_id}
    special |= {tokenizer.user_id, tokenizer.assistant_id}
    ids = [i for i in stream(network, prompt, sampling) if i not in special]
    return tokenizer.decode(ids).split("\n\n")[0]


def run_of(outputs: Path, stage: str) -> Path:
    [folder] = (outputs / "runs").glob(f"{stage}-*")
    return folder


def benchmark(outputs: Path, *arguments: str) -> None:
    main([f"outputs={outputs}", *arguments])


def found(outputs: Path, stage: str, task: str, metric: str) -> dict:
    file = "benchmark_random.json" if stage == "random" else "benchmark.json"
    stored = read_json(run_of(outputs, "pretrain" if stage == "random" else stage) / file)
    assert stored["lm_eval"].startswith("0.")
    [one] = [x for x in stored["tasks"] if (x["task"], x["metric"]) == (task, metric)]
    return one
