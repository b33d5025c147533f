"""The reasoning source: problems that no held-out prompt of any source gives away."""

from dataclasses import replace
from itertools import islice

from fourstage.data.config import DataConfig, cached
from fourstage.data.heldout import cleaned
from fourstage.data.keys import HeldOutKeys
from fourstage.data.problems import split_problems
from fourstage.data.records import Problem, Problems, content_digest


@cached("chat", "preference", "reasoning", "knowledge")
def load_reasoning(config: DataConfig) -> Problems:
    """Train and held-out problems. Raises UserError without any, for a bad file or bad tasks."""
    config.check_given("reasoning")
    problems = cleaned(config, "data.reasoning", split_problems(config), _gives_away)
    contents = (*map(_content, problems.train), "", *map(_content, problems.heldout))
    return replace(problems, digest=content_digest(*contents))


def worked_problems(
    config: DataConfig, count: int, share: float
) -> tuple[list[Problem], list[Problem]]:
    """The first `count` train problems with a worked solution; and held-out ones, so many that
    they are `share` of all. Raises as load_reasoning."""
    if count == 0:
        return [], []
    problems = load_reasoning(config)
    train = list(islice((p for p in problems.train if p.worked), count))
    heldout = [p for p in problems.heldout if p.worked]
    return train, heldout[: round(len(train) * (share / (1 - share)))]


def _gives_away(problem: Problem, keys: HeldOutKeys) -> bool:
    text = f"{problem.question}\n{problem.worked or ''}"
    return keys.hold(problem.question) or keys.in_text(text)


def _content(problem: Problem) -> str:
    return f"{problem.task}\x1f{problem.question}\x1f{problem.answer}\x1f{problem.worked}"
