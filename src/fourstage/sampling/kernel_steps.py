"""The network's half of generation through the kernel: keys and values, weights as it reads them.

Shape legend: B rows, T tokens, L layers, D d_model, G key/value heads, C head_dim, S places of a
row, E experts, F d_expert, V vocabulary; *_16 rounded up to a multiple of 16.
"""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int32, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from fourstage.model import ops
from fourstage.model.attention import rope_angles
from fourstage.model.moe import Router
from fourstage.model.transformer import Block, BlockWeights, Transformer
from fourstage.sampling.steps import KNOWN


def _fields(names: str, kind: type) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _Layer(Structure):
    """The same as in decode.cpp, as is _Model."""

    _fields_ = _fields(" ".join(BlockWeights._fields), c_void_p)


class _Model(Structure):
    _fields_ = [
        *_fields("n_layers D H G C E K F d_shared V_16 S has_norm", c_int32),
        *_fields("eps route_scale", c_float),
        ("layers", POINTER(_Layer)),
        *_fields("gain head cos sin", c_void_p),
    ]


class KernelSteps:
    """What Decoder runs on a CPU in float32. It reads the weights once, when it is made."""

    @staticmethod
    def supports(model: Transformer) -> bool:
        """Whether the kernel computes what this network's modules compute, in its widths."""
        c = model.config
        if any(type(module) not in {*KNOWN, Router} for module in model.modules()):
            return False
        if c.expert_path != "grouped" or torch.is_autocast_enabled("cpu"):
            return False
        if any(w.device.type != "cpu" or w.dtype != torch.float32 for w in model.parameters()):
            return False
        return ops.has_kernels(c.d_model, c.head_dim, c.d_expert, c.d_shared)

    def __init__(self, model: Transformer, capacity: int, real_BS: Tensor | None):
        """real_BS: bool [B, capacity], padding at the left."""
        c = self.config = model.config
        self.vocab_size = model.vocab_size
        self.embedding = model.embedding.weight.detach()
        self.first_B = None if real_BS is None else _ends_of_padding(real_BS)
        self.capacity = _up(capacity)
        self.k_LBGCS: Tensor | None = None
        self.v_LBGSC: Tensor | None = None
        self.held: list[Tensor] = []  # what the structures point to
        rope = rope_angles(torch.arange(capacity)[None], c.head_dim, c.rope_theta)
        cos_SC, sin_SC = (F.pad(x[0, :, 0], (0, 0, 0, self.capacity - capacity)) for x in rope)
        half = c.head_dim // 2  # the other half of cos is equal, that of sin negative
        head = (model.head or model.embedding).weight
        self.layers = (_Layer * c.n_layers)(*map(self._layer, model.blocks))
        self.model = _Model(
            c.n_layers,
            c.d_model,
            c.n_heads,
            c.n_kv_heads,
            c.head_dim,
            c.num_experts,
            c.top_k,
            c.d_expert,
            c.d_shared,
            _up(self.vocab_size),
            self.capacity,
            c.qk_norm,
            c.norm_eps,
            c.route_scale,
            self.layers,
            self._hold("gain", model.norm.weight, (c.d_model,)),
            self._hold("head", head, (self.vocab_size, c.d_model), is_product=True),
            self._hold("cos", cos_SC[:, half:], (self.capacity, half)),
            self._hold("sin", sin_SC[:, half:], (self.capacity, half)),
        )

    def _layer(self, block: Block) -> _Layer:
        c, C = self.config, self.config.head_dim
        D, E, F_, n_qk = c.d_model, c.num_experts, c.d_expert, c.n_heads + c.n_kv_heads
        shapes = {
            "attention_gain": (D,),
            "qkv": ((n_qk + c.n_kv_heads) * C, D),
            "head_gain": (n_qk, C),
            "out": (D, c.n_heads * C),
            "mlp_gain": (D,),
            "router": (E, D),
            "bias": (E,),
            "gate_up": (2 * F_, D) if c.dense else (E, D, 2 * F_),
            "down": (D, F_) if c.dense else (E, F_, D),
            "shared_gate_up": (2 * c.d_shared, D),
            "shared_down": (D, c.d_shared),
        }
        layer = _Layer()
        for name, x in block.weights()._asdict().items():
            if x is not None:
                is_product = x.dim() == 2 and name != "head_gain"
                setattr(layer, name, self._hold(name, x, shapes[name], is_product))
        return layer

    def _hold(self, name: str, x: Tensor, shape: tuple[int, ...], is_product: bool = False) -> int:
        """The address of x's numbers, which stay there; a product's [out, in] as [in, out_16]."""
        ops.kernels.check(name, x, shape)
        x = x.detach()
        self.held.append(_packed(x) if is_product else x.contiguous())
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
        if not B * T:
            return
        if self.k_LBGCS is None or self.v_LBGSC is None:
            self.k_LBGCS = torch.empty(c.n_layers, B, c.n_kv_heads, c.head_dim, S)
            self.v_LBGSC = torch.empty(c.n_layers, B, c.n_kv_heads, S, c.head_dim)
        assert at >= 0 and at + T <= S
        x_BTD = F.embedding(ids_BT, self.embedding)  # refuses tokens that are not in the table
        L, G, C = c.n_layers, c.n_kv_heads, c.head_dim
        ops.kernels.check("keys", self.k_LBGCS, (L, B, G, C, S))
        ops.kernels.check("values", self.v_LBGSC, (L, B, G, S, C))
        if self.first_B is not None:
            ops.kernels.check("ends of padding", self.first_B, (B,), torch.int32)
        caches = self.k_LBGCS, self.v_LBGSC
        ops.kernels.run("decode", self.model, x_BTD, B, T, at, self.first_B, *caches, logits_BV)

    def keep(self, rows: Tensor) -> None:
        """Row i is then what row rows[i] was, int64 [b]: some rows less, or a row several times."""
        assert self.k_LBGCS is not None and self.v_LBGSC is not None, "the rows have not begun"
        self.k_LBGCS = self.k_LBGCS.index_select(1, rows)
        self.v_LBGSC = self.v_LBGSC.index_select(1, rows)
        self.first_B = None if self.first_B is None else self.first_B[rows]


def _up(n: int) -> int:
    return -(-n // ops.kernels.WIDTH) * ops.kernels.WIDTH


def _packed(weight: Tensor) -> Tensor:
    """[out, in] -> [in, out_16]: a product reads its rows one after the other."""
    missing = -weight.shape[0] % ops.kernels.WIDTH
    return F.pad(weight.t(), (0, missing)) if missing else weight.t().contiguous()


def _ends_of_padding(real_BS: Tensor) -> Tensor:
    """int32 [B]: the first place of each row that is no padding."""
    first_B = real_BS.int().argmax(-1)
    places_S = torch.arange(real_BS.shape[1])
    assert torch.equal(real_BS, places_S >= first_B[:, None]), "padding must be at the left"
    return first_B.int()
