"""The kernels and their gradients equal the plain expressions, and are used where they fit."""

from __future__ import annotations

import pytest
import torch

from fourstage.kernels import operations
from fourstage.model import ops
from fourstage.model.attention import Attention, Linear, RMSNorm, rope_angles
from fourstage.model.moe import Experts, Router
from fourstage.optim.muon import orthogonalize

pytestmark = pytest.mark.skipif(not ops.has_kernels(), reason="needs a C++ compiler")


@pytest.fixture
def device() -> torch.device:
    """The kernels are the CPU's."""
    return torch.device("cpu")


@pytest.fixture
def plain(monkeypatch):
    """A function that computes the same without the kernels."""

    def plain(function):
        with monkeypatch.context() as patch:
            patch.setattr(ops, "applies", lambda *_: False)
            return function()

    return plain


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request):
    """Gradients of weights are summed by pieces of work, which threads take as they come."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def gradients(y: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    return [y, *torch.autograd.grad((y * weight).sum(), inputs)]


def assert_equal(fast: list[torch.Tensor], slow: list[torch.Tensor]) -> None:
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5 + 1e-5 * b.abs().max().item())


def has_kernel(y: torch.Tensor, name: str) -> bool:
    """Whether the graph behind y holds a node of this name."""
    todo, seen = [y.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == name:
            return True
        todo += [parent for parent, _ in node.next_functions]
    return False


ROWS = [(1,), (7,), (64,), (3, 65), (2, 600)]  # around the pieces of work of the kernels


@pytest.mark.parametrize("shape", ROWS)
def test_rms_norm(plain, threads, shape):
    torch.manual_seed(0)
    norm = RMSNorm(48, 1e-5)
    norm.weight.data = torch.randn(48)
    x = torch.randn(*shape, 48).mul(3).requires_grad_()
    fast, slow = norm(x), plain(lambda: norm(x))
    assert has_kernel(fast, "rms_normBackward")
    inputs = [x, norm.weight]
    assert_equal(gradients(fast, inputs), gradients(slow, inputs))


@pytest.mark.parametrize("shape", [*ROWS, (2100,)])
@pytest.mark.parametrize("widths", [(16, 48), (80, 32)])
def test_linear(plain, threads, shape, widths):
    torch.manual_seed(0)
    linear = Linear(*widths, std=0.3)
    x = torch.randn(*shape, widths[0], requires_grad=True)
    fast, slow = linear(x), plain(lambda: linear(x))
    assert has_kernel(fast, "linearBackward")
    inputs = [x, linear.weight]
    assert_equal(gradients(fast, inputs), gradients(slow, inputs))


def test_a_large_weight_is_left_to_pytorch(monkeypatch):
    x = torch.randn(5, 16, requires_grad=True)
    linear = Linear(16, 48, std=0.3)
    monkeypatch.setattr(ops, "LARGEST", 16 * 48)
    assert has_kernel(linear(x), "linearBackward")
    monkeypatch.setattr(ops, "LARGEST", 16 * 48 - 1)
    assert not has_kernel(linear(x), "linearBackward")


@pytest.mark.parametrize("rows", [1, 5, 200, 1500])
@pytest.mark.parametrize("experts", [(4, 2), (4, 1), (3, 3), (16, 4)])
def test_experts(nano, plain, threads, rows, experts):
    """With few rows some expert has none; with many an expert's rows are several pieces."""
    torch.manual_seed(0)
    config = nano(num_experts=experts[0], top_k=experts[1], init_std=0.3)
    module, router = Experts(config), Router(config)
    x = torch.randn(rows, 64, requires_grad=True)
    with torch.no_grad():
        routing = router(x, None)
    gates = routing.gates_NK.clone().requires_grad_()
    fast = module(x, routing.experts_NK, gates)
    assert has_kernel(fast, "expertsBackward")
    inputs = [x, gates, module.gate_up_EDF, module.down_EFD]
    for slow in (
        plain(lambda: module(x, routing.experts_NK, gates)),
        module.loop(x, routing.experts_NK, gates),
    ):
        assert_equal(gradients(fast, inputs), gradients(slow, inputs))
        fast = module(x, routing.experts_NK, gates)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("tokens", [1, 7, 64, 65, 150])
def test_attention(nano, plain, threads, heads, tokens):
    torch.manual_seed(1)
    attention = Attention(nano(n_heads=heads[0], n_kv_heads=heads[1], init_std=0.3))
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.data = torch.randn(32)
    rope = rope_angles(torch.arange(tokens)[None], 32, 10000.0)
    x = torch.randn(3, tokens, 64, requires_grad=True)
    inputs = [x, *attention.parameters()]
    fast, slow = attention(x, rope), plain(lambda: attention(x, rope))
    assert has_kernel(fast, "attentionBackward")
    assert not has_kernel(slow, "attentionBackward")
    assert_equal(gradients(fast, inputs), gradients(slow, inputs))


