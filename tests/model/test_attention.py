import pytest
import torch
import torch.nn.functional as F

from fourstage.model.attention import Attention, RMSNorm, rope_angles, rotate
from tests.device import close

THETA = 10000.0


@pytest.fixture
def angles(device):
    """The rotations at some positions."""
    return lambda head_dim, *at: rope_angles(torch.tensor([at], device=device), head_dim, THETA)


def test_rope_turns_each_pair_by_its_angle(device, angles):
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device).view(
        1, 1, 1, 4
    )  # pairs (1, 3) and (2, 4)
    turned = rotate(x, angles(4, 5)).flatten()
    fast, slow = torch.tensor(5.0), torch.tensor(5.0 * THETA**-0.5)
    want = [
        1 * fast.cos() - 3 * fast.sin(),
        2 * slow.cos() - 4 * slow.sin(),
        3 * fast.cos() + 1 * fast.sin(),
        4 * slow.cos() + 2 * slow.sin(),
    ]
    close(turned, torch.stack(want))


def test_rope_keeps_norms_and_depends_on_the_distance_only(device, angles):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 32).to(device)

    def score(i: int, j: int) -> torch.Tensor:
        turned_q = rotate(q, angles(32, i))
        turned_k = rotate(k, angles(32, j))
        close(turned_q.norm(), q.norm())
        return (turned_q * turned_k).sum()

    assert torch.allclose(score(7, 3), score(104, 100), atol=1e-4)
    assert torch.allclose(score(0, 0), (q * k).sum(), atol=1e-5)
    assert not torch.allclose(score(7, 3), score(7, 4), atol=1e-2)


def test_rms_norm_by_hand(device):
    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 10.0])
    norm.to(device)
    rms = (0.5 * (3.0**2 + 4.0**2)) ** 0.5
    want = torch.tensor([3 / rms, 40 / rms])
    close(norm(torch.tensor([3.0, 4.0], device=device)), want)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_attention_equals_the_formula_with_repeated_kv_heads(nano, device, angles, qk_norm):
    """Softmax attention written out, every key/value head repeated for its query heads."""
    torch.manual_seed(0)
    config = nano(n_heads=4, n_kv_heads=2, head_dim=16, init_std=0.2, qk_norm=qk_norm)
    attention = Attention(config)
    for p in attention.parameters():
        p.data += 0.1 * torch.randn_like(p)
    attention.to(device)
    x, T = torch.randn(3, 7, config.d_model).to(device), 7
    rope = angles(16, *range(T))

    q, k, v = attention.qkv(x).view(3, T, 8, 16).split([4, 2, 2], dim=2)
    if qk_norm:
        q = F.rms_norm(q, (16,), attention.q_norm.weight, config.norm_eps)
        k = F.rms_norm(k, (16,), attention.k_norm.weight, config.norm_eps)
    q, k = rotate(q, rope), rotate(k, rope)
    k, v = k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=2)
    scores = torch.einsum("bthc,bshc->bhts", q, k) / 16**0.5
    scores = scores.masked_fill(torch.ones(T, T, device=device).triu(1).bool(), -torch.inf)
    y = torch.einsum("bhts,bshc->bthc", scores.softmax(-1), v).flatten(2)

    close(attention(x, rope), attention.out(y))


def test_qk_norm_makes_scores_independent_of_the_size_of_queries_and_keys(nano, device, angles):
    torch.manual_seed(0)
    attention = Attention(nano(norm_eps=1e-12, init_std=0.2)).to(device)
    x, rope = torch.randn(1, 5, 64).to(device), angles(32, *range(5))
    before = attention(x, rope)
    attention.qkv.weight.data[: 3 * 32] *= 7  # two query heads and the key head, not the values
    close(attention(x, rope), before)
    attention.q_norm.weight.data *= 3
    assert not torch.allclose(attention(x, rope), before, atol=1e-3)
