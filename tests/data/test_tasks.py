"""The short forms and worked solutions of reasoning-gym's tasks."""

import pytest

from fourstage.data.tasks import chain_sum_steps, short_question, worked_solution


def solve(task, answer, **metadata):
    entry = {"question": "long question?", "answer": answer, "metadata": metadata}
    return short_question(task, entry), worked_solution(task, entry)


@pytest.mark.parametrize(
    ("expression", "answer", "steps"),
    [
        ("4 + 5", "9", ""),
        ("47 + 38", "85", "40+30=70\n7+8=15\n"),
        ("12 - 85", "-73", "10-80=-70\n2-5=-3\n"),
        ("20 + 30", "50", "20+30=50\n0+0=0\n"),
        ("305 - 98", "207", "300-0=300\n0-90=-90\n5-8=-3\n"),
        ("-12 + -5", "-17", "-10+0=-10\n-2+-5=-7\n"),
        ("12 + 34 - 6", "40", "12+34=46\n46-6=40\n"),
    ],
)
def test_chain_sum(expression, answer, steps):
    question, worked = solve("chain_sum", answer, expression=expression)
    assert question == f"{expression} = ?"
    assert worked == f"{steps}#### {answer}"


@pytest.mark.parametrize(
    ("expression", "answer", "steps"),
    [
        ("3 * 8", "24", "8 16 24\n"),
        ("1 * 8", "8", ""),
        ("0 * 8", "0", ""),
        ("12 * 30", "360", "12*30=360\n"),
        ("12 * 34", "408", "12*30=360\n12*4=48\n360+48=408\n"),
        ("-12 * 34", "-408", "-12*30=-360\n-12*4=-48\n-360-48=-408\n"),
        ("2 * 3 * 15", "90", "3 6\n15 30 45 60 75 90\n"),
    ],
)
def test_products(expression, answer, steps):
    question, worked = solve("products", answer, expression=expression)
    assert question == f"{expression} = ?"
    assert worked == f"{steps}#### {answer}"


def test_gcd():
    assert solve("gcd", "6", numbers=[12, 18]) == (
        "gcd(12, 18) = ?",
        "18%12=6\n12%6=0\n#### 6",
    )
    assert solve("gcd", "2", numbers=[12, 18, 8])[1] == "18%12=6\n12%6=0\n8%6=2\n6%2=0\n#### 2"


def test_spell_backward():
    assert solve("spell_backward", "olleh", word="hello") == (
        "Reverse: hello",
        "h e l l o\n#### olleh",
    )


def test_other_tasks_keep_their_question():
    assert solve("lcm", "12") == ("long question?", "#### 12")
    assert solve("propositional_logic", None)[1] is None


def test_leg_counting_is_worked_out() -> None:
    entry = {"metadata": {"animals": {"dog": 3, "ant": 1}}, "answer": "18"}
    assert short_question("leg_counting", entry) == "Legs: 3 dogs, 1 ant"
    assert worked_solution("leg_counting", entry) == "3*4=12\n1*6=6\n12+6=18\n#### 18"


def test_a_chain_of_one_term_has_no_steps():
    assert chain_sum_steps({"expression": "7"}) == []
