"""The kernels as operations of PyTorch (torch.ops.fourstage), with their gradients.

A signature names a kernel's arguments and results. A tensor's name ends in its shape: x_ND is
[N, D], and a letter is the same size throughout. A single letter is an int, any other word a float.
Tensors are checked against the signature and made contiguous; results are allocated, which is all
that fake tensors need. The C++ function takes each letter's size, in order of first appearance,
then tensors and floats, then results.

Shape legend: N tokens, B rows, T tokens of a row, D d_model, H query heads, G key/value heads,
J = H + 2 G, C head_dim, Q heads with a norm, E experts, K of them chosen per token, M = N K
choices, F d_expert or the width of a Linear's result, U = 2 F, R and C rows and columns of a
matrix, I iterations.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.function import once_differentiable
from torch.library import Library, register_fake

from fourstage.kernels.build import WIDTH, run

DTYPES = {"order_M": torch.int64, "ends_E": torch.int32}  # the others are float32
WIDTHS = frozenset("DFCR")  # must be multiples of WIDTH
LIBRARY = Library("fourstage", "FRAGMENT")


def _type(name: str) -> str:
    return "Tensor" if "_" in name else "int" if name.isupper() else "float"


def _shape(name: str, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[letter] for letter in name.rpartition("_")[2])


def _sizes(names: list[str], arguments: tuple[Any, ...]) -> dict[str, int]:
    """The size of each letter. Raises TypeError for a tensor's dtype or device, ValueError for its
    shape or for a size that kernels don't support."""
    sizes: dict[str, int] = {}
    for name, x in zip(names, arguments, strict=True):
        if isinstance(x, int):
            sizes[name] = x
        elif _type(name) == "Tensor":
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor, not {x}")
            letters = name.rpartition("_")[2]
            if x.dim() != len(letters):
                raise ValueError(f"{name} must have {len(letters)} dimensions, not {x.dim()}")
            shape = tuple(
                sizes.setdefault(letter, n) for letter, n in zip(letters, x.shape, strict=True)
            )
            if x.dtype != (dtype := DTYPES.get(name, torch.float32)) or not x.is_cpu:
                raise TypeError(f"{name} must be {dtype} on the CPU, not {x.dtype} on {x.device}")
            if x.shape != shape:
                raise ValueError(f"{name} must be {list(shape)}, not {list(x.shape)}")
    for letter, n in sizes.items():
        if letter in WIDTHS and (n <= 0 or n % WIDTH):
            raise ValueError(f"{letter} = {n}: widths must be multiples of {WIDTH}")
        if n >= 2**31:
            raise ValueError(f"{letter} = {n}: kernels count up to 2^31")
    return sizes


def _registered(name: str, kernel: str, inputs: list[str], outputs: list[str]) -> OpOverload:
    """The C++ function `kernel` as torch.ops.fourstage.<name>, for real and for fake tensors."""

    def allocated(*arguments: Any) -> tuple[dict[str, int], list[Tensor]]:
        try:
            sizes = _sizes(inputs, arguments)
        except (TypeError, ValueError) as error:
            raise type(error)(f"fourstage::{name}: {error}") from None
        return sizes, [
            torch.empty(_shape(x, sizes), dtype=torch.float32, device="cpu") for x in outputs
        ]

    def result(found: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
        return found[0] if len(found) == 1 else tuple(found)

    def real(*arguments: Any) -> Tensor | tuple[Tensor, ...]:
        sizes, found = allocated(*arguments)
        others = (x for x in arguments if not isinstance(x, int))
        given = (x.contiguous() if isinstance(x, Tensor) else x for x in others)
        run(kernel, *sizes.values(), *given, *found)
        return result(found)

    arguments = ", ".join(f"{_type(x)} {x}" for x in inputs)
    results = ", ".join(["Tensor"] * len(outputs))
    schema = f"{name}({arguments}) -> ({results})"
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, real, "CPU")
    register_fake(f"fourstage::{name}", lambda *x: result(allocated(*x)[1]), lib=LIBRARY)
    return getattr(torch.ops.fourstage, name).default


def _operation(name: str, signature: str, gradients: int = 0, kept: int = 0) -> Callable[..., Any]:
    """The operation of a kernel, and that of its gradient.

    gradients: how many of the first arguments have one, from the first result's gradient.
    kept: how many of the last results the gradient needs. Its arguments are the tensors, the kept
    results, the first result's gradient and the numbers.
    """
    inputs, outputs = (side.split() for side in signature.split("->"))
    if not gradients:
        return _registered(name, name, inputs, outputs)

    n_tensors = sum(_type(x) == "Tensor" for x in inputs)  # which come first
    tensors, numbers = inputs[:n_tensors], inputs[n_tensors:]
    saved = [*tensors, *outputs[len(outputs) - kept :]]
    grad = f"grad_{outputs[0].rpartition('_')[2]}"
    forward = _registered(name, f"{name}_forward", inputs, outputs)
    backward = _registered(
        f"{name}_backward", f"{name}_backward", [*saved, grad, *numbers], inputs[:gradients]
    )

    def run_and_save(ctx, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            found = forward(*arguments)
        results = found if len(outputs) > 1 else (found,)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[:n_tensors], *results[len(outputs) - kept :])
        ctx.numbers = arguments[n_tensors:]
        return found

    @once_differentiable
    def gradient(ctx, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        none = [None] * (len(inputs) - gradients)
        if grad is None:
            return *[None] * gradients, *none
        found = backward(*ctx.saved_tensors, grad, *ctx.numbers)
        return *(found if gradients > 1 else (found,)), *none

    # a custom_op's own autograd takes 20 us more per call
    methods = {"forward": staticmethod(run_and_save), "backward": staticmethod(gradient)}
    function = type(name, (torch.autograd.Function,), methods)
    LIBRARY.impl(name, function.apply, "Autograd")
    return function.apply


# x times the transposed weight
linear = _operation("linear", "x_ND weight_FD -> y_NF", gradients=2)

# x / sqrt(mean(x^2) + eps) * weight, by rows
rms_norm = _operation("rms_norm", "x_ND weight_D eps -> y_ND", gradients=2)

# RMSNorm and rotation of the first Q heads; the others are copied
heads = _operation("heads", "qkv_BTJC weight_QC cos_TC sin_TC eps -> y_BTJC", gradients=2)

# causal, of queries already divided by sqrt(C); and log(sum(exp)) of each query's scores
attention = _operation("attention", "qkv_BTJC H -> y_BTHC log_sums_BHT", gradients=1, kept=2)

# the sum of each token's experts times their gates; and their activations before SwiGLU.
# order_M: the choices sorted by expert, where those of expert e end at ends_E[e]
experts = _operation(
    "experts",
    "x_ND gate_up_EDU down_EFD gates_NK order_M ends_E -> y_ND hidden_MU",
    gradients=4,
    kept=1,
)

# Newton-Schulz iterations on matrices of norm 1, R >= C: about U V^T of each U S V^T.
# coefficients_IL: a, b and c of each iteration
newton_schulz = _operation("newton_schulz", "x_MRC coefficients_IL -> y_MRC")
