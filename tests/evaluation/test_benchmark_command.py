"""Mistakes, kills and two commands at once of `python -m fourstage benchmark`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from threading import Thread

import pytest

from fourstage.errors import UserError
from fourstage.files import read_json
from fourstage.runs.benchmarks import add_benchmarks, read_benchmarks
from tests.evaluation.benchmarked import (
    benchmark,
    run_of,
    write_choice,
    write_talk,
)

pytest.importorskip("lm_eval", reason="the extra lm-eval isn't installed")
pytestmark = pytest.mark.usefixtures("indexed_once")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run=", "tasks=own_choice"], "run: name a run, as in run=sft"),
        (["run=sft"], "tasks: name one or more, as in tasks=arc_easy,gsm8k"),
        (
            ["run=sft", "tasks=own_choce"],
            "tasks: unknown task 'own_choce': did you mean own_choice",
        ),
        (["run=sft", "tasks=qqqqqqqqqq"], "unknown task 'qqqqqqqqqq': `lm_eval ls tasks` lists"),
        (["run=sft", "tasks=arc_easy"], "the data of arc_easy can't be had .*: download it where"),
        (["run=reward", "tasks=own_choice"], "reward-.*: holds a reward model, which gives no"),
        (["run=nobody", "tasks=own_choice"], "unknown run 'nobody'"),
        (["run=sft", "tasks=own_choice", "limit=0"], "limit: must be at least 1, got 0"),
        (["run=sft", "tasks=own_choice", "limit=few"], "limit: expected a whole number"),
        (["run=sft", "tasks=own_choice", "num_fewshot=-1"], "num_fewshot: must be at least 0"),
        (["run=sft", "tasks=own_choice", "include_path=/no"], "include_path: there is no folder"),
        (["run=sft", "tasks=own_choice", "num_fewshot=99"], "own_choice: lm-eval can't run it"),
        (["run=sft", "task=own_choice"], "task: unknown key, did you mean tasks"),
    ],
)
def test_mistakes_are_one_line(ladder, tasks, arguments, says) -> None:
    words = arguments if "/no" in arguments[-1] else [*arguments, f"include_path={tasks}"]
    with pytest.raises(UserError, match=says) as error:
        benchmark(ladder, *words)
    assert "\n" not in str(error.value)
    assert not list(ladder.glob("benchmark-*")) and not list(ladder.glob("runs/*/benchmark*"))


def test_broken_tasks_are_one_line(ladder, tmp_path) -> None:
    (tmp_path / "broken.yaml").write_text("task: [broken\n")
    write_choice(tmp_path, "half", text="{{q")
    write_choice(tmp_path, "huge", [("word " * 200, ["a", "b"], 0)])
    write_talk(tmp_path, [("Hi", "?!")], "endless", max_gen_toks="lots")
    write_talk(tmp_path, [("Hi", "?!")], "unmeasured")
    path = tmp_path / "unmeasured.yaml"
    path.write_text(path.read_text().replace("metric: exact_match", "metric: exactly"))
    for name, says in (
        ("broken", r"unknown task 'broken': .*broken\.yaml is broken \(ParserError: "),
        ("half", "tasks: half can't be loaded .TemplateSyntaxError: "),
        ("huge", "huge: no item fits into the context of 512 tokens: give fewer examples"),
        ("endless", "endless: lm-eval can't run it .ValueError: invalid literal for int"),
        ("unmeasured", "unmeasured: lm-eval "),
    ):
        with pytest.raises(UserError, match=says) as error:
            benchmark(ladder, "run=sft", f"tasks={name}", f"include_path={tmp_path}")
        assert "\n" not in str(error.value)


def test_a_task_whose_name_is_a_number_is_one_line(ladder, tmp_path) -> None:
    (tmp_path / "seven.yaml").write_text("task: 7\ndataset_path: json\n")
    with pytest.raises(UserError, match="a name in a task file isn't text .TypeError: "):
        benchmark(ladder, "run=sft", "tasks=7", f"include_path={tmp_path}")


def test_an_unfinished_run_is_refused(own_ladder, tasks) -> None:
    folder = run_of(own_ladder, "sft")
    record = read_json(folder / "run.json") | {"status": "running"}
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="this run is not finished"):
        benchmark(own_ladder, f"run={folder.name}", "tasks=own_choice", f"include_path={tasks}")


def test_without_lm_eval_a_line_says_what_to_install(ladder, tasks, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="benchmark needs lm-eval: install it with `pip install"):
        benchmark(ladder, "run=sft", "tasks=own_choice", f"include_path={tasks}")


def test_ctrl_c_keeps_what_is_done_and_leaves_no_export(own_ladder, tasks, monkeypatch) -> None:
    from fourstage.evaluation import harness

    words = ["run=sft", "tasks=own_choice,own_talk", f"include_path={tasks}"]
    measure = harness.measure

    def interrupted(model, name, *rest, **options):
        if name == "own_talk":
            raise KeyboardInterrupt
        return measure(model, name, *rest, **options)

    monkeypatch.setattr(harness, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark(own_ladder, *words)
    folder = run_of(own_ladder, "sft")
    assert {one.task for one in read_benchmarks(folder / "benchmark.json")} == {"own_choice"}

    def stopped(*_):
        assert (own_ladder / "benchmark-model" / "model.safetensors").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "Model", stopped)
    with pytest.raises(KeyboardInterrupt):
        benchmark(own_ladder, *words)
    assert not list(own_ladder.glob("benchmark-*")) and not list(folder.glob(".*"))


def test_two_commands_at_once_lose_nothing(own, tasks, monkeypatch) -> None:
    """The second reads the file while the first is about to write it."""
    from fourstage.runs import benchmarks

    path = run_of(own, "sft") / "benchmark.json"
    stored = read_json(path)
    one, two = (replace(read_benchmarks(path)[0], task=name) for name in "ab")
    others, write = [], benchmarks.write_json

    def write_late(*given) -> None:
        if not others:
            others.append(Thread(target=add_benchmarks, args=(path, stored["lm_eval"], [two])))
            others[0].start()
            others[0].join(timeout=0.5)
        write(*given)

    monkeypatch.setattr(benchmarks, "write_json", write_late)
    add_benchmarks(path, stored["lm_eval"], [one])
    others[0].join()
    assert len(read_benchmarks(path)) == len(stored["tasks"]) + 2
    assert not list(path.parent.glob(".*"))


def test_what_a_kill_left_is_removed(own, tasks) -> None:
    (own / "benchmark-model").mkdir()
    (own / "benchmark-model" / "config.json").write_text("half")
    benchmark(own, "run=sft", "tasks=own_choice", f"include_path={tasks}")
    assert not list(own.glob("benchmark-*"))


def test_a_ladder_with_a_gap_is_said(own, tasks, capsys) -> None:
    shutil.rmtree(run_of(own, "pretrain"))
    benchmark(own, "run=grpo", "ladder=true", "tasks=own_choice", f"include_path={tasks}")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"sft: no run in {own / 'runs'} that it started from: left out"
    assert said[1] == "sft, ppo, grpo on own_choice (7)"
