"""What the report makes of items and costs: differences, routers, goals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fourstage.evaluation import suite
from fourstage.report import main
from fourstage.report.charts import (
    heat_map,
)
from fourstage.report.figures import loads
from fourstage.report.html import Cell, Table, markdown, page
from fourstage.report.keys import change, shown, verdict
from fourstage.report.tables import duration
from tests.ladders import (
    folder,
    items,
    read_items,
    run_id,
    section,
    stages,
    write_json,
    write_ladder,
    write_lines,
)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole ladder and its report, for tests that change nothing."""
    outputs = tmp_path_factory.mktemp("full")
    write_ladder(outputs)
    main([f"outputs={outputs}"])
    return outputs


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("ladder")
    write_ladder(outputs, n=30, steps=0)
    return outputs


@pytest.fixture
def outputs(copied: Path) -> Path:
    return copied


def report(outputs: Path) -> str:
    main([f"outputs={outputs}"])
    return section(outputs, "What is missing")


# --- paired differences


def test_differences_are_paired_over_the_items_of_both_rows(full: Path) -> None:
    """Against a bootstrap of the items' gains, which is a little narrower at n = 30."""
    before = read_items(folder(full, "ppo") / "eval_items.jsonl")
    after = read_items(folder(full, "grpo") / "eval_items.jsonl")
    ids = sorted((key for key in after if key[0] == "chat"), key=lambda key: str(key[1]))
    gains = np.array([after[i]["true_score"] - before[i]["true_score"] for i in ids])
    drawn = np.random.default_rng(0).integers(0, len(gains), (suite.BOOTSTRAPS, len(gains)))
    low, high = np.quantile(gains[drawn].mean(1), [0.025, 0.975])
    found = stages(full)["grpo"]["differences"]["true_score"]
    assert found["n"] == 30
    assert found["value"] == pytest.approx(gains.mean(), abs=1e-6)
    assert found["high"] - found["low"] == pytest.approx(1.14 * (high - low), rel=0.06)


def test_each_row_is_held_against_the_policy_that_it_started_from(full: Path) -> None:
    rows = stages(full)
    assert rows["random"]["differences"] == {} and rows["reward"]["differences"] == {}
    for stage, parent in {"pretrain": "random", "sft": "pretrain", "ppo": "sft"}.items():
        for name in ("bits_per_char", "well_formed", "router_entropy"):
            gain = rows[stage]["metrics"][name]["value"] - rows[parent]["metrics"][name]["value"]
            assert rows[stage]["differences"][name]["value"] == pytest.approx(gain, abs=2e-6)


def test_what_later_models_said_is_compared_too(full: Path) -> None:
    """The reward model scored sft's answers later: ladder_eval_items.jsonl is joined in."""
    assert (
        "reward_model_score"
        not in read_items(folder(full, "sft") / "eval_items.jsonl").popitem()[1]
    )
    rows = stages(full)
    for name in ("reward_model_score", "win_rate_learned"):
        after, before = (rows[stage]["metrics"][name]["value"] for stage in ("sft", "pretrain"))
        found = rows["sft"]["differences"][name]
        assert found["value"] == pytest.approx(after - before, abs=2e-6)


def test_only_common_items_are_compared(outputs: Path) -> None:
    path = folder(outputs, "sft") / "eval_items.jsonl"
    rows = [row for key, row in read_items(path).items() if key[0] != "corpus" or key[1] < 10]
    write_lines(path, rows)
    report(outputs)
    assert stages(outputs)["sft"]["differences"]["bits_per_char"]["n"] == 10
    assert stages(outputs)["sft"]["differences"]["true_score"]["n"] == 30


def test_keys_without_common_items_are_named(outputs: Path) -> None:
    path = folder(outputs, "grpo") / "eval_items.jsonl"
    rows = read_items(path).values()
    write_lines(path, [r | {"id": f"x{r['id']}"} if r["set"] == "corpus" else r for r in rows])
    missing = report(outputs)
    same = "bits per character, bits per byte: the two have no items"
    assert f"- grpo: no difference to ppo for {same}" in missing
    assert "bits_per_char" not in stages(outputs)["grpo"]["differences"]


