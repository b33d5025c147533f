"""The suite's definitions: hand-made items with written-out values, published intervals, coverage
of the truth by a fake model of known accuracy."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from fourstage.evaluation import suite
from fourstage.evaluation.suite import (
    DEFINITIONS,
    definition,
    differences,
    difficulties,
    joined,
    metrics,
)


def values(items, reasons=None):
    return {name: metric["value"] for name, metric in metrics(items, reasons or {}, 0).items()}


def chat(i, **fields):
    return {"set": "chat", "id": f"c{i}", "ids": [5] * 3, **fields}


def problem(i, correct, task="sums", difficulty="easy", **fields):
    fields = {"correct": correct, "task": task, "difficulty": difficulty, **fields}
    return {"set": "reasoning", "id": f"p{i}", **fields}


def sampled(i, correct, samples=8, task="sums", difficulty="easy"):
    item = problem(i, correct, task, difficulty, samples=samples)
    return {**item, "set": "reasoning_sampled"}


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
    got = suite.wilson(successes, n)
    assert got == pytest.approx((low, high), abs=5e-5)
    assert suite.wilson(n - successes, n) == pytest.approx((1 - got[1], 1 - got[0]), abs=1e-9)


@pytest.mark.parametrize("n", [1, 7, 400])
def test_wilson_stays_within_0_and_1(n):
    assert suite.wilson(0, n)[0] == 0.0 < suite.wilson(0, n)[1] < 1
    assert suite.wilson(n, n)[1] == 1.0 > suite.wilson(n, n)[0] > 0


def test_resampling_against_an_explicit_loop(monkeypatch):
    monkeypatch.setattr(suite, "BOOTSTRAPS", 50)
    vectors = np.arange(24.0).reshape(4, 3, 2) ** 2
    rows = np.random.default_rng(3).integers(0, 4, (50, 4))
    expected = [sum(vectors[row] for row in drawn) for drawn in rows]
    assert suite.resampled_sums(vectors, seed=3) == pytest.approx(np.array(expected))


def test_resampling_in_parts_is_the_same():
    """The text of a large corpus has too many blocks for one draw of all."""
    vectors = np.random.default_rng(0).normal(size=(1500, 2))
    sums = suite.resampled_sums(vectors, seed=1)
    assert len(sums) == suite.BOOTSTRAPS
    rows = np.random.default_rng(1).integers(0, 1500, (2000, 1500))
    assert sums == pytest.approx(vectors[rows].sum(1))


def coverage(truth, draw, name, seeds=400):
    """Share of the seeds whose interval covers the truth; draw(rng) makes a model's items."""
    covered = 0
    for seed in range(seeds):
        cell = metrics(draw(np.random.default_rng(seed)), {}, seed)[name]
        covered += cell["low"] <= truth <= cell["high"]
    return covered / seeds


def test_intervals_of_a_model_of_known_accuracy_cover_it():
    """A fake model answers each of 60 problems right with probability 0.3."""

    def draw(rng):
        return [problem(i, bool(rng.random() < 0.3)) for i in range(60)]

    assert 0.93 <= coverage(0.3, draw, "reasoning_accuracy") <= 0.98


def test_intervals_of_pass_at_k_cover_it():
    """Problem i is solved with its own probability, drawn from Beta(1, 2): of 4 independent
    answers one is right with probability 1 - E[(1 - p)^4] = 1 - 2 / 6."""

    def draw(rng):
        solved = rng.beta(1, 2, 80)
        return [sampled(i, int(rng.binomial(8, p))) for i, p in enumerate(solved)]

    assert 0.92 <= coverage(2 / 3, draw, "pass_at_4", seeds=300) <= 0.98
    assert 0.92 <= coverage(1 / 3, draw, "pass_at_1", seeds=300) <= 0.98


def test_intervals_of_a_mean_cover_it():
    """A skewed distribution with mean 1."""

    def draw(rng):
        return [chat(i, true_score=rng.gamma(4.0, 0.25)) for i in range(60)]

    assert 0.93 <= coverage(1.0, draw, "true_score") <= 0.98


