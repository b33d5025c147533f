"""The stages as data: what each starts from and is for. A new one is a row here, below its parents.

Its code (Settings, prepare, check_data) is in `module`, its usual settings are in
conf/stages/<name>.yaml; docs/extending.md has an example.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A row of the ladder.

    parents: the stages that it usually starts from, by role: "policy", and what else it needs. A
        config can name others under `parent` or `<role>_parent`.
    source: the data that it reads; from_prompts: only the prompts of the preferences.
    goal: the key in the evaluation suite that it is meant to improve; `instead`, another where the
        data doesn't define it.
    leaves: a language model, or a scalar model, which gives no answers.
    trained, frozen: how many networks of the model's size it holds.
    takes_any_shape: whether its parents may have another architecture than the command's model.
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
    instead: str = ""
    module: str = ""  # default: fourstage.stages.<name>

    @property
    def code(self) -> Any:
        """The stage's module, which imports PyTorch."""
        return import_module(self.module or f"fourstage.stages.{self.name}")

    @property
    def keys(self) -> dict[str, str]:
        """role of a parent -> key in the stage's config."""
        return {role: "parent" if role == "policy" else f"{role}_parent" for role in self.parents}


ROWS = (
    Stage(name="pretrain", source="corpus", goal="bits_per_char"),
    Stage(
        name="sft",
        source="chat",
        goal="knowledge_answered",
        instead="well_formed",
        parents={"policy": "pretrain"},
    ),
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
        instead="reward_model_score",
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
LADDER = {row.name: row for row in ROWS}
REFERENCE, REWARD = "sft", "reward"  # their models judge the answers of other stages


def stages() -> list[str]:
    """The names in the ladder's order, each after its parents."""
    return list(LADDER)


def place(stage: str) -> int:
    """How far up the ladder a stage is; an unknown one is above all others."""
    return stages().index(stage) if stage in LADDER else len(LADDER)
