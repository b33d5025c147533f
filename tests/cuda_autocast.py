"""CUDA's autocast rules for the GPU that is not there (fake_gpu.py): which operation is in what.

The lists are those of torch 2.11 to 2.13 (aten/src/ATen/autocast_mode.h), of the operations that a
network of ours could reach; rms_norm is in float32 from 2.12 on. PyTorch's own are tied to CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from tests.fake_gpu import NAME

RULES = {
    "lower": """linear matmul mm mv addmm addmv bmm baddbmm addbmm addr linalg_vecdot prelu
        scaled_dot_product_attention""",
    "float32": """exp expm1 log log10 log2 log1p reciprocal rsqrt pow.Tensor_Scalar
        pow.Tensor_Tensor pow.Scalar softplus layer_norm group_norm logsumexp nll_loss nll_loss_nd
        kl_div mse_loss l1_loss huber_loss cosine_similarity binary_cross_entropy_with_logits dist
        prod prod.dim_int softmax.int log_softmax.int cumprod cumsum sum sum.dim_IntList norm.Scalar
        norm.ScalarOpt_dim linalg_vector_norm""",
    "promoted": "addcdiv addcmul atan2 cross dot index_put scatter_add",
}
KEY = torch._C.DispatchKey.AutocastPrivateUse1


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _is_eligible(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def _kernel(name: str, rule: str) -> Any:
    op = _overload(name)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(KEY)):
            mine = [x for x in tree_leaves((args, kwargs)) if _is_eligible(x)]
            mine = [x for x in mine if x.device.type == NAME]
            if rule == "promoted":
                is_full = any(x.dtype == torch.float32 for x in mine)
                dtype = torch.float32 if is_full else torch.get_autocast_dtype(NAME)
            else:
                dtype = torch.get_autocast_dtype(NAME) if rule == "lower" else torch.float32

            def cast(x: Any) -> Any:
                return x.to(dtype) if any(x is tensor for tensor in mine) else x

            return op(*tree_map(cast, args), **tree_map(cast, kwargs))

    return run


@contextmanager
def cuda_rules(rms_norm_in_float32: bool = True) -> Iterator[None]:
    """What autocast does on the fake GPU; without rms_norm's rule, as torch 2.11 has it."""
    library = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")  # noqa: TOR901
    others = torch.library.Library("_", "IMPL")  # noqa: TOR901
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for rule, names in RULES.items():
        norms = ["rms_norm"] * (rule == "float32" and rms_norm_in_float32)
        for name in [*names.split(), *norms]:
            library.impl(_overload(name), _kernel(name, rule))
    try:
        yield
    finally:
        library._destroy()
        others._destroy()


@contextmanager
def cuda_autocast(rms_norm_in_float32: bool = True) -> Iterator[None]:
    """bf16 autocast by these rules."""
    with cuda_rules(rms_norm_in_float32), torch.autocast(NAME, torch.bfloat16):
        yield
