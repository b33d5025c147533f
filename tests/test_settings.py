"""Config values become typed settings, or one clear line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from fourstage.errors import UserError
from fourstage.settings import build


@dataclass(frozen=True, kw_only=True)
class Inner:
    path: str | None = None
    share: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Sample:
    group_size: int
    lr: float = 1e-3
    loss: Literal["grpo", "dapo"] = "grpo"
    top: Literal[1, 2] = 1
    shuffle: bool = True
    max_time: str | None = None
    parent: str | int | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    names: list[str] = field(default_factory=list)
    tasks: dict[str, dict] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    extra: Any = None

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise UserError(f"group_size: must be at least 2, got {self.group_size}")


def make(**values: Any) -> Sample:
    return build(Sample, {"group_size": 4, **values}, "stages.grpo")


def test_good_values() -> None:
    sample = make(
        lr=1,
        loss="dapo",
        max_time="00:00:02:00",
        parent="sft",
        betas=[0.9, 1],
        names=["a"],
        tasks={"gcd": {"terms": 2}},
        inner={"share": 0},
        extra={"any": object},
    )
    assert sample.lr == 1.0 and type(sample.lr) is float  # 1 and 1.0 must hash alike
    assert sample.betas == (0.9, 1.0) and type(sample.betas) is tuple
    assert sample.inner == Inner(share=0.0) and type(sample.inner.share) is float
    assert (sample.loss, sample.parent, sample.names) == ("dapo", "sft", ["a"])
    assert sample.tasks == {"gcd": {"terms": 2}}
    assert make(parent=None).parent is None and make(parent=3).parent == 3
    assert make(inner=Inner(path="x")).inner.path == "x"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_size": "abc"}, "group_size: expected a whole number, got 'abc'"),
        ({"group_size": 1.5}, "group_size: expected a whole number, got 1.5"),
        ({"group_size": True}, "group_size: expected a whole number, got True"),
        ({"group_size": None}, "group_size: expected a whole number, got None"),
        ({"group_size": 1}, "group_size: must be at least 2, got 1"),
        ({"group_sise": 4}, "group_sise: unknown key, did you mean group_size?"),
        ({"lr": "1e-3"}, "lr: expected a number, got '1e-3'"),
        ({"lr": True}, "lr: expected a number, got True"),
        ({"lr": float("nan")}, "lr: expected a finite number, got nan"),
        ({"lr": 1e300}, "lr: must be at most 3.4e+38 in size, got 1e+300"),
        ({"lr": -(10**400)}, f"lr: must be at most 3.4e+38 in size, got -1{'0' * 400}"),
        ({"loss": "ppo"}, "loss: expected one of grpo, dapo, got 'ppo'"),
        ({"top": True}, "top: expected one of 1, 2, got True"),
        ({"shuffle": 1}, "shuffle: expected true or false, got 1"),
        ({"max_time": 12}, "max_time: expected text or null, got 12"),
        ({"betas": [0.9]}, "betas: expected a list of 2 values, got [0.9]"),
        ({"betas": "0.9"}, "betas: expected a list of 2 values, got '0.9'"),
        ({"names": ["a", 1]}, "names[1]: expected text, got 1"),
        ({"tasks": {"gcd": 3}}, "tasks.gcd: expected keys and values, got 3"),
        ({"inner": {"share": "x"}}, "inner.share: expected a number, got 'x'"),
        ({"inner": {"shares": 1}}, "inner.shares: unknown key, did you mean share?"),
        ({"inner": 3}, "inner: expected keys and values, got 3"),
    ],
)
def test_one_line_for_a_mistake(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make(**values)
    assert str(caught.value) == f"stages.grpo.{message}"


def test_missing_key_and_root_path() -> None:
    with pytest.raises(UserError, match=r"^group_size: missing, expected a whole number$"):
        build(Sample, {}, "")
    with pytest.raises(UserError, match=r"^group_size: must be at least 2, got 0$"):
        build(Sample, {"group_size": 0}, "")


def test_a_message_that_names_its_path_is_not_prefixed_twice() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Model:
        num_experts: int

        def __post_init__(self) -> None:
            raise UserError("model.num_experts: must be at least 1, got 0")

    with pytest.raises(UserError, match=r"^model\.num_experts: must"):
        build(Model, {"num_experts": 0}, "model")