def test_another_suite_is_not_compared(outputs: Path) -> None:
    path = folder(outputs, "grpo") / "eval.json"
    write_json(path, json.loads(path.read_text()) | {"suite": "1"})
    missing = report(outputs)
    assert "- grpo: no differences to ppo: grpo was evaluated by suite 1" in missing
    assert stages(outputs)["grpo"]["differences"] == {}
    assert stages(outputs)["ppo"]["differences"] != {}
    goals = section(outputs, "Each stage on its own goal").splitlines()
    assert goals[-3].startswith("| grpo |") and goals[-3].endswith("; different suites |")
    assert re.search(
        r"\| \+\d\d\.\d points better \[\+\d\d\.\d, \+\d\d\.\d\] \|$", goals[-6]
    )  # sft
    text = (outputs / "report" / "report.md").read_text()
    assert (
        f"Evaluated by suites 1 and {suite.SUITE}; this version has suite {suite.SUITE}, and "
        "figures of different suites are not comparable. To evaluate again, without training: "
        f"python -m fourstage evaluation run=grpo-{run_id('grpo', 0)} ladder=true\n"
    ) in text


def test_a_ladder_of_this_suite_needs_no_word_about_it(full: Path) -> None:
    assert "not comparable" not in (full / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("name", "low", "high", "expected"),
    [
        ("well_formed", 0.01, 0.2, "better"),
        ("well_formed", -0.2, -0.01, "worse"),
        ("well_formed", -0.01, 0.2, "unclear"),
        ("well_formed", 0.0, 0.2, "unclear"),
        ("bits_per_char", 0.1, 0.2, "worse"),
        ("bits_per_char", -0.2, -0.1, "better"),
        ("answer_tokens", 1.0, 2.0, "unclear"),  # neither way is better
        ("of_another_suite", 1.0, 2.0, "unclear"),
        ("well_formed", 0.2, 0.2, "unclear"),  # no width: one item, or all are equal
    ],
)
def test_verdict(name: str, low: float, high: float, expected: str) -> None:
    assert verdict(name, {"value": (low + high) / 2, "low": low, "high": high}) == expected


def test_a_change_says_in_words_what_its_colour_says() -> None:
    cell = {"value": -0.062, "n": 9, "low": -0.1, "high": -0.02}
    parts = change("reasoning_accuracy", cell)
    assert parts == [("-6.2 points worse", "worse"), ("[-10.0, -2.0]", "small")]
    assert markdown([Table(["a"], [[Cell([("1", ""), *parts])]])]).splitlines()[-1] == (
        "| 1; -6.2 points worse [-10.0, -2.0] |"
    )
    assert '<span class="worse">-6.2 points worse</span>' in page(
        "", [Table(["a"], [[Cell(parts)]])]
    )
    assert change("bits_per_char", {"value": 0.1, "n": 9, "low": -0.1, "high": 0.3})[0] == (
        "+0.100",
        "unclear",
    )
    assert change("bits_per_char", None) == []


def test_a_huge_value_has_four_digits() -> None:
    key = "benchmark/wikitext/word_perplexity"
    assert [shown(key, x) for x in (29.4269, 33518407575.87)] == ["29.427", "3.352e+10"]


def test_tables_show_the_differences(full: Path) -> None:
    found = stages(full)["grpo"]["differences"]["reasoning_accuracy"]
    shown = f"{100 * found['value']:+.1f} points"
    assert shown in section(full, "What each stage did").splitlines()[-1]
    changed = section(full, "What each stage changed").splitlines()
    assert changed[3] == "| key | pretrain − random | sft − pretrain | ppo − sft | grpo − ppo |"
    line = next(line for line in changed if line.startswith("| reasoning accuracy |"))
    assert shown in line.split(" | ")[-1]
    assert not [line for line in changed if "difficulty" in line]
    assert "| reasoning accuracy: difficulty easy |" in section(full, "By task and by difficulty")


def test_only_a_loss_on_another_stages_goal_is_a_tax(full: Path) -> None:
    """What sft lost of pretrain's goal; not what pre-training changed of random weights."""
    found = {row: stages(full)[row]["differences"] for row in ("pretrain", "sft", "ppo", "grpo")}
    goals = {
        "pretrain": "bits_per_char",
        "sft": "well_formed",
        "reward": "pair_accuracy",
        "ppo": "true_score",
        "grpo": "reasoning_accuracy",
    }
    expected = {
        (stage, name)
        for stage in ("sft", "ppo", "grpo")
        for other, name in goals.items()
        if other != stage and name in found[stage]
        if verdict(name, found[stage][name]) == "worse"
    }
    assert ("sft", "bits_per_char") in expected
    changed = section(full, "What each stage changed")
    assert changed.count("; a tax") == len(expected)
    bits = next(line for line in changed.splitlines() if line.startswith("| bits"))
    _, _, pretrain, sft, *_ = bits.split(" | ")[0:1] + bits.split(" | ")
    assert "; a tax" not in pretrain and sft.endswith("; a tax")
    loss = f"{found['sft']['bits_per_char']['value']:+.3f}"
    said = (full / "report" / "report.md").read_text().split("\n## ")[0]
    assert (
        f"The alignment tax, lost on the goals of other stages: bits a character (sft {loss}"
        in said
    )


