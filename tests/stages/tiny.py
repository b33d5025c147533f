"""A network that trains in milliseconds, the shipped settings with changes, and a real Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fourstage.batch import PromptBatch
from fourstage.ladder import LADDER
from fourstage.model import ModelConfig, ScalarModel, Transformer
from fourstage.sampling.generate import Sampler, generate
from fourstage.settings import build
from fourstage.stages import StageModule
from fourstage.tokenizer import Tokenizer
from tests.device import TRAINER
from tests.model.configs import read_config

STAGES = Path(__file__).parents[2] / "conf" / "stages"
TOKENIZER = Tokenizer.char()
TINY = read_config(
    "moe_nano", d_model=32, head_dim=16, d_expert=16, max_seq_len=64, init_std=0.2, bias_step=0.01
)
STEADY = {"warmup": 0.0, "min_lr": 1.0, "weight_decay": 0.0, "clip_norm": 0.0, "max_time": None}


def make_policy(seed: int = 1, model: ModelConfig = TINY) -> Transformer:
    """A seeded, opinionated policy whose answers are of different length, or cut off."""
    torch.manual_seed(seed)
    policy = Transformer(model, TOKENIZER.vocab_size)
    with torch.no_grad():
        policy.head.weight[TOKENIZER.eot_id] *= 4
    return policy


def without_logprobs(policy: Transformer) -> Sampler:
    """Our sampler, as if it were one that doesn't know the log-probs of our network."""
    return lambda prompts, sampling: replace(generate(policy, prompts, sampling), logprobs=None)


def make_scalar(seed: int = 2, model: ModelConfig = TINY) -> ScalarModel:
    torch.manual_seed(seed)
    return ScalarModel(Transformer(model, TOKENIZER.vocab_size))


def shipped(name: str) -> dict[str, Any]:
    """conf/stages/<name>.yaml with the file it builds on."""
    values = yaml.safe_load((STAGES / f"{name}.yaml").read_text())
    bases = [base for base in values.pop("defaults", []) if base != "_self_"]
    for base in bases:
        values = {**shipped(base), **values}
    return values


def settings(name: str, **changes: Any) -> Any:
    """The settings of conf/stages/<name>.yaml with changes."""
    stage = name.split("_")[0]
    return build(LADDER[stage].code.Settings, {**shipped(name), **changes}, f"stages.{stage}")


def steady(name: str, **changes: Any) -> Any:
    """The same with a constant learning rate, no decay and no clipping."""
    return settings(name, **{**STEADY, **changes})


def fit(module: StageModule, batches: Sequence[Any], val: Sequence[Any] = (), **options: Any):
    """Train on these batches with Lightning (where tests run, by default); returns the Trainer."""
    trainer = L.Trainer(
        **{**TRAINER, **options},
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    loaders = [DataLoader(list(b), batch_size=None, collate_fn=as_is) for b in (batches, val)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You defined a `validation_step` but have no")
        warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated")
        trainer.fit(module, loaders[0], loaders[1] if val else None)
    return trainer


def as_is(batch: Any) -> Any:
    return batch


def use_sgd(monkeypatch) -> None:
    """Plain gradient steps: Adam would hide a gradient of the wrong size and blow up rounding."""

    def configure_optimizers(self: StageModule) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], self.settings.lr)

    monkeypatch.setattr(StageModule, "configure_optimizers", configure_optimizers)


def weights(network: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that would be saved."""
    return {name: w.detach().cpu().clone() for name, w in network.state_dict().items()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference between two copies."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def biases(network: nn.Module) -> dict[str, Tensor]:
    """The routers' selection biases."""
    found = {n: w for n, w in weights(network).items() if n.endswith("expert_bias_E")}
    assert found
    return found


def prompt_batches(n_steps: int, records: Sequence[Any] | None = None) -> list[PromptBatch]:
    """Four prompts of different length a step."""
    ids = [TOKENIZER.prompt([{"role": "user", "content": "x" * n}]) for n in (1, 9, 4, 6)]
    return [PromptBatch(ids, list(records or range(4)), list(range(4))) for _ in range(n_steps)]


def with_balance(balance: str, **changes: Any) -> ModelConfig:
    return replace(TINY, balance=balance, **changes)
