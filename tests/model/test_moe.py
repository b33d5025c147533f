import pytest
import torch
import torch.nn.functional as F

from fourstage.model import opaque
from fourstage.model.moe import MoE, Router, SwiGLU, count_load, switch_loss, z_loss
from fourstage.model.ops import grouped_mm
from tests.device import close

LOG9 = 2.1972246  # sigmoid(log 9) = 0.9


@pytest.fixture
def moe(nano, device):
    def build(**changes) -> MoE:
        torch.manual_seed(0)
        return MoE(nano(**{"init_std": 0.3, **changes})).to(device)

    return build


@pytest.fixture
def hand_router(nano, device):
    """Two inputs, three experts: on x = (1, 0) the scores are 0.9, 0.5, 0.1."""

    def build(**changes) -> Router:
        router = Router(nano(**{"d_model": 2, "num_experts": 3, **changes}))
        router.proj.weight.data = torch.tensor([[LOG9, -LOG9], [0.0, 0.0], [-LOG9, LOG9]])
        return router.to(device)

    return build


@pytest.mark.parametrize("tokens", [1, 2, 64])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_equals_the_loop_in_output_and_gradients(moe, device, tokens, top_k, dtype):
    results = []
    for path in ("loop", "grouped"):
        layer = moe(expert_path=path, top_k=top_k, d_shared=16)
        x = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(1))
        x = x.to(device).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            y, _ = layer(x)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        (y * weight.to(device)).sum().backward()
        results.append({"y": y, "x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}})
    loop, grouped = results
    for name in loop:
        close(grouped[name], loop[name], dtype, name)
    assert loop["router.proj.weight"].abs().max() > 1e-3


@pytest.mark.parametrize("path", ["loop", "grouped"])
def test_experts_without_tokens_get_a_zero_gradient_not_none(moe, device, path):
    layer = moe(expert_path=path, top_k=1)
    layer.router.expert_bias_E[:] = torch.tensor([0.0, 5.0, 0.0, 0.0])
    y, routing = layer(torch.randn(2, 5, 64).to(device))
    assert routing.load_E.tolist() == [0, 10, 0, 0]
    y.square().sum().backward()
    per_expert = layer.experts.down_EFD.grad.abs().sum((1, 2))
    assert per_expert[1] > 0 and per_expert[[0, 2, 3]].eq(0).all()


def test_a_layer_is_the_gated_sum_of_its_experts_and_the_shared_one(moe, device):
    layer = moe(d_shared=16, route_scale=2.5)
    x = torch.randn(1, 1, 64).to(device)
    y, routing = layer(x)
    want = layer.shared(x[0, 0])
    for e, gate in zip(routing.experts_NK[0], routing.gates_NK[0], strict=True):
        gate_part, up_part = (x[0, 0] @ layer.experts.gate_up_EDF[e]).chunk(2)
        want = want + gate * (F.silu(gate_part) * up_part) @ layer.experts.down_EFD[e]
    close(y[0, 0], want)
    assert routing.gates_NK.sum().item() == pytest.approx(2.5)


def test_gates_are_normalised_scores_for_two_and_the_raw_score_for_one(hand_router, device):
    x = torch.tensor([[1.0, 0.0]], device=device)
    two = hand_router(top_k=2)(x, None)
    gates = dict(zip(two.experts_NK[0].tolist(), two.gates_NK[0].tolist(), strict=True))
    assert gates == pytest.approx({0: 0.9 / 1.4, 1: 0.5 / 1.4})
    one = hand_router(top_k=1)(x, None)
    assert one.experts_NK.tolist() == [[0]]
    assert one.gates_NK.item() == pytest.approx(0.9)


def test_the_bias_picks_experts_but_the_gate_is_the_raw_score(hand_router, device):
    router = hand_router(top_k=1)
    router.expert_bias_E[2] = 1.0  # 0.1 + 1.0 beats 0.9
    routing = router(torch.tensor([[1.0, 0.0]], device=device), None)
    assert routing.experts_NK.tolist() == [[2]]
    assert routing.gates_NK.item() == pytest.approx(0.1)


def test_the_raw_gate_of_a_single_expert_has_a_gradient(hand_router, device):
    router = hand_router(top_k=1)
    router(torch.tensor([[1.0, 0.0]], device=device), None).gates_NK.sum().backward()
    # d sigmoid / d weight = 0.9 * 0.1 * x, for the chosen expert only
    close(router.proj.weight.grad, torch.tensor([[0.09, 0.0], [0.0, 0.0], [0.0, 0.0]]))


def test_load_counts_valid_tokens_only(device):
    experts_NK = torch.tensor([[0, 1], [1, 2], [1, 3], [0, 3]], device=device)
    assert count_load(experts_NK, 5, None).tolist() == [2, 3, 1, 2, 0]
    valid_N = torch.tensor([True, True, False, False], device=device)
    assert count_load(experts_NK, 5, valid_N).tolist() == [1, 2, 1, 0, 0]


def test_switch_loss_is_one_at_balance_and_by_hand_elsewhere():
    even = torch.full((4, 4), 0.5)
    assert switch_loss(even, torch.ones(4)).item() == pytest.approx(1.0)
    scores = torch.tensor([[0.9, 0.1], [0.6, 0.6]])
    load = torch.tensor([3.0, 1.0])
    # f = (3/4, 1/4), P = mean of (0.9, 0.1) and (0.5, 0.5) = (0.7, 0.3)
    assert switch_loss(scores, load).item() == pytest.approx(2 * (0.75 * 0.7 + 0.25 * 0.3))
    # The second token is padding: P = (0.9, 0.1)
    valid = torch.tensor([True, False])
    assert switch_loss(scores, load, valid).item() == pytest.approx(2 * (0.75 * 0.9 + 0.25 * 0.1))


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [LOG9, LOG9]])
    ln2 = 0.6931472
    assert z_loss(logits).item() == pytest.approx((ln2**2 + (ln2 + LOG9) ** 2) / 2)
    assert z_loss(logits, torch.tensor([True, False])).item() == pytest.approx(ln2**2)
    assert z_loss(logits, torch.tensor([False, False])).item() == 0  # not NaN


