"""The frozen suite: intervals against published numbers, items against direct computations."""

from __future__ import annotations

import json
from copy import deepcopy
from math import log2

import numpy as np
import pytest
import torch

from fourstage import evaluation as module
from fourstage.batch import PairBatch
from fourstage.data.records import Conversation, Problem
from fourstage.errors import UserError
from fourstage.evaluation import (
    EvaluationConfig,
    HeldOut,
    bootstrap_mean,
    bootstrap_ratio,
    corpus_items,
    evaluate_ancestors,
    evaluate_policy,
    evaluate_reward_model,
    problem_items,
    read_items,
    wilson,
    write_evaluation,
)
from fourstage.generate import Generation
from fourstage.rl.rewards import true_score, well_formed
from fourstage.rl.rollout import final_scores, pack, score_tokens
from fourstage.settings import build
from fourstage.verify import FROM_FILE
from tests.stages.tiny import TINY, TOKENIZER, distance, make_policy, make_scalar, weights

CONFIG = EvaluationConfig(seed=0, max_prompts=50, max_problems=50, max_pairs=50, max_new_tokens=12)


def chat(text: str) -> Conversation:
    turns = [("user", text), ("assistant", "It is.")]
    return Conversation([{"role": role, "content": content} for role, content in turns])


def problem(question: str, answer: str, task: str = FROM_FILE) -> Problem:
    return Problem(question, answer, task, None, {"answer": answer})


HELDOUT = HeldOut(
    corpus=["A short text.", "Another one, which is a little longer than that: " + "word " * 30],
    chats=[chat(f"Question {i}?") for i in range(7)],
    problems=[problem(f"{i} + 1 = ?", str(i + 1)) for i in range(5)],
    has_true_score=True,
)
NOTHING = HeldOut("no corpus: why", "no chats: why", "no problems: why", has_true_score=False)


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- intervals


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_intervals(successes, n, low, high):
    got = wilson(successes, n)
    assert got["value"] == pytest.approx(successes / n, abs=1e-6)
    assert got["n"] == n
    assert (round(got["low"], 4), round(got["high"], 4)) == (low, high)
    mirrored = wilson(n - successes, n)
    assert mirrored["low"] == pytest.approx(1 - got["high"], abs=2e-6)


@pytest.mark.parametrize("n", [1, 7, 400])
def test_wilson_stays_within_0_and_1(n):
    none, every = wilson(0, n), wilson(n, n)
    assert none["low"] == none["value"] == 0.0 < none["high"] < 1
    assert every["high"] == every["value"] == 1.0 > every["low"] > 0


def test_bootstrap_intervals_cover_the_mean_about_95_times_in_100(monkeypatch):
    """400 samples of 60 from a skewed distribution with mean 1; a percentile interval is a little
    narrow there."""
    monkeypatch.setattr(module, "BOOTSTRAPS", 500)
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(400):
        got = bootstrap_mean(rng.gamma(4.0, 0.25, 60), seed)
        covered += got["low"] <= 1.0 <= got["high"]
    assert 0.92 < covered / 400 < 0.97


def test_bootstrap_is_seeded_and_counts_items():
    values = [0.5, 1.0, 4.0, -2.0]
    got = bootstrap_mean(values, seed=1)
    assert (got["value"], got["n"]) == (0.875, 4)
    assert got["low"] < 0.875 < got["high"]
    many = [x * x for x in range(30)]
    assert bootstrap_mean(many, seed=1) == bootstrap_mean(many, seed=1)
    assert bootstrap_mean(many, seed=1) != bootstrap_mean(many, seed=2)
    assert bootstrap_mean([3.0] * 5, seed=0) == {"value": 3.0, "n": 5, "low": 3.0, "high": 3.0}


def test_a_ratio_weighs_by_size():
    """7 bits over 4 characters, not the mean of 1 and 2."""
    got = bootstrap_ratio([1.0, 6.0], [1.0, 3.0], seed=0)
    assert got["value"] == 1.75
    assert (got["low"], got["high"]) == (1.0, 2.0)
    assert got["n"] == 2


