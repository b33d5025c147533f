"""Casts votes by a rule on a ladder's answers, without a browser, and prints the board:

    python -m tests.arena.voter outputs outputs/arena/votes.jsonl 120

The voter likes friendly answers best, then those that end by themselves; equal ones are a tie. A
quarter of his votes are on two answers of one stage. The same ladder gives the same votes.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch

from fourstage.arena.board import rates, strengths
from fourstage.arena.contestants import Answer, answer, duel, open_ladder
from fourstage.arena.votes import Side, Vote, Votes, wins
from fourstage.runs.store import RunStore
from fourstage.sampling.generate import Sampling

FRIENDLY = ("hope that helps", "Glad to help", "welcome to ask")
LENGTH, TEMPERATURE = 120, 0.7


def taste(said: Answer) -> tuple[bool, bool]:
    return any(words in said.text for words in FRIENDLY), said.stopped


def main(outputs: str, path: str, n: str, ladder: str = "grpo") -> None:
    torch.set_flush_denormal(True)
    arena, votes = open_ladder(RunStore(Path(outputs)), ladder), Votes(Path(path))
    draw = random.Random(0)
    for i in range(int(n)):
        messages = draw.choice(arena.prompts)
        two = duel(arena, messages, i, same_run=i % 4 == 0)
        said, sides = [], []
        for one, seed in zip((two.left, two.right), two.seeds, strict=True):
            how = {"max_new_tokens": LENGTH, "temperature": TEMPERATURE, "seed": seed}
            *_, last = answer(one, messages, Sampling(stop_id=0, **how))
            said.append(last)
            sides.append(Side(run=one.run, answer=last.text, stopped=last.stopped, **how))
        left, right = map(taste, said)
        choice = "tie" if left == right else "left" if left > right else "right"
        asked = messages[0]["content"] if len(messages) == 1 else messages
        times = {"id": f"{i:032x}", "voted": "2026-01-01T00:00:00+00:00"}
        votes.add(Vote(**times, prompt=asked, choice=choice, left=sides[0], right=sides[1]))
    cast, _ = votes.read()
    won, runs = wins(cast), [one.run for one in arena.contestants]
    print(f"{len(cast)} votes, {sum(vote.choice == 'tie' for vote in cast)} without a winner")
    for x in strengths(won, runs):
        print(f"{x.run}: {x.value:+.2f} [{x.low:+.2f}, {x.high:+.2f}]")
    for y in rates(won, runs):
        value, low, high = (f"{100 * z:.1f}" for z in (y.value, y.low, y.high))
        print(f"{y.first} against {y.second}: {value} % [{low}, {high}], n {y.n}")


if __name__ == "__main__":
    main(*sys.argv[1:])
