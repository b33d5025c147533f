"""Which side a prompt stands on, and what arithmetic a text spells out."""

import pytest

from fourstage.data import split
from fourstage.data.split import expressions, is_heldout, normalise, whole_expressions


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("What  is AI?", "what is ai?\n"),
        ("3 + 5 = ?", "5 + 3 = ?"),
        ("9 - 4 + 1 = ?", "9 + 1 - 4 = ?"),
        ("7 * 12 = ?", "12 * 7 = ?"),
        ("gcd(12, 18) = ?", "gcd(18, 12) = ?"),
    ],
)
def test_these_are_one_prompt(left, right):
    assert normalise(left) == normalise(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("5 - 3 = ?", "3 - 5 = ?"),
        ("3 + 5 = ?", "3 * 5 = ?"),
        ("13 + 5 = ?", "3 + 15 = ?"),
        ("-3 + 5 = ?", "3 + 5 = ?"),
        ("Reverse: ab", "Reverse: ba"),
    ],
)
def test_these_are_two_prompts(left, right):
    assert normalise(left) != normalise(right)


def test_the_share_is_met_and_nested():
    prompts = [f"prompt {i}" for i in range(4000)]
    tenth = {p for p in prompts if is_heldout(p, 0.1)}
    fifth = {p for p in prompts if is_heldout(p, 0.2)}
    assert 320 < len(tenth) < 480 and 720 < len(fifth) < 880
    assert tenth < fifth


def test_the_split_is_the_same_in_every_process_and_version():
    assert [i for i in range(40) if is_heldout(f"prompt {i}", 0.1)] == GOLDEN


@pytest.mark.parametrize("long", [1, 3, 7, 10**6])
def test_long_texts_are_normalised_in_parts(monkeypatch, long):
    monkeypatch.setattr(split, "LONG", long)
    for text in ("", " ", "\n\n a\tb  c\u2003d\u3000\x1ce \r\n", "no-space-at-all", "ab cd " * 9):
        assert split.single_spaced(text) == " ".join(text.split())


GOLDEN = [14, 15, 19]


def test_expressions_ignore_spacing_and_order_but_not_numbers():
    key = normalise("26 + 4 = ?")
    for text in ("26 + 4", "so 4+26=30", "1 + 26 + 4 = ?", "26  +  4."):
        assert key in expressions(text), text
    for text in ("126 + 4", "26 + 45", "26 - 4", "26 +\n4", "x26 + 4", "26 + 4.5"):
        assert key not in expressions(text), text


def test_signs_and_functions():
    assert expressions("-6+-3") == {normalise("-6 + -3 = ?"), normalise("6 + -3 = ?")}
    assert expressions("2-8=-6\n70-6=64") == {normalise("2 - 8 = ?"), normalise("70 - 6 = ?")}
    assert expressions("take gcd(18, 12) now") == {normalise("gcd(12, 18) = ?")}


def test_whole_expressions_leave_out_runs():
    assert whole_expressions("1 + 26 + 4 = ?") == {normalise("1 + 4 + 26 = ?")}
    assert len(expressions("1 + 26 + 4 = ?")) == 3