# --- bits per character


def test_a_uniform_model_needs_log2_v_bits_a_character():
    uniform = make_policy()
    torch.nn.init.zeros_(uniform.head.weight)
    items = corpus_items(uniform, TOKENIZER, ["x" * 150])
    assert [item["chars"] for item in items] == [64, 64, 22]  # every character once
    for item in items:
        assert item["bits"] == pytest.approx(item["chars"] * log2(103), abs=1e-3)


def test_bits_are_those_of_a_direct_computation():
    """Each block of 64 tokens, the context, on its own; <bos> costs bits, but is no character."""
    assert TINY.max_seq_len == 64
    policy = make_policy()
    documents = ["First document. " * 9, "Odd \u2603!", "Last one, " * 95]
    ids = []
    for text in documents:
        ids += [TOKENIZER.bos_id, *TOKENIZER.encode(text)]
    items = corpus_items(policy, TOKENIZER, documents)
    assert sum(item["chars"] for item in items) == sum(map(len, documents))
    assert [item["id"] for item in items] == list(range(len(items)))
    assert len(items) == 18  # more than one forward holds
    for k, item in enumerate(items):
        block = torch.tensor(ids[64 * k : 64 * k + 65])
        with torch.no_grad():
            logp = policy.logits(policy(block[None, :-1]).hidden_BTD)[0].log_softmax(-1)
        nats = -logp[torch.arange(len(block) - 1), block[1:]].sum().item()
        assert item["bits"] == pytest.approx(nats * 1.442695, abs=1e-2)
        assert item["chars"] == (block[1:] != TOKENIZER.bos_id).sum()


# --- problems


def answers_of(*texts: str, stopped: tuple[bool, ...] | None = None):
    """Stands in for decoding: the listed answers, whatever the prompt."""

    def generate(policy, prompts, **options):
        assert options["temperature"] == 0.0
        ids = [TOKENIZER.encode(text) for text in texts]
        return Generation(ids, [[0.0] * len(i) for i in ids], list(stopped or [True] * len(ids)))

    return generate


def test_a_problem_is_right_when_it_stopped_and_the_verifier_accepts(monkeypatch):
    problems = [problem(f"{i} + 1 = ?", str(i + 1)) for i in range(4)]
    given = ("1 it is\n#### 1", "#### 3", "#### 3", "4")
    monkeypatch.setattr(module, "generate", answers_of(*given, stopped=(True, True, False, True)))
    items = problem_items(make_policy(), TOKENIZER, problems, CONFIG)
    assert [item["correct"] for item in items] == [True, False, False, False]
    assert [item["well_formed"] for item in items] == [True, True, False, False]
    assert [item["answer"] for item in items] == list(given)
    assert [item["id"] for item in items] == [p.id for p in problems]


def test_part_of_a_score_is_not_right(monkeypatch):
    monkeypatch.setattr(module, "generate", answers_of("#### 1", "#### 2"))
    monkeypatch.setattr(module, "verify", lambda p, text: 0.99 if p.question == "a" else 1.0)
    problems = [problem("a", "1"), problem("b", "2")]
    items = problem_items(make_policy(), TOKENIZER, problems, CONFIG)
    assert [item["correct"] for item in items] == [False, True]


def test_accuracy_of_all_and_of_each_task(monkeypatch):
    monkeypatch.setattr(module, "generate", answers_of("#### 1", "#### 2", "#### 0", "#### 4"))
    monkeypatch.setattr(module, "verify", lambda p, text: float(text.endswith(p.answer)))
    tasks = ("sums", "sums", "sums", "gcd")
    problems = [problem(f"{i}?", str(i + 1), task) for i, task in enumerate(tasks)]
    heldout = HeldOut("no", "no", problems, has_true_score=True)
    metrics, _ = evaluate_policy(make_policy(), TOKENIZER, heldout, CONFIG)
    assert metrics["reasoning_accuracy"] == wilson(3, 4)
    assert metrics["reasoning_accuracy/sums"] == wilson(2, 3)
    assert metrics["reasoning_accuracy/gcd"] == wilson(1, 1)
    assert metrics["well_formed"] == wilson(4, 4)


