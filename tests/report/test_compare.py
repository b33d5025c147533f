"""Several ladders in one table."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest

from benchmarks.seeds import main as seeds_table
from fourstage.errors import UserError
from fourstage.evaluation import suite
from fourstage.report import main
from fourstage.report.charts import Drawing
from tests.ladders import run_id, stages, write_json, write_ladder


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three ladders that differ in their seed, and the comparison of all."""
    outputs = tmp_path_factory.mktemp("seeds")
    for seed in range(3):
        write_ladder(outputs, seed, n=12, steps=0, config={"seed": seed})
    compare(outputs, "all")
    return outputs


def compare(outputs: Path, *names: str) -> dict:
    main(["compare", *names, f"outputs={outputs}"])
    return json.loads((outputs / "report" / "compare.json").read_text())


def line(found: dict, stage: str, key: str, table: str = "metrics") -> dict:
    return next(row for row in found[table] if (row["stage"], row["key"]) == (stage, key))


def section_of(text: str, heading: str) -> str:
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


def compare_md(outputs: Path) -> str:
    return (outputs / "report" / "compare.md").read_text()


def test_mean_and_spread_of_every_key(seeds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "BOOTSTRAPS", 10)
    monkeypatch.setattr(
        "fourstage.report.figures.intervals", lambda *_: Drawing("<svg></svg>", None)
    )
    monkeypatch.setattr(Drawing, "files", lambda *_: {})
    found = json.loads((seeds / "report" / "compare.json").read_text())
    assert [ladder["label"] for ladder in found["ladders"]] == ["seed 0", "seed 1", "seed 2"]
    values = []
    for seed in range(3):
        main([f"outputs={seeds}", f"run={run_id('grpo', seed)}"])
        rows = stages(seeds)
        values.append(rows["grpo"]["metrics"]["reasoning_accuracy"]["value"])
        assert found["ladders"][seed]["runs"] == {s: row["run"] for s, row in rows.items()}
    assert line(found, "grpo", "reasoning_accuracy") == {
        "stage": "grpo",
        "key": "reasoning_accuracy",
        "n": 3,
        "mean": round(statistics.fmean(values), 6),
        "sd": round(statistics.stdev(values), 6),
        "min": min(values),
        "max": max(values),
        "values": values,
    }
    assert {row["stage"] for row in found["metrics"]} == {
        *("random", "pretrain", "sft", "reward", "ppo", "grpo")
    }
    assert line(found, "reward", "pair_accuracy")["n"] == 3
    assert line(found, "ppo", "seconds", "costs")["values"] == [61.2, 62.2, 63.2]
    assert line(found, "ppo", "seconds", "costs")["sd"] == 1.0


def test_seeds_are_said_to_be_seeds(seeds: Path) -> None:
    text = compare_md(seeds)
    assert "3 seeds: they share all settings that can change a figure. " in text
    assert "| stage: key | mean | sd | min to max | n |\n" in text
    assert "| sft: well-formed answers | " in text and "| ppo: time | 1 min 02 s | 1.0 s |" in text
    goals = section_of(text, "Each stage on its own goal")
    assert "pretrain: bits per character (lower is better)\n\n| group | runs | mean | gain" in goals
    assert "| all | 3 | " in goals and "− (" not in goals and "Holm" not in goals
    html = (seeds / "report" / "compare.html").read_text()
    assert html.count("<table>") == text.count("| --- |\n")


def test_the_mean_over_seeds_has_a_t_interval(seeds: Path) -> None:
    """Three values: t(2) is 4.3027."""
    found = json.loads((seeds / "report" / "compare.json").read_text())
    [row] = [row for row in found["comparisons"] if row["stage"] == "ppo"]
    values = line(found, "ppo", "true_score")["values"]
    half = 4.3027 * statistics.stdev(values) / 3**0.5
    assert row["mean"] == pytest.approx(statistics.fmean(values), abs=1e-6)
    assert (row["low"], row["high"]) == pytest.approx(
        (row["mean"] - half, row["mean"] + half), abs=1e-4
    )
    assert (row["key"], row["group"], row["n"], row["over"]) == ("true_score", "all", 3, "seeds")
    assert list(row["values"]) == ["0", "1", "2"] and list(row["values"].values()) == values


def test_the_same_runs_give_the_same_bytes(seeds: Path) -> None:
    names = ("compare.json", "compare.md", "compare.html")
    first = [(seeds / "report" / name).read_bytes() for name in names]
    for name in names:
        (seeds / "report" / name).unlink()
    compare(seeds, "all")
    assert first == [(seeds / "report" / name).read_bytes() for name in names]
    compare(seeds)
    assert first == [(seeds / "report" / name).read_bytes() for name in names]
    compare(seeds, *(run_id("grpo", seed) for seed in range(3)))
    assert first == [(seeds / "report" / name).read_bytes() for name in names]


