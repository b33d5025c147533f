"""The hand-written gradients equal those of the plain expressions, and are used where they fit."""

from __future__ import annotations

import pytest
import torch

from fourstage.model import fused
from fourstage.model.attention import Attention, RMSNorm, rope_angles
from fourstage.model.moe import swiglu


@pytest.fixture
def plain(monkeypatch):
    """A function that computes the same without the hand-written gradients."""

    def plain(function):
        with monkeypatch.context() as patch:
            patch.setattr(fused, "applies", lambda _: False)
            return function()

    return plain


def gradients(y: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    return [y, *torch.autograd.grad((y * weight).sum(), inputs)]


def assert_equal(fast: list[torch.Tensor], slow: list[torch.Tensor]) -> None:
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5 + 1e-5 * b.abs().max().item())


def was_fused(y: torch.Tensor, name: str) -> bool:
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


def test_swiglu(plain):
    x = torch.randn(3, 7, 10, requires_grad=True)
    fast = swiglu(x)
    assert was_fused(fast, "SwiGLUBackward")
    slow = plain(lambda: swiglu(x))
    assert not was_fused(slow, "SwiGLUBackward")
    assert_equal(gradients(fast, [x]), gradients(slow, [x]))


def test_rms_norm(plain):
    norm = RMSNorm(12, 1e-5)
    norm.weight.data = torch.randn(12)
    x = torch.randn(4, 5, 12).mul(3).requires_grad_()
    fast, slow = norm(x), plain(lambda: norm(x))
    assert was_fused(fast, "RMSNormBackward")
    inputs = [x, norm.weight]
    assert_equal(gradients(fast, inputs), gradients(slow, inputs))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("tokens", [1, 7, 64, 65, 150])
def test_attention(nano, plain, heads, tokens):
    torch.manual_seed(1)
    attention = Attention(nano(n_heads=heads[0], n_kv_heads=heads[1], init_std=0.3))
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.data = torch.randn(32)
    rope = rope_angles(torch.arange(tokens)[None], 32, 10000.0)
    x = torch.randn(3, tokens, 64, requires_grad=True)
    inputs = [x, *attention.parameters()]
    fast, slow = attention(x, rope), plain(lambda: attention(x, rope))
    assert was_fused(fast, "_CausalAttentionBackward")
    assert not was_fused(slow, "_CausalAttentionBackward")
    assert_equal(gradients(fast, inputs), gradients(slow, inputs))


def test_attention_falls_back_where_the_gradient_does_not_fit(nano):
    x = torch.randn(2, 6, 64, requires_grad=True)
    attention = Attention(nano())
    same, own = torch.arange(6)[None], torch.arange(6).repeat(2, 1)
    shared_rope, own_rope = (rope_angles(p, 32, 10000.0) for p in (same, own))
    name = "_CausalAttentionBackward"
    assert was_fused(attention(x, shared_rope), name)
    assert not was_fused(attention(x, own_rope), name)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    assert not was_fused(attention(x, shared_rope, mask=mask), name)
    assert not was_fused(Attention(nano(qk_norm=False))(x, shared_rope), name)
    with torch.autocast("cpu", torch.bfloat16):
        assert not was_fused(attention(x, shared_rope), name)
    long = torch.arange(fused.LONGEST + 1)[None]
    x = torch.randn(1, fused.LONGEST + 1, 64, requires_grad=True)
    assert not was_fused(attention(x, rope_angles(long, 32, 10000.0)), name)


def test_no_query_sees_the_future(nano):
    attention = Attention(nano(init_std=0.3))
    tokens = 2 * fused.CHUNK + 5
    rope = rope_angles(torch.arange(tokens)[None], 32, 10000.0)
    x = torch.randn(1, tokens, 64, requires_grad=True)
    for at in (0, fused.CHUNK - 1, fused.CHUNK, tokens - 2):
        (grad,) = torch.autograd.grad(attention(x, rope)[:, at].sum(), x)
        assert (grad[:, at + 1 :] == 0).all()
        assert (grad[:, : at + 1] != 0).any(-1).all()
