import copy
import math

import pytest
import torch

from fourstage.model import Transformer
from fourstage.model.health import bias_spread, drift, load_health
from tests.device import close, repeated
from tests.model.configs import VOCAB, read_config


@pytest.fixture
def ids(device) -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0)).to(device)


def logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    return model.logits(model(ids).hidden_BTD)


def test_a_later_token_changes_nothing_earlier(build, ids):
    model = build()
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCAB
    before, after = logits(model, ids), logits(model, changed)
    close(after[:, :7], before[:, :7])
    assert not torch.allclose(before[:, 7], after[:, 7], atol=1e-2)
    assert not torch.allclose(before[:, -1], after[:, -1], atol=1e-4)


def test_positions_matter(build, device):
    """The last token of a single layer sees the same tokens, in another order."""
    model = build(n_layers=1)
    near, far = (torch.tensor([ids], device=device) for ids in ([4, 5, 4], [5, 4, 4]))
    assert not torch.allclose(logits(model, near)[0, 2], logits(model, far)[0, 2], atol=1e-3)
    same = torch.full((1, 3), 4, device=device)
    close(logits(model, same)[0, 2], logits(model, same)[0, 0])


def test_right_padding_changes_no_real_token(build, ids, device):
    model = build()
    padded = torch.nn.functional.pad(ids, (0, 5), value=3)
    valid = (torch.arange(17) < 12).expand(2, -1).to(device)
    out, alone = model(padded, valid_BT=valid), model(ids)
    close(out.hidden_BTD[:, :12], alone.hidden_BTD)
    assert torch.equal(out.router.load_LE, alone.router.load_LE)
    assert not torch.equal(model(padded).router.load_LE, alone.router.load_LE)


def test_padding_is_no_part_of_the_balance_losses(build, ids, device):
    model = build(balance="switch", z_loss_coef=0.1)
    padded = torch.nn.functional.pad(ids, (0, 5), value=3)
    valid = (torch.arange(17) < 12).expand(2, -1).to(device)
    alone = model(ids).router.aux_loss.item()
    assert model(padded, valid_BT=valid).router.aux_loss.item() == pytest.approx(alone, rel=1e-5)
    assert model(padded).router.aux_loss.item() != pytest.approx(alone, rel=1e-3)


def test_the_grouped_and_the_loop_model_agree_in_logits_and_gradients(build, ids):
    gradients = []
    for path in ("loop", "grouped"):
        model = build(expert_path=path)
        logits(model, ids).logsumexp(-1).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_tied_embeddings_share_one_weight(build, ids):
    tied = build(tie_embeddings=True)
    assert tied.head is None
    assert "head.weight" not in tied.state_dict()
    out = tied(ids)
    close(tied.logits(out.hidden_BTD), out.hidden_BTD @ tied.embedding.weight.T)
    assert build(tie_embeddings=False).head.weight.shape == (VOCAB, 64)


@pytest.mark.parametrize("name", ["dense_tiny", "moe_nano"])
def test_one_expert_is_dense_and_has_no_router(device, ids, name):
    model = Transformer(read_config(name), VOCAB).to(device)
    out = model(ids)
    dense = name.startswith("dense")
    assert (out.router is None) is dense
    assert any("router" in key for key in model.state_dict()) is not dense


def test_every_parameter_gets_a_gradient(build, ids):
    model = build(d_shared=16)
    logits(model, ids).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_initial_weights_have_their_standard_deviations():
    torch.manual_seed(0)
    model = Transformer(read_config("moe_tiny"), 1000)
    block, residual = model.blocks[1], 0.02 / math.sqrt(2 * 4)
    assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.attention.out.weight.std().item() == pytest.approx(residual, rel=0.05)
    assert block.mlp.experts.gate_up_EDF.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.experts.down_EFD.std().item() == pytest.approx(residual, rel=0.05)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    out = model.eval()(torch.arange(256)[None])
    loss = torch.nn.functional.cross_entropy(
        model.logits(out.hidden_BTD)[0, :-1], torch.arange(1, 256)
    )
    assert loss.item() == pytest.approx(math.log(1000), rel=0.05)


def test_dropout_is_on_in_training_only(build, ids):
    model = build(dropout=0.5)
    assert not torch.allclose(logits(model, ids), logits(model, ids))
    model.eval()
    assert torch.equal(logits(model, ids), logits(model, ids))


# The selection bias


