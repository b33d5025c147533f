"""The loop, closed: votes cast in a browser, and a reward model that learns the voter's taste."""

from __future__ import annotations

import json

import pytest

from fourstage.lineage.climb import climb
from fourstage.runs.store import RunStore
from tests.arena.browser import Visitor, chromium, serving
from tests.fakes import QUICK, config

pytest.importorskip("gradio")

# half a minute: enough for words, of a kind
TRAINED = [
    *("stages.pretrain.max_steps=300", "stages.pretrain.batch_size=16", "stages.pretrain.lr=0.005"),
    *("stages.sft.max_steps=60", "stages.sft.batch_size=16", "stages.sft.lr=0.002"),
    *("stages.sft.max_tokens=256", "stages.reward.max_tokens=160", "stages.reward.max_steps=60"),
    *("stages.reward.batch_size=32", "stages.reward.lr=0.005", "evaluation.max_pairs=200"),
]


def taste(answer: str) -> float:
    """The voter prefers the answer with the larger share of small letters and spaces; equal shares
    are a tie."""
    return sum(x.islower() or x == " " for x in answer) / max(1, len(answer))


@pytest.mark.slow
def test_the_reward_model_learns_a_voters_taste(tmp_path) -> None:
    outputs = tmp_path / "outputs"
    climb(config(*QUICK, *TRAINED, "stage=sft", f"outputs={outputs}"))
    with chromium() as browser, serving(f"outputs={outputs}") as served:
        visitor = Visitor(browser, served.url)
        page = visitor.page
        visitor.tab("Vote")
        page.click("button:has-text('Settings'):visible")
        page.locator("[aria-label*='number input for tokens']:visible").fill("40")
        page.keyboard.press("Tab")
        for _ in range(200):
            visitor.draw()
            left, right = map(taste, visitor.answers("#two-answers"))
            key = "t" if left == right else "ArrowLeft" if left > right else "ArrowRight"
            page.keyboard.press(key)
            visitor.message("#voted", "saved")
        visitor.tab("Board")
        visitor.message("#counted", "200 votes")
    votes = outputs / "arena" / "votes.jsonl"
    overrides = [f"data.preference.path={votes}", f"outputs={outputs}"]
    climb(config(*QUICK, *TRAINED, "stage=reward", *overrides))
    found = json.loads((RunStore(outputs).find("reward") / "eval.json").read_text())
    accuracy = found["metrics"]["pair_accuracy"]
    assert accuracy["n"] >= 15 and accuracy["low"] > 0.5