# --- the whole suite


class Evaluated:
    """A policy's evaluation with a reward model and an sft policy."""

    def __init__(self) -> None:
        self.reward, self.reference = make_scalar(), make_policy(seed=7)
        self.metrics, self.items = self.again()
        self.chats = [item for item in self.items if item["set"] == "chat"]

    def again(self, **changes):
        config = EvaluationConfig(**{**vars(CONFIG), **changes})
        policy = make_policy()
        return evaluate_policy(policy, TOKENIZER, HELDOUT, config, self.reward, self.reference)

    def rollout(self):
        """The answers to the chat prompts."""
        prompts, ids = [c["prompt_ids"] for c in self.chats], [c["ids"] for c in self.chats]
        zeros, stopped = [[0.0] * len(i) for i in ids], [c["stopped"] for c in self.chats]
        return pack(prompts, ids, zeros, stopped, TOKENIZER.pad_id)


@pytest.fixture(scope="module")
def done() -> Evaluated:
    return Evaluated()


def test_the_names_and_counts_of_the_suite(done):
    assert {name: metric["n"] for name, metric in done.metrics.items()} == {
        "bits_per_char": 4,  # blocks
        "well_formed": 12,
        "reasoning_accuracy": 5,
        f"reasoning_accuracy/{FROM_FILE}": 5,
        "preference_score": 7,
        "answer_tokens": 7,
        "reward_model_score": 7,
        "kl_to_sft": 7,
    }
    for metric in done.metrics.values():
        assert list(metric) == ["value", "n", "low", "high"]
        assert metric["low"] <= metric["value"] <= metric["high"]


def test_chat_items_are_what_was_said_and_how_it_is_judged(done):
    assert {c["stopped"] for c in done.chats} == {True, False}  # a case worth testing
    for record, item in zip(HELDOUT.chats, done.chats, strict=True):
        assert item["id"] == record.id
        assert item["prompt"] == record.messages[0]["content"]
        assert item["prompt_ids"] == TOKENIZER.prompt(record.prompt_messages)
        text, stopped = item["answer"], item["stopped"]
        assert TOKENIZER.decode(item["ids"]) == text
        assert stopped == (item["ids"][-1] == TOKENIZER.eot_id)
        assert stopped or len(item["ids"]) == 12
        assert item["preference_score"] == pytest.approx(true_score(text, stopped), abs=1e-6)
        assert item["well_formed"] == well_formed(text, stopped, is_problem=False)


def test_metrics_are_means_of_the_items(done):
    def mean(key: str) -> float:
        return sum(item[key] for item in done.chats) / 7

    assert done.metrics["preference_score"]["value"] == pytest.approx(
        mean("preference_score"), abs=1e-5
    )
    tokens = sum(len(item["ids"]) for item in done.chats) / 7
    assert done.metrics["answer_tokens"]["value"] == pytest.approx(tokens, abs=1e-5)
    blocks = [item for item in done.items if item["set"] == "corpus"]
    bits = sum(item["bits"] for item in blocks) / sum(item["chars"] for item in blocks)
    assert done.metrics["bits_per_char"]["value"] == pytest.approx(bits, abs=1e-5)
    formed = [item["well_formed"] for item in done.items if item["set"] != "corpus"]
    assert done.metrics["well_formed"]["value"] == pytest.approx(sum(formed) / 12, abs=1e-6)


def test_model_based_metrics_are_those_of_the_networks(done):
    rollout = done.rollout()
    scores = final_scores(done.reward, rollout).mean().item()
    assert done.metrics["reward_model_score"]["value"] == pytest.approx(scores, abs=1e-4)
    own, sft = (score_tokens(p, rollout).logprobs for p in (make_policy(), done.reference))
    kl = ((own - sft) * rollout.mask).sum(1).mean().item()
    assert abs(kl) > 1
    assert done.metrics["kl_to_sft"]["value"] == pytest.approx(kl, abs=1e-3)