def test_intervals_of_a_paired_difference_cover_it():
    """The second stage solves every problem of the first and a tenth of the others: a gain of
    0.06, which intervals of the two stages apart would hide."""
    covered, above = 0, 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        before = rng.random(150) < 0.4
        after = before | (rng.random(150) < 0.1)
        items = [[problem(i, bool(x)) for i, x in enumerate(side)] for side in (after, before)]
        cell = differences(*items, seed)["reasoning_accuracy"]
        covered += cell["low"] <= 0.06 <= cell["high"]
        above += cell["low"] > 0
        assert cell["n"] == 150
    assert 0.93 <= covered / 400 <= 0.98
    assert above / 400 > 0.85
    accuracies = [metrics(side, {}, 0)["reasoning_accuracy"] for side in items]
    assert accuracies[0]["low"] < accuracies[1]["high"]


@pytest.mark.parametrize(
    ("df", "quantile"),
    [(2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (19, 2.093), (99, 1.984), (10**6, 1.960)],
)
def test_t_quantiles_against_a_table(df, quantile):
    assert suite.t_quantile(df) == pytest.approx(quantile, rel=0.01 if df < 4 else 1e-3)


def test_a_difference_by_hand():
    """Of 3 gains 2, -0.5 and 2; their mean is 7 / 6, the furthest is 5 / 3 away: -0.5."""
    after, before = [3.0, 1.0, 2.0, 9.0], [1.0, 1.5, 0.0]
    a = [chat(i, true_score=x) for i, x in enumerate(after)]  # the last has no partner
    b = [chat(i, true_score=x) for i, x in enumerate(before)]
    cell = differences(a, b, seed=5)["true_score"]
    padded = [2.0, -0.5, 2.0, 7 / 6 - 5 / 3, 7 / 6 + 5 / 3]
    half = 4.271 * np.std(padded, ddof=1) / math.sqrt(5)
    assert cell["value"] == pytest.approx(7 / 6, abs=1e-6) and cell["n"] == 3
    assert (cell["low"], cell["high"]) == pytest.approx((7 / 6 - half, 7 / 6 + half), abs=1e-3)


def paired(name, before, after):
    sides = [[problem(i, bool(x)) for i, x in enumerate(side)] for side in (after, before)]
    return differences(*sides, 0)[name]


def test_a_paired_difference_of_yes_no_items_is_nearly_bonett_and_price():
    """24 gained and 4 lost of 100; theirs is a normal quantile over population variances."""
    before = [0] * 24 + [1] * 4 + [0] * 72
    after = [1] * 24 + [0] * 4 + [0] * 72
    cell = paired("reasoning_accuracy", before, after)
    p_gained, p_lost = 25 / 102, 5 / 102
    half = 1.96 * math.sqrt((p_gained + p_lost - (p_gained - p_lost) ** 2) / 102)
    assert cell["value"] == pytest.approx(0.2)
    assert cell["low"] == pytest.approx(p_gained - p_lost - half, abs=3e-3)
    assert cell["high"] == pytest.approx(p_gained - p_lost + half, abs=3e-3)


def test_a_difference_that_never_varies_still_has_an_interval():
    """20 items that go from wrong to right; and 20 scores that all gain 1."""
    cell = paired("reasoning_accuracy", [0] * 20, [1] * 20)
    assert cell["value"] == cell["high"] == 1.0 and 0.6 < cell["low"] < 0.8
    cell = paired("reasoning_accuracy", [0] * 20, [0] * 20)
    assert cell["low"] == pytest.approx(-cell["high"]) and 0.05 < cell["high"] < 0.2


def mcnemar_exact(gained, lost):
    """The two-sided exact p of McNemar's test: a fair coin for each item that changed."""
    n, fewer = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def test_four_of_400_is_no_gain():
    cell = paired("reasoning_accuracy", [0] * 400, [1] * 4 + [0] * 396)
    assert mcnemar_exact(4, 0) == 0.125
    assert cell["low"] < 0 < cell["value"] == 0.01


def test_an_interval_without_0_agrees_with_mcnemar():
    """Wherever it excludes 0, the mid-p of McNemar's exact test is below 0.05."""
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 10, 15, 20, 50, 100, 400):
        for gained in range(1, min(n, 60) + 1):
            for lost in range(min(gained, n - gained + 1)):
                gains = np.repeat([1.0, -1.0, 0.0], [gained, lost, n - gained - lost])
                low, _ = suite.padded_t(gains, (-1.0, 1.0))
                changed = gained + lost
                mid_p = mcnemar_exact(gained, lost) - math.comb(changed, lost) / 2**changed
                assert low <= 0 or mid_p < 0.05, (n, gained, lost)


