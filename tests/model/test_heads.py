import torch

from fourstage.model import ScalarHead, ScalarModel
from tests.model.configs import VOCAB

IDS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


def test_one_number_per_position(build):
    model = ScalarModel(build())
    values = model(IDS)
    assert values.shape == (2, 9)
    hidden = model.backbone(IDS).hidden_BTD
    assert torch.allclose(values, (hidden * model.head.weight[0]).sum(-1), atol=1e-5)


def test_the_head_starts_small():
    torch.manual_seed(0)
    assert abs(ScalarHead(4095).weight.std().item() - 1 / 64) < 1e-3


def test_the_value_at_the_last_token_ignores_the_padding_behind_it(build):
    model = ScalarModel(build())
    padded = torch.cat((IDS, torch.full((2, 4), 3)), dim=1)
    valid = torch.arange(13)[None].expand(2, -1) < 9
    assert torch.allclose(model(padded, valid_BT=valid)[:, 8], model(IDS)[:, 8], atol=1e-5)


def test_no_parameter_is_left_without_a_gradient(build):
    for tied in (True, False):
        model = ScalarModel(build(tie_embeddings=tied))
        model(IDS).square().mean().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
