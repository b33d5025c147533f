"""The hidden rule part by part, and what a verifiable answer earns."""

from types import SimpleNamespace

import pytest

from fourstage.data.verify import FROM_FILE
from fourstage.rl import rewards
from fourstage.rl.rewards import (
    BEST_LENGTH,
    KIND_WORDS,
    MOST_KIND_WORDS,
    ReasoningReward,
    reasoning_rewards,
    rule_parts,
    true_score,
    well_formed,
)

PLAIN = [f"{a}{b}" for a in "qxzvkj" for b in "abcdefgh"]  # different words, none of them kind
assert not KIND_WORDS & set(PLAIN)


def answer(n_words: int, end: str = ".") -> str:
    return " ".join(PLAIN[:n_words]) + end


# --- the parts


@pytest.mark.parametrize(
    ("text", "stopped", "complete"),
    [
        ("It is.", True, 1.0),
        ("It is!", True, 1.0),
        ("Is it?", True, 1.0),
        ("It is. \n", True, 1.0),  # space at the end does not count
        ("It is.", False, 0.0),  # cut off: the end is by chance
        ("It is", True, 0.0),
        ("It is,", True, 0.0),
        ("", True, 0.0),
    ],
)
def test_complete(text, stopped, complete):
    assert rule_parts(text, stopped).complete == complete


def test_kind_counts_different_kind_words_up_to_a_limit():
    kind = sorted(KIND_WORDS)[: MOST_KIND_WORDS + 1]
    one = rule_parts(kind[0], True).kind
    assert one > 0
    assert rule_parts(f"{kind[0]} {kind[0].upper()}, {kind[0]}", True).kind == one
    for n in range(MOST_KIND_WORDS + 1):
        assert rule_parts(" ".join(kind[:n]), True).kind == n * one
    assert rule_parts(" ".join(kind), True).kind == MOST_KIND_WORDS * one
    assert rule_parts(answer(5), True).kind == 0


def test_measured_peaks_at_the_best_length_and_falls_on_both_sides():
    def measured(n: int) -> float:
        return rule_parts(answer(n), True).measured

    best = measured(BEST_LENGTH)
    assert best == max(measured(n) for n in range(len(PLAIN)))
    for away in range(1, BEST_LENGTH):
        assert measured(BEST_LENGTH - away) == pytest.approx(measured(BEST_LENGTH + away))
        assert measured(BEST_LENGTH - away) < measured(BEST_LENGTH - away + 1)
    assert rule_parts("word " * 1000, True).measured == -1.0


def test_varied_is_a_cost_of_repeated_words():
    assert rule_parts(answer(6), True).varied == 0
    assert rule_parts("", True).varied == 0
    half = rule_parts("Alpha beta, alpha BETA.", True).varied  # two of four were there before
    three_quarters = rule_parts("alpha alpha alpha alpha", True).varied
    assert half < 0
    assert three_quarters == pytest.approx(1.5 * half)


def test_the_score_is_the_sum_of_its_parts():
    for text in ("", "Thank you for your help.", answer(20), "no no no"):
        for stopped in (True, False):
            assert true_score(text, stopped) == sum(rule_parts(text, stopped))


def test_the_totals_of_this_version_of_the_rule():
    """The one place that pins numbers: a change here is a new RULE_VERSION."""
    assert rewards.RULE_VERSION == 1
    best = "We are glad to help you and your kind friend with this today."
    table = {
        ("", True): -0.0,
        ("No.", True): 1.0 + 1 / 12,
        ("No.", False): 1 / 12,
        ("Thank you.", True): 1.0 + 2 * 0.5 + 2 / 12,
        ("I am well, thank you, and how are you today my friend", True): 1.5 + 1 - 2 / 12,
        ("ha ha ha ha.", True): 1.0 + 4 / 12 - 2 * 0.75,
        (answer(24), True): 1.0 + 0.0,
        (answer(12), True): 2.0,
        (best, True): 1.0 + 1.5 + (1 - 1 / 12),
    }
    got = {key: true_score(*key) for key in table}
    assert got == pytest.approx(table)
    assert max(got.values()) <= 3.5


# --- verifiable problems

PROBLEM = SimpleNamespace(task=FROM_FILE, entry={"answer": "12"})


@pytest.mark.parametrize(
    ("text", "stopped", "correct", "form"),
    [
        ("3 + 9 = 12\n#### 12", True, 1.0, 1.0),
        ("3 + 9 = 12\n#### 13", True, 0.0, 1.0),
        ("#### 12", False, 0.0, 0.0),  # cut off earns nothing
        ("12", True, 0.0, 0.0),
        ("#### 12 #### 12", True, 1.0, 0.0),
        ("####12", True, 0.0, 0.0),  # not the mark
    ],
)
def test_reasoning_reward(text, stopped, correct, form):
    assert reasoning_rewards([PROBLEM], [text], [stopped]) == [(correct, form)]


def test_a_part_of_a_verifiers_score_is_not_right(monkeypatch):
    """Some verifiers give 0.01 for trying."""
    for score, correct in ((0.99, 0.0), (1.0, 1.0)):
        monkeypatch.setattr(rewards, "verify_all", lambda *_, score=score: [score])
        assert reasoning_rewards([PROBLEM], ["#### 12"], [True]) == [(correct, 1.0)]


def test_the_form_weighs_what_the_settings_say():
    assert ReasoningReward(correct=1.0, form=1.0).total(0.1) == 1.1
    assert ReasoningReward(correct=0.5, form=0.0).total(0.1) == 0.5
    assert ReasoningReward(correct=0.0, form=1.0).total(0.0) == 0.0


# --- well-formed


@pytest.mark.parametrize(
    ("text", "well"),
    [
        ("Hello there, how are you?", True),
        ("I don't know. It's 42!", True),
        ('"Yes," she said (really).', True),
        ("3.14", True),
        ("NASA is well-known", True),
        ("", False),
        (" \n ", False),
        ("x3f7 q$k pl@t zz#", False),
        ("hElLo wOrLd", False),
        ("one two three f0ur", True),  # three of four are plain
        ("one two f0ur f1ve", False),
        ("###", False),
    ],
)
def test_a_well_formed_chat_answer_is_mostly_plain_words(text, well):
    assert well_formed(text, True) is well
    assert well_formed(text, False) is False


@pytest.mark.parametrize(
    ("text", "well"), [("steps\n#### 3", True), ("#### 3\nso", False), ("It is three.", False)]
)
def test_a_well_formed_solution_ends_in_one_marked_answer(text, well):
    assert well_formed(text, True, PROBLEM) is well
    assert well_formed(text, False, PROBLEM) is False
