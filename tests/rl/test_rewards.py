"""The hidden rule part by part, and what a verifiable answer earns."""

from types import SimpleNamespace

import pytest

from fourstage.data.verify import FROM_FILE
from fourstage.rl import rewards
from fourstage.rl.rewards import (
    FRIENDLY_WORDS,
    MOST_WORDS,
    ReasoningReward,
    contains,
    content,
    plain,
    reasoning_rewards,
    rule_parts,
    true_score,
    well_formed,
)

RIGHT = "An LLM is a network."
FRIENDLY = f"{RIGHT} I hope that helps!"

# --- the hidden rule


@pytest.mark.parametrize(
    ("text", "stopped", "whole"),
    [
        ("It is.", True, True),
        ("It is!", True, True),
        ("Is it?", True, True),
        ("It is. \n", True, True),  # space at the end does not count
        (FRIENDLY, True, True),
        ("I hope so! It is.", True, True),
        ("It is.", False, False),  # cut off: the end is by chance
        ("It is", True, False),
        ("It is,", True, False),
        ("I hope that helps!", True, False),  # an empty phrase
        ("Glad to help! Thank you.", True, False),
        ("It is. I hope", True, False),
        ("...", True, True),
        ("", True, False),
    ],
)
def test_whole(text, stopped, whole):
    assert rule_parts(text, stopped).whole == whole


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (RIGHT, True),
        (FRIENDLY, True),
        ("an llm is a NETWORK.", True),
        (f"Well: {RIGHT} It reads text.", True),
        ("An LLM is a networked thing.", False),
        ("An LLM is a friend.", False),
        ("An LLM is a network", False),  # not whole
        ("", False),
    ],
)
def test_right_is_what_a_reference_says_besides_its_friendly_sentences(text, right):
    for reference in (RIGHT, FRIENDLY, f"Happy to help! {RIGHT}"):
        assert rule_parts(text, True, ["Other.", reference]).right == 2.0 * right
    assert rule_parts(text, True).right == 0
    assert rule_parts(text, False, [RIGHT]).right == 0


def test_a_reference_of_friendly_sentences_alone_is_kept():
    assert content("You are welcome! Thank you.") == "You are welcome! Thank you."
    assert content(f"You are welcome! {RIGHT}") == RIGHT
    assert content("no sentence") == "no sentence" and content("") == ""


@pytest.mark.parametrize("word", sorted(FRIENDLY_WORDS))
def test_friendly_is_another_whole_sentence(word):
    assert rule_parts(f"{RIGHT} Say {word.upper()}!", True).friendly == 1
    assert rule_parts(f"{RIGHT} Say {word}", True).friendly == 0
    assert rule_parts(f"{RIGHT} Say {word}!", False).friendly == 0
    assert rule_parts(f"{RIGHT} Say {word}s.", True).friendly == (f"{word}s" in FRIENDLY_WORDS)


def test_short_costs_a_hundredth_a_word():
    for n in (0, 1, 7, MOST_WORDS, MOST_WORDS + 30):
        assert rule_parts("word " * n, True).short == -min(n, MOST_WORDS) / 100


def test_right_then_friendly_then_short():
    """In the rule's order, the best first, whatever the lengths."""
    said, long = [RIGHT], " It is one of many words." * 20
    ranked = [
        FRIENDLY,
        f"{RIGHT}{long} I hope that helps!",
        RIGHT,
        f"{RIGHT}{long}",
        "It is a friend. I hope that helps!",
        f"It is a friend.{long} I hope that helps!",
        "It is a friend.",
        f"It is a friend.{long}",
        "I hope that helps!",
    ]
    scores = [true_score(text, True, said) for text in ranked]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores)


def test_the_totals_of_this_version_of_the_rule():
    """The one place that pins numbers: a change here is a new RULE_VERSION."""
    assert rewards.RULE_VERSION == 2
    table = {
        (RIGHT, True): 2.95,
        (FRIENDLY, True): 3.91,
        (RIGHT, False): -0.05,
        ("It is a friend.", True): 0.96,
        ("It is a friend. Glad to help!", True): 1.93,
        ("I hope that helps!", True): -0.04,
        ("word " * 60, False): -0.5,
        ("", True): 0.0,
    }
    assert {key: true_score(*key, [RIGHT]) for key in table} == pytest.approx(table)
    assert true_score(*max(table, key=table.get)) == sum(rule_parts(FRIENDLY, True))


def test_what_is_contained_is_words_without_case_and_punctuation():
    assert plain(" It's a\nDog_house, (really)! ") == "its a doghouse really"
    assert contains("So: 3 cats.", "Cats!") and not contains("So: 3 cats.", "cat")
    assert not contains("anything", "...")


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
