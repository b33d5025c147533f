"""Public benchmarks: lm-eval on an export says what our own network says of the same items."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fourstage.errors import UserError
from fourstage.files import read_json
from fourstage.model import Transformer
from fourstage.model.weights import load_policy
from fourstage.report import main as report
from fourstage.runs.benchmarks import add_benchmarks, parse_benchmarks, read_benchmarks
from fourstage.tokenizer import Tokenizer
from tests.evaluation.benchmarked import (
    CHOICES,
    TEXTS,
    benchmark,
    found,
    greedy,
    run_of,
    write_choice,
    write_talk,
)

pytest.importorskip("lm_eval", reason="the extra lm-eval isn't installed")
pytestmark = pytest.mark.usefixtures("indexed_once")


def network_of(outputs: Path, stage: str) -> tuple[Transformer, Tokenizer]:
    """The run's, or for "random" the one that the ladder's seed draws."""
    network, tokenizer = load_policy(run_of(outputs, stage.replace("random", "pretrain")))
    if stage == "random":
        torch.manual_seed(0)
        network = Transformer(network.config, tokenizer.vocab_size)
    return network.eval(), tokenizer


@torch.no_grad()
def logprob(network: Transformer, ids: list[int], answer: int) -> float:
    """Of the last `answer` ids."""
    hidden_BTD = network(torch.tensor([ids])).hidden_BTD
    log_probs = network.logits(hidden_BTD).log_softmax(-1)[0]
    at = range(len(ids) - answer - 1, len(ids) - 1)
    return sum(log_probs[i, ids[i + 1]].item() for i in at)


STAGES = ("random", "pretrain", "sft", "grpo")


@pytest.mark.parametrize("stage", STAGES)
def test_multiple_choice_is_the_likeliest_choice(measured, stage) -> None:
    network, tokenizer = network_of(measured, stage)
    right, right_norm = [], []
    for question, choices, answer in CHOICES:
        context = tokenizer.encode(f"Question: {question}\nAnswer:")
        ids = [tokenizer.encode(f" {choice}") for choice in choices]
        said = [logprob(network, context + x, len(x)) for x in ids]
        by_length = [x / len(choice) for x, choice in zip(said, choices, strict=True)]
        right.append(said.index(max(said)) == answer)
        right_norm.append(by_length.index(max(by_length)) == answer)
    for metric, each in (("acc", right), ("acc_norm", right_norm)):
        one = found(measured, stage, "own_choice", metric)
        share, half = statistics.mean(each), 1.96 * statistics.stdev(each) / math.sqrt(len(each))
        expected = (share, max(share - half, 0), min(share + half, 1))
        assert (one["value"], one["low"], one["high"]) == pytest.approx(expected, abs=1e-6)
        assert one["n"] == len(CHOICES) and not one["chat_template"]
        assert (one["few_shot"], one["limit"], one["better"]) == (0, None, "higher")
        guess = (1 / 2 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 3 + 1 / 3 + 1 / 4) / 7
        assert one["chance"] == pytest.approx(guess, abs=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_bits_per_byte_are_those_of_our_network_from_bos_on(measured, stage) -> None:
    network, tokenizer = network_of(measured, stage)
    nats = 0.0
    for text in TEXTS:
        ids = tokenizer.encode(text)
        nats -= logprob(network, [tokenizer.bos_id, *ids], len(ids))
    one = found(measured, stage, "own_text", "bits_per_byte")
    assert one["value"] == pytest.approx(nats / math.log(2) / sum(map(len, TEXTS)), rel=1e-4)
    assert one["chance"] == pytest.approx(math.log2(tokenizer.vocab_size), abs=1e-5)
    assert (one["low"], one["high"], one["better"]) == (None, None, "lower")
    assert one["why"] == "lm-eval has no standard error for this metric"
    words = found(measured, stage, "own_text", "word_perplexity")
    per_word = sum(map(len, TEXTS)) / sum(len(text.split()) for text in TEXTS)
    assert words["chance"] == pytest.approx(tokenizer.vocab_size**per_word, rel=1e-6)


def test_answers_are_greedy_and_in_the_chat_format_from_sft_on(measured, tasks) -> None:
    rows = [json.loads(line) for line in (tasks / "own_talk.jsonl").read_text().splitlines()]
    for stage in ("pretrain", "sft", "ppo", "grpo"):
        folder, is_chat = run_of(measured, stage), stage != "pretrain"
        right = [greedy(folder, row["q"], is_chat) == row["a"] for row in rows]
        one = found(measured, stage, "own_talk", "exact_match")
        assert one["value"] == pytest.approx(statistics.mean(right), abs=1e-6)
        assert one["chat_template"] == is_chat and one["chance"] == 0 and one["n"] == 9
        if stage in ("pretrain", "sft"):
            assert sum(right) >= 3
    assert not found(measured, "random", "own_talk", "exact_match")["chat_template"]


def test_a_reward_run_is_passed_over_and_no_export_is_left(measured) -> None:
    assert not (run_of(measured, "reward") / "benchmark.json").exists()
    assert not list(measured.glob("benchmark-*"))


def test_the_same_command_gives_the_same_bytes_and_others_are_added(own, tasks, capsys) -> None:
    path = run_of(own, "sft") / "benchmark.json"
    before = path.read_bytes()
    benchmark(own, "run=sft", "tasks=own_choice,own_talk", f"include_path={tasks}")
    assert path.read_bytes() == before
    benchmark(own, "run=sft", "tasks=own_choice", f"include_path={tasks}", "limit=2")
    benchmark(own, "run=sft", "tasks=own_choice", f"include_path={tasks}", "num_fewshot=1")
    text = capsys.readouterr().out
    assert "sft on own_choice (7), own_talk (9)\nsft: own_choice: acc " in text
    keys = [one.key for one in read_benchmarks(path) if one.task == "own_choice"]
    more = [f"benchmark/own_choice/acc{x}" for x in ("", "/1-shot", "/limit 2")]
    assert keys == sorted([*more, *(x.replace("acc", "acc_norm") for x in more)])
    assert {one.n for one in read_benchmarks(path) if one.limit} == {2}


def test_a_group_is_one_value(own, tasks, tmp_path) -> None:
    folder = shutil.copytree(tasks, tmp_path / "group")
    write_choice(folder, "other_choice", CHOICES[:3])
    metrics = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": "both", "task": ["own_choice", "other_choice"]}
    text = yaml.safe_dump({**group, "aggregate_metric_list": metrics, "metadata": {"version": 2}})
    (folder / "both.yaml").write_text(text)
    benchmark(own, "run=sft", "tasks=both,other_choice", f"include_path={folder}")
    whole, part = (found(own, "sft", task, "acc") for task in ("both", "other_choice"))
    all_of_own = found(own, "sft", "own_choice", "acc")
    assert (whole["subtasks"], whole["n"], whole["version"]) == (2, 10, "2")
    for key in ("value", "chance"):
        assert whole[key] == pytest.approx((7 * all_of_own[key] + 3 * part[key]) / 10, abs=1e-5)


def test_a_group_of_which_one_task_has_the_metric(own, tasks, tmp_path) -> None:
    folder = shutil.copytree(tasks, tmp_path / "group")
    metrics = [{"metric": "acc_norm", "weight_by_size": True}]
    group = {"group": "mixed", "task": ["own_choice", "own_text"]}
    (folder / "mixed.yaml").write_text(yaml.safe_dump({**group, "aggregate_metric_list": metrics}))
    benchmark(own, "run=sft", "tasks=mixed", f"include_path={folder}")
    whole, part = (found(own, "sft", task, "acc_norm") for task in ("mixed", "own_choice"))
    assert (whole["subtasks"], whole["n"]) == (1, 7)
    assert (whole["value"], whole["chance"]) == (part["value"], part["chance"])


def test_long_prompts_are_counted_and_long_answers_get_half_the_context(
    own, tmp_path, caplog
) -> None:
    long = "word " * 150  # 750 characters, and so many tokens
    write_choice(tmp_path, rows=[*CHOICES[:3], (long, ["a", "b"], 0)])
    write_talk(tmp_path, [("Hi", "?!"), ("word " * 60, "?!")], max_gen_toks=1000)
    benchmark(own, "run=sft", "tasks=own_choice,own_talk", f"include_path={tmp_path}")
    assert found(own, "sft", "own_choice", "acc")["truncated"] == 1
    one = found(own, "sft", "own_talk", "exact_match")
    assert (one["max_gen_toks"], one["truncated"]) == (256, 1)
    assert "indexing errors" not in caplog.text


def test_another_version_of_lm_eval_replaces_the_file(own) -> None:
    path = run_of(own, "sft") / "benchmark.json"
    some = read_benchmarks(path)
    assert not add_benchmarks(path, read_json(path)["lm_eval"], some[:1])
    assert len(read_benchmarks(path)) == len(some)
    assert add_benchmarks(path, "9", some[:1]) == some
    assert parse_benchmarks(read_json(path)) == parse_benchmarks(
        {"lm_eval": "9", "tasks": read_json(path)["tasks"][:1]}
    )


# --- where they are shown


def test_the_report_shows_them_and_one_without_them_has_no_such_part(own, undrawn) -> None:
    report([f"outputs={own}"])
    rows = read_json(own / "report" / "stages.json")["rows"]
    cells = [{k: x for k, x in row["metrics"].items() if "benchmark/" in k} for row in rows]
    assert list(map(len, cells)) == [5, 5, 5, 0, 5, 5]
    stored = {one.key: one for one in read_benchmarks(run_of(own, "sft") / "benchmark.json")}
    assert cells[2]["benchmark/own_choice/acc"] == {
        name: getattr(stored["benchmark/own_choice/acc"], name)
        for name in ("value", "n", "low", "high", "chance")
    }
    text = (own / "report" / "report.md").read_text()
    part = text.partition("## Public benchmarks")[2].partition("\n## ")[0]
    one = found(own, "sft", "own_choice", "acc")
    ends = f"[{100 * one['low']:.1f}, {100 * one['high']:.1f}]"
    assert f"| sft | {100 * one['value']:.1f} % {ends} n 7, chance 35.7 % |" in part
    assert "own_text: bits_per_byte (lower is better)" in part and "| reward |" not in part
    for path in own.glob("runs/*/benchmark*.json"):
        path.unlink()
    report([f"outputs={own}"])
    assert "Public benchmarks" not in (own / "report" / "report.md").read_text()
    assert "benchmark" not in (own / "report" / "stages.json").read_text()


@pytest.mark.parametrize("text", ["", "[]", '{"lm_eval": "1", "tasks": [{"task": "x"}]}', "{"])
def test_a_broken_file_is_named_and_kept(own, undrawn, tasks, text) -> None:
    path = run_of(own, "sft") / "benchmark.json"
    path.write_text(text)
    report([f"outputs={own}"])
    shown = (own / "report" / "report.md").read_text()
    assert f"- {path.parent.name}/benchmark.json " in shown.partition("## What is missing")[2]
    with pytest.raises(UserError, match=r"benchmark\.json: broken .*: remove it"):
        benchmark(own, "run=sft", "tasks=own_choice", f"include_path={tasks}")
    assert path.read_text() == text


def test_compare_has_a_line_for_each_stage(own, undrawn) -> None:
    first = run_of(own, "pretrain")
    other = shutil.copytree(first, first.with_name("pretrain-zzzzzzzzzz"))
    record = read_json(other / "run.json") | {"id": "zzzzzzzzzz"}
    (other / "run.json").write_text(json.dumps(record))
    stored = read_json(other / "benchmark.json")
    [acc] = [x for x in stored["tasks"] if (x["task"], x["metric"]) == ("own_choice", "acc")]
    values = [acc["value"], 0.75]
    acc["value"] = 0.75
    (other / "benchmark.json").write_text(json.dumps(stored))
    report(["compare", run_of(own, "grpo").name, other.name, f"outputs={own}"])
    lines = read_json(own / "report" / "compare.json")["metrics"]
    by_key = {(line["stage"], line["key"]): line for line in lines}
    line = by_key["pretrain", "benchmark/own_choice/acc"]
    assert line["values"] == values and line["n"] == 2
    assert line["mean"] == pytest.approx(statistics.mean(values), abs=1e-6)
    assert line["sd"] == pytest.approx(statistics.stdev(values), abs=1e-6)
    assert by_key["sft", "benchmark/own_choice/acc"]["values"][1] is None
    assert "## Public benchmarks" in (own / "report" / "compare.md").read_text()


# --- lm-eval's own command


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_lm_evals_own_command_says_the_same(measured, tasks, tmp_path, stage) -> None:
    from fourstage.exchange.export import export_run

    export_run(run_of(measured, stage), tmp_path / "model")
    for task in ("own_choice", "own_talk", "own_text"):
        template = ["--apply_chat_template"] * (task == "own_talk" and stage == "sft")
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", task]
        command += ["--model_args", f"pretrained={tmp_path / 'model'},dtype=float32"]
        command += ["--include_path", str(tasks), "--batch_size", "16", "--device", "cpu"]
        command += ["--output_path", str(tmp_path / task), *template]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        [path] = (tmp_path / task).rglob("results_*.json")
        results = json.loads(path.read_text())["results"][task]
        ours = [x for x in read_benchmarks(run_of(measured, stage) / "benchmark.json")]
        ours = [one for one in ours if one.task == task]
        theirs = {k for k in results if "," in k and "_stderr" not in k}
        assert {f"{one.metric},{one.filter}" for one in ours} == theirs
        for one in ours:
            value = results[f"{one.metric},{one.filter}"]
            assert one.value == pytest.approx(value, rel=1e-5, abs=1e-6)
            stderr = results[f"{one.metric}_stderr,{one.filter}"]
            if one.low is None:
                assert (one.stderr, stderr) == (None, "N/A")
            else:
                assert one.stderr == pytest.approx(stderr, abs=1e-6)
                assert one.high == pytest.approx(min(value + 1.96 * stderr, 1), abs=1e-6)
