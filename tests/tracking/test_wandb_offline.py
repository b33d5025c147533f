"""What W&B has of a ladder that was trained offline, read back from its files with W&B's reader."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fourstage.files import read_jsonl
from fourstage.lineage.climb import climb
from fourstage.runs.benchmarks import Benchmark, add_benchmarks
from fourstage.runs.records import read_record, write_record
from fourstage.runs.store import RunStore
from fourstage.tracking.wandb_run import log_benchmarks
from tests.fakes import QUICK, config


@dataclass
class Landed:
    """One offline run: its records by type, in order, and its tables by key."""

    run: Path  # the stage's folder
    records: dict[str, list[dict[str, Any]]]
    tables: dict[str, dict[str, Any]]

    @property
    def summary(self) -> dict[str, Any]:
        return {k: v for record in self.records["summary"] for k, v in record["update"].items()}


def read_back(folder: Path, run: Path) -> Landed:
    """`wandb leet inspect --json` prints a run's log, one record a line."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    records: dict[str, list[dict[str, Any]]] = {}
    for record in map(json.loads, lines):
        records.setdefault(record["type"], []).append(record.get(record["type"], {}))
    tables = {}
    for record in records.get("history", []):
        for key, value in record["item"].items():
            if key.endswith(".path"):  # the last one logged stays
                tables[key[: -len(".path")]] = json.loads((folder / "files" / value).read_text())
    return Landed(run, records, tables)


@pytest.fixture(scope="module")
def landed(tmp_path_factory) -> dict[str, Landed]:
    """stage -> what `train.py stage=sft model=moe_nano debug=fast` left, offline."""
    outputs = tmp_path_factory.mktemp("offline") / "outputs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DATA_DIR", str(outputs / "wandb"))
        climb(config(*QUICK, "logger=wandb", "stage=sft", "tag=mine", f"outputs={outputs}"))
    found = {}
    for stage in ("pretrain", "sft"):
        run = RunStore(outputs).find(stage)
        [folder] = (outputs / "wandb").glob(f"offline-run-*-{read_record(run)['wandb']}")
        found[stage] = read_back(folder, run)
    return found


def test_what_a_run_says_of_itself(landed) -> None:
    pretrain, sft = landed["pretrain"].run, landed["sft"].run
    [run] = landed["sft"].records["run"]
    assert run["display_name"] == sft.name and run["project"] == "fourstage"
    assert (run["run_group"], run["job_type"]) == (read_record(pretrain)["id"], "sft")
    own = ["sft", "moe_nano", "embedded", "seed0", "mine"]
    assert run["tags"] == [*own, "debug", "debug-fast"]
    settings = run["config"]["update"]
    assert settings["parents"] == {"policy": pretrain.name}
    assert settings["run"] == read_record(sft)["id"] and settings["model"]["name"] == "moe_nano"
    [end] = landed["sft"].records["exit"]  # on a busy machine with a runtime too
    assert end["exit_code"] == 0


