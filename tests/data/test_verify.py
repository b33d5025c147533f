"""Right and wrong answers, and the form of an answer."""

from types import SimpleNamespace

import pytest

from fourstage.data.verify import FROM_FILE, extract, has_form
from tests.verdicts import same_value, verify


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


def test_an_answer_of_several_lines_may_take_as_many():
    sudoku = entry("mini_sudoku", "1 2\n2 1", solution=[[1, 2], [2, 1]])
    for answer, form in (
        ("think\n#### 1 2\n2 1", True),
        ("#### 1 2", True),
        ("#### 1 2\n2 1\nbye", False),
        ("#### 1 2\n#### 2 1", False),
        ("1 2\n2 1", False),
    ):
        assert has_form(answer, sudoku) is form, answer
    assert verify(sudoku, "#### 1 2\n2 1") == 1.0


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
    assert has_form(answer, entry("gcd", "5")) is form


# what is accepted for an expected answer, and what is not
VALUES = {
    "42": (
        [
            "42",
            "42.",
            "42.0",
            "$42",
            "42%",
            "0042",
            " 42 ",
            "+42",
            "$42$",
            "$42.$",
            r"\boxed{42.}",
            r"\boxed 42",
            r"\fbox{42}",
            r"\[42\]",
            "$$42$$",
            "**42**",
            "4.2e1",
            "42\u00b0",
        ],
        ["12+30", "40, 41, 42", "41 or 42", "1=42", "4,2", "4200%", "84/2", "6*7", "x=42", "42 42"]
        + ["42 apples", "forty-two", "-42", "--42", "4 2", "٤٢", "42e", "0x2a", "", "(", "9" * 60],
    ),
    "1000": (["1,000", "1000", "1e3", "$1,000.00"], ["1,0000", "10,00", "1.000", "1 000", "1_000"]),
    "1,234,567": (["1234567", "$1,234,567"], ["1,234567", "1234,567"]),
    "\u22127": (["-7", "\u22127", "-$7", "$-7"], ["7", "\u22126", "0-7"]),
    "0": (["-0", "0.0"], ["", "-", "."]),
    "0.5": (["1/2", ".5", r"\frac{1}{2}", "5e-1"], ["50%", "1/3", "0,5", "1/4+1/4"]),
    "1/2": (["2/4", "0.5", r"\dfrac{1}{2}", "-1/-2"], ["1/2/1", "1/4+1/4", "50%", "1/0"]),
    "50%": (["50", r"50\%"], ["0.5"]),
    r"2\sqrt{3}": ([r"\sqrt{12}", "2*sqrt(3)"], [r"\sqrt{3}+\sqrt{3}", "9**9**9", "sqrt(3)"]),
    r"\frac{\pi}{2}": ([r"\pi/2"], [r"\pi", r"\pi/4+\pi/4"]),
    "x+1": (["1+x", "(x+1)", "x + 1"], ["x+2-1", "x", "x+2"]),
    "(1, 2)": (["(1,2)"], ["(2,1)", "1", "(1,2,3)"]),
    r"\{1,2\}": (["{1,2}", "{2, 1}"], ["1", "{1,2,3}", "(1,2)", "[1,2]"]),
    "[1, 2)": (["[1,2)", "[1.0, 2)"], ["[2/2, 2)", "[1,2]", "(1,2)", "{1,2}", "1,2"]),
    "1, 2": (["1,2", "1.0, 2"], ["2, 1", "1", "1+0, 2", "(1,2)", "1, 2, 3"]),
    r"(1, \sqrt{2})": (["(1,sqrt(2))", "(1, \u221a2)"], [r"(\sqrt{2}, 1)", r"(1, \sqrt{3})"]),
    r"(1,2) \cup (3,4)": ([r"(1,2)\cup(3,4)"], [r"[1,2] \cup [3,4]", "(1,2)"]),
    r"1\frac{4}{5}": (["9/5", "1.8", "1 4/5", r"1\tfrac{4}{5}"], ["14/5", "4/5", "1+4/5"]),
    "-1 1/2": (["-1.5", "-3/2"], ["-1/2", "1/2", "-11/2"]),
    r"3\pi": (["3*pi", "3\u03c0", "3pi", r"3 \cdot \pi"], [r"2\pi+\pi", "3", "pi"]),
    r"\ln 2": (["ln 2", "ln(2)", r"\ln(2)"], ["ln 3", "2", r"\ln 1 + \ln 2"]),
    r"2\sqrt{5}": (["2\u221a5", "2sqrt(5)", "\u221a(20)"], ["2\u221a6", "25"]),
    "x^10": (["x**10", "x^{10}"], ["x^1*0", "x^11", "x^5*x^5+0"]),
    r"90^\circ": (["90", "90\u00b0"], ["9", "90+0"]),
    "3:30": (["3:30"], ["3:31", "330", "3/30"]),
    "5 cm": (["5 cm", "5cm"], ["5 kg", "6 cm"]),
    "Paris": (["paris", "Paris."], ["London", "Paris or London", ""]),
    "it\u2019s": (["it's", "It\u2019s"], ["its"]),
    "\u201cyes\u201d": (['"yes"'], ["yes no"]),
    "(A)": (["(a)"], ["(B)", "(A) or (B)"]),
    "nan": (["nan"], ["1"]),
    "3-5": (["3-5", "3 - 5"], ["5-7", "1-3", "-2"]),
    "2024-01-15": (["2024-01-15"], ["2024-15-1"]),
    "10:30": (["10:30"], ["1:3"]),
    "3 hours 20 minutes": (["3 Hours 20 minutes"], ["20 hours 3 minutes"]),
    "R2D2": (["r2d2"], ["D2R2"]),
    "1011_2": (["1011_2"], ["1011"]),
    "40410": (["40,410"], ["40, 410"]),
    "1{,}000": (["1000", "1,000"], ["1"]),
    r"\frac12": (["1/2", r"\frac{1}{2}"], ["12"]),
    r"\text{Evelyn}": (["Evelyn"], ["Eve"]),
}


