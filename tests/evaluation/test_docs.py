"""docs/evaluation.md has a line for every key of the suite, and says what the suite does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fourstage.evaluation import suite
from tests.verdicts import same_value

TEXT = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
COLUMNS = ["key", "items", "what it is", "interval", "better", "known weaknesses"]


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, its header first."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = section[section.index("\n|") :].strip().split("\n\n")[0]  # the first one
    lines = table.splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


KEYS = {row[0].strip("`"): row for row in rows("Keys")[2:]}


def test_every_key_has_a_line_and_every_line_a_key() -> None:
    assert rows("Keys")[0] == COLUMNS
    assert list(KEYS) == list(suite.DEFINITIONS)
    assert f"**suite {suite.SUITE}**" in TEXT
    assert f"{suite.BOOTSTRAPS} resamples" in TEXT


@pytest.mark.parametrize("name", suite.DEFINITIONS)
def test_a_line_says_what_the_definition_does(name: str) -> None:
    defined, row = suite.DEFINITIONS[name], KEYS[name]
    assert len(row) == len(COLUMNS) and all(row)
    assert row[1] == ", ".join(defined.sets)
    of_ratio = "Wilson" if defined.yes_no else "t"
    assert row[3] == (of_ratio if defined.statistic is suite.ratio else "bootstrap")
    assert row[4] == (defined.better or "-")


def test_every_set_of_items_has_a_line() -> None:
    named = [row[0].strip("`") for row in rows("Items")[2:]]
    assert sorted(named) == sorted({s for d in suite.DEFINITIONS.values() for s in d.sets})
    by_problem = {n.split("_at_")[0] for n, d in suite.DEFINITIONS.items() if d.by_problem}
    assert by_problem == {"reasoning_accuracy", "pass"}
    assert re.search("`reasoning_accuracy` and `pass_at_k` are also there for each task", TEXT)


def test_the_examples_of_final_answers_are_judged_as_they_say() -> None:
    table = TEXT[TEXT.index("| expected | right | wrong |") :].split("\n\n")[0].splitlines()[2:]
    examples = [[re.findall("`([^`]*)`", cell) for cell in row.split(" | ")] for row in table]
    assert len(examples) >= 10
    for (expected,), right, wrong in examples:
        assert [given for given in right if not same_value(given, expected)] == [], expected
        assert [given for given in wrong if same_value(given, expected)] == [], expected
