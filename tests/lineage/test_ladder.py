"""The whole ladder for real, in this process: lineage, files, evaluation, report, reuse."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from fourstage.errors import UserError
from fourstage.evaluation import suite
from fourstage.evaluation import tables as evaluation
from fourstage.evaluation.__main__ import main as evaluate
from fourstage.files import read_jsonl
from fourstage.ladder import LADDER
from fourstage.lineage.climb import climb
from fourstage.lineage.messages import gain
from fourstage.model.weights import load_policy, load_scalar
from fourstage.report import write_report
from fourstage.runs.records import read_record, write_record
from fourstage.runs.store import RunStore
from tests.fakes import QUICK, config


def folder(outputs: Path, stage: str) -> Path:
    return RunStore(outputs).find(stage)


def metrics(outputs: Path, stage: str) -> dict[str, list[tuple[int, float]]]:
    with open(folder(outputs, stage) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name for row in rows for name in row} - {"step"}
    return {
        name: [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        for name in columns
    }


def test_each_run_names_its_parents_and_nothing_else_lies_there(ladder) -> None:
    records = {stage: read_record(folder(ladder, stage)) for stage in LADDER}
    ids = {stage: record["id"] for stage, record in records.items()}
    assert {p.name for p in (ladder / "runs").iterdir()} == {f"{s}-{ids[s]}" for s in LADDER}
    assert [records[stage]["parents"] for stage in LADDER] == [
        {},
        {"policy": ids["pretrain"]},
        {"policy": ids["sft"]},
        {"policy": ids["sft"], "reward": ids["reward"]},
        {"policy": ids["ppo"]},
    ]
    assert all(r["status"] == "finished" and r["debug"] == "fast" for r in records.values())
    assert {record["group"] for record in records.values()} == {ids["pretrain"]}
    assert [records[stage]["cost"]["steps"] for stage in LADDER] == [3, 3, 3, 2, 2]


def test_the_files_of_each_stage(ladder) -> None:
    always = {"run.json", "metrics.csv", "eval.json", "eval_items.jsonl", "model.safetensors"}
    always |= {"config.json", "tokenizer.json", "tokenizer_config.json"}
    late = {"ladder_eval.json", "ladder_eval_items.jsonl"}
    extra = {
        "pretrain": {"samples.jsonl", "eval_random.json", "eval_items_random.jsonl"},
        "sft": {"samples.jsonl", *late},
        "reward": {"pairs.jsonl", "pairs_heldout.jsonl", *late},
        "ppo": {"samples.jsonl"},
        "grpo": {"samples.jsonl"},
    }
    for stage in LADDER:
        assert {p.name for p in folder(ladder, stage).iterdir()} == always | extra[stage], stage


def test_every_stage_starts_from_its_parents_weights_and_changes_them(ladder) -> None:
    weights = {
        stage: load_policy(folder(ladder, stage))[0].state_dict()
        for stage in ("pretrain", "sft", "ppo", "grpo")
    }
    for child, parent in (("sft", "pretrain"), ("ppo", "sft")):
        moved = [(weights[child][n] - w).abs().max().item() for n, w in weights[parent].items()]
        # a few steps of AdamW move no weight by more than a few learning rates
        assert 0 < max(moved) < 0.02, child
    reward, _ = load_scalar(folder(ladder, "reward"))
    assert torch.isfinite(reward.head.weight).all()


def test_pairs_are_two_different_answers_to_train_prompts(ladder) -> None:
    place = folder(ladder, "reward")
    train, heldout = (read_jsonl(place / n) for n in ("pairs.jsonl", "pairs_heldout.jsonl"))
    assert train and heldout
    keys = {"prompt", "chosen", "rejected"}
    assert all(keys <= set(row) <= keys | {"unfinished"} for row in train + heldout)
    cut = [row for row in train + heldout if "unfinished" in row]
    assert cut  # after three steps hardly an answer stops
    assert all(row["chosen"] != row["rejected"] for row in train + heldout)
    prompts = [{json.dumps(row["prompt"]) for row in side} for side in (train, heldout)]
    assert not prompts[0] & prompts[1]


def test_metrics_have_one_validation_loss_and_it_is_the_final_weights(ladder) -> None:
    for stage in ("pretrain", "sft"):
        columns = metrics(ladder, stage)
        assert [n for n in columns if n.startswith("val") and n.endswith("loss")] == ["val/loss"]
        assert columns["val/loss"][-1][0] == 3
    bits = metrics(ladder, "pretrain")["val/bits_per_char"][-1][1]
    nats = metrics(ladder, "pretrain")["val/loss"][-1][1]
    assert bits == pytest.approx(nats / math.log(2), rel=0.05)  # <bos> has no character
    evaluated = json.loads((folder(ladder, "pretrain") / "eval.json").read_text())
    assert bits == pytest.approx(evaluated["metrics"]["bits_per_char"]["value"], rel=0.02)


def test_each_stage_logs_the_health_of_its_routers(ladder) -> None:
    for stage in LADDER:
        columns = metrics(ladder, stage)
        for name in ("load_entropy", "max_over_mean", "dead_experts", "bias_spread", "drift"):
            for layer in ("", "/layer0", "/layer1"):
                assert len(columns[f"router/{name}{layer}"]) == len(columns["speed/tflops"])


def test_each_run_knows_what_it_cost(ladder) -> None:
    for stage in LADDER:
        cost = read_record(folder(ladder, stage))["cost"]
        assert cost["seconds"] > cost["train_seconds"] + cost["eval_seconds"] - 0.2  # rounded
        assert min(cost["tokens"], cost["flops"], cost["tokens_per_s"]) > 0
        assert ("tokens_generated" in cost) == (stage in ("ppo", "grpo"))
        assert "mfu" not in cost  # a CPU's peak is not known


def test_the_preference_stages_log_what_makes_them_believable(ladder) -> None:
    ppo = metrics(ladder, "ppo")
    wanted = "score true_score kl entropy approx_kl clip_low clip_high ratio_mean ratio_max "
    wanted += "value_loss explained_variance answer_length stop_rate sampler_gap"
    assert {f"train/{name}" for name in wanted.split()} <= set(ppo)
    assert ppo["train/kl"][0][1] == pytest.approx(0, abs=1e-4)  # the first policy is the reference
    grpo = metrics(ladder, "grpo")
    wanted = "reward reward_correct reward_form reward_std zero_spread kl entropy clip_low "
    wanted += "clip_high answer_length stop_rate pass_at_1 pass_at_2 sampler_gap"
    assert {f"train/{name}" for name in wanted.split()} <= set(grpo)
    for columns in (ppo, grpo):
        assert max(gap for _, gap in columns["train/sampler_gap"]) < 1e-4


def test_the_same_prompts_are_answered_by_every_stage(ladder) -> None:
    asked = {}
    for stage in ("pretrain", "sft", "ppo", "grpo"):
        rows = read_jsonl(folder(ladder, stage) / "samples.jsonl")
        last = max(row["step"] for row in rows)
        asked[stage] = [row["prompt"] for row in rows if row["step"] == last]
        assert rows[0]["prompt"] == "What is an LLM?"
        assert (rows[0]["step"] == 0) == (stage == "pretrain")  # the row of random weights
    assert len({tuple(prompts) for prompts in asked.values()}) == 1


def test_the_report_has_a_row_a_stage_with_intervals(ladder) -> None:
    place = write_report(ladder)
    table = json.loads((place / "stages.json").read_text())
    rows = {row["stage"]: row for row in table["rows"]}
    assert list(rows) == ["random", *LADDER] and table["suite"] == evaluation.SUITE
    for stage in ("random", "pretrain", "sft", "ppo", "grpo"):
        for name in (
            "bits_per_char",
            "well_formed",
            "reasoning_accuracy",
            "true_score",
            "reward_model_score",  # filled in later, for the rows before the reward stage
            "kl_to_sft",
        ):
            cell = rows[stage]["metrics"][name]
            assert cell["low"] <= cell["value"] <= cell["high"] and cell["n"] > 0, (stage, name)
    assert set(rows["reward"]["metrics"]) == {"pair_accuracy", "pair_margin"}
    assert rows["sft"]["metrics"]["kl_to_sft"]["value"] == pytest.approx(0, abs=1e-3)
    assert "What is an LLM?" in (place / "report.md").read_text()


def evaluated(outputs: Path, stage: str, suffix: str = "") -> dict[str, dict]:
    """A row's own metrics with what later models say of it."""
    found = json.loads((folder(outputs, stage) / f"eval{suffix}.json").read_text())["metrics"]
    row = "random" if suffix else read_record(folder(outputs, stage))["id"]
    for judge in ("sft", "reward"):
        found |= json.loads((folder(outputs, judge) / "ladder_eval.json").read_text()).get(row, {})
    return found


