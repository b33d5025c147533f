"""The reasoning source: problems that no held-out prompt of any source gives away."""

from __future__ import annotations

from itertools import islice

from fourstage.data.config import DataConfig, cached
from fourstage.data.heldout import heldout_keys
from fourstage.data.problems import split_problems
from fourstage.data.records import Problem, Problems, content_digest
from fourstage.errors import UserError


@cached("chat", "preference", "reasoning")
def load_reasoning(config: DataConfig) -> Problems:
    """Train and held-out problems.

    Raises:
        UserError: no path and no tasks, a bad file, an unknown task or a bad argument of one.
    """
    if config.reasoning.path is None and not config.reasoning.chosen:
        raise UserError("stages.grpo needs data.reasoning.path=FILE (a file in gsm8k's schema)")
    train, heldout, notes = split_problems(config)
    keys = heldout_keys(config)
    clean = [
        p
        for p in train
        if not (keys.hold(p.question) or keys.in_text(f"{p.question}\n{p.worked or ''}"))
    ]
    notes = notes | {"dropped_with_a_heldout_prompt": len(train) - len(clean)}
    for name, side in (("train", clean), ("held out", heldout)):
        if not side:
            raise UserError(
                f"data.reasoning: no problem is left to be {name}: give more problems or another "
                "data.heldout"
            )
    notes |= {"train": len(clean), "heldout": len(heldout)}
    digest = content_digest(*(_content(p) for p in clean), "", *(_content(p) for p in heldout))
    return Problems(clean, heldout, digest, notes)


def worked_train_problems(config: DataConfig, count: int) -> list[Problem]:
    """The first `count` train problems that have a worked solution."""
    if count == 0:
        return []
    if config.reasoning.path is None and not config.reasoning.chosen:
        raise UserError(
            "data.corpus.problems and data.chat.demonstrations take problems from the reasoning "
            "source: give data.reasoning.path=FILE (a file in gsm8k's schema), or set both to 0"
        )
    return list(islice((p for p in load_reasoning(config).train if p.worked), count))


def _content(problem: Problem) -> str:
    return f"{problem.task}\x1f{problem.question}\x1f{problem.answer}\x1f{problem.worked}"
