import pytest
import torch

from fourstage.model import ScalarHead, ScalarModel
from tests.device import close
from tests.model.configs import VOCAB


@pytest.fixture
def ids(device) -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0)).to(device)


def test_one_number_per_position(build, ids, device):
    model = ScalarModel(build()).to(device)
    values = model(ids)
    assert values.shape == (2, 9)
    hidden = model.backbone(ids).hidden_BTD
    close(values, (hidden * model.head.weight[0]).sum(-1))


def test_the_head_starts_small():
    torch.manual_seed(0)
    assert abs(ScalarHead(4095).weight.std().item() - 1 / 64) < 1e-3


def test_the_value_at_the_last_token_ignores_the_padding_behind_it(build, ids, device):
    model = ScalarModel(build()).to(device)
    padded = torch.nn.functional.pad(ids, (0, 4), value=3)
    valid = (torch.arange(13) < 9).expand(2, -1).to(device)
    close(model(padded, valid_BT=valid)[:, 8], model(ids)[:, 8])


def test_no_parameter_is_left_without_a_gradient(build, ids, device):
    for tied in (True, False):
        model = ScalarModel(build(tie_embeddings=tied)).to(device)
        model(ids).square().mean().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