@pytest.mark.parametrize(
    "changes", [{"balance": "switch", "switch_coef": 0.5}, {"z_loss_coef": 0.5}]
)
def test_the_gradient_of_an_auxiliary_loss_reaches_the_router(moe, device, changes):
    layer = moe(**changes)
    _, routing = layer(torch.randn(2, 8, 64).to(device))
    routing.aux_loss.backward()
    assert layer.router.proj.weight.grad.abs().max() > 1e-4


def test_the_auxiliary_loss_is_the_weighted_sum(moe, device):
    layer = moe(balance="switch", switch_coef=0.5, z_loss_coef=0.25)
    x = torch.randn(1, 8, 64).to(device)
    _, routing = layer(x)
    logits = layer.router.proj(x[0])
    want = 0.5 * switch_loss(logits.sigmoid(), routing.load_E) + 0.25 * z_loss(logits)
    assert routing.aux_loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert moe(balance="bias", switch_coef=0.5)(x)[1].aux_loss.item() == 0


def test_a_dense_mlp_is_the_loop_of_one_expert(nano, moe, device):
    torch.manual_seed(0)
    mlp = SwiGLU(nano(), 32).to(device)
    layer = moe(top_k=1)
    layer.experts.gate_up_EDF.data[:] = mlp.gate_up.weight.T
    layer.experts.down_EFD.data[:] = mlp.down.weight.T
    x = torch.randn(1, 3, 64).to(device)
    gates_31 = torch.ones(3, 1, device=device)
    for e in range(4):
        y = layer.experts.loop(x[0], torch.full((3, 1), e, device=device), gates_31)
        close(y, mlp(x[0]))


@pytest.mark.parametrize("path", ["loop", "grouped"])
def test_autocast_routes_in_fp32_and_computes_in_bf16(moe, device, path):
    layer = moe(expert_path=path)
    x = torch.randn(1, 16, 64).to(device)
    y, routing = layer(x)
    with torch.autocast(device.type, torch.bfloat16):
        y16, routing16 = layer(x)
    assert routing16.gates_NK.dtype == torch.float32
    assert torch.equal(routing16.experts_NK, routing.experts_NK)
    assert torch.equal(routing16.gates_NK, routing.gates_NK)
    assert 0 < (y16 - y).abs().max() < 0.05 * y.abs().max()
    y16.sum().backward()
    assert layer.experts.gate_up_EDF.grad.dtype == torch.float32


def test_experts_without_tokens_get_no_gradient_where_the_product_writes_none(device, monkeypatch):
    """As on compute capability 10: what grouped_mm's backward leaves there was in memory before."""

    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w_EDF, ends_E):
            ctx.save_for_backward(ends_E)
            return w_EDF.view_as(w_EDF)

        @staticmethod
        def backward(ctx, grad_EDF):
            (ends_E,) = ctx.saved_tensors
            counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
            return torch.where((counts_E > 0)[:, None, None], grad_EDF, torch.nan), None

    product = F.grouped_mm
    monkeypatch.setattr(
        F, "grouped_mm", lambda x, w, offs: product(x, Poisoned.apply(w, offs), offs=offs)
    )
    x_MD = torch.randn(6, 16).to(device)
    ends_E = torch.tensor([2, 2, 6, 6], dtype=torch.int32, device=device)
    found = []
    for has_gaps in (False, True):
        monkeypatch.setattr(opaque, "leaves_gaps", lambda w, has_gaps=has_gaps: has_gaps)
        w_EDF = torch.ones(4, 16, 16, device=device, requires_grad=True)
        grouped_mm(x_MD, w_EDF, ends_E).square().sum().backward()
        found.append(w_EDF.grad)
    assert found[0][[1, 3]].isnan().all() and (found[1][[1, 3]] == 0).all()
    assert torch.equal(found[0][[0, 2]], found[1][[0, 2]])
