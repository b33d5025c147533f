"""One number per position: the reward model (read at the last token) and PPO's value network."""

import torch
from torch import Tensor, nn

from fourstage.model.attention import Linear
from fourstage.model.flops import head_flops
from fourstage.model.precision import full_precision
from fourstage.model.transformer import Transformer


class ScalarHead(Linear):
    """[..., D] -> [...]; weights N(0, 1 / (D + 1)) (Stiennon et al. 2020, arXiv 2009.01325)."""

    def __init__(self, d_model: int):
        super().__init__(d_model, 1, std=(d_model + 1) ** -0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        with full_precision(hidden):
            return super().forward(hidden.to(self.weight.dtype)).squeeze(-1)


class ScalarModel(nn.Module):
    """A Transformer with a scalar head; its token head, which would get no gradient, is dropped."""

    def __init__(self, backbone: Transformer):
        super().__init__()
        backbone.head = None
        self.backbone = backbone
        self.head = ScalarHead(backbone.config.d_model)

    def forward(self, ids_BT: Tensor, *, valid_BT: Tensor | None = None) -> Tensor:
        """int64 [B, T], right-padded -> float [B, T], meaningless on padding."""
        hidden_BTD = self.backbone(ids_BT, valid_BT=valid_BT).hidden_BTD
        flops = head_flops(hidden_BTD.shape[-1], 1, ids_BT.numel())
        self.backbone.count_flops(flops, has_backward=hidden_BTD.requires_grad)
        return self.head(hidden_BTD)

    def last(self, ids_BT: Tensor, length_B: Tensor) -> Tensor:
        """The number at each row's last real token, float32 [B]; length_B: tokens per row."""
        valid_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < length_B[:, None]
        values_BT = self(ids_BT, valid_BT=valid_BT).float()
        return values_BT.gather(1, length_B[:, None] - 1).squeeze(1)