def test_the_same_keys_after_every_stage_and_for_random_weights(ladder) -> None:
    rows = {stage: evaluated(ladder, stage) for stage in ("pretrain", "sft", "ppo", "grpo")}
    rows["random"] = evaluated(ladder, "pretrain", "_random")
    for stage, cells in rows.items():
        assert cells.keys() == rows["grpo"].keys(), stage
        null = {name for name, cell in cells.items() if cell["value"] is None}
        # eight tokens of gibberish may have no second word; nothing came before random weights
        assert null - {"distinct_2"} == ({"router_drift"} if stage == "random" else set()), stage
    assert {"pass_at_1", "pass_at_2/chain_sum", "chat_contained", "router_dead"} <= cells.keys()
    assert "pass_at_4" not in cells  # evaluation.samples is 2
    assert (rows["sft"]["win_rate"]["value"], rows["sft"]["win_rate"]["n"]) == (0.5, 4)
    assert rows["sft"]["win_rate_learned"]["value"] == 0.5
    assert 0 < rows["pretrain"]["router_drift"]["value"] < 1  # three steps from the random weights


def test_the_late_items_give_the_late_metrics(ladder) -> None:
    pretrain = folder(ladder, "pretrain")
    items = read_jsonl(pretrain / "eval_items_random.jsonl")
    for judge in ("sft", "reward"):
        late = read_jsonl(folder(ladder, judge) / "ladder_eval_items.jsonl")
        items = suite.joined(items, [item for item in late if item["row"] == "random"])
    reasons = {"router_drift": "random weights have no parent", "distinct_2": "no two words"}
    got = suite.metrics(items, reasons, seed=0)
    expected = evaluated(ladder, "pretrain", "_random")
    assert {n: m["value"] for n, m in got.items()} == {n: m["value"] for n, m in expected.items()}


