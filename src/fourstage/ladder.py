"""The stages as data: what stands on what, and what each is about. A new stage is a row here.

Its code (Settings, Module, prepare, check_data) is in `module`, its usual settings are in
conf/stages/<name>.yaml; docs/extending.md has an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A row of the ladder.

    parents: the stage that it usually starts from, by role: "policy", and what else it needs. Where
        a config names others, under `parent` or `<role>_parent`, it starts from those.
    source: what it reads of the data; from_prompts: of the preferences the prompts only.
    goal: the suite's key that it is there for.
    leaves: a language model, or a scalar model, which gives no answers.
    trained, frozen: the networks of the model's size that it holds.
    takes_any_shape: whether its parents may be of another shape than the command's model.
    """

    name: str
    source: Literal["corpus", "chat", "preference", "reasoning"]
    goal: str
    parents: Mapping[str, str] = field(default_factory=dict)
    from_prompts: bool = False
    leaves: Literal["policy", "scalar"] = "policy"
    trained: int = 1
    frozen: int = 0
    takes_any_shape: bool = False
    module: str = ""  # fourstage.stages.<name>, where it is not said

    @property
    def code(self) -> Any:
        """The module of the stage; importing it takes PyTorch."""
        return import_module(self.module or f"fourstage.stages.{self.name}")

    @property
    def keys(self) -> dict[str, str]:
        """The config's key for each role of a parent."""
        return {role: "parent" if role == "policy" else f"{role}_parent" for role in self.parents}


LADDER = {
    row.name: row
    for row in (
        Stage(name="pretrain", source="corpus", goal="bits_per_char"),
        Stage(name="sft", source="chat", goal="well_formed", parents={"policy": "pretrain"}),
        Stage(
            name="reward",
            source="preference",
            goal="pair_accuracy",
            parents={"policy": "sft"},
            leaves="scalar",
        ),
        Stage(
            name="ppo",
            source="preference",
            from_prompts=True,
            goal="true_score",
            parents={"policy": "sft", "reward": "reward"},
            trained=2,
            frozen=2,
        ),
        Stage(
            name="grpo",
            source="reasoning",
            goal="reasoning_accuracy",
            parents={"policy": "ppo"},
            frozen=1,
        ),
    )
}


# the stages whose models judge the answers of the others
REFERENCE, REWARD = "sft", "reward"


def stages() -> list[str]:
    """The names, each after its parents; else in the order of the rows."""
    found: list[str] = []

    def add(name: str) -> None:
        if name not in found:
            for parent in LADDER[name].parents.values():
                add(parent)
            found.append(name)

    for name in LADDER:
        add(name)
    return found


def place(stage: str) -> int:
    """How far up the ladder a stage is; an unknown one is above all."""
    names = stages()
    return names.index(stage) if stage in names else len(names)
