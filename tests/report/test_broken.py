"""Broken files: each is named in the report, and nothing else is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fourstage.evaluation import suite
from fourstage.report import main
from fourstage.report.files import Files
from tests.ladders import (
    folder,
    read_items,
    section,
    stages,
    write_ladder,
    write_lines,
)


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("ladder")
    write_ladder(outputs, n=6, steps=0)
    return outputs


@pytest.fixture
def outputs(copied: Path) -> Path:
    return copied


def report(outputs: Path) -> str:
    main([f"outputs={outputs}"])
    return section(outputs, "What is missing")


GARBAGE = [
    None,
    "",
    "\xff\x00\xfe",
    "[]",
    "7",
    '{"a": ',
    json.dumps({"suite": suite.SUITE}),
    "[" * 100_000,
    '{"set": "corpus", "id": 1, "bits": NaN, "chars": 3, "bytes": 3}',
    '{"set": "router", "id": 1, "tokens": 1, "load": [[1], [1, 2]], "drift": null}',
    '{"set": "chat", "id": [], "ids": "x"}',
    'step\n1\n"',
    "step,train/kl\n1,1e999\nnan,2\n",
]
FILES = [
    ("grpo", "run.json"),
    ("ppo", "metrics.csv"),
    ("ppo", "eval.json"),
    ("ppo", "eval_items.jsonl"),
    ("ppo", "samples.jsonl"),
    ("reward", "ladder_eval.json"),
    ("reward", "ladder_eval_items.jsonl"),
    ("pretrain", "eval_random.json"),
    ("pretrain", "eval_items_random.jsonl"),
]


@pytest.mark.parametrize("first", range(len(GARBAGE)))
def test_no_content_of_a_file_breaks_the_report(outputs: Path, first: int) -> None:
    """All files are broken at once, each in another way, so that every file meets every way."""
    contents = [GARBAGE[(first + at) % len(GARBAGE)] for at in range(len(FILES))]
    for (stage, file), content in zip(FILES, contents, strict=True):
        path = folder(outputs, stage) / file
        path.unlink()
        if content is not None:
            path.write_text(content, encoding="latin-1")
    missing = report(outputs)
    for (stage, file), content in zip(FILES, contents, strict=True):
        if not may_pass(file, content):
            name = folder(outputs, stage).name
            said = (f"- {name}: not a run", f"- {name}/{file}: broken", f"- {name}/{file} ")
            assert any(line in missing for line in said), content
    rows = stages(outputs)
    assert list(rows)[:5] == ["random", "pretrain", "sft", "reward", "ppo"]
    assert rows["sft"]["metrics"]["bits_per_char"]["value"] is not None
    assert "bits_per_char" in rows["sft"]["differences"]


def may_pass(file: str, content: str | None) -> bool:
    """Contents that say nothing and are not wrong."""
    if file == "ladder_eval.json" and content is not None and content.startswith('{"s'):
        return True  # an object without this ladder's rows
    if "_items" in file and content is not None and content.startswith('{"set": "router"'):
        return True  # an item that nothing is compared with
    return file == "metrics.csv" and content is not None and content.endswith("\n")


def test_lines_that_are_no_items_cost_only_themselves(outputs: Path) -> None:
    path = folder(outputs, "sft") / "eval_items.jsonl"
    rows = list(read_items(path).values())
    corpus = [at for at, row in enumerate(rows) if row["set"] == "corpus"]
    del rows[corpus[0]]["id"]
    rows[corpus[1]]["set"] = []
    write_lines(path, rows)
    lines_ = f"2 broken lines ({corpus[0] + 1}, {corpus[1] + 1})"
    assert f"- {path.parent.name}/eval_items.jsonl has {lines_}" in report(outputs)
    found = stages(outputs)["sft"]["differences"]
    assert found["bits_per_char"]["n"] == 4 and found["true_score"]["n"] == 6


@pytest.mark.parametrize(
    ("set_", "nonsense"),
    [
        ("corpus", {"bits": "many"}),
        ("corpus", {"bits": 10**400}),
        ("reasoning", {"task": [], "difficulty": None}),
        ("router", {"load": [[1, 2, 3]]}),
        ("router", {"load": [[1], [1, 2]]}),
    ],
)
def test_items_that_the_suite_cannot_read_cost_that_runs_differences(
    outputs: Path, set_: str, nonsense: dict
) -> None:
    path = folder(outputs, "sft") / "eval_items.jsonl"
    rows = list(read_items(path).values())
    first = next(at for at, row in enumerate(rows) if row["set"] == set_)
    rows[first] |= nonsense
    write_lines(path, rows)
    assert f"- {path.parent.name}/eval_items.jsonl cannot be compared with" in report(outputs)
    found = stages(outputs)
    assert found["sft"]["differences"] == {} != found["pretrain"]["differences"]
    assert found["sft"]["metrics"]["true_score"]["n"] == 6


def test_loads_that_make_no_sense_together_are_named(outputs: Path) -> None:
    path = folder(outputs, "sft") / "eval_items.jsonl"
    rows = read_items(path).values()
    write_lines(path, [r | {"load": [[1, 2]]} if r["set"] == "router" else r for r in rows])
    assert f"- {path.parent.name}/eval_items.jsonl cannot be compared with" in report(outputs)
    write_lines(path, [r | {"load": [[0] * 4] * 2} if r["set"] == "router" else r for r in rows])
    assert "eval_items.jsonl has no value, n, low and high for router_" in report(outputs)


def test_nonsense_in_a_record_costs_that_run(outputs: Path) -> None:
    """One rule for all commands says what a record is; the rest of the ladder is shown."""
    path = folder(outputs, "ppo") / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": 7}))
    assert f"- {path.parent.name}/run.json: broken (config is '7')" in report(outputs)
    assert list(stages(outputs)) == ["grpo"]


def test_costs_that_are_no_numbers_leave_the_rest(outputs: Path) -> None:
    path = folder(outputs, "ppo") / "run.json"
    record = json.loads(path.read_text())
    nonsense = {"seconds": 61.2, "tokens": None, "flops": 10**400, "steps": "many"}
    path.write_text(json.dumps(record | {"cost": nonsense, "device": []}))
    report(outputs)
    cells = "1 min 01 s | – | – | – | – | – | – |"
    assert f"| ppo | {path.parent.name} | {cells}" in section(outputs, "What it cost")


def test_a_copy_of_a_run_is_named(outputs: Path) -> None:
    shutil.copytree(folder(outputs, "sft"), outputs / "runs" / "sft-copy")
    missing = report(outputs)
    assert "is a copy of" in missing and list(stages(outputs))[2] == "sft"


def test_cells_of_other_types_are_refused(tmp_path: Path) -> None:
    files = Files()
    good = {"value": 1, "n": 2, "low": 0.5, "high": 1.5}
    cells = {
        "good": good,
        "empty": {"value": None, "why": "no data"},
        "text": good | {"value": "1"},
        "yes": good | {"value": True},
        "huge": good | {"high": 10**400},
        "nan": good | {"low": float("nan")},
        "list": [],
        "no reason": {"value": None},
    }
    assert list(files.valid_metrics(tmp_path / "eval.json", cells)) == ["good", "empty"]
    assert len(files.problems) == 1


def test_what_a_kill_left_is_named(outputs: Path) -> None:
    """Half a line of metrics.csv, which would be read as another number, and an empty file."""
    curves = folder(outputs, "ppo") / "metrics.csv"
    curves.write_text("step,train/kl\n1,0.25\n2,0.2")
    assert Files().curves(curves) == {"train/kl": [(1.0, 0.25)]}
    (folder(outputs, "sft") / "samples.jsonl").write_text("")
    missing = report(outputs)
    assert f"- {curves.parent.name}/metrics.csv ends within a line" in missing
    assert f"- {folder(outputs, 'sft').name}/samples.jsonl is empty" in missing


def test_the_heads_of_items_are_read_however_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "run" / "eval_items.jsonl"
    path.parent.mkdir()
    lines = [
        '{"set": "corpus", "id": 7, "bits": 1.5}',
        '{"set": "chat", "id": "a b", "x": {}}',
        '{"id": "\\u00e9", "set":"chat"}',
        '{"set": "chat", "id": "\\u00e9"}',
        '{"set": "chat"}',
        "{",
    ]
    path.write_text("\n".join(lines))
    files = Files()
    found = [(item["set"], item["id"]) for item in files.item_heads(path)]
    assert found == [("corpus", 7), ("chat", "a b"), ("chat", "é"), ("chat", "é")]
    assert files.problems == ["run/eval_items.jsonl has 2 broken lines (5, 6)"]