def evaluations(*places: Path) -> dict[str, bytes]:
    paths = (path for place in places for path in place.glob("*eval*"))
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in paths}


def test_evaluating_again_gives_the_same_bytes(ladder) -> None:
    for stage in ("pretrain", "reward", "grpo"):
        place = folder(ladder, stage)
        before = evaluations(place)
        for path in place.glob("*eval*"):
            path.unlink()
        torch.set_num_threads(2)  # the run had one, which the evaluation takes from its record
        evaluate([f"run={stage}", f"outputs={ladder}"])
        assert torch.get_num_threads() == 1
        assert evaluations(place) == before, stage


def test_other_settings_are_taken_and_recorded(ladder, capsys) -> None:
    place = folder(ladder, "sft")
    before = evaluations(place)
    call = ["run=sft", f"outputs={ladder}"]
    evaluate([*call, "evaluation.max_problems=2"])
    assert evaluated(ladder, "sft")["reasoning_accuracy"]["n"] == 2
    fewer = evaluations(place)
    evaluate(call)  # as recorded
    assert evaluations(place) == fewer
    with pytest.raises(UserError, match="^evaluation.max_problems: expected a whole number, got"):
        evaluate([*call, "evaluation.max_problems=all"])
    evaluate([*call, "evaluation.max_problems=4"])
    assert evaluations(place) == before
    assert "sft: evaluating: held-out text\nsft: evaluated in 0:0" in capsys.readouterr().err


def test_a_ladder_is_evaluated_on_what_its_last_run_holds_out(ladder, capsys) -> None:
    places = [folder(ladder, stage) for stage in LADDER]
    before, record = evaluations(*places), read_record(places[0])
    write_report(ladder, "grpo")
    differ = "Not all rows were evaluated alike"
    assert differ not in (ladder / "report" / "report.md").read_text()
    chat = {**record["config"]["data"]["chat"], "max_answer_chars": 30}
    write_record(places[0], config={"data": {**record["config"]["data"], "chat": chat}})
    for path in places[0].glob("eval*.json"):
        path.unlink()
    fewer = ["evaluation.max_problems=2", "evaluation.max_prompts=2"]
    evaluate(["run=pretrain", f"outputs={ladder}", *fewer])
    write_report(ladder, "grpo")
    said = (ladder / "report" / "report.md").read_text()
    assert differ in said and "Every row was measured" not in said
    assert "reasoning: sft 4, pretrain 2, 2 of them the same" in said
    assert f"run={places[-1].name} ladder=true" in said
    assert " (95 % intervals; other held-out items)" in gain(ladder, places[1].name)

    evaluate(["run=grpo", "ladder=true", f"outputs={ladder}"])
    assert capsys.readouterr().out.endswith(f"{gain(ladder, places[-1].name)}\n")
    assert evaluations(*places) == before
    assert read_record(places[0])["config"] == record["config"]
    assert "keeps its own" not in capsys.readouterr().err

    grown = {**record["data"], "digest": "of another text"}
    write_record(places[0], data=grown)
    with pytest.raises(UserError, match="the corpus of pretrain-|its corpus has changed"):
        evaluate(["run=grpo", "ladder=true", f"outputs={ladder}"])
    name = (
        f"{places[0].name} keeps its own held-out data: under that of {places[-1].name} its corpus"
    )
    assert name in capsys.readouterr().err
    write_record(places[0], data=record["data"])


