"""Tasks of reasoning-gym: answers that are nearly right, or have the right one in them."""

import json
from fractions import Fraction
from types import SimpleNamespace

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from fourstage.data.tasks import worked_solution
from fourstage.verifiers import CONDITIONS, EVALUATED, OWN, READ_PAST, is_plausible
from fourstage.verify import verify, verify_all

STRICTER = sorted(set(CONDITIONS) | set(EVALUATED) | set(OWN) | set(READ_PAST))


def problems(task: str, n: int) -> list[SimpleNamespace]:
    """With the task's default arguments, as they are stored."""
    data = reasoning_gym.create_dataset(task, size=n, seed=5)
    return [
        SimpleNamespace(task=task, entry=json.loads(json.dumps(data[i], default=str)))
        for i in range(n)
    ]


def changed(answer: str) -> list[str]:
    """A right answer with something else beside it."""
    within = ["xyzzy {}", "{} xyzzy", "not {}", "{}\nxyzzy", "xyzzy\n{}", "{}, xyzzy", "{}\n{}\n{}"]
    numbers = ["{} 57", "{}, 57", "{} or 57", "57, {}", "{}:57"]
    listed = ['{}, "xyzzy"]', "{}, 57]", "{}, [57]]"] if answer.endswith("]") else []
    whole = [form.replace("{}", answer) for form in within + numbers]
    return whole + [form.replace("{}", answer[:-1]) for form in listed]


def outwitted(task: str, n: int) -> list[tuple[str, str]]:
    """The (right answer, changed answer) with a full score."""
    asked = [p for p in problems(task, n) if isinstance(p.entry["answer"], str)]
    tries = [(one, text) for one in asked for text in changed(one.entry["answer"].strip())]
    scores = verify_all([one for one, _ in tries], [f"#### {text}" for _, text in tries])
    return [
        (one.entry["answer"], text)
        for (one, text), score in zip(tries, scores, strict=True)
        if score == 1.0
    ]


@pytest.mark.parametrize("task", STRICTER)
def test_the_right_answer_with_something_beside_it_is_wrong(task):
    assert outwitted(task, n=2) == []


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(set(DATASETS) - {"composite"}))
def test_the_right_answer_with_something_beside_it_is_wrong_in_every_task(task):
    assert outwitted(task, n=6) == []


@pytest.mark.parametrize("task", STRICTER)
def test_right_answers_stay_right(task):
    asked = [p for p in problems(task, 4) if isinstance(p.entry["answer"], str)]
    asked = [p for p in asked if "Integral(" not in p.entry["answer"]]  # no answer: not solved
    answers = [p.entry["answer"].strip() or '""' for p in asked]
    for one, answer in zip(asked, answers, strict=True):
        assert is_plausible(answer, task, one.entry)
    assert verify_all(asked, [f"#### {a}" for a in answers]) == [1.0] * len(asked)


def judged(task: str, answer: object, /, **metadata: object):
    one = SimpleNamespace(task=task, entry={"answer": answer, "metadata": metadata})
    return lambda given: verify(one, f"#### {given}") == 1.0


def test_puzzle24_and_countdown():
    right = judged("puzzle24", "8*(5*1 - 2)", numbers=[5, 1, 2, 8])
    assert right("8*(5*1 - 2)") and right("(5*1-2)*8")
    for wrong in ("2*(5+1+6)", "24", "8*5-2**4*1", "8.0*(5*1-2)", "8*3", "8*(5*1 - 2)+0", "4!"):
        assert not right(wrong), wrong
    assert judged("puzzle24", "12+12*1*1", numbers=[12, 12, 1, 1])("12+12*1*1"), "beyond 1 to 10"
    right = judged("countdown", "49*3", numbers=[49, 3], target=147)
    assert right("3*49") and not right("49*3 + 0") and not right("49+3")
    nearly = judged("countdown", "-", numbers=[100000, 3, 300001], target=100000)
    assert not nearly("300001/3*1"), "not all numbers"
    nearly = judged("countdown", "-", numbers=[300001, 3], target=100000)
    assert not nearly("300001/3"), "near is not equal"


def test_numbers_are_those_of_the_answer():
    right = judged("coin_flip", "0.003173828125")
    assert right(0.003173828125) and right(Fraction(13, 4096)) and right("0.0031738")
    assert not right("0") and not right("0.00317") and not right("-0.003173828125")
    right = judged("gsm_symbolic", "279")
    assert right("279") and right("279.0") and not right("-279") and not right("279+1")
    right = judged("decimal_arithmetic", "2.98141124210")
    assert right("2.98141124210") and right("2.98141124211") and not right("2.981411")
    right = judged("number_sorting", "['-1.5', '2.0']", direction="ascending")
    assert right("['-1.5', '2.0']") and right('["-1.5", "2"]') and not right("['-1.5', '2.9']")
    right = judged("calendar_arithmetic", "-3", task="count_days")
    assert right("-3") and not right("-4"), "reasoning-gym gives more than 1 for a smaller one"
    right = judged("game_of_life", "[[0, 1], [1, 0]]")
    assert right("[[0,1],[1,0]]") and not right("[[0,1,1],[1,0]]")
    right = judged("time_intervals", "67 days", task_type="date")
    assert right("67 days") and not right("67 or 68 days")


def test_knights_and_knaves_in_any_order():
    right = judged("knights_knaves", "Zoey is a knight, and Owen is a knave.")
    assert right("Owen is a knave, and Zoey is a knight") and right("zoey knight owen knave")
    assert not right("Zoey is a knave, and Owen is a knight.")
    assert not right("not Zoey is a knight, and Owen is a knave.")


def test_verifiers_that_take_anything_are_replaced():
    right = judged("game_of_life_halting", True)
    assert [right(text) for text in ("True", "False", "x")] == [True, False, False]
    for task in ("rearc", "arc_agi"):
        right = judged(task, "1 0\n0 1", output=[[1, 0], [0, 1]])
        assert right("1 0\n0 1") and not right("1 0\n0 0")


def test_an_unsolved_integral_is_no_worked_solution():
    for answer, solution in (("x**2 + C", "#### x**2 + C"), ("3*Integral(x**3, x) + C", None)):
        assert worked_solution("intermediate_integration", {"answer": answer}) == solution


def test_only_tasks_that_there_are_are_named():
    assert set(STRICTER) < set(DATASETS)
