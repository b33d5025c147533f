"""Muon against PyTorch's own for one matrix, and what it makes of weights that hold several."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fourstage.lineage.climb import climb
from fourstage.lineage.plan import make_plan
from fourstage.model import Transformer
from fourstage.optim.muon import Muon, orthogonalize
from fourstage.parallel.strategies import ZERO
from fourstage.stages import GRPOModule, PPOModule, PretrainModule, RewardModule, SFTModule
from fourstage.stages.base import parameter_groups
from tests.device import BFLOAT16, close, repeated
from tests.fakes import FakeTrain, config, own_files
from tests.stages.tiny import TINY, TOKENIZER, make_policy, make_scalar, settings

TIED = replace(TINY, tie_embeddings=True, d_shared=16, qk_norm=False)
DENSE = replace(TINY, num_experts=1, top_k=1, balance="none")


@pytest.fixture
def gradients(device) -> Callable[..., list[Tensor]]:
    def gradients(n: int, *shape: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator).to(device) for _ in range(n)]

    return gradients


@pytest.fixture
def start(gradients) -> Callable[..., nn.Parameter]:
    return lambda *shape: nn.Parameter(gradients(1, *shape)[0].flip(0))


def take_steps(optimizer: torch.optim.Optimizer, weight: nn.Parameter, grads: list[Tensor]) -> None:
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()


def muon(weight: nn.Parameter, *split) -> Muon:
    return Muon([{"params": [weight], "splits": [split]}], lr=0.02, weight_decay=0.5)


# --- the mathematics


def test_singular_values_go_through_the_polynomial_and_nothing_turns(device):
    """In float64, against x (a + b x^2 + c x^4), five times, on the singular values alone."""
    generator = torch.Generator().manual_seed(0)
    x_MRC = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64).to(device)
    u, s, vh = torch.linalg.svd(x_MRC, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = s * (3.4445 - 4.7750 * s**2 + 2.0315 * s**4)
    torch.testing.assert_close(orthogonalize(x_MRC), u * s[:, None] @ vh)
    assert s.min() > 0.6 and s.max() < 1.3


def test_a_matrix_without_a_gradient_stays(device):
    assert not orthogonalize(torch.zeros(1, 2, 3, device=device)).any()


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_one_matrix_moves_as_with_pytorchs_muon(start, gradients, shape):
    """Which works in bf16."""
    mine, theirs, grads = start(*shape), start(*shape), gradients(5, *shape)
    take_steps(muon(mine, shape[0], 0), mine, grads)
    options = {"lr": 0.02, "weight_decay": 0.5, "adjust_lr_fn": "match_rms_adamw"}
    take_steps(torch.optim.Muon([theirs], **options), theirs, grads)
    moved = theirs.detach() - start(*shape).detach()
    assert (mine - theirs).norm() < BFLOAT16 * moved.norm()


def test_other_groups_are_adamws_to_the_bit(start, gradients):
    mine, theirs, grads = start(6, 10), start(6, 10), gradients(3, 6, 10)
    options = {"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.5}
    take_steps(Muon([{"params": [mine]}], **options), mine, grads)
    take_steps(torch.optim.AdamW([theirs], **options, fused=True), theirs, grads)
    assert mine.equal(theirs)


# --- weights that hold several matrices

PARTED = {
    "qkv": ((16, 6), ([8, 4, 4], 0)),
    "gate and up": ((8, 6), (4, 0)),
    "experts": ((3, 6, 4), (3, 0)),
    "experts' gate and up": ((3, 6, 8), (4, 2)),
}


@pytest.mark.parametrize("at_once", [1, 100, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PARTED)
def test_a_weight_of_several_moves_as_each_on_its_own(
    start, gradients, name, at_once, dtype, monkeypatch
):
    monkeypatch.setattr("fourstage.optim.muon.AT_ONCE", {"cpu": at_once, "cuda": at_once})
    monkeypatch.setattr("fourstage.optim.muon.worked_in", lambda x: dtype)
    shape, split = PARTED[name]
    weight, grads = start(*shape), gradients(3, *shape)
    take_steps(muon(weight, *split), weight, grads)

    def matrices(x: Tensor) -> list[Tensor]:
        parts = x.detach().split(*split)
        return [m for part in parts for m in (part if part.ndim == 3 else [part])]

    alone = []
    for i, matrix in enumerate(matrices(start(*shape))):
        own = nn.Parameter(matrix.clone())
        take_steps(muon(own, len(own), 0), own, [matrices(grad)[i] for grad in grads])
        alone.append(own)
    assert len(alone) == {"qkv": 3, "gate and up": 2, "experts": 3}.get(name, 6)
    for one, two, before in zip(matrices(weight), alone, matrices(start(*shape)), strict=True):
        close(one - before, two - before, dtype)


# --- every network of every stage

BLOCK = {
    "attention_norm.weight": "adamw",
    "attention.qkv.weight": "muon [32, 16, 16] of 0",
    "attention.out.weight": "muon",
    "attention.q_norm.weight": "adamw",
    "attention.k_norm.weight": "adamw",
    "mlp_norm.weight": "adamw",
}
WITHOUT_QK_NORM = {n: k for n, k in BLOCK.items() if "q_norm" not in n and "k_norm" not in n}
EXPERTS = {
    "mlp.router.proj.weight": "adamw decayed",
    "mlp.experts.gate_up_EDF": "muon 16 of 2",
    "mlp.experts.down_EFD": "muon",
}
DENSE_MLP = {"mlp.gate_up.weight": "muon 16 of 0", "mlp.down.weight": "muon"}
SHARED = {"mlp.shared.gate_up.weight": "muon 16 of 0", "mlp.shared.down.weight": "muon"}
AROUND = {"embedding.weight": "adamw", "norm.weight": "adamw"}
HEAD = {"head.weight": "adamw decayed"}


def expected(*of_a_block: dict[str, str], around: dict[str, str] = AROUND) -> dict[str, str]:
    blocks = {
        f"blocks.{i}.{name}": kind
        for i in (0, 1)
        for part in of_a_block
        for name, kind in part.items()
    }
    return around | blocks


def under(prefix: str, kinds: dict[str, str]) -> dict[str, str]:
    return {f"{prefix}.{name}": kind for name, kind in kinds.items()}


POLICY = under("policy", expected(BLOCK, EXPERTS, around=AROUND | HEAD))
SCALAR = under("backbone", expected(BLOCK, EXPERTS)) | HEAD


def transformer(model) -> Transformer:
    return Transformer(model, TOKENIZER.vocab_size)


def sft(policy: Transformer, **changes) -> SFTModule:
    return SFTModule(policy, settings("sft", optimizer="muon", **changes), 0)


def ppo() -> PPOModule:
    networks = {"value": make_scalar(), "reference": make_policy(4), "reward": make_scalar(5)}
    s = settings("ppo", optimizer="muon", weight_decay=0.1)
    return PPOModule(make_policy(), **networks, tokenizer=TOKENIZER, settings=s, seed=0)


def grpo() -> GRPOModule:
    s = settings("grpo", optimizer="muon", weight_decay=0.1)
    return GRPOModule(make_policy(), make_policy(7), TOKENIZER, s, 0)


STAGES: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "pretrain": (
        lambda: PretrainModule(make_policy(), settings("pretrain", optimizer="muon"), 0, 1, 1),
        POLICY,
    ),
    "sft": (lambda: sft(make_policy()), POLICY),
    "reward": (
        lambda: RewardModule(make_scalar(), settings("reward", optimizer="muon"), 0),
        under("reward", SCALAR),
    ),
    "ppo": (ppo, POLICY | under("value", SCALAR)),
    "grpo": (grpo, POLICY),
    "a dense model": (
        lambda: sft(transformer(DENSE)),
        under("policy", expected(BLOCK, DENSE_MLP, around=AROUND | HEAD)),
    ),
    "a tied one with a shared expert and no query-key norm": (
        lambda: sft(transformer(TIED)),
        under("policy", expected(WITHOUT_QK_NORM, EXPERTS, SHARED)),
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_weight_is_in_the_group_that_it_should_be_in(stage):
    make, kinds = STAGES[stage]
    module = make()
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, Muon)
    names = {id(p): name for name, p in module.named_parameters()}
    found: dict[str, str] = {}
    for group in optimizer.param_groups:
        decay = group["weight_decay"]
        splits = group["splits"] or [None] * len(group["params"])
        for weight, split in zip(group["params"], splits, strict=True):
            name = names[id(weight)]
            assert name not in found
            if split is None:
                found[name] = "adamw decayed" if decay else "adamw"
                continue
            assert decay == module.settings.weight_decay > 0
            parts = weight.split(*split)
            found[name] = "muon" if len(parts) == 1 else f"muon {split[0]} of {split[1]}"
    assert found == kinds


# --- state, and the next stage


def test_a_resumed_optimizer_goes_on_to_the_bit(device):
    """Through a file, in the middle of ppo's two networks."""

    def steps(module: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + seed)
                for weight in group["params"]:
                    weight.grad = torch.randn(weight.shape, generator=generator).to(device)
            optimizer.step()

    calm, first, second = (ppo().to(device) for _ in range(3))
    steps(calm, calm.configure_optimizers(), range(4))
    optimizer = first.configure_optimizers()
    steps(first, optimizer, range(2))
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second.load_state_dict(weights)
    resumed = second.configure_optimizers()
    resumed.load_state_dict(state)
    steps(second, resumed, range(2, 4))
    for one, two, before in zip(*(m.parameters() for m in (calm, second, first)), strict=True):
        repeated(one, two)
        assert not one.equal(before)


