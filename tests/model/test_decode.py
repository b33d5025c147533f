"""A token at a time with stored keys and values equals one forward of the whole rows."""

import copy

import pytest
import torch

from fourstage.model import Decoder, decode
from tests.model.configs import VOCAB

IDS = torch.randint(0, VOCAB, (20, 12), generator=torch.Generator().manual_seed(0))
SHAPES = {
    "grouped queries": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 16},
    "no norm of heads": {"qk_norm": False},
    "a shared expert, scaled gates": {"d_shared": 16, "route_scale": 2.5},
    "one expert": {"top_k": 1},
    "dense": {"num_experts": 1, "top_k": 1},
    "tied": {"tie_embeddings": True},
    "one layer": {"n_layers": 1},
    "loop": {"expert_path": "loop"},
}


@pytest.fixture
def bent(build):
    """A model whose gains and biases are not those of the start."""

    def bent(**changes):
        model = build(**changes).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("norm.weight"):
                    weight.uniform_(0.5, 1.5)
            for name, bias in model.named_buffers():
                assert name.endswith("expert_bias_E")
                bias.normal_(std=0.1)
        return model

    return bent


@torch.no_grad()
def steps(decoder, ids, first):
    return torch.stack([decoder(ids[:, t]) for t in range(first, ids.shape[1])], dim=1)


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_equal_one_forward(bent, shape, rows):
    model, ids = bent(**SHAPES[shape]), IDS[:rows]
    want = model.logits(model(ids).hidden_BTD)
    decoder = Decoder(model, 12)
    decoder.prefill(ids[:, :5])
    assert decoder.length == 5
    torch.testing.assert_close(steps(decoder, ids, 5), want[:, 5:].detach(), atol=2e-5, rtol=1e-4)
    assert decoder.length == 12


def test_rows_may_begin_without_a_prompt(bent):
    model = bent()
    want = model.logits(model(IDS).hidden_BTD).detach()
    torch.testing.assert_close(steps(Decoder(model, 12), IDS, 0), want, atol=2e-5, rtol=1e-4)


def test_padding_at_the_left_is_not_seen(bent):
    model = bent()
    want = model.logits(model(IDS).hidden_BTD).detach()
    padded = torch.cat((torch.full((len(IDS), 3), 7), IDS), dim=1)
    real = (torch.arange(15) >= 3).expand(len(IDS), -1)
    decoder = Decoder(model, 15, real)
    decoder.prefill(padded[:, :8])
    found = steps(decoder, padded, 8)
    torch.testing.assert_close(found, want[:, 5:], atol=2e-5, rtol=1e-4)


def test_rows_leave_and_come_twice(bent):
    model, rows = bent(), torch.tensor([4, 1, 4])
    want = model.logits(model(IDS[rows]).hidden_BTD).detach()
    decoder = Decoder(model, 12)
    decoder.prefill(IDS[:, :5])
    steps(decoder, IDS[:, :7], 5)
    decoder.keep(rows)
    found = steps(decoder, IDS[rows], 7)
    torch.testing.assert_close(found, want[:, 7:], atol=2e-5, rtol=1e-4)


def test_half_precision_is_that_of_a_forward(bent):
    model = bent()
    with torch.autocast("cpu", torch.bfloat16):
        want = model.logits(model(IDS).hidden_BTD).detach()
        decoder = Decoder(model, 12)
        decoder.prefill(IDS[:, :5])
        found = steps(decoder, IDS, 5)
    exact = model.logits(model(IDS).hidden_BTD).detach()[:, 5:]
    assert (found - exact).abs().mean() < 1.5 * (want[:, 5:] - exact).abs().mean()


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_made_half_once_and_routers_never(bent, shape, monkeypatch):
    model, found = bent(**SHAPES[shape]), []
    copies = copy.deepcopy(model.state_dict())
    for casts in (decode._compute_dtype, lambda model: torch.float32):
        monkeypatch.setattr(decode, "_compute_dtype", casts)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            decoder = Decoder(model, 12)
            decoder.prefill(IDS[:, :5])
            found.append(steps(decoder, IDS, 5))
    assert torch.equal(*found)
    assert all(torch.equal(weight, copies[name]) for name, weight in model.state_dict().items())


def test_a_capacity_beyond_the_model_is_refused(bent):
    model = bent()
    with pytest.raises(AssertionError, match="exceed max_seq_len"):
        Decoder(model, model.config.max_seq_len + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("is_padded", [False, True])
def test_a_recorded_step_is_replayed_for_every_place(bent, is_padded):
    model = bent(num_experts=1, top_k=1).cuda()  # a dense model is recorded in full precision
    ids = IDS.cuda()
    real = torch.ones(len(ids), 12, dtype=torch.bool, device="cuda") if is_padded else None
    if is_padded:
        real[::2, :3] = False
    want, found = (Decoder(model, 12, real) for _ in range(2))
    want.prefill(ids[:, :4])
    want = steps(want, ids, 4)
    model.records_steps = True
    found.prefill(ids[:, :4])
    torch.testing.assert_close(steps(found, ids, 4), want, atol=2e-5, rtol=1e-4)
    assert found.recording is not None
