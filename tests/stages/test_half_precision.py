"""bf16-mixed; and 16-mixed: the loss is scaled so that half-precision gradients do not vanish."""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from fourstage.model import Transformer
from fourstage.stages import PretrainModule
from tests.device import BFLOAT16, DEVICE
from tests.model.configs import read_config
from tests.stages import tiny
from tests.test_golden import VOCAB, Logged, token_batches


def train(optimizer: str, n_steps: int, scale: float | None, precision: str | None = None):
    """Losses and gradient norms of some steps; with a scale in 16-mixed."""
    torch.manual_seed(3)
    policy = Transformer(read_config("moe_nano", init_std=0.06, expert_path="loop"), VOCAB)
    changes = {"optimizer": optimizer, "lr": 2e-3, "clip_norm": 1.0, "max_steps": n_steps}
    module = PretrainModule(policy, tiny.settings("pretrain", **changes), 0, 1, 1)
    losses, norms = Logged("train/loss"), Logged("train/grad_norm")
    plugins = []
    if scale is not None:
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=scale)
        plugins = [MixedPrecision("16-mixed", DEVICE.type, scaler)]
    batches = token_batches(n_steps, 6, 70, padded=False)
    tiny.fit(module, batches, callbacks=[losses, norms], plugins=plugins, precision=precision)
    return module, losses.values, norms.values


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_and_norms_are_those_of_full_precision(optimizer):
    _, losses, norms = train(optimizer, 6, scale=2.0**16)
    _, want_losses, want_norms = train(optimizer, 6, scale=None)
    assert losses == pytest.approx(want_losses, rel=1e-3)
    assert norms == pytest.approx(want_norms, rel=5e-3)
    assert max(norms) > 1  # some were clipped


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bf16_needs_no_scale(optimizer):
    module, losses, norms = train(optimizer, 6, scale=None, precision="bf16-mixed")
    _, want_losses, want_norms = train(optimizer, 6, scale=None)
    assert losses == pytest.approx(want_losses, rel=BFLOAT16)
    assert norms == pytest.approx(want_norms, rel=BFLOAT16)
    assert losses != want_losses and module.skipped_steps == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_scale_that_is_too_large_is_halved_until_steps_are_taken(optimizer):
    module, losses, _ = train(optimizer, 8, scale=2.0**22)
    scaler = module.trainer.precision_plugin.scaler
    assert 1 <= module.skipped_steps <= 7
    assert scaler.get_scale() == 2.0 ** (22 - module.skipped_steps)
    _, first, _ = train(optimizer, 8 - module.skipped_steps, scale=None)
    assert losses[0] == pytest.approx(first[0], rel=1e-3)
    assert len({round(loss, 6) for loss in losses}) > 1
