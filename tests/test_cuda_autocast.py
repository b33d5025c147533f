"""What is computed in which precision on a GPU in bf16, on one that is not there."""

from __future__ import annotations

import math
from statistics import mean

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from fourstage.model import ScalarModel, Transformer, moe, ops
from fourstage.sampling.decode import Decoder
from fourstage.sampling.generate import Sampling, generate
from fourstage.stages import grpo
from fourstage.stages.supervised import next_token_nll
from tests.cuda_autocast import cuda_autocast, cuda_rules
from tests.fake_gpu import DEVICE, NAME, fake_gpu, trainer_options
from tests.fakes import one_by_one
from tests.model.configs import read_config
from tests.stages import test_grpo
from tests.stages.matrix import MUON, STAGES
from tests.stand_in_graph import StandIn, gaps, record_with
from tests.test_fake_gpu import NeverWaits, losses

QUICK = ("pretrain", "reward", "grpo")
TORCH = pytest.mark.parametrize("rms_norm_in_float32", [True, False], ids=["2.13", "2.11"])
SHAPES = pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("moe_nano", {"balance": "switch", "z_loss_coef": 0.1, "d_shared": 16}),
        ("moe_nano", {"qk_norm": False, "tie_embeddings": True}),
        ("dense_tiny", {"n_layers": 2}),
    ],
    ids=str,
)


def network(name: str, changes: dict) -> Transformer:
    torch.manual_seed(2)
    return Transformer(read_config(name, init_std=0.2, **changes), 50)


@TORCH
@SHAPES
def test_a_training_forward_and_its_backward(name, changes, rms_norm_in_float32, monkeypatch):
    """Attention and experts in half precision; routers, heads and losses in full."""
    seen: dict[str, set[torch.dtype]] = {}

    def note(what: str, *tensors: torch.Tensor) -> None:
        seen.setdefault(what, set()).update(x.dtype for x in tensors)

    attention = torch.nn.functional.scaled_dot_product_attention

    def noted_attention(q, k, v, **options):
        note("attention", q, k, v)
        return attention(q, k, v, **options)

    grouped, z_loss, switch_loss = ops.grouped_mm, moe.z_loss, moe.switch_loss

    def noted(what, of):
        def run(*tensors):
            note(what, *(x for x in tensors if x is not None and x.is_floating_point()))
            y = of(*tensors)
            note(what, y)
            return y

        return run

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted_attention)
    monkeypatch.setattr(ops, "grouped_mm", noted("experts", grouped))
    monkeypatch.setattr(moe, "z_loss", noted("router", z_loss))
    monkeypatch.setattr(moe, "switch_loss", noted("router", switch_loss))
    policy, ids = network(name, changes), torch.randint(4, 50, (3, 20))
    with fake_gpu():
        policy.to(DEVICE)
        ids = ids.to(DEVICE)
        with cuda_autocast(rms_norm_in_float32):
            output = policy(ids, valid_BT=ids > 9)
            logits = policy.logits(output.hidden_BTD)
            loss = next_token_nll(logits, ids)
            if output.router is not None:
                note("router", output.router.aux_loss, output.router.load_LE)
                loss = loss + output.router.aux_loss
        loss.backward()
    assert seen.pop("attention") == {torch.bfloat16}
    assert (logits.dtype, loss.dtype) == (torch.float32, torch.float32)
    if not policy.config.dense:
        assert seen == {"experts": {torch.bfloat16}, "router": {torch.float32}}
    assert all(p.grad.dtype == torch.float32 for p in policy.parameters())


@TORCH
@SHAPES
def test_the_cache_is_in_half_precision_and_logits_in_full(name, changes, rms_norm_in_float32):
    policy, ids = network(name, changes).eval(), torch.randint(4, 50, (3, 7))
    with fake_gpu():
        policy.to(DEVICE)
        with cuda_autocast(rms_norm_in_float32):
            decoder = Decoder(policy, 12)
            decoder.prefill(ids[:, :-1].to(DEVICE))
            logits = decoder(ids[:, -1].to(DEVICE))
            caches = decoder.steps.caches
    assert {x.dtype for cache in caches for x in (cache.k, cache.v)} == {torch.bfloat16}
    assert logits.dtype == torch.float32


@TORCH
@SHAPES
def test_recorded_steps_draw_what_others_do(name, changes, rms_norm_in_float32, monkeypatch):
    policy = network(name, changes)
    prompts = [[5, 6, 7], [8, 9], [10] * 9]
    options = {"max_new_tokens": 32, "stop_id": 3, "seed": 4}
    found = []
    record_with(monkeypatch, NeverWaits)
    for policy.records_steps in (False, True):
        with fake_gpu() as NeverWaits.waits, cuda_autocast(rms_norm_in_float32):
            found.append(generate(policy.to(DEVICE), prompts, Sampling(**options)))
        assert bool(StandIn.replays) == policy.records_steps
    apart = gaps(*found)
    assert len(apart) > 24 and mean(apart) < 0.02


@TORCH
def test_scores_do_not_tie(rms_norm_in_float32):
    """In half precision a third of 300 scores near 1 would be equal."""
    model, ids = ScalarModel(network("moe_nano", {})), torch.randint(4, 50, (300, 9))
    with fake_gpu(), torch.no_grad():
        model.to(DEVICE)
        with cuda_autocast(rms_norm_in_float32):
            scores = model(ids.to(DEVICE))[:, -1].cpu()
    assert scores.dtype == torch.float32 and len(scores.unique()) == len(scores)


@pytest.mark.parametrize(
    "rms_norm_in_float32", [pytest.param(True, id="2.13"), pytest.param(False, id="2.11")]
)
@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(stage, marks=[] if stage in QUICK else pytest.mark.slow)
        for stage in (*STAGES, *MUON, "sampled")
    ],
)
def test_every_stage_trains(stage, rms_norm_in_float32, tmp_path, monkeypatch):
    """To half precision's tolerance as in full; no gradient is rounded on its way back."""
    in_half: list[bool] = []
    backward = L.LightningModule.manual_backward

    def noted(module, loss):
        in_half.append(torch.is_autocast_enabled(NAME) or loss.dtype != torch.float32)
        backward(module, loss)

    monkeypatch.setattr(L.LightningModule, "manual_backward", noted)
    monkeypatch.setattr(grpo, "reasoning_rewards", one_by_one(test_grpo.reward_by_text))
    want = losses(stage, tmp_path)
    in_half.clear()
    with fake_gpu(), cuda_rules(rms_norm_in_float32):
        plugins = [MixedPrecision("bf16-mixed", NAME)]
        found = losses(stage, tmp_path, plugins=plugins, **trainer_options())
    assert in_half and not any(in_half)
    assert all(map(math.isfinite, found)) and len(found) == len(want)
    if not stage.startswith(("ppo", "grpo", "sampled")):  # small differences of log-probabilities
        assert found == pytest.approx(want, rel=0.05)
