"""A run's id is the same as long as what it trains is, however configs grow."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest

from fourstage import data
from fourstage.errors import UserError
from fourstage.lineage import plan
from fourstage.lineage.plan import make_plan
from fourstage.model import ModelConfig
from fourstage.runs.records import read_record
from fourstage.runs.store import RunStore
from fourstage.settings import hashed
from tests.fakes import QUICK, config

# of the shipped configs, were all data of the digest "0"
PINNED = {
    "": "ufxfggpnao sumfnzdykh unwfbcdbyk dhvreewsrd eyjwqqoedc",
    "model=moe_small": "ydyxarzjfw cecwcspgum awkcwgkply zkridqoant wjezbhefnn",
    "stages.pretrain.optimizer=adamw stages.sft.max_time=00:00:01:00": (
        "vncsvmmimh wqqrqveirg zjlyjuquui teovkcxlnq nuarovqmwb"
    ),
    "stages@stages.grpo=grpo_dapo": "ufxfggpnao sumfnzdykh unwfbcdbyk dhvreewsrd kfjvfvarrn",
    "seed=7 debug=fast": "heapvwtqde esxsymqbho upmljzljsp zngzdmthmr papmckmdfr",
    # the former demo's settings: pretrain and sft as they were, another hidden rule from reward on
    "stages.pretrain.max_steps=1000 stages.pretrain.lr=0.004 stages.sft.max_steps=350 "
    "stages.sft.lr=0.001": "viuqqwtocw cwdqcworzq ywleyxrwmk bshbbuklti bnqjxquzic",
}


@pytest.mark.parametrize("words", PINNED)
def test_recorded_ids(words, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "digest", lambda *_: "0")
    monkeypatch.setattr(plan, "check_records", lambda *_: [])
    overrides = [*words.split(), "stage=grpo", "trainer=cpu", f"outputs={tmp_path}"]
    assert " ".join(run.id for run in make_plan(config(*overrides)).runs) == PINNED[words]


@dataclass(frozen=True, kw_only=True)
class Grown(ModelConfig):
    """Of a later release, which can do more."""

    sliding_window: int = 0
    HASHED_UP_TO: ClassVar[str] = ModelConfig.HASHED_UP_TO


def test_a_new_field_counts_where_it_is_used():
    values = config(*QUICK)["model"]
    before, same, other = ModelConfig(**values), Grown(**values), Grown(**values, sliding_window=64)
    assert hashed(same) == hashed(before) and "dropout" in hashed(before)
    assert hashed(other) == {**hashed(before), "sliding_window": 64}


def without(outputs, *keys: str) -> None:
    """Every run's record as an older release wrote it."""
    for path in (outputs / "runs").glob("*/run.json"):
        record = json.loads(path.read_text())
        for key in keys:
            del record["config"]["model"][key]
        path.write_text(json.dumps(record))


def test_a_parent_of_an_older_release_is_one_of_today(own_ladder):
    outputs = own_ladder
    without(outputs, "z_loss_coef", "dropout")
    sft = RunStore(outputs).find("sft")
    words = [*QUICK, "stage=grpo", f"outputs={outputs}", f"stages.grpo.parent={sft.name}"]
    (run,) = make_plan(config(*words)).runs
    assert run.parents == {"policy": read_record(sft)["id"]}
    line = "is of another model .*: dropout 0.0, not 0.1"
    with pytest.raises(UserError, match=line):
        make_plan(config(*words, "model.dropout=0.1"))


def test_a_parent_of_a_newer_release_is_one_line(own_ladder):
    outputs = own_ladder
    folder = RunStore(outputs).find("sft")
    for name in ("run.json", "config.json"):
        values = json.loads((folder / name).read_text())
        values.get("config", values)["model"] |= {"sliding_window": 64}
        (folder / name).write_text(json.dumps(values))
    words = [*QUICK, "stage=grpo", f"outputs={outputs}", f"stages.grpo.parent={folder.name}"]
    with pytest.raises(UserError, match="is of a model that is not known here"):
        make_plan(config(*words))