def test_a_few_changed_scores_are_no_gain():
    """As with yes or no: 4 of 400 scores that gain 1 are no certainty."""
    before = [chat(i, true_score=0.0) for i in range(400)]
    after = [chat(i, true_score=float(i < 4)) for i in range(400)]
    cell = differences(after, before, 0)["true_score"]
    assert cell["low"] < 0 < cell["value"] == 0.01


def test_one_item():
    """One yes or no, or one share, says next to nothing; one unbounded value has no width."""
    cells = metrics([sampled(0, 8), problem(1, True), chat(2, true_score=1.5)], {}, 0)
    wide = [(cells[k]["low"], cells[k]["high"]) for k in ("pass_at_1", "reasoning_accuracy")]
    assert wide == [(0.0, 1.0), (pytest.approx(0.2065, abs=1e-4), 1.0)]
    assert cells["true_score"] == {"value": 1.5, "n": 1, "low": 1.5, "high": 1.5}
    cell = paired("reasoning_accuracy", [0], [1])
    assert (cell["low"], cell["high"]) == (-1.0, 1.0)


def test_a_ratio_has_the_delta_methods_variance():
    """Against resampling the ratio itself."""
    rng = np.random.default_rng(0)
    chars = rng.integers(50, 200, 300).astype(float)
    vectors = np.stack([chars * rng.gamma(9, 0.3, 300), chars], 1)
    values = suite.linear(vectors)
    assert values.mean() == pytest.approx(vectors[:, 0].sum() / vectors[:, 1].sum())
    drawn = suite.ratio(suite.resampled_sums(vectors, seed=0))
    assert values.std() / math.sqrt(300) == pytest.approx(drawn.std(), rel=0.05)
    assert suite.linear(np.array([[3.0, 1.0], [5.0, 1.0]])) == pytest.approx([3.0, 5.0])


def test_a_difference_of_ratios_is_of_the_ratios():
    """10 / 4 - 6 / 3, not the mean of the blocks' differences."""
    after = [block(0, 1.0, 1), block(1, 9.0, 3)]
    before = [block(0, 2.0, 2), block(1, 4.0, 1), block(2, 50.0, 1)]
    cell = differences(after, before, seed=0)["bits_per_char"]
    assert (cell["value"], cell["n"]) == (0.5, 2)


def test_nothing_in_common_is_no_difference():
    assert differences([chat(1, stopped=True)], [chat(2, stopped=True)], 0) == {}
    assert differences([chat(1, win=1.0)], [chat(1, win=None)], 0).keys() == {"answer_tokens"}


# --- each key by hand


def block(i, bits, chars):
    return {"set": "corpus", "id": i, "bits": bits, "chars": chars, "bytes": 2 * chars}


def test_bits_weigh_by_characters_and_bytes():
    """7 bits over 4 characters, not the mean of 1 and 2; a block of no character is none."""
    found = metrics([block(0, 1.0, 1), block(1, 6.0, 3), block(2, 2.0, 0)], {}, 0)
    for name, value in (("char", 1.75), ("byte", 0.875)):
        cell = found[f"bits_per_{name}"]
        assert (cell["value"], cell["n"]) == (value, 2)


def test_accuracy_of_all_of_each_task_and_of_each_difficulty():
    items = [
        problem(0, True),
        problem(1, False, difficulty="hard"),
        problem(2, True, difficulty="hard"),
        problem(3, False, "gcd", "medium"),
    ]
    assert values(items) == {
        "reasoning_accuracy": 0.5,
        "reasoning_accuracy/sums": pytest.approx(2 / 3, abs=1e-6),
        "reasoning_accuracy/gcd": 0.0,
        "reasoning_accuracy/difficulty_easy": 1.0,
        "reasoning_accuracy/difficulty_medium": 0.0,
        "reasoning_accuracy/difficulty_hard": 0.5,
    }
    cell = metrics(items, {}, 0)["reasoning_accuracy"]
    assert (cell["low"], cell["high"]) == pytest.approx(suite.wilson(2, 4), abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_against_enumeration(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            answers = [True] * c + [False] * (n - c)
            draws = [any(drawn) for drawn in combinations(answers, k)]
            assert suite.pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws)), (n, c, k)