def test_zero_goes_on_from_a_run_of_any_trainer(tmp_path, monkeypatch):
    shared = [f"outputs={tmp_path}/outputs", "model=moe_nano", "logger=none"]
    shared += own_files(tmp_path / "files")
    climb(config(*shared, "stage=pretrain", "trainer=cpu"), train=FakeTrain())
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for trainer in ("ddp", *ZERO):
        where = [f"trainer={trainer}", "trainer.precision=32-true", "trainer.devices=1"]
        runs = make_plan(config(*shared, *where, "stage=sft")).runs
        assert runs[0].settings.optimizer == "muon"
        assert [run.status for run in runs] == ["found", "train"]


@pytest.mark.parametrize("world", [2, 3, 40])
def test_processes_share_out_the_matrices(world, monkeypatch):
    """Each moves its part as one process would all of them, to the bit, and sends it."""

    def policy() -> tuple[Transformer, Muon]:
        network = make_policy()
        groups = parameter_groups(network, 0.1, "muon")
        generator = torch.Generator().manual_seed(1)
        for weight in network.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
        return network, Muon(groups, lr=0.02)

    whole, optimizer = policy()
    optimizer.step()

    class Sent:
        def wait(self) -> None:
            pass

    moved: list[list[bool]] = []
    for rank in range(world):
        sources: list[int] = []

        def broadcast(weight, src, async_op, sources=sources):
            sources.append(src)
            return Sent()

        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: world)
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(dist, "broadcast", broadcast)
        network, optimizer = policy()
        (group,) = (group for group in optimizer.param_groups if group["splits"])
        expected = dict(zip(network.parameters(), whole.parameters(), strict=True))
        optimizer.step()
        assert len(sources) == len(group["params"])
        is_mine = [source == rank for source in sources]
        for weight, mine in zip(group["params"], is_mine, strict=True):
            assert torch.equal(weight, expected[weight]) is mine
        moved.append(is_mine)
    assert [sum(who) for who in zip(*moved, strict=True)] == [1] * len(moved[0])
    sizes = [
        sum(w.numel() for w, mine in zip(group["params"], who, strict=True) if mine)
        for who in moved
    ]
    assert max(sizes) <= sum(sizes) / world + max(w.numel() for w in group["params"])
