"""How the runner sets up Lightning."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from fourstage.data import Problem, SamplePrompt
from fourstage.lineage.resume import Checkpointer
from fourstage.lineage.runner import check_order, judged, quieten
from fourstage.tracking.callbacks import RouterHealth, SampleLog, StepAxis
from fourstage.tracking.cost import CostMeter
from tests.one_weight import fit


def test_callbacks_in_an_order_that_counts_too_much_or_saves_too_early_are_refused(tmp_path):
    meter, health = CostMeter(), RouterHealth([[1]], every=1)
    samples = SampleLog(Path("samples.jsonl"), list, every=1)
    checkpointer = Checkpointer(tmp_path / "sft-a" / "checkpoints" / "last.ckpt", every=1)
    for order in permutations([StepAxis(), meter, health, samples, checkpointer]):
        place = order.index
        if place(meter) < min(place(health), place(samples)) and place(checkpointer) == 4:
            check_order(list(order))
            continue
        with pytest.raises(AssertionError):
            check_order(list(order))


def test_a_budget_below_the_logging_interval_is_no_warning(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path / "loud", log_every=100)
        assert any("smaller than the logging interval" in str(w.message) for w in caught)
        caught.clear()
        quieten()
        fit(tmp_path / "quiet", log_every=100)
    assert not [w for w in caught if "logging interval" in str(w.message)]


FACT = SamplePrompt("f", [{"role": "user", "content": "What is RoPE?"}], ("RoPE turns queries.",))
PROBLEM = Problem("1 + 1 = ?", "2", "file", None, {"question": "1 + 1 = ?", "answer": "2"})


@pytest.mark.parametrize(
    ("prompt", "answer", "stopped", "right"),
    [
        (FACT, "RoPE turns queries. I hope that helps!", True, True),
        (FACT, "Well: rope turns queries", True, True),
        (FACT, "RoPE turns queries.", False, False),
        (FACT, "RoPE turns", True, False),
        (replace(FACT, references=("It is RoPE.", "RoPE turns.")), "RoPE turns.", True, True),
        (replace(FACT, references=()), "RoPE turns queries.", True, None),
        (SamplePrompt("p", PROBLEM.prompt_messages, (), PROBLEM), "1 + 1\n#### 2", True, True),
        (SamplePrompt("p", PROBLEM.prompt_messages, (), PROBLEM), "1 + 1\n#### 2", False, False),
        (SamplePrompt("p", PROBLEM.prompt_messages, (), PROBLEM), "It is 2", True, False),
    ],
)
def test_answers_are_right_if_they_say_what_is_known_to_be_right(prompt, answer, stopped, right):
    sample = judged(prompt, answer, stopped)
    assert sample.right is right
    assert (sample.prompt, sample.answer) == (prompt.messages[-1]["content"], answer)