# the same for formulas, units and words as people write them
VALUES |= {
    "\\frac 34": (["3/4", "\\frac{3}{4}"], []),
    "\\frac 59": (["5/9"], []),
    "\\frac{1}2": (["1/2"], []),
    "\\frac1{2}": (["1/2"], []),
    "3/4": (["\\frac 34", "\\dfrac 3 4", "\\cfrac{3}{4}", "\\displaystyle\\frac{3}{4}"], []),
    "1/3": (["\u2153"], []),
    "5/2": (["2\xbd"], []),
    "\\frac{1}{\\sqrt{2}}": (["\\frac{\\sqrt{2}}{2}"], []),
    "\\frac{2}{\\sqrt{3}}": (["\\frac{2\\sqrt{3}}{3}"], []),
    "\\frac{x}{2}": (["\\frac{1}{2}x"], []),
    "y=\\frac{x}{3}": (["y=\\frac{1}{3}x"], []),
    "\\frac{3\\pi}{4}": (["\\frac{3}{4}\\pi"], []),
    "\\frac{\\pi}{2}": (["\\frac{1}{2}\\pi"], []),
    "\\frac{a-b}{2}": (["\\frac{1}{2}(a-b)"], []),
    "\\frac{x}{2}+1": (["\\frac{x+2}{2}"], []),
    "a-b": (["-b+a"], []),
    "x(x+1)": (["x^2+x"], []),
    "42": (
        ["(42)", "`42`", '"42"', "42\u20ac", "\xa542", "42\\$", "42,", "\\mathbf{42}", "*42*"],
        [],
    ),
    "-5": (["(-5)"], []),
    "B": (["(B)", "B)", "\\textbf{(B)}"], []),
    "(C)": (["C"], []),
    "x \\le 3": (["x <= 3", "x\u22643"], []),
    "x\\geq 3": (["x>=3"], []),
    "x \\neq 2": (["x != 2"], []),
    "x>3": (["x\\gt 3"], []),
    "(-\\infty, 2]": (["(-\u221e,2]", "(-infinity,2]", "(-inf,2]", "(-oo,2]"], []),
    "[0,1] \\cup [2,3]": (["[0,1] \u222a [2,3]"], []),
    "\\infty": (["\u221e"], []),
    "\\emptyset": (["\\varnothing"], []),
    "1010_2": (["1010_{2}"], []),
    "\\begin{pmatrix}1\\\\2\\end{pmatrix}": (["\\begin{bmatrix}1\\\\2\\end{bmatrix}"], []),
    "1.5 \\times 10^6": (["1.5e6", "1500000"], []),
    "90 degrees": (["90", "90\xb0"], []),
    "60^\\circ": (["60 degrees"], []),
    "15\\%": (["15 percent"], []),
    "33\\frac{1}{3}\\%": (["100/3", "33 1/3"], []),
    "10:15 a.m.": (["10:15 AM"], ["10:51 a.m.", "10:15 p.m.", "10:99 a.m."]),
    "x^2 + 1": (["x\xb2 + 1"], []),
    "3.5m": (["3.5 m"], []),
    "1+xy": (["xy+1"], []),
    "4 R 3": (["4 r 3"], ["12R"]),
    "(x+1)(x-1)": (["x^2-1"], []),
    "-x+1": (["1-x"], []),
    "7 a.m.": ([], ["7 p.m."]),
    "9:00 a.m.": ([], ["9:00 p.m."]),
    "4:00 p.m.": ([], ["4:00 a.m."]),
    "5 ft 3 in": ([], ["3 ft 5 in"]),
    "6'": ([], ["6''"]),
    "44 B.C.": ([], ["44 A.D."]),
    "2 h": ([], ["2 m"]),
    "2 m": ([], ["2 s", "2"]),
    "3 h": ([], ["3"]),
    "12 s": ([], ["12 h"]),
    "3.5 h": ([], ["3.5 m"]),
    "5M": ([], ["5"]),
    "\\sqrt{3} m": ([], ["\\sqrt{3} s"]),
    "\\frac12 h": ([], ["\\frac12 m"]),
    "7 R 2": ([], ["14 R"]),
    "2 R 3": ([], ["3 R 2"]),
    "2 to 3": ([], ["3 to 2"]),
    "1 in 4": ([], ["4 in 1"]),
    "1 of 3": ([], ["3 of 1"]),
    "6 x 4": ([], ["4 x 6"]),
    "1 or 2": ([], ["2 or 1"]),
    "0.\\overline{3}": ([], ["0.\\overline{4}"]),
    "0.\\overline{36}": ([], ["0.\\overline{63}"]),
    "0.\\overline{142857}": ([], ["0.\\overline{1}"]),
    "0.\\dot{3}": ([], ["0.\\dot{4}"]),
    "3.\\dot{3}": ([], ["3"]),
    "0.333...": ([], ["0.333"]),
    "2\u2075": ([], ["2\u2076", "2"]),
    "3\xbd": ([], ["3"]),
    "n \\equiv 1 \\pmod{4}": ([], ["n \\equiv 1 \\pmod{5}"]),
    "\\frac{dy}{dx}=2x": ([], ["\\frac{dx}{dy}=2x"]),
    "\\frac{\\partial f}{\\partial x}": ([], ["\\frac{\\partial f}{\\partial y}"]),
    "x+1": ([], ["x+1!", "x+1'"]),
    "\\sqrt{2}": ([], ["1.4142135"]),
    "\\pi": ([], ["3.1415926"]),
    "\\ln 2": ([], ["0.693147"]),
    "2\\pi": ([], ["6.2831853"]),
    "\\frac{\\sqrt3}{2}": ([], ["0.8660254"]),
    "\\{5\\}": ([], ["5"]),
    "\\{-1\\}": ([], ["-1"]),
    "\\{1\\}": ([], ["(1)", "[1]"]),
    "\\{x\\}": ([], ["x"]),
    "[x+1]": ([], ["x+1"]),
    "(1,2),(3,4)": ([], ["(3,4),(1,2)"]),
    "yes": ([], ["y e s"]),
    "no": ([], ["n o"]),
    "red": ([], ["r e d"]),
    "ice cream": ([], ["i cec ream"]),
    "No solution": ([], ["nosolution"]),
}


@pytest.mark.parametrize("expected", VALUES)
def test_same_value(expected):
    """One number, or one expression of the same kind as the expected one."""
    right, wrong = VALUES[expected]
    assert [given for given in right if not same_value(given, expected)] == []
    assert [given for given in wrong if same_value(given, expected)] == []


def test_brackets_a_thousand_deep_are_no_crash():
    deep = "(1," * 1500 + "2" + ")" * 1500
    assert same_value(deep, deep) and not same_value(deep.replace("2", "3"), deep)