def test_the_bias_update_by_hand(build, device):
    model = build(bias_step=0.1)
    load = torch.tensor([[6.0, 4.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    model.update_expert_bias(load.to(device))
    # Layer 0: mean load 3, signs (-1, -1, 1, 1), which are centred already. Layer 1: no sign.
    want = torch.tensor([[-0.1, -0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]])
    close(model.expert_bias_LE(), want)
    load = torch.tensor([[9.0, 1.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    model.update_expert_bias(load.to(device))
    # Signs (-1, 1, 1, 1) have the mean 0.5: steps of 0.1 * (-1.5, 0.5, 0.5, 0.5) on top.
    want[0] += torch.tensor([-0.15, 0.05, 0.05, 0.05])
    close(model.expert_bias_LE(), want)
    close(model.expert_bias_LE().sum(-1), torch.zeros(2))


@pytest.mark.parametrize("balance", ["bias", "switch", "none"])
def test_loads_add_up_over_forwards_until_they_are_taken(build, ids, balance):
    model, other = build(balance=balance), build(balance=balance)
    loads = model(ids[:1]).router.load_LE + model(ids[1:]).router.load_LE
    other(ids)
    assert torch.equal(model.take_load(), loads)
    assert torch.equal(other.take_load(), loads)
    assert model.take_load() is None


@pytest.mark.parametrize("case", ["eval", "no_grad", "dense"])
def test_only_training_forwards_of_routers_are_counted(build, ids, case):
    model = build(num_experts=1, top_k=1) if case == "dense" else build()
    with torch.set_grad_enabled(case != "no_grad"):
        model.train(case != "eval")(ids)
    assert model.take_load() is None


def test_the_bias_evens_out_the_load(build, device):
    """Without any learning, the bias alone makes skewed routers use their experts equally."""
    model = build(bias_step=0.02)
    ids = torch.randint(0, VOCAB, (8, 64), generator=torch.Generator().manual_seed(1))
    ids = ids.to(device)
    first = load_health(model(ids).router.load_LE)
    for _ in range(60):
        model.update_expert_bias(model.take_load())
        last = load_health(model(ids).router.load_LE)
    assert first["max_over_mean"].max() > 1.3
    assert last["max_over_mean"].max() < 1.15
    assert (last["load_entropy"] > first["load_entropy"]).all()


def test_the_bias_is_saved_and_the_counts_are_not(build, ids):
    model = build()
    model(ids)
    assert sum(key.endswith("expert_bias_E") for key in model.state_dict()) == 2
    assert not any("load" in key for key in model.state_dict())
    copy.deepcopy(model)


def test_router_health_by_hand():
    health = load_health(torch.tensor([[4.0, 4.0, 4.0, 4.0], [8.0, 8.0, 0.0, 0.0]]))
    assert health["load_entropy"].tolist() == pytest.approx([1.0, 0.5])
    assert health["max_over_mean"].tolist() == [1.0, 2.0]
    assert health["dead_experts"].tolist() == [0, 2]
    spread = bias_spread(torch.tensor([[0.1, -0.2, 0.0, 0.1], [0.0, 0.0, 0.0, 0.0]]))
    assert spread.tolist() == pytest.approx([0.3, 0.0])


def test_drift_compares_sets_of_experts():
    before = torch.tensor([[[0, 1], [2, 3], [0, 3], [1, 2]], [[0, 1], [0, 1], [0, 1], [0, 1]]])
    after = torch.tensor([[[1, 0], [3, 1], [0, 3], [1, 2]], [[2, 3], [1, 0], [0, 2], [3, 1]]])
    assert drift(before, after).tolist() == [0.25, 0.75]
    assert drift(before, before).tolist() == [0, 0]


def test_a_forward_says_which_experts_each_token_chose(build, ids):
    router = build()(ids).router
    for experts_NK, load_E in zip(router.experts, router.load_LE, strict=True):
        assert experts_NK.shape == (ids.numel(), 2)
        assert experts_NK.flatten().bincount(minlength=4).tolist() == load_E.tolist()


def test_the_same_seed_gives_the_same_loss_and_gradients(build, ids):
    runs = []
    for _ in range(2):
        model = build()
        loss = logits(model, ids).logsumexp(-1).mean()
        loss.backward()
        runs.append([loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*runs, strict=True):
        repeated(a, b)


def gradients(model: Transformer, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.logits(model(ids).hidden_BTD).logsumexp(-1).square().sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("shape", [{}, {"num_experts": 1, "top_k": 1}])
def test_checkpointed_activations_change_memory_only(build, device, shape):
    model, ids = build(**shape), torch.randint(0, VOCAB, (3, 40)).to(device)
    found, kept = [], []
    for model.checkpoint_activations in (False, True):
        numbers = []

        def keep(x: torch.Tensor, numbers: list[int] = numbers) -> torch.Tensor:
            numbers.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            output = model.logits(model(ids).hidden_BTD)
        kept.append(sum(numbers))
        del output
        found.append((gradients(model, ids), model.take_load(), model.flops))
        model.flops = 0
    assert kept[1] < kept[0] / 3
    (plain, load, flops), (again, load_again, flops_again) = found
    assert flops == flops_again
    assert load is None or torch.equal(load, load_again)
    for name, gradient in plain.items():
        repeated(again[name], gradient)