def test_the_kl_of_the_sft_policy_to_itself_is_0():
    policy = make_policy()
    metrics, _ = evaluate_policy(policy, TOKENIZER, HELDOUT, CONFIG, reference=policy)
    assert metrics["kl_to_sft"]["value"] == pytest.approx(0.0, abs=1e-3)
    assert metrics["reward_model_score"]["value"] is None


def test_evaluating_again_gives_the_same_bytes(done, tmp_path):
    for name, (metrics, items) in {"one": (done.metrics, done.items), "two": done.again()}.items():
        write_evaluation(tmp_path / name, metrics, items, seed=0)
    for file in ("eval.json", "eval_items.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_another_seed_draws_other_answers(done):
    _, items = done.again(seed=1)
    answers = [[i["answer"] for i in some if i["set"] == "chat"] for some in (done.items, items)]
    assert answers[0] != answers[1]
    greedy = [[i for i in some if i["set"] != "chat"] for some in (done.items, items)]
    assert greedy[0] == greedy[1]  # nothing else is drawn


def test_the_config_says_how_many(done):
    metrics, items = done.again(max_prompts=2, max_problems=3, max_new_tokens=4)
    assert metrics["preference_score"]["n"] == 2
    assert metrics["reasoning_accuracy"]["n"] == 3
    assert max(len(item["ids"]) for item in items if item["set"] == "chat") <= 4


def test_evaluation_leaves_the_networks_alone():
    policy, reward = make_policy().train(), make_scalar()
    before = weights(policy), weights(reward)
    evaluate_policy(policy, TOKENIZER, HELDOUT, CONFIG, reward=reward, reference=policy)
    assert policy.training
    assert policy.load_LE is None
    assert distance(before[0], weights(policy)) == 0 == distance(before[1], weights(reward))


@pytest.mark.parametrize("has_true_score", [True, False])
def test_what_the_data_lacks_is_null_with_the_reason(has_true_score):
    metrics, items = evaluate_policy(make_policy(), TOKENIZER, NOTHING, CONFIG)
    assert items == []
    why = {name: metric.pop("why") for name, metric in metrics.items()}
    assert all(metric == {"value": None} for metric in metrics.values())
    assert why == {
        "bits_per_char": "no corpus: why",
        "well_formed": "no chats: why",
        "reasoning_accuracy": "no problems: why",
        "preference_score": "no chats: why",
        "answer_tokens": "no chats: why",
        "reward_model_score": "the data has no chat prompts",
        "kl_to_sft": "the data has no chat prompts",
    }
    chats = HeldOut("no", HELDOUT.chats, "no", has_true_score)
    metrics, items = evaluate_policy(make_policy(), TOKENIZER, chats, CONFIG)
    known = metrics["preference_score"]["value"] is not None
    assert known == has_true_score == (items[0]["preference_score"] is not None)
    if not known:
        assert "data=embedded" in metrics["preference_score"]["why"]
    assert metrics["well_formed"]["n"] == 7
    assert metrics["kl_to_sft"]["why"] == "no sft policy on this ladder yet"


@pytest.mark.parametrize("name", ["max_prompts", "max_problems", "max_pairs", "max_new_tokens"])
def test_a_bad_setting_is_one_line(name):
    with pytest.raises(UserError) as error:
        build(EvaluationConfig, {**vars(CONFIG), name: 0}, "evaluation")
    assert one_line(error) == f"evaluation.{name}: must be at least 1, got 0"


# --- reward models


def ramp(*scores: float):
    """A reward model that reads a row's score off its last token."""
    table = torch.tensor(scores)

    class Ramp(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(()))

        def forward(self, ids_BT, *, valid_BT):
            return table[ids_BT] * valid_BT - 100.0 * ~valid_BT

    return Ramp()


def test_pair_accuracy_by_hand():
    """Scores 0 to 4 of the last tokens; padding would score -100."""
    batch = PairBatch(
        chosen_ids=torch.tensor([[4, 3, 0], [1, 2, 2], [0, 4, 0], [1, 0, 0]]),
        chosen_len=torch.tensor([2, 3, 2, 1]),
        rejected_ids=torch.tensor([[4, 0, 0], [4, 0, 0], [4, 4, 4], [3, 3, 2]]),
        rejected_len=torch.tensor([1, 2, 3, 3]),
    )
    # last tokens: 3 against 4, 2 against 0, 4 against 4 (a tie is not right), 1 against 2
    metrics, items = evaluate_reward_model(ramp(0.0, 1.0, 2.0, 3.0, 4.0), [batch, batch], CONFIG)
    assert [(i["chosen"], i["rejected"]) for i in items[:4]] == [(3, 4), (2, 0), (4, 4), (1, 2)]
    assert [item["id"] for item in items] == list(range(8))
    assert metrics["pair_accuracy"] == wilson(2, 8)
    assert metrics["pair_margin"]["value"] == 0.0
    few = EvaluationConfig(**{**vars(CONFIG), "max_pairs": 2})
    metrics, items = evaluate_reward_model(ramp(0.0, 1.0, 2.0, 3.0, 4.0), [batch], few)
    assert metrics["pair_accuracy"] == wilson(1, 2)
    assert metrics["pair_margin"]["value"] == 0.5


def test_no_pairs_is_null():
    metrics, items = evaluate_reward_model(make_scalar(), [], CONFIG)
    assert metrics == {"pair_accuracy": {"value": None, "why": "no held-out pairs"}}
    assert items == []


# --- files


def test_files_round_trip(tmp_path, done):
    odd = [{"set": "chat", "answer": "new\nline, \u2028 separator, \x85 and \u2603"}]
    for suffix, items in (("", done.items), ("_random", odd)):
        write_evaluation(tmp_path, done.metrics, items, seed=5, suffix=suffix)
        assert read_items(tmp_path, suffix) == items
        summary = json.loads((tmp_path / f"eval{suffix}.json").read_text())
        assert summary == {"suite": "1", "seed": 5, "metrics": done.metrics}
    assert len(list(tmp_path.iterdir())) == 4  # no temporary file is left
    assert read_items(tmp_path, "_other") == []


def test_later_models_judge_the_stored_answers_of_earlier_rows(tmp_path, done):
    sft, random, empty = (tmp_path / name for name in ("sft-a", "pretrain-b", "pretrain-c"))
    write_evaluation(sft, done.metrics, done.items, seed=0)
    some = deepcopy(done.items)
    for item in some:
        item["ids"] = item.get("ids", [0])[:1]
    write_evaluation(random, {}, some, seed=0, suffix="_random")
    rows = {"a": (sft, ""), "random": (random, "_random"), "c": (empty, "")}
    found = evaluate_ancestors(rows, TOKENIZER, 0, reward=done.reward)
    assert set(found) == {"a", "random"}  # a row that was never evaluated is left out
    assert found["a"] == {"reward_model_score": done.metrics["reward_model_score"]}
    assert found["random"]["reward_model_score"] != found["a"]["reward_model_score"]
    found = evaluate_ancestors(rows, TOKENIZER, 0, reference=done.reference)
    assert found["a"] == {"kl_to_sft": done.metrics["kl_to_sft"]}


def test_a_row_without_chats_has_nothing_to_judge(tmp_path):
    write_evaluation(tmp_path, {}, [{"set": "corpus", "bits": 1.0, "chars": 1}], seed=0)
    assert evaluate_ancestors({"a": (tmp_path, "")}, TOKENIZER, 0, reward=make_scalar()) == {
        "a": {}
    }


@pytest.mark.parametrize("arguments", [[], ["sft"], ["run=sft", "seed=1"], ["outputs=x"]])
def test_the_command_says_how_it_is_used(arguments):
    with pytest.raises(UserError) as error:
        module.main(arguments)
    assert one_line(error) == "usage: python -m fourstage.evaluation run=NAME [outputs=outputs]"