def test_settings_that_differ_are_listed(tmp_path: Path) -> None:
    write_ladder(tmp_path, 0, n=6, steps=0, config={"stages": {"sft": {"lr": 0.001}}})
    config = {"model": {"name": "dense_tiny"}, "stages": {"sft": {"lr": 0.01}}}
    write_ladder(tmp_path, 1, n=6, steps=0, config=config, experts=1, stages=("pretrain", "sft"))
    found = compare(tmp_path, "grpo", f"sft-{run_id('sft', 1)}")
    assert found["differs"] == {
        "seed": ["0", "1"],
        "model.name": ["moe_tiny", "dense_tiny"],
        "stages.sft.lr": ["0.001", "0.01"],
    }
    text = compare_md(tmp_path)
    assert "2 groups, the seeds within each. " in text
    assert "| model.name | moe_tiny; dense_tiny |" in text
    assert ": a dense model has no routers" in text
    only_one = line(found, "grpo", "reasoning_accuracy")
    assert (only_one["n"], only_one["sd"]) == (1, None)
    assert only_one["values"][1] is None


def test_seeds_of_two_commits_are_called_by_their_seed(tmp_path: Path) -> None:
    for seed, commit in ((0, "abc"), (1, "def")):
        last = write_ladder(tmp_path, seed, n=6, steps=0, stages=("pretrain",))
        record = json.loads((last / "run.json").read_text())
        record["config"] |= {"seed": seed}
        write_json(last / "run.json", record | {"git": {"commit": commit}})
    found = compare(tmp_path, "all")
    assert [ladder["label"] for ladder in found["ladders"]] == ["seed 0", "seed 1"]
    assert found["differs"]["git.commit"] == ["abc", "def"]


def test_a_run_that_ladders_share_counts_once(tmp_path: Path) -> None:
    write_ladder(tmp_path, 0, n=6, steps=0)
    found = compare(tmp_path, "sft", "grpo")
    shared = line(found, "sft", "well_formed")
    assert shared["n"] == 1 and shared["sd"] is None
    assert shared["values"][0] == shared["values"][1] == shared["mean"]
    assert line(found, "random", "bits_per_char")["n"] == 1
    both = section_of(compare_md(tmp_path), "Each stage on its own goal")
    assert both.count("| all | 1 | ") == 5
    assert [group["label"] for group in found["groups"]] == ["sft → ppo → grpo", "sft"]


def test_a_broken_file_is_named_and_the_rest_compared(tmp_path: Path) -> None:
    folders = [write_ladder(tmp_path, s, n=6, steps=0, stages=("pretrain", "sft")) for s in (0, 1)]
    (folders[1] / "eval.json").write_text("{")
    found = compare(tmp_path, "all")
    assert f"- {folders[1].name}/eval.json cannot be read" in compare_md(tmp_path)
    assert line(found, "sft", "bits_per_char")["n"] == 1
    assert line(found, "pretrain", "bits_per_char")["n"] == 2


