"""Ranges in Hydra's words."""

from __future__ import annotations

import pytest

from fourstage.errors import UserError
from fourstage.search.space import split_words


class Low:
    """A trial that takes the first of everything, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple] = []

    def suggest_float(self, name, low, high, *, log):
        self.asked.append(("float", name, low, high, log))
        return low * 1.000001

    def suggest_int(self, name, low, high, *, log=False):
        self.asked.append(("int", name, low, high, log))
        return low

    def suggest_categorical(self, name, choices):
        self.asked.append(("choice", name, choices))
        return choices[0]


@pytest.mark.parametrize(
    ("word", "asked", "override"),
    [
        ("a.b=interval(1e-5,1e-3)", ("float", "a.b", 1e-5, 1e-3, False), "a.b=1e-05"),
        ("a=tag(log,interval(1e-5,1e-3))", ("float", "a", 1e-5, 1e-3, True), "a=1e-05"),
        ("a=int(interval(1,9))", ("int", "a", 1, 9, False), "a=1"),
        ("a=tag(log, int(interval(1, 9)))", ("int", "a", 1, 9, True), "a=1"),
        ("a=int(interval(1.0,9e0))", ("int", "a", 1, 9, False), "a=1"),
        ("a=range(5,2,-1)", ("int", "a", 0, 2, False), "a=5"),  # 5, 4, 3
        ("a=choice(4,8,16)", ("choice", "a", ("4", "8", "16")), "a=4"),
        ("a=shuffle(choice(8,4))", ("choice", "a", ("8", "4")), "a=8"),
        ("s@s.grpo=grpo,grpo_dapo", ("choice", "s@s.grpo", ("grpo", "grpo_dapo")), "s@s.grpo=grpo"),
        ("a=choice('x y',true)", ("choice", "a", ("x\\ y", "True")), "a=x\\ y"),
        ("a=range(2,5)", ("int", "a", 0, 2, False), "a=2"),  # 2, 3, 4
        ("a=range(0,1,0.25)", ("int", "a", 0, 3, False), "a=0.0"),
        ("+a=choice(1,2)", ("choice", "+a", ("1", "2")), "+a=1"),
    ],
)
def test_a_range_asks_for_its_values(word, asked, override) -> None:
    fixed, (found,) = split_words(["stage=grpo", word])
    trial = Low()
    assert (found.suggest(trial), trial.asked, fixed) == (override, [asked], ["stage=grpo"])


def test_the_ends_are_overrides() -> None:
    words = ["a=interval(1e-5,1e-3)", "b=choice(4,8,16)", "c=range(1,4)", "d=int(interval(1,9))"]
    _, ranges = split_words(words)
    assert [r.ends for r in ranges] == [
        ("a=1e-05", "a=0.001"),
        ("b=4", "b=16"),
        ("c=1", "c=3"),
        ("d=1", "d=9"),
    ]


def test_a_number_has_four_digits_and_stays_inside() -> None:
    _, (found,) = split_words(["a=interval(0.123456,0.234567)"])
    written = [found.written(value) for value in (0.15123456, 0.12345601, 0.234566)]
    assert written == ["0.1512", "0.1235", "0.234567"]  # 0.2346 would be outside


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("stage=grpo", "no range to search: for example "),
        ("", "no range to search"),
        ("a=interval(3,1)", r"a=interval\(3,1\): the first number has to be below the second"),
        ("a=interval(1,1)", "has to be below"),
        ("a=choice(4)", r"a=choice\(4\): one value is no choice: a=4"),
        ("a=choice(4,4)", "one value is no choice"),
        ("a=range(1,2)", "one value is no choice: a=1"),
        ("a=range(5,5)", r"no values: a step of 1 doesn't lead from 5 to 5"),
        ("a=range(5,1)", r"a=range\(5,1\): no values: a step of 1 doesn't lead from 5 to 1"),
        ("a=range(1,5,0)", "no values: a step of 0 doesn't lead from 1 to 5"),
        ("a=range(1,5.5,0)", "no values: a step of 0 doesn't lead from 1 to 5.5"),
        ("a=range(1,5,-1)", "no values: a step of -1"),
        ("a=range(1,inf)", r"a=range\(1,inf\): expected finite numbers"),
        ("a=range(0,1,nan)", "expected finite numbers"),
        ("a=interval(1,inf)", r"a=interval\(1,inf\): expected finite numbers"),
        ("a=interval(-inf,1)", "expected finite numbers"),
        ("a=int(interval(1,inf))", "expected finite numbers"),
        ("a=int(interval(1.5,3))", r"a=int\(interval\(1.5,3\)\): int\(\) takes whole numbers"),
        ("a=tag(log,int(interval(1,3.5)))", "int.* takes whole numbers"),
        ("a=int(range(1,3,0.5))", "int.* takes whole numbers"),
        ("a=tag(log,interval(0,1))", "a logarithm needs numbers above 0"),
        ("a=tag(fast,interval(0,1))", "unknown tag fast"),
        ("a=interval(x,1)", r"a=interval\(x,1\): no range: expected one such as interval\(1e-5,"),
        ("a=interval(1e-3)", r"^a=interval\(1e-3\): no range: expected one such as [^:]*$"),
        ("a=intervall(1e-3,1e-2)", r"^a=intervall\(1e-3,1e-2\): no range: expected one such as"),
        ("a=1,2 b=tagg(log,interval(1,2))", r"^b=tagg\(log,interval\(1,2\)\): no range"),
        ("a=interval(1,2,3)", "no range: expected one such as"),
        ("a=int(interval(a,b))", "no range: expected one such as"),
        ("a=choice()", "no range: expected one such as"),
        ("a=interval(0,1", r"a=interval\(0,1: "),
        ("a=glob(*)", "expected interval, choice or range"),
        ("seed=0,1", "seed=0,1: seed is no setting to search over"),
        ("stage=sft,grpo", "stage is no setting"),
        ("a=1,2 a=3", "a: given twice"),
        ("a=1,2 a=3,4", "a: given twice"),
        ("+a=1,2 a=3", "a: given twice"),
        ("-m a=1,2", "-m: a search takes train.py's settings"),
        ("hydra/launcher=joblib a=1,2", "none of Hydra's own"),
    ],
)
def test_bad_ranges(words, line) -> None:
    with pytest.raises(UserError, match=line):
        split_words(words.split())


def test_words_that_hydra_cannot_read_are_train_pys() -> None:
    fixed, _ = split_words(["tokenizer=hf:/a folder", "data.corpus.path='a, b.txt'", "a=1,2"])
    assert fixed == ["tokenizer=hf:/a folder", "data.corpus.path='a, b.txt'"]
