"""Rows of the table: which keys they have and why some are null, files, late joins, the command."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fourstage.batch import PairBatch
from fourstage.data.verify import FROM_FILE
from fourstage.errors import UserError
from fourstage.evaluation import suite
from fourstage.evaluation.__main__ import main as evaluate
from fourstage.evaluation.judges import Judges
from fourstage.evaluation.tables import (
    BY_REWARD,
    BY_SFT,
    evaluate_ancestors,
    evaluate_policy,
    evaluate_reward_model,
    stored_chats,
    stored_items,
    write_evaluation,
)
from fourstage.job import EvaluationConfig
from fourstage.settings import build
from tests.evaluation.test_judges import ramp
from tests.heldout import CONFIG, HELDOUT, NOTHING, changed
from tests.stages.tiny import TINY, TOKENIZER, distance, make_policy, make_scalar, weights

FIXED = [name for name in suite.DEFINITIONS if not name.startswith("pair_")]  # of every policy
DENSE = replace(TINY, num_experts=1, top_k=1)
AGAIN = "(to evaluate again: python -m fourstage evaluation run=NAME ladder=true)"
NO_SFT, NO_REWARD = "no sft policy on this ladder yet", "no reward model on this ladder yet"


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def of_set(items, name):
    return [item for item in items if item["set"] == name]


def nulls(table):
    return {name: cell["why"] for name, cell in table.items() if cell["value"] is None}


class Evaluated:
    """A policy's evaluation with a reward model, an sft policy, its answers, and a parent."""

    def __init__(self) -> None:
        self.reward, self.reference = make_scalar(), make_policy(seed=7)
        _, self.sft_items = evaluate_policy(
            make_policy(seed=7), TOKENIZER, HELDOUT, CONFIG, Judges(reference=self.reference)
        )
        self.metrics, self.items = self.again()

    def again(self, **changes):
        judges = Judges(self.reward, self.reference, of_set(self.sft_items, "chat"))
        config, parent = changed(**changes), make_policy(seed=3)
        return evaluate_policy(make_policy(), TOKENIZER, HELDOUT, config, judges, parent)


@pytest.fixture(scope="module")
def done() -> Evaluated:
    return Evaluated()


# --- the whole suite


def test_the_names_and_counts_of_the_suite(done):
    tasks = ("", f"/{FROM_FILE}", "/difficulty_medium")  # the questions are of one length
    answers = dict.fromkeys(
        [name for name, d in suite.DEFINITIONS.items() if d.sets[0] in ("chat", "chat_greedy")], 7
    )
    answers |= dict.fromkeys([name for name in FIXED if name.startswith("knowledge")], 1)
    blocks = dict.fromkeys([name for name in FIXED if name.startswith("router")], 4)
    counts = {name: metric["n"] for name, metric in done.metrics.items()}
    assert counts.pop("distinct_2") <= counts.pop("distinct_1") <= 7
    assert counts == {
        **{name: n for name, n in answers.items() if not name.startswith("distinct")},
        **blocks,
        "bits_per_char": 4,
        "bits_per_byte": 4,
        "well_formed": 12,
        **{f"reasoning_accuracy{task}": 5 for task in tasks},
        **{f"pass_at_{k}{task}": 3 for task in tasks for k in (1, 2)},  # two samples a problem
    }
    for metric in done.metrics.values():
        assert list(metric) == ["value", "n", "low", "high"]
        assert metric["low"] <= metric["value"] <= metric["high"]


def test_the_table_is_made_of_the_stored_items(done):
    stored = [json.loads(json.dumps(item)) for item in done.items]
    assert suite.metrics(stored, {}, CONFIG.seed) == done.metrics


def test_items_say_what_the_judges_found(done):
    for item in of_set(done.items, "chat"):
        assert {"reward_model_score", "kl_to_sft", "win", "win_learned"} <= item.keys()
    assert all(item["drift"] is not None for item in of_set(done.items, "router"))
    assert done.metrics["router_drift"]["value"] > 0


def test_the_sft_policy_ties_with_itself():
    policy = make_policy()
    judges = Judges(reference=policy)
    metrics, items = evaluate_policy(policy, TOKENIZER, HELDOUT, CONFIG, judges, policy)
    assert metrics["kl_to_sft"]["value"] == pytest.approx(0.0, abs=1e-3)
    assert (metrics["win_rate"]["value"], metrics["win_rate"]["n"]) == (0.5, 7)
    assert metrics["win_rate_ties"]["value"] == 1.0
    assert metrics["router_drift"]["value"] == 0.0
    assert nulls(metrics) == dict.fromkeys(BY_REWARD, NO_REWARD)