@pytest.mark.parametrize("width", [16, 48, 64])
def test_heads_of_other_widths(nano, plain, width):
    torch.manual_seed(1)
    attention = Attention(nano(head_dim=width, init_std=0.3))
    rope = rope_angles(torch.arange(40)[None], width, 10000.0)
    x = torch.randn(2, 40, 64, requires_grad=True)
    inputs = [x, *attention.parameters()]
    fast, slow = attention(x, rope), plain(lambda: attention(x, rope))
    assert has_kernel(fast, "attentionBackward")
    assert_equal(gradients(fast, inputs), gradients(slow, inputs))


def test_large_scores_neither_overflow_nor_vanish(nano, plain):
    torch.manual_seed(1)
    attention = Attention(nano(init_std=0.3))
    attention.q_norm.weight.data.fill_(30.0)
    attention.k_norm.weight.data.fill_(30.0)  # scores of some thousands
    rope = rope_angles(torch.arange(40)[None], 32, 10000.0)
    x = torch.randn(2, 40, 64, requires_grad=True)
    fast, slow = attention(x, rope), plain(lambda: attention(x, rope))
    assert fast.isfinite().all()
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-3)


def test_where_the_kernels_do_not_fit(nano):
    x = torch.randn(2, 6, 64, requires_grad=True)
    attention = Attention(nano())
    same, own = torch.arange(6)[None], torch.arange(6).repeat(2, 1)
    shared_rope, own_rope = (rope_angles(p, 32, 10000.0) for p in (same, own))
    name = "attentionBackward"
    assert has_kernel(attention(x, shared_rope), name)
    assert not has_kernel(attention(x, own_rope), name)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    assert not has_kernel(attention(x, shared_rope, mask=mask), name)
    assert not has_kernel(Attention(nano(qk_norm=False))(x, shared_rope), name)
    narrow = Attention(nano(head_dim=24))
    assert not has_kernel(narrow(x, rope_angles(same, 24, 10000.0)), name)
    with torch.autocast("cpu", torch.bfloat16):
        assert not has_kernel(attention(x, shared_rope), name)
    for other in (x[..., :40], x.double()):
        norm = RMSNorm(other.shape[-1], 1e-5)
        assert not has_kernel(norm(other), "rms_normBackward")


def test_no_query_sees_the_future(nano):
    attention, tokens = Attention(nano(init_std=0.3)), 69  # some chunks of queries
    rope = rope_angles(torch.arange(tokens)[None], 32, 10000.0)
    x = torch.randn(1, tokens, 64, requires_grad=True)
    for at in (0, 31, 32, tokens - 2):
        (grad,) = torch.autograd.grad(attention(x, rope)[:, at].sum(), x)
        assert (grad[:, at + 1 :] == 0).all()
        assert (grad[:, : at + 1] != 0).any(-1).all()


def test_no_number_depends_on_the_threads(build):
    ids = torch.randint(0, 50, (6, 130), generator=torch.Generator().manual_seed(2))
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        model = build()
        logits = model.logits(model(ids).hidden_BTD)
        logits.logsumexp(-1).mean().backward()
        grads = {name: p.grad for name, p in model.blocks.named_parameters()}
        found.append({"logits": logits.detach(), **grads})
    torch.set_num_threads(1)
    for other in found[1:]:
        for name, value in found[0].items():
            # the router's products are PyTorch's, whose sums depend on the threads on some CPUs
            tolerance = 1e-7 if "router" in name else 0.0
            torch.testing.assert_close(value, other[name], rtol=0.0, atol=tolerance, msg=name)


@pytest.mark.parametrize("shape", [(3, 32, 48), (2, 64, 64), (1, 16, 160), (5, 48, 48)])
def test_newton_schulz(plain, threads, shape, monkeypatch):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    assert ops.applies((x,), *shape[1:])
    kept = x.clone()
    called, run = [], operations.run

    def counted(name, *arguments):
        called.append(name)
        run(name, *arguments)

    monkeypatch.setattr(operations, "run", counted)
    fast = orthogonalize(x)
    assert called == ["newton_schulz"]
    slow = plain(lambda: orthogonalize(x))
    assert len(called) == 1, "this one is PyTorch's"
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    assert x.equal(kept)


@pytest.mark.parametrize("missing", [0, 1])
def test_what_is_no_tensor_is_refused(missing):
    given = [torch.randn(4, 16), torch.randn(16)]
    given[missing] = None
    with pytest.raises(TypeError, match="must be a tensor, not None"):
        torch.ops.fourstage.rms_norm(*given, 1e-5)
