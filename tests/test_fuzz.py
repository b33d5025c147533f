"""300 odd settings, damaged runs and damaged files each: every one finishes or ends in one line."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from tests.fuzz import KINDS, REPO, damaged_bytes, damaged_json, leaves, odd_value, write_damaged


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_case_finishes_or_ends_in_one_line(kind: str) -> None:
    command = [sys.executable, "-m", "tests.fuzz", f"kinds={kind}", "cases=300"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_damage_is_damage_and_comes_from_the_seed(tmp_path) -> None:
    value = {"a": {"b": [1, {"c": "text"}]}}
    texts = [damaged_json(value, random.Random(seed)) for seed in range(40)]
    assert texts == [damaged_json(value, random.Random(seed)) for seed in range(40)]
    assert len(set(texts)) > 20 and all("\\u0000odd" not in text for text in texts)
    content = b'{"text": "a"}\n' * 9
    assert all(damaged_bytes(content, random.Random(seed))[0] != content for seed in range(40))
    records = [{"text": f"document {i}"} for i in range(9)]
    for suffix in (".json", ".jsonl", ".parquet", ".txt"):
        for seed in range(6):
            assert write_damaged(tmp_path / f"a{suffix}", records, random.Random(seed))


def test_every_kind_of_setting_gets_odd_values() -> None:
    found = dict(leaves({"a": {"lr": 0.1, "max_steps": 3, "tasks": {}}, "name": None}))
    assert found == {"a.lr": 0.1, "a.max_steps": 3, "a.tasks": {}, "name": None}
    rng = random.Random(0)
    steps = {odd_value("stages.sft.max_steps", 3, rng) for _ in range(300)}
    assert len(steps) > 20 and not any(value.startswith("1" + "0" * 20) for value in steps)
