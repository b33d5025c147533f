"""The FLOP counter of the networks against the formula by hand and torch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fourstage.model import ScalarModel, Transformer
from fourstage.model.flops import forward_flops, head_flops
from fourstage.model.packing import Packing, ranks
from fourstage.sampling.generate import Sampling, generate
from tests.model.configs import VOCAB, read_config

IDS = torch.randint(0, VOCAB, (3, 11), generator=torch.Generator().manual_seed(0))
SHAPES = {
    "moe": {},
    "shared": {"d_shared": 24},
    "tied": {"tie_embeddings": True},
    "top_1": {"top_k": 1, "n_kv_heads": 2},
    "dense": {"num_experts": 1, "top_k": 1},
}


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    """torch's counter sees its own operations only."""
    monkeypatch.setattr("fourstage.model.ops.applies", lambda *_: False)


def make(shape: str, **changes) -> Transformer:
    """torch counts no grouped product, so the experts are looped over."""
    torch.manual_seed(0)
    config = read_config("moe_nano", expert_path="loop", **SHAPES[shape], **changes)
    return Transformer(config, VOCAB)


def torch_flops(run) -> int:
    """What torch counts while run() runs. Its fused attention computes the scores again in the
    backward and is counted so; the plain one is not."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_the_formula_by_hand():
    config = read_config("moe_nano", d_shared=16)  # 2 layers, width 64, 2 heads of 32, 1 kv head
    qkv_out = 64 * (2 + 1 + 1) * 32 + 2 * 32 * 64
    attention = 2 * 2 * 32 * 10
    router = 64 * 4
    experts = 2 * 3 * 64 * 32 + 3 * 64 * 16
    assert forward_flops(config, 5, 10) == 2 * 5 * 2 * (qkv_out + attention + router + experts)
    assert head_flops(64, 100, 5) == 2 * 5 * 64 * 100


@pytest.mark.parametrize("shape", SHAPES)
def test_without_attention_it_is_two_flops_an_active_weight(shape):
    config = make(shape).config
    _, active = config.count_params(VOCAB)
    norms = (2 * config.n_layers + 1) * config.d_model + 2 * config.n_layers * config.head_dim
    tables = VOCAB * config.d_model * (1 if config.tie_embeddings else 2)
    assert forward_flops(config, 1, 0) == 2 * (active - norms - tables)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_equal_torchs_counter(shape):
    model = make(shape)

    def forward(ids=IDS, where=slice(None)) -> torch.Tensor:
        return model.logits(model(ids).hidden_BTD[:, where]).logsumexp(-1).sum()

    with torch.no_grad():
        assert torch_flops(forward) == model.flops > 0
    model.flops = 0
    assert torch_flops(lambda: forward(where=slice(-2, None)).backward()) == model.flops
    model.requires_grad_(False).flops = 0
    assert torch_flops(forward) == model.flops  # a frozen network has no backward


@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_forward_equals_torchs_counter(shape):
    model = make(shape)
    rows = IDS[[0, 0, 1, 2]], torch.tensor([11, 5, 11, 7])
    packing = Packing(*rows, ranks(*rows))
    assert len(packing) == 29  # of 44 places
    found = torch_flops(lambda: model(packing).hidden_BTD.logsumexp(-1).sum().backward())
    assert found == model.flops > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_scalar_model_equals_torchs_counter(shape):
    model = ScalarModel(make(shape))
    valid_BT = torch.arange(11) < torch.tensor([[11], [4], [7]])  # padding is computed
    found = torch_flops(lambda: model(IDS, valid_BT=valid_BT).sum().backward())
    assert found == model.backbone.flops


@pytest.mark.parametrize("shape", SHAPES)
def test_sampling_with_a_cache_equals_torchs_counter(shape):
    model = make(shape, init_std=0.2)
    prompts = [[5, 6, 7, 8], [9], [10, 11]]

    @torch.no_grad()
    def answer() -> None:
        generate(model, prompts, Sampling(max_new_tokens=9, stop_id=2, row_seeds=[1, 2, 3]))

    assert torch_flops(answer) == model.flops


def test_grouped_experts_count_as_the_loop_does():
    looped, grouped = make("moe"), Transformer(read_config("moe_nano"), VOCAB)
    for model in (looped, grouped):
        model(IDS)
    assert grouped.flops == looped.flops
