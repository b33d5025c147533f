"""Tasks of reasoning-gym: answers that are nearly right, or have the right one in them."""

import json
import time
from fractions import Fraction
from types import SimpleNamespace

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from fourstage.data.tasks import worked_solution
from fourstage.data.verifiers import CONDITIONS, EVALUATED, OWN, READ_PAST, is_plausible
from fourstage.data.verify import verify_all
from tests.verdicts import verify

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


def test_parts_of_a_wrong_answer_do_not_add_up():
    right = judged("spell_backward", "yawmaerts", word="streamway")
    assert right("yawmaerts") and right("YAWMAERTS")
    assert not right("yawmaertsxyzzy") and not right("yawmaerts or dog")
    right = judged("figlet_font", "SURGEONSHIP", font="standard")
    assert right("SURGEONSHIP") and not right("SURGEONSHIzzz") and not right("SURGEONSHIP or dog")
    right = judged("game_of_life", "[[0, 1], [1, 0]]")
    assert not right("[[0,1],[1,0],[]]") and not right('[[0,1],[1,0],"",[]]')
    right = judged("palindrome_partitioning", '[["a", "a"], ["aa"]]', solution=[["a", "a"], ["aa"]])
    right_twice = '[["a", "a"], ["aa"], ["a", "a"]]'
    assert right('[["aa"], ["a", "a"]]') and not right(right_twice)


def test_a_number_is_that_number():
    right = judged("gsm_symbolic", "1348")
    assert right("1348") and right("$1348")
    for wrong in (".1348", "-$1348", "- 1348", "-(1348)", "<1348", "!1348", "≠1348"):
        assert not right(wrong), wrong
    right = judged("number_format", "325906824.607", solution=325906824.607)
    assert right("325906824.607") and right("325,906,824.607")
    assert not right("325906824.612") and not right("3,2,5,9,0,6,8,2,4,.,6,0,7")
    right = judged("chain_sum", "14")
    assert right("14") and not right("1,4")
    right = judged("pool_matrix", "3.0 5.22\n4.67 3.67")
    assert right("3.0 5.22\n4.67 3.67") and right("3 5.22\n4.66 3.67")
    for wrong in ("3.0 5.26\n4.67 3.67", "3.0 5.22\n4.67 3.67 # or 3", "3.0\n5.22\n4.67\n3.67"):
        assert not right(wrong), wrong


def test_tasks_without_one_answer():
    """Their entries have no answer, but an example."""
    (one,) = problems("rubiks_cube", 1)
    right = one.entry["metadata"]["example_correct_answer"]
    assert verify(one, f"#### {right}") == 1.0 and verify(one, f"#### {right} xy9z 57x7") == 0.0
    (one,) = problems("graph_color", 1)
    right = json.dumps(one.entry["metadata"]["possible_answer"])
    assert verify(one, f"#### {right}") == 1.0
    assert verify(one, f'#### {right[:-1]}, "99": 57, "zz": "xyzzy"}}') == 0.0
    board = "BBooooooooooAAoooooooooooooooooooooo"  # A is the way out in some moves to the right
    one = SimpleNamespace(
        task="rush_hour", entry={"answer": None, "metadata": {"board_config": board}}
    )
    assert verify(one, "#### A+4") == 1.0
    assert verify(one, "#### not A+4 or 57") == verify(one, "#### xyzzy A+4") == 0.0


def test_moves_are_moves():
    puzzle = {"jug_capacities": [3, 5], "target": 3, "min_moves": 1}
    right = judged("jugs", '["fill A"]', puzzle=puzzle)
    assert right('["fill A"]') and not right('["fill A xyzzy 57"]')
    assert worked_solution("jugs", {"answer": '["No solution"]'}) is None
    right = judged("sokoban", "R", gamestr="+ + + + +\n+ * @ X +\n+ + + + +")
    assert right("R") and not right("R" + "LR" * 10)


def test_long_coefficients():
    long = "12345678901234567890123456789012345678901234567890"
    right = judged(
        "polynomial_multiplication", f"{long}*x**2", result=f"{long}*x**2", variables="x"
    )
    assert right(f"{long}*x**2")


def test_shapes_take_no_time():
    """A regular expression that tries many ways would take seconds."""
    gold = "A → B" * 5000
    one = SimpleNamespace(task="quantum_lock", entry={"answer": gold, "metadata": {}})
    begin = time.process_time()
    assert verify(one, "#### A" + " " * 39000 + "x") == 0.0
    one = SimpleNamespace(task="tower_of_hanoi", entry={"answer": gold, "metadata": {}})
    assert verify(one, "#### Move disk 1 from Peg 1 to Peg 2" + "\n" * 39000 + "x") == 0.0
    assert time.process_time() - begin < 2


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
