"""A train.py that is a function: the value is a formula of the words, the run a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fourstage.errors import UserError
from fourstage.files import write_json
from fourstage.search.training import Trainer, TrialFailed

Words = Mapping[str, str]


def parabola(words: Words) -> float:
    """1 at lr 1e-3 and 6 epochs, which the default isn't; a little more or less by the seed."""
    import math

    lr, epochs = float(words.get("stages.grpo.lr", 1e-5)), int(words.get("stages.grpo.epochs", 2))
    seed = int(words["seed"])
    return 1 - 0.1 * (math.log10(lr) + 3) ** 2 - 0.01 * (epochs - 6) ** 2 + 0.001 * (seed % 7)


class FakeTrainPy:
    """Counts what is trained. dies_in: the training in which Ctrl-C comes; is_full: the disk."""

    def __init__(self, outputs: Path, value: Callable[[Words], float | None] = parabola) -> None:
        self.outputs, self.value = outputs, value
        self.trained: list[list[str]] = []
        self.dies_in: int | None = None
        self.is_full = False

    @property
    def trainer(self) -> Trainer:
        return Trainer(self.settings, self.train)

    def settings(self, commands: Sequence[Sequence[str]]) -> Mapping[str, Any]:
        for words in commands:
            given = dict(word.split("=", 1) for word in words)
            if "stages.grpo.lrr" in given:
                raise UserError("stages.grpo.lrr: no such setting: did you mean lr?")
            if float(given.get("stages.grpo.lr", 1)) <= 0:
                raise UserError("stages.grpo.lr: must be above 0")
        given = dict(word.split("=", 1) for word in commands[0])
        stage, seed = given.get("stage", "pretrain"), int(given.get("seed", 0))
        return {"stage": stage, "seed": seed, "outputs": str(self.outputs)}

    def train(self, words: Sequence[str], log: Path) -> Path:
        self.trained.append(list(words))
        log.write_text("trained\n")
        if len(self.trained) - 1 == self.dies_in:
            raise KeyboardInterrupt
        if self.is_full:
            raise UserError("disk full: free space and run the same command again (of the search)")
        given = dict(word.split("=", 1) for word in words)
        value = self.value(given)
        if value is not None and value != value:
            raise TrialFailed("grpo, after step 3: out of memory")
        name = hashlib.sha256(" ".join(sorted(words)).encode()).hexdigest()[:10]
        folder = self.outputs / "runs" / f"{given.get('stage', 'pretrain')}-{name}"
        goals = ("reasoning_accuracy", "bits_per_char")
        metrics = {goal: {"value": value} for goal in goals}
        write_json(folder / "eval.json", {"suite": "6", "seed": 0, "metrics": metrics})
        return folder
