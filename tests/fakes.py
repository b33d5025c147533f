"""The real config tree, small files of one's own, and a stage that trains in no time."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

import train as _resolvers  # noqa: F401  it registers those of conf/
from fourstage.job import StageJob
from fourstage.lineage.climb import climb
from fourstage.lineage.plan import make_plan

CONF = Path(__file__).parent.parent / "conf"
QUICK = ("model=moe_nano", "debug=fast", "logger=none", "trainer=cpu")  # a ladder in ten seconds

GROUPS = ("model", "tokenizer", "data", "trainer", "logger", "experiment", "debug")


def config(*overrides: str) -> dict[str, Any]:
    """What train.py hands on for these overrides; composing takes long, so it is done once."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    chosen = [o for o in parsed if o.key_or_group in GROUPS or o.package is not None]
    tree = composed(*sorted(o.input_line for o in chosen)).copy()
    for override in parsed:
        if override not in chosen:
            OmegaConf.update(tree, override.key_or_group, override.value(), force_add=True)
    return OmegaConf.to_container(tree, resolve=True)


@cache
def composed(*overrides: str) -> DictConfig:
    """The config that Hydra composes."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def own_files(folder: Path) -> list[str]:
    """Overrides for data=files with a file for each source."""
    rows = {
        "chat": [
            {"instruction": f"Say {i}", "input": "", "output": f"It is {i}."} for i in range(40)
        ],
        "preference": [
            {"prompt": f"Say {i}", "chosen": f"It is {i}.", "rejected": "No."} for i in range(40)
        ],
        "reasoning": [{"question": f"{i} + 1 = ?", "answer": f"#### {i + 1}"} for i in range(40)],
    }
    folder.mkdir(exist_ok=True)
    for name, records in rows.items():
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "corpus.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    paths = [f"data.{name}.path={folder}/{name}.jsonl" for name in rows]
    return ["data=files", f"data.corpus.path={folder}/corpus.txt", *paths]


def one_by_one(reward: Callable[..., Any]) -> Callable[..., list[Any]]:
    """A judge of many answers from a judge of one."""
    return lambda *columns: [reward(*row) for row in zip(*columns, strict=True)]


class FakeTrain:
    """Trains by writing who trained; dies in stage `fail_in`, with a checkpoint when told so."""

    def __init__(
        self,
        fail_in: str = "",
        error: BaseException | None = None,
        checkpoint: bool = False,
    ) -> None:
        self.jobs: list[StageJob] = []
        self.fail_in, self.error, self.checkpoint = fail_in, error, checkpoint

    @property
    def stages(self) -> list[str]:
        return [job.stage for job in self.jobs]

    def __call__(self, job: StageJob) -> dict[str, Any]:
        self.jobs.append(job)
        if self.checkpoint:
            job.checkpoint.write_text("state")
        if job.stage == self.fail_in:
            raise self.error or RuntimeError("loss is nan")
        (job.folder / "model.safetensors").write_text(f"weights {len(self.jobs)}")
        return {"steps": 7}


def ids(overrides: list[str], stage: str = "grpo") -> dict[str, str]:
    """stage -> id of each run of a plan."""
    return {run.stage: run.id for run in make_plan(config(*overrides, f"stage={stage}")).runs}


def run(overrides: list[str], stage: str = "grpo", train: FakeTrain | None = None) -> FakeTrain:
    """Climb to a stage."""
    train = train or FakeTrain()
    climb(config(*overrides, f"stage={stage}"), overrides=overrides, train=train)
    return train
