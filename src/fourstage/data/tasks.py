"""Tasks of reasoning-gym in the form a small character model reads, with worked solutions.

| task | reasoning-gym's question | here |
| --- | --- | --- |
| chain_sum | State the final answer to the following arithmetic problem: 26 + 4 = | 26 + 4 = ? |
| products | Solve the following multiplication: 7 * 12. Give only the result ... | 7 * 12 = ? |
| gcd | Find the Greatest Common Divisor (GCD) of these numbers: 12, 18. ... | gcd(12, 18) = ? |
| leg_counting | Your task is to count how many legs there are in total ... | Legs: 3 dogs, 2 ants |
| spell_backward | Spell this word backward (example: sun -> nus): hello | Reverse: hello |
| any other | as it is | as it is, and the worked solution is its last line only |

The answer is always judged by the task's own verifier, on its own entry. A worked solution is
short steps, then "#### ANSWER" (Nye et al. 2021, arXiv 2112.00114: scratchpads).
"""

import re
from collections.abc import Callable
from functools import reduce
from typing import Any

from fourstage.data.verifiers import is_plausible
from fourstage.data.verify import MARK

Entry = dict[str, Any]


def short_question(task: str, entry: Entry) -> str:
    """The question as the model sees it."""
    metadata = entry["metadata"]
    if task in ("chain_sum", "products"):
        return f"{metadata['expression']} = ?"
    if task == "gcd":
        return f"gcd({', '.join(map(str, metadata['numbers']))}) = ?"
    if task == "leg_counting":
        counts = (f"{n} {animal}{'s' * (n > 1)}" for animal, n in metadata["animals"].items())
        return f"Legs: {', '.join(counts)}"
    if task == "spell_backward":
        return f"Reverse: {metadata['word']}"
    return entry["question"].strip()


def worked_solution(task: str, entry: Entry) -> str | None:
    """Steps, one a line, and the marked answer; None if the task has no single answer, or one that
    its verifier rejects (an integral that sympy leaves unsolved)."""
    answer = entry["answer"]
    if not isinstance(answer, str) or not answer.strip() or not is_plausible(answer, task, entry):
        return None
    steps = STEPS[task](entry["metadata"]) if task in STEPS else []
    return "\n".join([*steps, f"{MARK}{answer.strip()}"])


def _by_place(number: int) -> list[int]:
    """347 -> [300, 40, 7]; the sign goes with every part, and zeros stay."""
    sign, digits = (-1 if number < 0 else 1), str(abs(number))
    return [sign * int(d) * 10 ** (len(digits) - 1 - i) for i, d in enumerate(digits)]


def _running_sums(total: int, terms: list[tuple[str, int]]) -> list[str]:
    """12 + 34 - 6: 12+34=46, 46-6=40."""
    steps = []
    for sign, term in terms:
        result = total + term if sign == "+" else total - term
        steps.append(f"{total}{sign}{term}={result}")
        total = result
    return steps


def chain_sum_steps(metadata: Entry) -> list[str]:
    """Two terms: hundreds, tens and units apart (47 + 38: 40+30=70, 7+8=15). More: running sums.

    Single digits need no step.
    """
    first, *rest = re.findall(r"-?\d+|[+-](?= )", metadata["expression"])
    terms = [(rest[i], int(rest[i + 1])) for i in range(0, len(rest), 2)]
    if len(terms) != 1:
        return _running_sums(int(first), terms)
    sign, term = terms[0]
    width = max(len(str(abs(n))) for n in (int(first), term))
    if width == 1:
        return []
    columns = ([0] * (width - len(parts)) + parts for parts in map(_by_place, (int(first), term)))
    return [step for a, b in zip(*columns, strict=True) for step in _running_sums(a, [(sign, b)])]


def products_steps(metadata: Entry) -> list[str]:
    """A digit times a number counts up (3 * 8: "8 16 24"); else the digits of the second factor.

    12 * 34: 12*30=360, 12*4=48, 360+48=408. Several factors are taken from the left.
    """
    factors = [int(f) for f in re.findall(r"-?\d+", metadata["expression"])]
    steps, left = [], factors[0]
    for right in factors[1:]:
        steps += _product(left, right)
        left *= right
    return steps


def _product(left: int, right: int) -> list[str]:
    small, large = sorted((abs(left), abs(right)))
    if small <= 9:
        return [" ".join(str(large * i) for i in range(1, small + 1))] if small > 1 else []
    parts = [part for part in _by_place(right) if part]
    first, *rest = (left * part for part in parts)
    signed = [("+" if n > 0 else "-", abs(n)) for n in rest]
    return [*(f"{left}*{part}={left * part}" for part in parts), *_running_sums(first, signed)]


def gcd_steps(metadata: Entry) -> list[str]:
    """Euclid's remainders: gcd(12, 18): 18%12=6, 12%6=0."""
    steps: list[str] = []

    def euclid(a: int, b: int) -> int:
        large, small = max(a, b), min(a, b)
        while small:
            steps.append(f"{large}%{small}={large % small}")
            large, small = small, large % small
        return large

    reduce(euclid, metadata["numbers"])
    return steps


def leg_counting_steps(metadata: Entry) -> list[str]:
    """Each kind of animal, then running sums: 3 dogs, 2 ants: 3*4=12, 2*6=12, 12+12=24."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    legs = [(n, ANIMALS[animal]) for animal, n in metadata["animals"].items()]
    first, *rest = (n * each for n, each in legs)
    steps = [f"{n}*{each}={n * each}" for n, each in legs]
    return steps + _running_sums(first, [("+", n) for n in rest])


STEPS: dict[str, Callable[[Entry], list[str]]] = {
    "chain_sum": chain_sum_steps,
    "products": products_steps,
    "gcd": gcd_steps,
    "leg_counting": leg_counting_steps,
    "spell_backward": lambda metadata: [" ".join(metadata["word"])],  # the letters, spaced out
}