def test_pass_at_k_is_the_mean_over_problems_up_to_the_samples():
    items = [sampled(0, 1, samples=4), sampled(1, 2, samples=4, task="gcd", difficulty="hard")]
    got = values(items)
    assert got["pass_at_1"] == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert got["pass_at_2"] == pytest.approx((1 / 2 + 5 / 6) / 2, abs=1e-6)
    assert got["pass_at_4"] == got["pass_at_4/gcd"] == got["pass_at_4/difficulty_hard"] == 1.0
    assert got["pass_at_1/sums"] == got["pass_at_1/difficulty_easy"] == 0.25
    assert not [name for name in got if name.startswith("pass_at_8")]


def test_a_share_that_never_varies_still_has_an_interval():
    """Nobody solved any of 20 problems: a bootstrap of zeros would be sure of 0."""
    cell = metrics([sampled(i, 0) for i in range(20)], {}, 0)["pass_at_8"]
    assert (cell["low"], cell["high"]) == pytest.approx((0.0, 0.1406), abs=1e-4)


def test_what_is_read_off_chat_answers():
    items = [
        chat(0, stopped=True, well_formed=True, true_score=2.0, distinct_1=0.5, win=1.0),
        chat(1, stopped=True, well_formed=False, true_score=-1.0, distinct_1=1.0, win=0.5),
        chat(2, stopped=False, well_formed=False, true_score=0.5, distinct_1=None, win=0.0),
        chat(3, stopped=True, well_formed=False, true_score=0.5, distinct_1=0.0, win=1.0),
    ]
    items[3]["ids"] = [5] * 11
    assert values(items) == {
        "well_formed": 0.25,
        "chat_stop_rate": 0.75,
        "chat_format_rate": 0.25,
        "true_score": 0.5,
        "answer_tokens": 5.0,
        "distinct_1": 0.5,
        "win_rate": 0.625,
        "win_rate_ties": 0.25,
    }
    cells = metrics(items, {}, 0)
    assert cells["distinct_1"]["n"] == 3
    assert cells["win_rate_ties"]["high"] == pytest.approx(suite.wilson(1, 4)[1], abs=1e-6)


def test_well_formed_is_of_chats_and_problems():
    items = [chat(0, well_formed=True), problem(1, True, well_formed=False)]
    assert metrics(items, {}, 0)["well_formed"]["n"] == 2
    assert values(items)["well_formed"] == 0.5
    assert values(items)["chat_format_rate"] == 1.0


def test_greedy_chat_answers():
    items = [{"set": "chat_greedy", "id": i, "exact": i < 1, "contained": i < 3} for i in range(4)]
    assert values(items) == {"chat_exact": 0.25, "chat_contained": 0.75}


def test_router_health_by_hand():
    """Two layers of four experts; the loads of the two items add up to
    [2, 2, 4, 0] and [2, 2, 2, 2]."""
    items = [
        {
            "set": "router",
            "id": 0,
            "tokens": 3,
            "load": [[2, 0, 4, 0], [0, 2, 2, 2]],
            "drift": [3, 0],
        },
        {
            "set": "router",
            "id": 1,
            "tokens": 1,
            "load": [[0, 2, 0, 0], [2, 0, 0, 0]],
            "drift": [1, 1],
        },
    ]
    first = -(2 * 0.25 * math.log(0.25) + 0.5 * math.log(0.5)) / math.log(4)
    got = values(items)
    assert first == pytest.approx(0.75)
    assert got["router_entropy"] == pytest.approx((first + 1) / 2)
    assert got["router_max_over_mean"] == pytest.approx((2 + 1) / 2)
    assert got["router_dead"] == 1.0
    assert got["router_drift"] == pytest.approx((4 / 4 + 1 / 4) / 2)
    for cell in metrics(items, {}, 0).values():
        assert cell["low"] <= cell["value"] <= cell["high"]