def test_random_weights_have_the_same_keys(done):
    metrics, items = evaluate_policy(make_policy(5), TOKENIZER, HELDOUT, CONFIG)
    assert metrics.keys() == done.metrics.keys()
    whys = nulls(metrics)
    whys.pop("distinct_2", None)  # whether gibberish has two words is chance
    assert whys == {
        **dict.fromkeys(BY_SFT, NO_SFT),
        **dict.fromkeys(BY_REWARD, NO_REWARD),
        "router_drift": "random weights have no parent",
    }


def test_evaluating_again_gives_the_same_bytes(done, tmp_path):
    for name, (metrics, items) in {"one": (done.metrics, done.items), "two": done.again()}.items():
        write_evaluation(tmp_path / name, metrics, items, seed=0)
    for file in ("eval.json", "eval_items.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_another_seed_draws_other_answers_and_its_intervals_cover_the_first(done):
    metrics, items = done.again(seed=1)
    sides = [[i["answer"] for i in of_set(some, "chat")] for some in (done.items, items)]
    assert sides[0] != sides[1]
    for name in ("corpus", "router", "chat_greedy", "reasoning"):
        assert of_set(done.items, name) == of_set(items, name)  # nothing of these is drawn
    assert metrics.keys() == done.metrics.keys()
    for name, cell in metrics.items():
        other = done.metrics[name]
        assert cell["low"] <= other["high"] and other["low"] <= cell["high"], name


def test_the_config_says_how_many(done):
    metrics, items = done.again(
        max_prompts=2, max_problems=3, max_new_tokens=4, samples=4, max_sampled_problems=2
    )
    assert metrics["true_score"]["n"] == metrics["chat_exact"]["n"] == 2
    assert metrics["reasoning_accuracy"]["n"] == 3
    assert metrics["pass_at_4"]["n"] == 2 and "pass_at_8" not in metrics
    assert max(len(item["ids"]) for item in of_set(items, "chat")) <= 4


def test_evaluation_leaves_the_networks_alone():
    policy, reward = make_policy().train(), make_scalar()
    before = weights(policy), weights(reward)
    judges = Judges(reward, policy)
    evaluate_policy(policy, TOKENIZER, HELDOUT, CONFIG, judges, parent=make_policy(2))
    assert policy.training
    assert policy.load_LE is None
    assert distance(before[0], weights(policy)) == 0 == distance(before[1], weights(reward))


# --- what cannot be measured


def test_what_the_data_lacks_is_null_with_the_reason():
    metrics, items = evaluate_policy(make_policy(), TOKENIZER, NOTHING, CONFIG)
    assert items == []
    whys = nulls(metrics)
    assert list(whys) == list(metrics) == [name for name in FIXED if name != "knowledge_completed"]
    for name, why in whys.items():
        if name.startswith("bits") or name.startswith("router"):
            assert why == "no corpus: why"
        elif name.startswith(("reasoning", "pass_at")):
            assert why == "no problems: why"
        else:
            assert why == "no chats: why"


@pytest.mark.parametrize("has_true_score", [True, False])
def test_without_a_known_rule_only_the_learned_one_judges(has_true_score):
    heldout = replace(HELDOUT, corpus="no", problems="no", has_true_score=has_true_score)
    policy = make_policy()
    judges = Judges(make_scalar(), policy)
    metrics, items = evaluate_policy(policy, TOKENIZER, heldout, CONFIG, judges, policy)
    ruled = ("true_score", "friendly", "win_rate", "win_rate_ties")
    whys = nulls(metrics)
    for name in ruled:
        assert (name in whys) != has_true_score
        assert has_true_score or "data=embedded" in whys[name]
    assert metrics["win_rate_learned"]["value"] == 0.5
    assert (of_set(items, "chat")[0]["true_score"] is None) != has_true_score
    assert metrics["router_drift"]["value"] == 0.0  # of the conversations
    assert metrics["well_formed"]["n"] == 7


def test_a_dense_model_has_no_router():
    dense = make_policy(model=DENSE)
    metrics, _ = evaluate_policy(dense, TOKENIZER, HELDOUT, CONFIG, parent=dense)
    whys = nulls(metrics)
    routers = [name for name in FIXED if name.startswith("router")]
    assert {whys[name] for name in routers} == {"a dense model has no router"}
    assert metrics["bits_per_char"]["n"] == 4


def test_a_parent_that_is_gone_leaves_the_drift_open():
    gone = "the parent run is not there any more"
    metrics, _ = evaluate_policy(make_policy(), TOKENIZER, HELDOUT, CONFIG, parent=gone)
    assert nulls(metrics)["router_drift"] == gone
    assert metrics["router_entropy"]["n"] == 4


@pytest.mark.parametrize("name", [name for name in vars(CONFIG) if name != "seed"])
def test_a_bad_setting_is_one_line(name):
    with pytest.raises(UserError) as error:
        build(EvaluationConfig, {**vars(CONFIG), name: 0}, "evaluation")
    assert one_line(error) == f"evaluation.{name}: must be at least 1, got 0"


def test_a_record_of_suite_1_names_no_samples():
    old = {k: v for k, v in vars(CONFIG).items() if "sample" not in k}
    assert build(EvaluationConfig, old, "evaluation").samples == 8


# --- reward models


def test_pair_accuracy_by_hand():
    """Last tokens 3 against 4, 2 against 0, 4 against 4 (a tie is not right), 1 against 2."""
    batch = PairBatch(
        chosen_ids=torch.tensor([[3], [2], [4], [1]]),
        chosen_len=torch.ones(4, dtype=torch.long),
        rejected_ids=torch.tensor([[4], [0], [4], [2]]),
        rejected_len=torch.ones(4, dtype=torch.long),
    )
    reward = ramp(0.0, 1.0, 2.0, 3.0, 4.0)
    metrics, items = evaluate_reward_model(reward, [batch, batch], CONFIG)
    assert metrics.keys() == {"pair_accuracy", "pair_margin"}
    assert (metrics["pair_accuracy"]["value"], metrics["pair_accuracy"]["n"]) == (0.25, 8)
    assert metrics["pair_margin"]["value"] == 0.0
    metrics, items = evaluate_reward_model(reward, [batch], changed(max_pairs=2))
    assert metrics["pair_accuracy"]["value"] == metrics["pair_margin"]["value"] == 0.5


def test_no_pairs_is_null():
    metrics, items = evaluate_reward_model(make_scalar(), [], CONFIG)
    assert nulls(metrics) == dict.fromkeys(("pair_accuracy", "pair_margin"), "no held-out pairs")
    assert items == []


# --- files


def test_files_round_trip(tmp_path, done):
    odd = [{"set": "chat", "id": 1, "answer": "new\nline, \u2028 separator, \x85 and \u2603"}]
    for suffix, items in (("", done.items), ("_random", odd)):
        write_evaluation(tmp_path, done.metrics, items, seed=5, suffix=suffix)
        assert stored_items(tmp_path, suffix) == items
        summary = json.loads((tmp_path / f"eval{suffix}.json").read_text())
        assert summary == {"suite": "6", "seed": 5, "metrics": done.metrics}
    assert len(list(tmp_path.iterdir())) == 4  # no temporary file is left
    assert stored_items(tmp_path, "_other") == f"{tmp_path.name} has no eval_other.json"


def of_suite_1(folder):
    path = folder / "eval.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "suite": "1"}))


def test_items_of_another_suite_or_broken_ones_are_not_read(tmp_path, done):
    folder = tmp_path / "sft-a"
    write_evaluation(folder, done.metrics, done.items, seed=0)
    assert [item["set"] for item in stored_chats(folder)] == ["chat"] * 7
    (folder / "eval_items.jsonl").write_text('{"set": "cha')
    assert stored_items(folder) == "sft-a/eval_items.jsonl is missing or broken"
    of_suite_1(folder)
    assert stored_chats(folder) == f"sft-a/eval.json is of suite 1, not 6 {AGAIN}"
    (folder / "eval.json").write_text("{")
    assert stored_items(folder) == "sft-a has no eval.json"
    write_evaluation(folder, {}, [{"set": "corpus", "id": 0}], seed=0)
    assert stored_chats(folder) == "sft-a/eval_items.jsonl has no chat answers"


def test_a_measured_cell_is_not_lost_with_its_data(tmp_path, done):
    """The corpus was moved away since: evaluating again must not replace the value by nothing."""
    write_evaluation(tmp_path, done.metrics, done.items, seed=0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    lost = {**done.metrics, "bits_per_char": suite.missing("no such file")}
    with pytest.raises(UserError) as error:
        write_evaluation(tmp_path, lost, [], seed=0)
    assert "eval.json has a value for bits_per_char" in one_line(error)
    assert "(no such file)" in str(error.value)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_evaluation(tmp_path / "new", lost, [], seed=0)
    write_evaluation(tmp_path / "new", lost, [], seed=0)  # null as before


# --- what later models say of earlier rows


@pytest.fixture
def rows(tmp_path, done):
    """Random weights and pretrain with the policies' answers, without what judges say of them."""
    folder = tmp_path / "pretrain-p"
    for suffix, policy in (("_random", make_policy(4)), ("", make_policy(1))):
        metrics, items = evaluate_policy(policy, TOKENIZER, HELDOUT, CONFIG)
        write_evaluation(folder, metrics, items, seed=0, suffix=suffix)
    return {"random": (folder, "_random"), "p": (folder, "")}


def test_what_sft_and_reward_say_later_is_what_they_say_at_once(rows, done):
    """The pretrain row holds the policy of `done`, whose judges were known from the start."""
    chats = of_set(done.sft_items, "chat")
    by_sft = Judges(reference=done.reference, sft_chats=chats)
    by_reward = Judges(reward=done.reward, sft_chats=chats)
    for judges, names in ((by_sft, BY_SFT), (by_reward, BY_REWARD)):
        found, late = evaluate_ancestors(rows, TOKENIZER, 0, judges, names)
        assert list(found) == ["random", "p"] and len(late) == 14
        assert found["p"] == {name: done.metrics[name] for name in names}
        assert found["random"].keys() == found["p"].keys()
        assert found["random"] != found["p"]
        fields = {"kl_to_sft", "win"} if names is BY_SFT else {"reward_model_score", "win_learned"}
        assert {frozenset(item) for item in late} == {frozenset({"row", "set", "id"} | fields)}
        for name in names:  # the late items give the late metrics
            items = suite.joined(stored_items(*rows["random"]), late[:7])
            assert suite.metrics(items, {}, 0)[name] == found["random"][name]


def test_rows_of_another_suite_are_not_judged_and_a_line_says_so(rows, done, capsys):
    of_suite_1(rows["p"][0])
    rows["gone"] = (rows["p"][0].parent / "sft-gone", "")
    judges = Judges(reward=done.reward, sft_chats=NO_SFT)
    found, late = evaluate_ancestors(rows, TOKENIZER, 0, judges, BY_REWARD)
    assert list(found) == ["random"] and {item["row"] for item in late} == {"random"}
    assert found["random"]["win_rate_learned"] == {"value": None, "why": NO_SFT}
    assert capsys.readouterr().out.splitlines() == [
        f"  not judged: pretrain-p/eval.json is of suite 1, not 6 {AGAIN}",
        "  not judged: sft-gone has no eval.json",
    ]


def test_sft_answers_of_another_suite_leave_the_wins_open(done, tmp_path):
    write_evaluation(tmp_path / "sft-a", {}, done.sft_items, seed=0)
    of_suite_1(tmp_path / "sft-a")
    judges = Judges(done.reward, done.reference, stored_chats(tmp_path / "sft-a"))
    metrics, _ = evaluate_policy(make_policy(), TOKENIZER, HELDOUT, CONFIG, judges, make_policy(3))
    why = f"sft-a/eval.json is of suite 1, not 6 {AGAIN}"
    assert nulls(metrics) == dict.fromkeys(("win_rate", "win_rate_ties", "win_rate_learned"), why)
    assert metrics["kl_to_sft"] == done.metrics["kl_to_sft"]


def test_a_row_without_chats_has_nothing_to_judge(tmp_path):
    write_evaluation(
        tmp_path, {}, [{"set": "corpus", "id": 0, "bits": 1.0, "chars": 1, "bytes": 1}], seed=0
    )
    judges = Judges(reward=make_scalar())
    found, late = evaluate_ancestors({"a": (tmp_path, "")}, TOKENIZER, 0, judges, BY_REWARD)
    assert late == []
    assert nulls(found["a"]) == dict.fromkeys(BY_REWARD, "the data has no chat prompts")


# --- the command


@pytest.mark.parametrize(
    "arguments",
    [[], ["sft"], ["run=sft", "seed=1"], ["outputs=x"], ["run="], ["run=a", "max_problems=9"]],
)
def test_the_command_says_how_it_is_used(arguments):
    with pytest.raises(UserError) as error:
        evaluate(arguments)
    assert one_line(error) == "name a run, as in run=sft, and no other keys than --help lists"


@pytest.mark.parametrize("value", ["maybe", "True", "1", ""])
def test_ladder_is_true_or_false(value, tmp_path):
    with pytest.raises(UserError) as error:
        evaluate(["run=sft", f"ladder={value}", f"outputs={tmp_path}"])
    assert one_line(error) == f"ladder: expected true or false, got {value!r}"


def test_a_run_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError) as error:
        evaluate(["run=nowhere", f"outputs={tmp_path}"])
    assert "nowhere" in one_line(error)
