"""Router health in all five stages, against counts taken at the routers themselves."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from fourstage.model import Transformer
from fourstage.model.health import load_health
from fourstage.tracking.callbacks import RouterHealth
from tests.device import REPEATED
from tests.stages.test_supervised import ragged
from tests.stages.tiny import TINY, distance, fit, make_policy, weights, with_balance
from tests.tracking.test_cost import ROWS, STAGES, build, judged  # noqa: F401

E = TINY.num_experts
NAMES = ("load_entropy", "max_over_mean", "dead_experts", "bias_spread", "drift")


def watch(network: Transformer) -> Tensor:
    """[L, E], counted at the routers in every forward that trains."""
    load_LE = torch.zeros(len(network.blocks), E)

    def count(layer: int):
        def hook(router, inputs, routing) -> None:
            if not (network.training and torch.is_grad_enabled()):
                return
            experts_NK = routing.experts_NK
            if inputs[1] is not None:  # how often a token counts
                experts_NK = experts_NK.repeat_interleave(inputs[1].long(), dim=0)
            load_LE[layer] += experts_NK.cpu().flatten().bincount(minlength=E)

        return hook

    for layer, block in enumerate(network.blocks):
        block.mlp.router.register_forward_hook(count(layer))
    return load_LE


def choices(network: Transformer) -> list[list[frozenset[int]]]:
    """The set of experts of every token of ROWS in every layer, row by row without padding."""
    found = [[] for _ in network.blocks]
    with torch.no_grad():
        for row in ROWS:
            router = network.eval()(torch.tensor([row])).router
            for layer, experts_NK in enumerate(router.experts):
                found[layer] += map(frozenset, experts_NK.tolist())
    network.train()
    return found


class Keep(Callback):
    """What was logged at each step."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *_) -> None:
        metrics = {k: v.item() for k, v in trainer.callback_metrics.items() if "router/" in k}
        self.logged.append(metrics)


@pytest.mark.parametrize("balance_router", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_logged_in_each_stage(stage, balance_router):
    module, batches = build(stage, TINY, balance_router=balance_router)
    network = module.transformers()[0]
    before = choices(network)
    load_LE = watch(network)
    keep = Keep()
    fit(module, batches, callbacks=[RouterHealth(ROWS, every=3), keep], log_every_n_steps=3)
    assert keep.logged[:2] == [{}, {}]
    got = keep.logged[2]
    assert set(got) == {
        f"router/{name}{layer}" for name in NAMES for layer in ("", "/layer0", "/layer1")
    }

    drifts = [
        fmean(a != b for a, b in zip(old, new, strict=True))
        for old, new in zip(before, choices(network), strict=True)
    ]
    bias_LE = network.expert_bias_LE()
    health = {name: value.tolist() for name, value in load_health(load_LE).items()}
    health |= {"drift": drifts, "bias_spread": (bias_LE.amax(1) - bias_LE.amin(1)).tolist()}
    for name, values in health.items():
        over_layers = {"max_over_mean": max, "dead_experts": sum}.get(name, fmean)
        assert got[f"router/{name}"] == pytest.approx(over_layers(values)), name
        for layer, value in enumerate(values):
            assert got[f"router/{name}/layer{layer}"] == pytest.approx(value), name
    assert load_LE.sum() > 0 and max(drifts) > 0
    assert (got["router/bias_spread"] > 0) is balance_router


def test_the_load_starts_again_after_each_log():
    module, _ = build("sft", TINY)
    load_LE = watch(module.policy)
    keep = Keep()
    health = RouterHealth(ROWS, every=1)
    fit(module, [ragged(5), ragged(4, seed=1)], callbacks=[health, keep], log_every_n_steps=1)
    whole = load_health(load_LE)["max_over_mean"].tolist()
    parts = [[step[f"router/max_over_mean/layer{i}"] for i in (0, 1)] for step in keep.logged]
    assert parts[0] != parts[1] and whole not in parts
    assert health.load_LE is None


def test_a_dense_model_logs_nothing():
    dense = with_balance("none", num_experts=1, top_k=1)
    module, batches = build("sft", dense)
    metrics = fit(module, batches, callbacks=[RouterHealth(ROWS, every=1)]).callback_metrics
    assert not [name for name in metrics if name.startswith("router/")]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_looking_changes_nothing(stage):
    """Dropout and sampling draw the same numbers, the bias moves the same, no FLOP is counted."""
    results = []
    for callbacks in ([], [RouterHealth(ROWS, every=1)]):
        torch.manual_seed(5)
        model = with_balance("bias", dropout=0.3)
        module, batches = build(stage, model, balance_router=True)
        torch.manual_seed(6)
        fit(module, batches, callbacks=callbacks)
        results.append((weights(module), torch.get_rng_state(), module.tokens_generated))
    assert distance(results[0][0], results[1][0]) <= REPEATED
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


@pytest.mark.parametrize("training", [True, False])
def test_the_probe_leaves_the_network_as_it_was(training):
    module, batches = build("sft", TINY)
    trainer = fit(module, batches[:1])
    policy = make_policy().train(training)
    policy.take_load()
    experts = RouterHealth(ROWS, every=1).experts(trainer, policy)
    assert experts.shape == (2, sum(map(len, ROWS)), 2)
    assert policy.training is training is policy.blocks[0].training
    assert policy.take_load() is None
