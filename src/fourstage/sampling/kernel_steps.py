"""Decode steps by the CPU's kernel (kernels/decode.cpp): its cache, and its layout of the weights.

Shape legend: B rows, T tokens, L layers, G key/value heads, C head_dim, S places of a row,
V vocabulary; *_16 rounded up to a multiple of 16.
"""

from ctypes import POINTER, Structure, c_float, c_int32, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from fourstage.model import ops
from fourstage.model.attention import rope_angles
from fourstage.model.transformer import Block, BlockWeights, Transformer
from fourstage.sampling.steps import is_as_built

INTS = (  # of ModelConfig
    *("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim"),
    *("num_experts", "top_k", "d_expert", "d_shared", "qk_norm"),
)
FLOATS = ("norm_eps", "route_scale")


class _Layer(Structure):
    """Laid out as in decode.cpp, as is _Model."""

    _fields_ = [(name, c_void_p) for name in BlockWeights._fields]


class _Model(Structure):
    _fields_ = [
        *((name, c_int32) for name in (*INTS, "V_16", "S")),
        *((name, c_float) for name in FLOATS),
        ("layers", POINTER(_Layer)),
        *((name, c_void_p) for name in ("gain", "head", "cos", "sin")),
    ]


class KernelSteps:
    """What Decoder runs on a CPU in float32. It reads the weights once, when it is created."""

    @staticmethod
    def supports(model: Transformer) -> bool:
        """Whether the kernel computes what this network's modules compute, and has its widths."""
        c = model.config
        return (
            is_as_built(model)
            and c.expert_path == "grouped"
            and not torch.is_autocast_enabled("cpu")
            and all(w.is_cpu and w.dtype == torch.float32 for w in model.parameters())
            and ops.has_kernels(c.d_model, c.head_dim, c.d_expert, c.d_shared)
        )

    def __init__(self, model: Transformer, capacity: int, real_BS: Tensor | None):
        """real_BS: bool [B, capacity], False on the padding at the left."""
        c = self.config = model.config
        self.vocab_size = model.vocab_size
        self.embedding = model.embedding.weight.detach()
        self.first_B = None if real_BS is None else _ends_of_padding(real_BS)
        self.capacity = _up(capacity)
        self.k_LBGCS = self.v_LBGSC = torch.empty(0)  # until the first token
        self.held: list[Tensor] = []  # what the structures point to
        places_1S = torch.arange(self.capacity)[None]
        self.model = _Model(
            *(getattr(c, name) for name in INTS),
            _up(self.vocab_size),
            self.capacity,
            *(getattr(c, name) for name in FLOATS),
            (_Layer * c.n_layers)(*map(self._layer, model.blocks)),
            self._hold(model.norm.weight),
            self._hold((model.head or model.embedding).weight, is_product=True),
            *map(self._hold, rope_angles(places_1S, c.head_dim, c.rope_theta)),
        )

    def _layer(self, block: Block) -> _Layer:
        layer = _Layer()
        for name, x in block.weights()._asdict().items():
            if x is not None:
                is_product = x.dim() == 2 and name != "head_gain"
                setattr(layer, name, self._hold(x, is_product))
        return layer

    def _hold(self, x: Tensor, is_product: bool = False) -> int:
        """The address of x's numbers; a product's weight [out, in] becomes [in, out_16], so that
        its rows are read in order."""
        x = x.detach()
        if is_product:
            x = F.pad(x.t(), (0, _up(len(x)) - len(x)))
        self.held.append(x.contiguous())
        return self.held[-1].data_ptr()

    def prefill(self, ids_BT: Tensor) -> None:
        self._decode(ids_BT, 0, None)

    def step(self, ids_B: Tensor, at: int) -> Tensor:
        """The tokens at place `at` -> logits [B, V]."""
        logits_BV = torch.empty(len(ids_B), self.model.V_16)
        self._decode(ids_B[:, None], at, logits_BV)
        return logits_BV[:, : self.vocab_size]

    def _decode(self, ids_BT: Tensor, at: int, logits_BV: Tensor | None) -> None:
        (B, T), c, S = ids_BT.shape, self.config, self.capacity
        if not self.k_LBGCS.numel():
            self.k_LBGCS = torch.empty(c.n_layers, B, c.n_kv_heads, c.head_dim, S)
            self.v_LBGSC = torch.empty(c.n_layers, B, c.n_kv_heads, S, c.head_dim)
        n_rows = B if self.first_B is None else len(self.first_B)
        assert B == n_rows == self.k_LBGCS.shape[1] > 0 and T > 0 and 0 <= at <= S - T
        x_BTD = F.embedding(ids_BT, self.embedding)  # raises for tokens outside the vocabulary
        caches = self.k_LBGCS, self.v_LBGSC
        ops.kernels.run("decode", self.model, x_BTD, B, T, at, self.first_B, *caches, logits_BV)

    def keep(self, rows: Tensor) -> None:
        self.k_LBGCS = self.k_LBGCS.index_select(1, rows)
        self.v_LBGSC = self.v_LBGSC.index_select(1, rows)
        self.first_B = None if self.first_B is None else self.first_B[rows]


def _up(n: int) -> int:
    return -(-n // ops.kernels.WIDTH) * ops.kernels.WIDTH


def _ends_of_padding(real_BS: Tensor) -> Tensor:
    """int32 [B]: the first place of each row that isn't padding."""
    first_B = real_BS.int().argmax(-1)
    places_S = torch.arange(real_BS.shape[1])
    assert torch.equal(real_BS, places_S >= first_B[:, None]), "padding must be at the left"
    return first_B.int()