def test_the_history_is_metrics_csv_against_the_step(landed) -> None:
    for stage in ("pretrain", "sft"):
        with open(landed[stage].run / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        logged: dict[int, dict[str, float]] = {}
        for record in landed[stage].records["history"]:
            step = record["item"]["trainer/global_step"]
            numbers = {k: v for k, v in record["item"].items() if isinstance(v, int | float)}
            logged.setdefault(step, {}).update(numbers)
        assert rows and list(logged) == sorted(logged)
        steps = [record["item"]["_step"] for record in landed[stage].records["history"]]
        assert steps == [*logged, max(logged) + 1]  # a row per step, and one of tables
        for row in rows:
            values = {name: float(text) for name, text in row.items() if text and name != "step"}
            assert {name: logged[int(row["step"])][name] for name in values} == pytest.approx(
                values, rel=1e-6
            )
    names = {record.get("glob_name"): record for record in landed["sft"].records["metric"]}
    assert names["*"]["step_metric"] == "trainer/global_step"


def test_the_summary_is_the_evaluation_and_the_cost(landed) -> None:
    for stage in ("pretrain", "sft"):
        run, summary = landed[stage].run, landed[stage].summary
        metrics = json.loads((run / "eval.json").read_text())["metrics"]
        measured = {name: cell for name, cell in metrics.items() if cell["value"] is not None}
        assert "bits_per_char" in measured
        for key, cell in (("eval", "value"), ("eval_low", "low"), ("eval_high", "high")):
            expected = {f"{key}/{name}": measured[name][cell] for name in measured}
            found = {name: v for name, v in summary.items() if name.startswith(f"{key}/")}
            assert found == pytest.approx(expected)
        cost = {f"cost/{name}": value for name, value in read_record(run)["cost"].items()}
        found = {name: v for name, v in summary.items() if name.startswith("cost/")}
        # the record's clock stops a little later
        assert found.pop("cost/seconds") == pytest.approx(cost.pop("cost/seconds"), abs=2)
        assert found == pytest.approx(cost) and "cost/tokens" in found
    random = json.loads((landed["pretrain"].run / "eval_random.json").read_text())["metrics"]
    summary = landed["pretrain"].summary
    assert summary["eval_random/bits_per_char"] == random["bits_per_char"]["value"]
    assert not any(name.startswith("eval_random/") for name in landed["sft"].summary)


def test_the_answers_of_every_stage_stand_side_by_side(landed) -> None:
    first, last = landed["pretrain"].run, landed["sft"].run
    samples = [*read_jsonl(first / "samples.jsonl"), *read_jsonl(last / "samples.jsonl")]
    n = len({sample["prompt_id"] for sample in samples})
    before, pretrain, sft = samples[:n], samples[n : 2 * n], samples[-n:]
    assert {s["step"] for s in before} == {0} and {s["step"] for s in pretrain + sft} == {3}
    for stage, asked in (("pretrain", [before, pretrain]), ("sft", [before, pretrain, sft])):
        table = landed[stage].tables["samples_by_stage"]
        assert table["columns"][::2] == ["prompt_id", "random", "pretrain", "sft"][: 1 + len(asked)]
        assert table["columns"][1::2] == ["prompt"] + [
            f"{c}: right" for c in table["columns"][2::2]
        ]
        assert table["data"] == [
            [rows[0][key] for key in ("prompt_id", "prompt")]
            + [row[key] for row in rows for key in ("answer", "right")]
            for rows in zip(*asked, strict=True)
        ]
        assert table["data"][0][1] == "What is an LLM?"
    history = landed["pretrain"].tables["samples"]
    assert history["columns"] == ["step", "prompt_id", "prompt", "answer", "stopped", "right"]
    assert history["data"] == [[s[c] for c in history["columns"]] for s in before + pretrain]


def test_the_ladder_table_has_the_rows_that_the_run_measured(landed) -> None:
    def cells(path: Path) -> dict[str, dict[str, Any]]:
        metrics = json.loads(path.read_text())["metrics"]
        return {name: cell for name, cell in metrics.items() if cell["value"] is not None}

    pretrain, sft = landed["pretrain"], landed["sft"]
    late = json.loads((sft.run / "ladder_eval.json").read_text())
    first, second = (read_record(landed[stage].run)["id"] for stage in ("pretrain", "sft"))
    expected = {
        "pretrain": [
            ("random", "", cells(pretrain.run / "eval_random.json")),
            ("pretrain", first, cells(pretrain.run / "eval.json")),
        ],
        "sft": [
            ("sft", second, cells(sft.run / "eval.json")),
            ("random", "", late["random"]),
            ("pretrain", first, late[first]),
        ],
    }
    for stage, rows in expected.items():
        table = landed[stage].tables["ladder"]
        assert table["columns"] == ["row", "run", "metric", "value", "low", "high", "n"]
        assert table["data"] == [
            [row, run, name, cell["value"], cell["low"], cell["high"], cell["n"]]
            for row, run, metrics in rows
            for name, cell in metrics.items()
        ]
    assert ["random", "kl_to_sft"] in [[row[0], row[2]] for row in sft.tables["ladder"]["data"]]


def test_the_weights_are_an_artifact_that_takes_no_second_place_on_disk(landed) -> None:
    for stage, parents in (("pretrain", {}), ("sft", {"policy": landed["pretrain"].run.name})):
        run = landed[stage].run
        models = [a for a in landed[stage].records["artifact"] if a["type"] == "model"]
        [model] = models
        assert model["name"] == run.name
        assert json.loads(model["metadata"]) == {
            "stage": stage,
            "parents": parents,
            "debug": "fast",
        }
        files = {entry["path"]: entry["local_path"] for entry in model["manifest"]["contents"]}
        names = {"model.safetensors", "config.json", "run.json"}
        assert set(files) == names | {"tokenizer.json", "tokenizer_config.json"}
        assert files["model.safetensors"] == str(run / "model.safetensors")
        assert all(Path(path).exists() for path in files.values())
    outputs = run.parent.parent
    copies = [p for p in (outputs / "wandb").rglob("*") if p.is_file() and p.suffix != ".wandb"]
    assert all(path.stat().st_size < (run / "model.safetensors").stat().st_size for path in copies)


def test_public_benchmarks_are_a_wandb_run_of_their_own(own_ladder, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(own_ladder / "wandb"))
    one = Benchmark(
        **dict(task="arc", version="1", metric="acc", filter="none", n=40, few_shot=5, limit=None),
        **dict(value=0.5, low=0.4, high=0.6, chance=0.25, better="higher", is_share=True),
        chat_template=False,
    )
    folders = {stage: RunStore(own_ladder).find(stage) for stage in ("pretrain", "sft", "grpo")}
    add_benchmarks(folders["pretrain"] / "benchmark.json", "1", [one])
    no_interval = replace(one, value=0.25, low=None, high=None)
    add_benchmarks(folders["pretrain"] / "benchmark_random.json", "1", [no_interval])
    add_benchmarks(folders["sft"] / "benchmark.json", "1", [one])
    write_record(folders["pretrain"], wandb="aaaaaaaa", config={"logger": {"name": "wandb"}})
    for folder in folders.values():  # sft was not logged, and grpo has no benchmarks
        log_benchmarks(folder, own_ladder)
    [folder] = (own_ladder / "wandb").glob("offline-run-*")
    found = read_back(folder, folders["pretrain"])
    [run] = found.records["run"]
    record = read_record(folders["pretrain"])
    assert run["run_id"] == "aaaaaaaa-benchmark" and run["display_name"] == record["name"]
    assert (run["run_group"], run["job_type"]) == (record["group"], "pretrain")
    assert run["tags"] == ["pretrain", "benchmark", "debug"]
    ours = {key: value for key, value in found.summary.items() if key.startswith("benchmark")}
    assert ours == {
        "benchmark/arc/acc/5-shot": 0.5,
        "benchmark_low/arc/acc/5-shot": 0.4,
        "benchmark_high/arc/acc/5-shot": 0.6,
        "benchmark_random/arc/acc/5-shot": 0.25,
    }
    assert "history" not in found.records and "wandb" not in read_record(folders["sft"])
