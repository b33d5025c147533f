"""The kernels as operations of PyTorch: what each takes, and once what holds for all of them.

A plan says what a kernel reads and writes; its gradient's plan follows from it. Arguments are
checked and made contiguous, results are allocated, and a fake tensor gets their shapes alone.

Shape legend: N tokens, B rows, T tokens of a row, D d_model, H query heads, G key/value heads,
J = H + 2 G, C head_dim, Q heads with a norm, E experts, K of them a token, M = N K choices,
F_ d_expert or the width of a Linear's result, R and C rows and columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.function import once_differentiable
from torch.library import Library, register_fake

from fourstage.kernels.build import WIDTH, check, run

DTYPES = {"order_M": torch.int64, "ends_E": torch.int32}  # of what is not float32
LIBRARY = Library("fourstage", "FRAGMENT")
Shape = tuple[int, ...]


class Plan(NamedTuple):
    """A kernel's arguments in its order: sizes, inputs, outputs."""

    sizes: tuple[int, ...]
    widths: tuple[int, ...]  # those that WIDTH must divide
    inputs: dict[str, tuple[Tensor, Shape] | float]  # with the shape that each must have
    outputs: dict[str, Shape]

    def checked(self) -> list[Tensor | float]:
        """The inputs, contiguous.

        Raises:
            TypeError: one has another dtype or device.
            ValueError: one has another shape.
        """
        for width in self.widths:
            if width <= 0 or width % WIDTH:
                raise ValueError(f"the widths {self.widths} must be multiples of {WIDTH}")
        for size in self.sizes:
            if size >= 2**31:
                raise ValueError(f"a kernel counts up to 2^31, not to {size}")
        found: list[Tensor | float] = []
        for name, given in self.inputs.items():
            if isinstance(given, tuple):
                check(name, *given, DTYPES.get(name, torch.float32))
                found.append(given[0].contiguous())
            else:
                found.append(given)
        return found

    def results(self) -> list[Tensor]:
        shapes = self.outputs.values()
        return [torch.empty(shape, dtype=torch.float32, device="cpu") for shape in shapes]


PlanOf = Callable[..., Plan]