# --- routers


def test_loads_are_shares_of_each_layer() -> None:
    found = loads(
        [
            {"set": "router", "load": [[3, 1], [0, 4]]},
            {"set": "router", "load": [[1, 3], [0, 4]]},
            {"set": "chat"},
        ]
    )
    assert found is not None and found.tolist() == [[0.5, 0.5], [0.0, 1.0]]
    assert loads([{"set": "chat"}]) is None
    assert loads([{"set": "router", "load": [[0, 0]]}]) is None


def test_heat_map_says_in_text_what_it_colours() -> None:
    svg = heat_map([[0.5, 0.125, 0.375, 0.0], [0.25, 0.25, 0.25, 0.25]], 0.5).svg
    texts = re.findall(">([^<>]+)</text>", svg)
    assert texts[2:] == [
        *("0", "50", "12", "38", "0", "2.00, 1"),
        *("1", "25", "25", "25", "25", "1.00, 0"),
    ]
    depths = [float(x) for x in re.findall("fill-opacity: ([0-9.]+)", svg)]
    assert depths == pytest.approx([0.85, 0.2125, 0.6375, *[0.425] * 4], abs=1e-6)  # 0: not filled


def test_heat_map_of_many_experts_keeps_a_summary_of_each_layer() -> None:
    shares = [[1 / 128] * 128, [2 / 128] * 64 + [0.0] * 64]
    texts = re.findall(">([^<>]+)</text>", heat_map(shares, 2 / 128).svg)
    assert texts[2:] == ["0", "1.00, 0", "1", "2.00, 64"]


def test_all_stages_have_a_heat_map_of_one_scale(full: Path, tmp_path: Path) -> None:
    text = (full / "report" / "report.html").read_text()
    routers = text.split(">What the routers do</h2>")[1].split("<h2")[0]
    drawn = re.findall("<strong>(.*?)</strong>", routers)
    names = ("random", "pretrain", "sft", "ppo", "grpo")
    assert drawn == [f"{name}: routers" for name in names]
    assert "An even share is 25.0 %" in routers
    depths = [float(x) for x in re.findall("fill-opacity: ([0-9.]+)", routers)]
    assert max(depths) == 0.85 and len(depths) == 5 * 2 * 4
    write_ladder(tmp_path, experts=1, stages=("pretrain",))
    report(tmp_path)
    said = section(tmp_path, "What the routers do")
    assert "No heat maps: a dense model has no routers." in said


# --- costs


def test_costs_and_why_some_are_empty(full: Path) -> None:
    text = section(full, "What it cost")
    name = f"ppo-{run_id('ppo', 0)}"
    cells = "1 min 01 s | 50 s | 9.0 s | 30 | 123,456 | 4,321 | 1.25e+12 | 2,464 | 900 |"
    assert f"| ppo | {name} | {cells}" in text
    total = "5 min 06 s | 4 min 10 s | 45 s | 150 | 617,280 | 8,642 | 6.25e+12 | – | 900 |"
    assert f"| together |  | {total}" in text
    assert (
        "Not recorded for every stage: tokens generated (only ppo and grpo generate); MFU (the "
        "device's peak FLOP/s is not known); peak GPU memory, MiB (no GPU was used)." in text
    )


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.6, "1 min 00 s"), (12, "12 s")]
)
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


# --- the invented items


def test_items_are_what_the_suite_reads() -> None:
    """The invented items define every key that they should."""
    found = suite.metrics(items("sft", 0, 12), {}, 0)
    assert {"bits_per_char", "pass_at_4", "router_entropy", "chat_exact"} <= set(found)


# --- own goals


def test_without_a_true_score_ppo_is_held_against_the_learned_one(outputs: Path) -> None:
    """A user's own data has no hidden rule; the learned score is what ppo raises there."""
    why = "the true score is known for data=embedded only"
    for stage in ("sft", "ppo"):
        path = folder(outputs, stage) / "eval.json"
        content = json.loads(path.read_text())
        content["metrics"]["true_score"] = suite.missing(why)
        write_json(path, content)
    assert "- ppo: true score: " + why in report(outputs)
    lines_ = section(outputs, "Each stage on its own goal").splitlines()
    row = next(line for line in lines_ if line.startswith("| ppo"))
    before, after = (stages(outputs)[x]["metrics"]["reward_model_score"] for x in ("sft", "ppo"))
    assert row.startswith(f"| ppo | reward-model score | {before['value']:.3f} [")
    assert f" | {after['value']:.3f} [" in row