def test_a_drift_that_is_not_known_is_not_counted():
    items = [{"set": "router", "id": 0, "tokens": 1, "load": [[1, 1]], "drift": None}]
    got = metrics(items, {"router_drift": "no parent"}, 0)
    assert got["router_drift"] == {"value": None, "why": "no parent"}
    assert got["router_entropy"]["value"] == 1.0


def test_pairs_of_a_reward_model():
    scores = [(3, 4), (2, 0), (4, 4), (5, 1)]  # a tie is not right
    items = [
        {"set": "pairs", "id": i, "chosen": c, "rejected": r} for i, (c, r) in enumerate(scores)
    ]
    assert values(items) == {"pair_accuracy": 0.5, "pair_margin": 1.25}


# --- the table


def test_why_a_key_is_not_measured_by_set_and_by_key():
    reasons = {"chat": "no chats", "win_rate": "no sft yet", "reasoning_sampled": "no problems"}
    got = metrics([problem(0, True, well_formed=True)], reasons, 0)
    whys = {name: cell["why"] for name, cell in got.items() if cell["value"] is None}
    assert whys.pop("win_rate") == "no sft yet"
    assert {whys.pop(f"pass_at_{k}") for k in (1, 2, 4, 8)} == {"no problems"}
    assert set(whys.values()) == {"no chats"}
    assert whys.keys() == {n for n, d in DEFINITIONS.items() if d.sets == ("chat",)} - {"win_rate"}
    assert got["well_formed"]["value"] == 1.0  # the problems define it
    assert "bits_per_char" not in got  # neither items nor a reason


def test_the_order_of_the_items_does_not_matter():
    rng = np.random.default_rng(0)
    items = [chat(i, true_score=rng.normal(), win=rng.random()) for i in range(30)]
    items += [sampled(i, int(rng.integers(9))) for i in range(30)]
    shuffled = [items[i] for i in rng.permutation(60)]
    assert metrics(items, {}, 4) == metrics(shuffled, {}, 4)
    assert differences(items, items[10:], 4) == differences(shuffled, items[10:], 4)


def test_seeds_repeat_and_differ():
    loads = np.random.default_rng(0).integers(1, 9, (30, 1, 4)).tolist()
    items = [
        {"set": "router", "id": i, "tokens": 8, "load": load, "drift": None}
        for i, load in enumerate(loads)
    ]
    assert metrics(items, {}, 1) == metrics(items, {}, 1)
    assert metrics(items, {}, 1) != metrics(items, {}, 2)


def test_late_values_are_joined_by_set_and_id():
    items = [chat(0, win=None), chat(1), problem(0, True)]
    late = [
        {"row": "random", **chat(1), "win": 1.0},
        {"set": "chat", "id": "c1", "kl_to_sft": 2.0},
        {"set": "chat", "id": "gone", "win": 0.0},
    ]
    got = joined(items, late)
    assert got[0] == items[0] and got[2] == items[2]
    assert (got[1]["win"], got[1]["kl_to_sft"]) == (1.0, 2.0)
    assert len(got) == 3 and "win" not in items[1]


def test_difficulties_are_terciles_within_a_task():
    tasks = ["a"] * 6 + ["b"] * 3
    lengths = [30, 10, 20, 60, 50, 40, 1, 1, 1]
    assert difficulties(tasks, lengths) == [
        "medium",
        "easy",
        "easy",
        "hard",
        "hard",
        "medium",
        *["medium"] * 3,  # equal lengths are equally difficult
    ]
    assert difficulties(["a"] * 4, [5, 5, 5, 9]) == ["medium", "medium", "medium", "hard"]
    assert difficulties([], []) == []


def test_every_key_has_a_title_and_knows_what_is_better():
    assert len({d.title for d in DEFINITIONS.values()}) == len(DEFINITIONS)
    lower = {name for name, d in DEFINITIONS.items() if d.better == "lower"}
    assert lower == {"bits_per_char", "bits_per_byte", "router_max_over_mean", "router_dead"}
    neither = {name for name, d in DEFINITIONS.items() if d.better is None}
    assert neither == {"kl_to_sft", "chat_exact", "answer_tokens", "win_rate_ties", "router_drift"}
    named = definition("pass_at_2/difficulty_hard")
    assert named.title == "pass@2: difficulty hard" and named.is_share
    with pytest.raises(KeyError):
        definition("made_up")
