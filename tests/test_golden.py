"""Golden numbers under fixed seeds: a speed-up may not change what a stage computes.

They were recorded before the first hand-written gradient (model/ops.py), on a CPU in float32.
Whoever changes the mathematics on purpose records them again and says so.
"""

from __future__ import annotations

from copy import deepcopy

import lightning as L
import pytest
import torch

from fourstage.batch import IGNORE, TokenBatch
from fourstage.model import Transformer
from fourstage.rl.rewards import ReasoningReward
from fourstage.stages import GRPOModule, PPOModule, PretrainModule, SFTModule, grpo
from tests.fakes import one_by_one
from tests.model.configs import read_config
from tests.stages import tiny

VOCAB = 50
LOSSES = {
    "moe_tiny": [4.153535, 4.046758, 3.940584, 3.87378, 4.001804, 3.738407, 3.698065, 3.855752],
    "dense_tiny": [4.112638, 4.006063, 4.012729, 3.980736, 4.190702, 3.730718, 3.791292, 3.826489],
    "muon": [4.153535, 4.019393, 3.992788, 3.978638, 3.934788, 3.617234, 3.839058, 3.807833],
    "padded": [4.162289, 4.066176, 3.965651, 3.941405, 3.99924, 3.711067, 3.841381, 3.941262],
}
SHORT = {"max_steps": 8, "warmup": 0.2}
ADAMW = {"optimizer": "adamw", "lr": 2e-3}
SFT = {"optimizer": "adamw", "lr": 1e-3}
MUON = {"optimizer": "muon", "lr": 4e-3}


class Logged(L.Callback):
    """What was logged of each step."""

    def __init__(self, name: str) -> None:
        self.name, self.values = name, []

    def on_train_batch_end(self, trainer, *_) -> None:
        self.values.append(trainer.callback_metrics[self.name].item())


def token_batches(n: int, rows: int, tokens: int, *, padded: bool) -> list[TokenBatch]:
    """Each token is a function of the two before it, so that there is something to learn."""
    generator = torch.Generator().manual_seed(7)
    batches = []
    for _ in range(n):
        ids = torch.randint(0, VOCAB, (rows, tokens + 1), generator=generator)
        for t in range(2, tokens + 1):
            ids[:, t] = (3 * ids[:, t - 1] + ids[:, t - 2]) % VOCAB
        targets = ids[:, 1:].clone()
        if padded:
            for row in range(rows):
                targets[row, tokens - 5 * row :] = IGNORE
                targets[row, :3] = IGNORE
        batches.append(TokenBatch(ids[:, :-1], targets))
    return batches


@pytest.mark.parametrize("case", LOSSES)
def test_next_token_losses(case):
    model = "dense_tiny" if case == "dense_tiny" else "moe_tiny"
    torch.manual_seed(3)
    policy = Transformer(read_config(model, init_std=0.06), VOCAB)
    stage = "sft" if case == "padded" else "pretrain"
    optimizer = ADAMW if case in ("moe_tiny", "dense_tiny") else SFT if case == "padded" else MUON
    settings = tiny.settings(stage, **{**SHORT, **optimizer})
    module = (
        SFTModule(policy, settings, seed=0)
        if case == "padded"
        else PretrainModule(policy, settings, seed=0, heldout_chars=1, heldout_bytes=1)
    )
    logged = Logged("train/loss")
    tiny.fit(
        module,
        token_batches(8, 6, 70, padded=case == "padded"),
        callbacks=[logged],
        accelerator="cpu",
    )
    assert logged.values == pytest.approx(LOSSES[case], rel=1e-5)


ON_POLICY = {"max_new_tokens": 12, "batch_size": 4, "max_steps": 3, "lr": 3e-3, "epochs": 2}
GRAD_NORMS = {"grpo": [1.649059, 6.901733, 0.90299], "ppo": [0.2996573, 4.947858, 0.9683408]}


def test_grpo_gradients(monkeypatch):
    def reward(problem, text: str, stopped: bool) -> ReasoningReward:
        return ReasoningReward(correct=float(len(text) % 3 == 0), form=float(stopped))

    monkeypatch.setattr(grpo, "reasoning_rewards", one_by_one(reward))
    settings = tiny.steady("grpo", **ON_POLICY, group_size=4, minibatch_size=8, kl_coef=0.1)
    module = GRPOModule(tiny.make_policy(), tiny.make_policy(7), tiny.TOKENIZER, settings, 0)
    logged = Logged("train/grad_norm")
    tiny.fit(module, tiny.prompt_batches(3), callbacks=[logged], accelerator="cpu")
    assert logged.values == pytest.approx(GRAD_NORMS["grpo"], rel=1e-4)


def test_ppo_gradients():
    settings = tiny.steady("ppo", **ON_POLICY, minibatch_size=2, kl_coef=0.1)
    reward = tiny.make_scalar()
    value = deepcopy(reward).train()
    networks = (tiny.make_policy(), value, tiny.make_policy(7), reward)
    logged = Logged("train/grad_norm")
    module = PPOModule(*networks, tiny.TOKENIZER, settings, 0, None)
    tiny.fit(module, tiny.prompt_batches(3), callbacks=[logged], accelerator="cpu")
    assert logged.values == pytest.approx(GRAD_NORMS["ppo"], rel=1e-4)
