"""Equal beginnings of rows are one token each, and the network does not notice."""

import pytest
import torch

from fourstage.model.packing import Packing, Take, ranks
from tests.device import close

ROWS = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8], [4], [5, 6, 7], [5, 6, 7, 3]]


def padded(rows: list[list[int]], fill: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Padding may look like a token that follows in another row."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [fill] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([len(row) for row in rows])


def packed(ids: torch.Tensor, length: torch.Tensor) -> Packing:
    return Packing(ids, length, ranks(ids, length))


def test_a_prefix_tree_by_hand():
    packing = packed(*padded(ROWS))
    # 4 | 5 6 7 (8) | .. 3 -> in the order of a dictionary: [4] [5 6 7] [5 6 7 3] [5 6 7 8] [5 6 9]
    assert packing.ids_N.tolist() == [4, 5, 6, 7, 3, 8, 9]
    assert packing.positions_N.tolist() == [0, 0, 1, 2, 3, 3, 2]
    assert packing.copies_N.tolist() == [1, 5, 5, 4, 1, 2, 1]
    for row, places in zip(ROWS, packing.place_BT.tolist(), strict=True):
        assert packing.ids_N[places[: len(row)]].tolist() == row
    assert packing.place_BT[0].equal(packing.place_BT[2])


@pytest.mark.parametrize("seed", range(5))
def test_as_many_tokens_as_there_are_different_beginnings(seed):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (30,), generator=draw).tolist()
    rows = [torch.randint(0, 3, (n,), generator=draw).tolist() for n in lengths]
    ids, length = padded(rows, fill=seed % 3)
    packing = packed(ids, length)
    beginnings = {tuple(row[: t + 1]) for row in rows for t in range(len(row))}
    assert len(packing) == len(beginnings)
    numbers = {}
    for row, places in zip(rows, packing.place_BT.tolist(), strict=True):
        for t in range(len(row)):
            assert numbers.setdefault(tuple(row[: t + 1]), places[t]) == places[t]
    assert sorted(numbers.values()) == list(range(len(packing)))
    assert packing.copies_N.sum() == sum(lengths)


@pytest.mark.parametrize("shape", [{}, {"n_heads": 4, "n_kv_heads": 2, "head_dim": 16}])
@pytest.mark.parametrize("way", ["kernels", "plain", "checkpointed", "loop", "bf16"])
def test_hidden_states_load_and_gradients_are_those_of_whole_rows(
    build, device, way, shape, monkeypatch
):
    top_k = 4 if way == "bf16" else 2  # all experts, lest rounding choose another
    path = "loop" if way == "loop" else "grouped"
    model = build(**shape, expert_path=path, balance="switch", top_k=top_k)
    if way == "plain":
        monkeypatch.setattr("fourstage.model.ops.applies", lambda *_: False)
    model.checkpoint_activations = way == "checkpointed"
    ids, length = padded(ROWS)
    packing = packed(ids, length).to(device)
    valid = (torch.arange(ids.shape[1]) < length[:, None]).to(device)
    weight = torch.rand(*ids.shape, model.config.d_model).to(device) * valid[..., None]

    def found(hidden_BTD):
        model.zero_grad()
        (hidden_BTD.float() * weight).sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [hidden_BTD.detach()[valid], model.take_load(), *grads]

    with torch.autocast(device.type, torch.bfloat16, enabled=way == "bf16"):
        want = found(model(ids.to(device), valid_BT=valid).hidden_BTD)
        hidden_ND = model(packing).hidden_BTD[0]
        take = Take(packing.place_BT.flatten(), len(packing))
        got = found(take(hidden_ND).view(*ids.shape, -1))
    assert len(got) == len(want) > 10
    for a, b in zip(got, want, strict=True):
        close(a, b, torch.bfloat16 if way == "bf16" else torch.float32)


def test_packed_rows_do_not_compile_anew_for_each_packing(build, device):
    def backend(graph, inputs):
        raise AssertionError("it compiles")

    model = build()
    model.compile_blocks(backend=backend)
    ids, length = padded(ROWS)
    assert model(packed(ids, length).to(device)).hidden_BTD.requires_grad
    half = torch.autocast(device.type, torch.bfloat16)
    with pytest.raises(Exception, match="it compiles"), half:
        model(ids.to(device))


def test_taking_rows_has_index_selects_gradient(device):
    x = torch.randn(6, 3, dtype=torch.float64, device=device, requires_grad=True)
    index = torch.tensor([4, 0, 4, 2, 4, 5, 0], device=device)
    weight = torch.randn(7, 3, dtype=torch.float64, device=device)
    y = Take(index, 6)(x)
    assert y.equal(x[index])
    (y * weight).sum().backward()
    mine, x.grad = x.grad, None
    (x[index] * weight).sum().backward()
    torch.testing.assert_close(mine, x.grad)
    assert (mine[1] == 0).all() and (mine[3] == 0).all()
    assert torch.autograd.gradcheck(Take(index, 6), (x,))