def _registered(name: str, kernel: str, schema: str, plan_of: PlanOf) -> OpOverload:
    """The kernel as torch.ops.fourstage.<name>, for real and for fake tensors."""

    def start(arguments: tuple[Any, ...]) -> tuple[Plan, list[Tensor | float], list[Tensor]]:
        try:
            plan = plan_of(*arguments)
            return plan, plan.checked(), plan.results()
        except (TypeError, ValueError) as error:
            raise type(error)(f"fourstage::{name}: {error}") from None

    def real(*arguments: Any) -> Tensor | tuple[Tensor, ...]:
        plan, inputs, outputs = start(arguments)
        run(kernel, *plan.sizes, *inputs, *outputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def fake(*arguments: Any) -> Tensor | tuple[Tensor, ...]:
        _, _, outputs = start(arguments)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    LIBRARY.define(f"{name}{schema}", tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, real, "CPU")
    register_fake(f"fourstage::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.fourstage, name).default


def _operation(
    arguments: str, outputs: int = 1, gradients: int = 0, kept: int = 0
) -> Callable[[PlanOf], Callable[..., Any]]:
    """The kernel of a plan, and that of its gradient.

    arguments: as in a schema. gradients: so many of the first inputs have one, all from that of the
    first output. kept: so many of the last outputs the gradient needs; its kernel takes the inputs,
    them and the gradient.
    """

    def register(plan_of: PlanOf) -> Callable[..., Any]:
        name = plan_of.__name__
        schema = f"({arguments}) -> {_tensors(outputs)}"
        if not gradients:
            return _registered(name, name, schema, plan_of)

        all_kept = "".join(f", Tensor kept_{i}" for i in range(kept))
        backward_schema = f"({arguments}{all_kept}, Tensor grad) -> {_tensors(gradients)}"
        forward = _registered(name, f"{name}_forward", schema, plan_of)
        backward = _registered(
            f"{name}_backward",
            f"{name}_backward",
            backward_schema,
            lambda *given: _gradient_plan(plan_of, gradients, kept, *given),
        )

        def run_and_keep(ctx, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = forward(*inputs)
            found = output if outputs > 1 else (output,)
            ctx.mark_non_differentiable(*found[1:])
            ctx.set_materialize_grads(False)
            ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
            tensors = [x for x in inputs if isinstance(x, Tensor)]
            ctx.save_for_backward(*tensors, *found[outputs - kept :])
            return output

        @once_differentiable
        def gradient(ctx, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
            if grad is None:
                return (None,) * len(ctx.others)
            saved = iter(ctx.saved_tensors)
            inputs = [next(saved) if x is None else x for x in ctx.others]
            found = backward(*inputs, *saved, grad)
            grads = found if gradients > 1 else (found,)
            return *grads, *[None] * (len(inputs) - gradients)

        # a custom_op's own autograd takes 20 us more for each call
        methods = {"forward": staticmethod(run_and_keep), "backward": staticmethod(gradient)}
        function = type(name, (torch.autograd.Function,), methods)
        LIBRARY.impl(name, function.apply, "Autograd")
        return function.apply

    return register


def _gradient_plan(plan_of: PlanOf, gradients: int, kept: int, *given: Any) -> Plan:
    """The gradients of a plan's first inputs, from its inputs, kept outputs and the gradient."""
    n = len(given) - kept - 1
    plan = plan_of(*given[:n])
    inputs, shapes = dict(plan.inputs), list(plan.outputs.items())
    for (name, shape), x in zip(shapes[len(shapes) - kept :], given[n:-1], strict=True):
        inputs[name] = x, shape
    inputs["grad"] = given[-1], shapes[0][1]
    grads = {name: shape for name, (_, shape) in list(plan.inputs.items())[:gradients]}
    return Plan(plan.sizes, plan.widths, inputs, grads)


def _tensors(n: int) -> str:
    return "Tensor" if n == 1 else f"({', '.join(['Tensor'] * n)})"


@_operation("Tensor x, Tensor weight", gradients=2)
def linear(x: Tensor, weight: Tensor) -> Plan:
    """x times the transposed weight [F_, D]."""
    (*rows, D), (F_, _) = x.shape, weight.shape
    inputs = {"x": (x, (*rows, D)), "weight": (weight, (F_, D))}
    return Plan((prod(rows), D, F_), (D, F_), inputs, {"y": (*rows, F_)})


@_operation("Tensor x, Tensor weight, float eps", gradients=2)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Plan:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    *rows, D = x.shape
    inputs = {"x": (x, (*rows, D)), "weight": (weight, (D,)), "eps": eps}
    return Plan((prod(rows), D), (D,), inputs, {"y": (*rows, D)})


@_operation(
    "Tensor qkv_BTJC, Tensor weight_QC, Tensor cos_TC, Tensor sin_TC, float eps", gradients=2
)
def heads(qkv_BTJC: Tensor, weight_QC: Tensor, cos_TC: Tensor, sin_TC: Tensor, eps: float) -> Plan:
    """RMSNorm and rotation of the first heads, which are those that have a weight."""
    (B, T, J, C), (Q, _) = qkv_BTJC.shape, weight_QC.shape
    if Q > J:
        raise ValueError(f"weights of {Q} heads, of which there are {J}")
    inputs = {
        "qkv_BTJC": (qkv_BTJC, (B, T, J, C)),
        "weight_QC": (weight_QC, (Q, C)),
        "cos_TC": (cos_TC, (T, C)),
        "sin_TC": (sin_TC, (T, C)),
        "eps": eps,
    }
    return Plan((B * T, T, J, Q, C), (C,), inputs, {"y_BTJC": (B, T, J, C)})


@_operation("Tensor qkv_BTJC, int n_heads", outputs=2, gradients=1, kept=2)
def attention(qkv_BTJC: Tensor, n_heads: int) -> Plan:
    """Causal, [B, T, J, C], queries divided by sqrt(C) -> [B, T, H, C]; and of each query's scores
    log(sum(exp))."""
    (B, T, J, C), H = qkv_BTJC.shape, n_heads
    G = (J - H) // 2
    if H < 1 or G < 1 or J != H + 2 * G or H % G:
        raise ValueError(f"{H} query heads and {J - H} others have no groups")
    inputs = {"qkv_BTJC": (qkv_BTJC, (B, T, J, C))}
    outputs = {"y_BTHC": (B, T, H, C), "log_sums_BHT": (B, H, T)}
    return Plan((B, T, H, G, C), (C,), inputs, outputs)


@_operation(
    "Tensor x_ND, Tensor gate_up_EDF, Tensor down_EFD, Tensor gates_NK, Tensor order_M, "
    "Tensor ends_E",
    outputs=2,
    gradients=4,
    kept=1,
)
def experts(
    x_ND: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    gates_NK: Tensor,
    order_M: Tensor,
    ends_E: Tensor,
) -> Plan:
    """The sum of each token's experts, each times its gate; and what they have before SwiGLU.

    order_M: the choices by expert, of which e's end at ends_E[e].
    """
    (N, K), (E, F_, D) = gates_NK.shape, down_EFD.shape
    inputs = {
        "x_ND": (x_ND, (N, D)),
        "gate_up_EDF": (gate_up_EDF, (E, D, 2 * F_)),
        "down_EFD": (down_EFD, (E, F_, D)),
        "gates_NK": (gates_NK, (N, K)),
        "order_M": (order_M, (N * K,)),
        "ends_E": (ends_E, (E,)),
    }
    outputs = {"y_ND": (N, D), "hidden_MF": (N * K, 2 * F_)}
    return Plan((N, K, E, D, F_), (D, F_), inputs, outputs)


@_operation("Tensor x_MRC, Tensor coefficients_I3")
def newton_schulz(x_MRC: Tensor, coefficients_I3: Tensor) -> Plan:
    """I iterations on matrices of norm 1, R >= C: about U V^T of each U S V^T."""
    (M, R, C), (n, _) = x_MRC.shape, coefficients_I3.shape
    inputs = {"x_MRC": (x_MRC, (M, R, C)), "coefficients_I3": (coefficients_I3, (n, 3))}
    return Plan((M, R, C, n), (R, C), inputs, {"y_MRC": (M, R, C)})
