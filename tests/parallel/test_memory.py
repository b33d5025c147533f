"""The memory table, against sums done by hand, and its command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fourstage.errors import UserError
from fourstage.job import TrainerConfig
from fourstage.model.__main__ import CONFIGS, counted
from fourstage.parallel import memory as scaling
from fourstage.parallel.memory import STATES, bytes_per_gpu
from fourstage.parallel.strategies import ZERO
from tests.fakes import config

ROOT = Path(__file__).parents[2]
BILLION = 10**9


@pytest.mark.parametrize(
    ("trainer", "stage", "gpus", "gigabytes"),
    [
        # weights 4, gradients 4, moments 8 bytes
        ("ddp", "sft", 1, 16),
        ("ddp", "sft", 32, 16),
        # weights 4, gradients 4, an eighth of the weights and moments
        ("zero1", "sft", 8, 8 + 12 / 8),
        ("zero2", "sft", 8, 4 + 16 / 8),
        # and a whole copy of the weights for the table of samples
        ("zero3", "sft", 8, 16 / 8 + 4),
        ("zero3_offload", "sft", 8, 4),
        # policy and value are trained, reference and reward model are frozen
        ("ddp", "ppo", 8, 2 * 16 + 2 * 4),
        ("zero2", "ppo", 32, 2 * (4 + 16 / 32) + 2 * 4),
        ("zero3", "ppo", 32, 2 * 16 / 32 + 4),
        ("ddp", "grpo", 8, 16 + 4),
    ],
)
def test_bytes_on_each_gpu(trainer, stage, gpus, gigabytes):
    assert bytes_per_gpu(trainer, stage, BILLION, gpus) == pytest.approx(gigabytes * BILLION)


def test_every_trainer_that_spreads_is_in_the_table():
    assert set(STATES) == {"ddp", *ZERO}


def test_the_command_prints_a_table_a_model(capsys):
    scaling.main(["vocab_size=103"])
    text = capsys.readouterr().out
    for name in ("moe_small, 123 M", "moe_medium, 1,310 M", "moe_large, 6,814 M", *STATES):
        assert name in text
    # 6,814,140,416 parameters x 16 bytes are 101.5 GiB
    assert "101.5" in text
    with pytest.raises(UserError, match=r"expected vocab_size=NUMBER below 2\^32, got 'vocab=3'"):
        scaling.main(["vocab=3"])


def test_the_documented_table_is_what_the_command_prints():
    documented = {}
    for line in (ROOT / "docs" / "scaling.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].startswith("moe_"):
            documented[cells[0], cells[1]] = cells[2:]
    assert len(documented) == 3 * len(STATES)
    for (model, trainer), cells in documented.items():
        parameters = counted(CONFIGS / f"{model}.yaml", 32768)[0]
        assert cells == [
            f"{bytes_per_gpu(trainer, stage, parameters, n) / scaling.GIB:,.1f}"
            for stage in ("sft", "grpo", "ppo")
            for n in (1, 8, 32)
        ]


def test_the_documented_commands_compose():
    text = (ROOT / "docs" / "scaling.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^ {4}.*(?:train\.py|slurm\.sbatch) (.*)$", text, flags=re.M)
    assert len(commands) == 5
    for command in commands:
        tree = config(*command.split())
        assert tree["stage"] == "grpo" and tree["trainer"]["accelerator"] == "gpu"


def test_zero_needs_gpus_and_a_precision_that_it_trains_in(monkeypatch):
    with pytest.raises(UserError, match="trainer.strategy: zero2 needs GPUs: take ddp"):
        TrainerConfig(accelerator="cpu", strategy="zero2").resolved()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    where = TrainerConfig(accelerator="gpu", strategy="zero2").resolved()
    assert where.precision == "bf16-mixed"
    with pytest.raises(UserError, match="zero2 trains in bf16-mixed or 32-true, not 16-mixed"):
        TrainerConfig(accelerator="gpu", strategy="zero2", precision="16-mixed").resolved()


@pytest.mark.parametrize("trainer", ZERO)
def test_a_trainer_with_zero_is_ddp_with_another_strategy(trainer):
    tree, ddp = config(f"trainer={trainer}"), config("trainer=ddp")
    assert tree.pop("trainer") == ddp.pop("trainer") | {"strategy": trainer}
    assert tree == ddp


@pytest.mark.parametrize("option", ["compile", "checkpoint_activations"])
def test_zero3_has_neither_compiled_blocks_nor_checkpoints(option, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    where = {"accelerator": "gpu", "precision": "bf16-mixed", option: True}
    assert getattr(TrainerConfig(strategy="zero2", **where).resolved(), option)
    with pytest.raises(UserError, match=f"trainer.{option}: not under zero3: take zero2"):
        TrainerConfig(strategy="zero3", **where).resolved()