def test_a_ladder_without_an_ancestor_is_said_above_the_groups(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_ladder(tmp_path, seed, n=6, steps=0, config={"seed": seed})
    shutil.rmtree(tmp_path / "runs" / f"sft-{run_id('sft', 1)}")
    found = compare(tmp_path, "stage=grpo")
    assert [group["label"] for group in found["groups"]] == [
        "pretrain → sft → ppo → grpo",
        "ppo → grpo",
    ]
    above = compare_md(tmp_path).split("| group | ladders |")[0]
    assert f"may make a group of their own: grpo-{run_id('grpo', 1)}. " in above


def test_debug_ladders_are_compared_only_where_nothing_else_is(tmp_path: Path) -> None:
    folders = [write_ladder(tmp_path, s, n=6, steps=0, stages=("pretrain",)) for s in (0, 1, 2)]
    record = json.loads((folders[2] / "run.json").read_text())
    write_json(folders[2] / "run.json", record | {"debug": "fast"})
    assert len(compare(tmp_path, "all")["ladders"]) == 2
    assert "Debug" not in (tmp_path / "report" / "compare.md").read_text()
    assert len(compare(tmp_path, run_id("pretrain", 0), run_id("pretrain", 2))["ladders"]) == 2
    debug = "Debug runs, too short for their figures to mean anything: pretrain-"
    assert debug + run_id("pretrain", 2) in (tmp_path / "report" / "compare.md").read_text()


def test_null_and_keys_with_values_differ(tmp_path: Path) -> None:
    folders = [write_ladder(tmp_path, s, n=6, steps=0, stages=("pretrain",)) for s in (0, 1)]
    for place, only in zip(folders, (None, {"gcd": {"max_value": 99}}), strict=True):
        record = json.loads((place / "run.json").read_text())
        data = {"name": "embedded", "reasoning": {"only": only}}
        write_json(place / "run.json", record | {"config": record["config"] | {"data": data}})
    compare(tmp_path, "all")
    text = (tmp_path / "report" / "compare.md").read_text()
    assert "| data.reasoning.only | None; {'gcd': {'max_value': 99}} |" in text
    assert "| only=null | 1 | 0 | pretrain |" in text
    assert "| only={gcd.max_value: 99} | 1 | 1 | pretrain |" in text


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["zzz", "grpo"], "unknown run 'zzz': "),
        (["grpo", "grpo"], "compare: grpo-{} is named twice (grpo grpo)"),
        (["{}", "grpo-{}"], "compare: grpo-{} is named twice ({} grpo-{})"),
        (["grpo"], "compare needs two finished ladders or more, got 1"),
        (["run=sft", "grpo"], "no run has a setting 'run': the runs have stage, id, "),
        (["stage=grop"], "no run has stage=grop: did you mean grpo? (the runs have "),
        (["stages.sft.lr=7"], "no run has stages.sft.lr=7: the runs have 0.001"),
        (["stage=grpo", "seed=1"], "compare needs two finished ladders or more, got 1 for stage="),
        (["all", "by=lr"], "by=lr: these ladders don't differ in it, but in nothing"),
        (["all", "by=parent"], "by=parent: these ladders don't differ in it, but in nothing (by=r"),
        (["all", "by="], "by=: a name is missing: expected by=KEY"),
        (["all", "by=lr,,loss"], "by=lr,,loss: a name is missing: expected by=KEY"),
        (["all", "grpo"], "compare: `all` stands alone: leave it out of all grpo"),
        (["all", "by=seed"], "by=seed: seeds are what means and intervals are over"),
    ],
)
def test_mistakes_are_one_line(seeds: Path, names: list[str], said: str) -> None:
    tip = run_id("grpo", 2)
    with pytest.raises(UserError) as error:
        main(["compare", *(name.replace("{}", tip) for name in names), f"outputs={seeds}"])
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(said.replace("{}", tip))


def test_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got 0: train some, for example with `python"):
        main(["compare", "all", f"outputs={tmp_path}"])


# --- benchmarks/seeds.py


def test_the_table_of_seeds(seeds: Path, capsys: pytest.CaptureFixture) -> None:
    """The latest run of a seed counts: an older ladder of it is not shown."""
    other = seeds / "runs" / f"grpo-{run_id('grpo', 3)}"
    record = json.loads((seeds / "runs" / f"grpo-{run_id('grpo', 0)}" / "run.json").read_text())
    write_json(other / "run.json", record | {"id": run_id("grpo", 3), "finished": "2025-01-01"})
    seeds_table([f"outputs={seeds}"])
    shutil.rmtree(other)
    *lines, last = capsys.readouterr().out.splitlines()
    table, kept = lines[: lines.index("")], lines[lines.index("") + 1 :]
    figures = json.loads(last)["figures"]
    assert json.loads(last)["device"] == "cpu"
    assert len(table) == 2 + len(figures) == 2 + 5 * 3
    for seed in (0, 1, 2):
        path = seeds / "runs" / f"grpo-{run_id('grpo', seed)}" / "eval.json"
        cell = json.loads(path.read_text())["metrics"]["reasoning_accuracy"]
        assert figures[f"grpo_seed{seed}"] == cell["value"]
        after = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**cell)
        [row] = [x for x in table if x.startswith(f"| grpo | held-out problems | {seed} |")]
        assert f" | {after} | " in row
        [kept_row] = [x for x in kept if x.startswith(f"| held-out problems | {seed} |")]
        assert kept_row.count("|") == 8 and kept_row.endswith(f" | {after} |")
    assert kept[0] == "| key | seed | random | pretrain | sft | ppo | grpo |"
    assert len(kept) == 2 + 5 * 3


@pytest.mark.parametrize(
    ("argument", "says"),
    [("outputs={}", "no finished grpo run under"), ("x=1", "unknown argument")],
)
def test_no_seeds_to_tabulate(tmp_path: Path, argument: str, says: str) -> None:
    with pytest.raises(SystemExit, match=says):
        seeds_table([argument.format(tmp_path)])
