"""Right and wrong answers, and the form of an answer."""

from types import SimpleNamespace

import pytest

from fourstage.verify import FROM_FILE, extract, has_form, same_value, verify


def entry(task, answer, **metadata):
    return SimpleNamespace(task=task, entry={"answer": answer, "metadata": metadata})


PROBLEMS = {
    "chain_sum": (entry("chain_sum", "30", expression="26 + 4"), "30", "31"),
    "products": (entry("products", "84", expression="7 * 12"), "84", "83"),
    "gcd": (entry("gcd", "6", numbers=[12, 18]), "6", "3"),
    "spell_backward": (entry("spell_backward", "olleh", word="hello"), "olleh", "hello"),
    FROM_FILE: (entry(FROM_FILE, "1800"), "$1,800.", "180"),
}


@pytest.mark.parametrize("task", PROBLEMS)
def test_right_and_wrong(task):
    problem, right, wrong = PROBLEMS[task]
    assert verify(problem, f"steps\n#### {right}") == 1.0
    assert verify(problem, f"#### {wrong}") < 1.0
    assert verify(problem, right) == 0.0, "an unmarked answer is not one"
    assert verify(problem, "#### ") == 0.0
    assert verify(problem, f"#### {right}\n#### {wrong}") < 1.0, "the last mark counts"
    assert verify(problem, f"#### {wrong}\n#### {right}") == 1.0


def test_a_verifier_that_fails_on_an_answer_scores_nothing():
    broken = SimpleNamespace(task="gcd", entry={})  # the verifier looks for an answer
    assert verify(broken, "#### 6") == 0.0


def test_extract():
    assert extract("a\n####  1 2 \n") == "1 2"
    assert extract("a\n####5") is None
    assert extract("") is None


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("#### 5", True),
        ("2+3=5\n#### 5", True),
        ("2+3=5\n#### 5\n", False),
        ("#### 5\n#### 5", False),
        ("so #### 5", False),
        ("#### 5\nbye", False),
        ("####5", False),
        ("#### ", False),
        ("##### 5", False),
        ("5", False),
        ("", False),
    ],
)
def test_has_form(answer, form):
    assert has_form(answer) is form


@pytest.mark.parametrize(
    ("given", "expected", "equal"),
    [
        ("1,000", "1000", True),
        ("$18.", "18", True),
        ("18.0", "18", True),
        ("-3", "3", False),
        ("1_8", "18", False),
        ("nan", "nan", True),
        ("inf", "3", False),
        ("Paris", "paris", True),
        ("abc", "3", False),
        (r"\frac{1}{2}", "0.5", True),
        ("1/3", "0.5", False),
        ("1" * 200 + "x", "3", False),
    ],
)
def test_same_value(given, expected, equal):
    assert same_value(given, expected) is equal
