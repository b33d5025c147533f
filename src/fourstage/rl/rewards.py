"""Text to reward: the hidden preference rule, and the verifiable reward of reasoning problems.

The hidden rule (RULE_VERSION) plays the human who compares two answers. It labels the pairs that
the reward model learns from and judges every stage in the evaluation, but no training sees its
score. So over-optimisation of the learned reward is measurable (Gao et al. 2022,
arXiv 2210.10760). The rule likes answers that are

    complete   +1.0   ended by the model itself, on a full stop, exclamation or question mark
    kind       +0.5   for each different kind word, three at most
    measured   +-1    1 - |words - 12| / 12, never below -1: neither a grunt nor a sermon
    varied     -2.0   times the fraction of words that repeat an earlier one

A constant or empty answer scores at most 0; the best possible answer scores 3.5.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from fourstage.data.verify import Verifiable, has_form, verify_all

RULE_VERSION = 1
BEST_LENGTH = 12
MOST_KIND_WORDS = 3
# fmt: off
KIND_WORDS = frozenset((
    "please", "thank", "thanks", "sorry", "glad", "happy", "welcome", "help", "hope", "sure",
    "good", "great", "nice", "well", "love", "you", "your", "we", "us", "friend", "let", "try",
))
# fmt: on
_WORD = re.compile(r"[A-Za-z']+")
_PLAIN = re.compile(
    r"[\"'(]?([A-Za-z][a-z]*(['-][A-Za-z]?[a-z]*)*|[A-Z]+|[0-9.,]+)[\"')]?[.,!?:;]*[\"')]?"
)


class RuleParts(NamedTuple):
    """The summands of the hidden rule."""

    complete: float
    kind: float
    measured: float
    varied: float


def rule_parts(answer: str, stopped: bool) -> RuleParts:
    """Judge one answer; `stopped`: the model ended it itself."""
    words = [word.lower() for word in _WORD.findall(answer)]
    distinct = set(words)
    repeated = 1 - len(distinct) / len(words) if words else 0.0
    return RuleParts(
        complete=float(stopped and answer.rstrip().endswith((".", "!", "?"))),
        kind=0.5 * min(len(distinct & KIND_WORDS), MOST_KIND_WORDS),
        measured=max(-1.0, 1 - abs(len(words) - BEST_LENGTH) / BEST_LENGTH),
        varied=-2.0 * repeated,
    )


def true_score(answer: str, stopped: bool) -> float:
    """The hidden rule's score of one answer, at most 3.5; higher is preferred."""
    return sum(rule_parts(answer, stopped))


class ReasoningReward(NamedTuple):
    """What a verifiable answer earns."""

    correct: float  # 1 if the task's own verifier gives it full marks, else 0
    form: float  # 1 if it stopped and ends in exactly one marked final answer, else 0

    def total(self, form_weight: float) -> float:
        return self.correct + form_weight * self.form


def reasoning_rewards(
    problems: Sequence[Verifiable], answers: Sequence[str], stopped: Sequence[bool]
) -> list[ReasoningReward]:
    """Judge an answer to each problem; a truncated answer earns nothing."""
    forms = [has_form(answer, problem) for problem, answer in zip(problems, answers, strict=True)]
    return [
        ReasoningReward(float(score == 1.0), float(form)) if ended else ReasoningReward(0.0, 0.0)
        for score, form, ended in zip(verify_all(problems, answers), forms, stopped, strict=True)
    ]


def well_formed(answer: str, stopped: bool, problem: Verifiable | None = None) -> bool:
    """Whether an answer stopped and has the form that instruction tuning taught.

    To a problem: it ends in exactly one marked final answer. In a chat: at least three quarters of
    its whitespace-separated pieces are plain words or numbers, punctuation aside.
    """
    if not stopped:
        return False
    if problem is not None:
        return has_form(answer, problem)
    pieces = answer.split()
    plain = sum(bool(_PLAIN.fullmatch(piece)) for piece in pieces)
    return bool(pieces) and plain >= 0.75 * len(pieces)