def test_an_ancestor_of_other_data_keeps_its_held_out_items(ladder, capsys) -> None:
    places = [folder(ladder, stage) for stage in LADDER]
    before, record = evaluations(*places), read_record(places[-1])
    data = record["config"]["data"]
    nothing = {**data, "name": "files"}  # no path: no corpus, no chat
    write_record(places[-1], config={"data": nothing})
    reasons = "there is no corpus to compare with its own (data.corpus.path names one)"
    with pytest.raises(UserError):  # grpo itself has nothing to be asked now
        evaluate(["run=grpo", "ladder=true", f"outputs={ladder}"])
    said = capsys.readouterr().err
    assert f"{places[0].name} keeps its own held-out data: under that of {places[-1].name}" in said
    assert reasons in said
    write_record(places[-1], config={"data": data})
    assert evaluations(*places) == before


def test_rows_of_other_settings_are_said_not_to_compare(ladder) -> None:
    place = folder(ladder, "sft")
    before, config = evaluations(place), read_record(place)["config"]["evaluation"]
    more = config["max_new_tokens"] + 8
    evaluate(["run=sft", f"outputs={ladder}", f"evaluation.max_new_tokens={more}"])
    write_report(ladder, "grpo")
    said = (ladder / "report" / "report.md").read_text()
    assert f"max_new_tokens {config['max_new_tokens']} before, {more} after" in said
    assert "Every row was measured" not in said
    room = "leave no room for a prompt in model.max_seq_len"
    with pytest.raises(UserError, match=room):
        evaluate(["run=sft", f"outputs={ladder}", "evaluation.max_new_tokens=100000"])
    evaluate(["run=grpo", "ladder=true", f"outputs={ladder}"])
    assert evaluations(place) == before


def test_what_other_data_would_say_replaces_no_evaluation(ladder) -> None:
    """A text that has grown holds out what the run trained on, or an ancestor."""
    before = evaluations(folder(ladder, "sft"))
    for stage, whose in (("sft", "its chat"), ("pretrain", "the corpus of pretrain-.*")):
        place = folder(ladder, stage)
        digest = read_record(place)["data"]["digest"]
        write_record(place, data={"digest": "of the old file"})
        with pytest.raises(UserError, match=f"sft-.*: {whose} has changed since .* is kept; "):
            evaluate(["run=sft", f"outputs={ladder}"])
        write_record(place, data={"digest": digest})
    assert evaluations(folder(ladder, "sft")) == before


def test_a_ladder_of_an_older_suite_becomes_one_of_this(ladder, capsys) -> None:
    """Evaluated from the bottom up, so that the later stages find rows that they can judge."""
    places = [folder(ladder, stage) for stage in LADDER]
    before = evaluations(*places)
    for place in places:
        for path in (*place.glob("eval.json"), *place.glob("eval_random.json")):
            path.write_text(json.dumps({**json.loads(path.read_text()), "suite": "1"}))
        for path in (*place.glob("eval_items*"), *place.glob("ladder_eval*")):
            path.write_text("{}")
    evaluate(["run=grpo", "ladder=true", f"outputs={ladder}"])
    assert evaluations(*places) == before
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said if line.startswith("evaluated")] == [
        f"{place.name}:" for place in places
    ]
    assert not [line for line in said if "not judged" in line]


def test_the_same_command_reuses_everything_and_a_new_setting_its_ancestors(ladder) -> None:
    def trained(*overrides: str) -> list[str]:
        def note(job):
            stages.append(job.stage)
            (job.folder / "model.safetensors").write_text("")
            return {}

        stages: list[str] = []
        climb(config(*QUICK, f"outputs={ladder}", *overrides), train=note)
        return stages

    assert trained("stage=grpo") == []
    assert trained("stage=grpo", "stages.grpo.lr=0.001") == ["grpo"]
    assert trained("stage=ppo", "stages.reward.margin=0.5") == ["reward", "ppo"]
    for run in ("grpo", "ppo", "reward"):
        store = RunStore(ladder)
        store.remove(store.find(run), force=True)  # the made-up ones are the latest
    assert trained("stage=grpo") == []
