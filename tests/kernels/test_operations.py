"""The kernels as PyTorch's operations: registered whole, and every argument is checked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from fourstage import kernels
from fourstage.model import ops

pytestmark = pytest.mark.skipif(not kernels.is_available(), reason="needs a C++ compiler")


def normal(*shape: int, has_grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).requires_grad_(has_grad)


def choices(n: int, experts: int) -> tuple[Tensor, Tensor]:
    """order_M and ends_E."""
    expert_M, order_M = (torch.arange(n) % experts).sort(stable=True)
    ends_E = torch.searchsorted(expert_M, torch.arange(experts), right=True, out_int32=True)
    return order_M, ends_E


ARGUMENTS: dict[str, tuple[object, ...]] = {
    "linear": (normal(15, 32), normal(48, 32)),
    "rms_norm": (normal(6, 48), normal(48), 1e-5),
    "heads": (normal(2, 7, 8, 16), normal(6, 16), *(normal(7, 16, has_grad=False),) * 2, 1e-5),
    "attention": (normal(2, 7, 8, 16), 4),
    "experts": (normal(5, 16), normal(3, 16, 64), normal(3, 32, 16), normal(5, 2), *choices(10, 3)),
    "newton_schulz": (normal(2, 32, 16, has_grad=False) / 30, torch.ones(5, 3) / 3),
}
KEPT = {"attention": 2, "experts": 1}  # outputs that the gradient takes


def operation(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.fourstage, name).default


def backward_arguments(name: str) -> tuple[object, ...]:
    given = [x.detach() if isinstance(x, Tensor) else x for x in ARGUMENTS[name]]
    found = operation(name)(*given)
    outputs = (found,) if isinstance(found, Tensor) else found
    tensors = [x for x in given if isinstance(x, Tensor)]
    numbers = given[len(tensors) :]
    kept = outputs[len(outputs) - KEPT.get(name, 0) :]
    return *tensors, *kept, torch.ones_like(outputs[0]), *numbers


FORWARD = [pytest.param(name, ARGUMENTS.__getitem__, id=name) for name in ARGUMENTS]
BACKWARD = [
    pytest.param(name, backward_arguments, id=f"{name}_backward")
    for name in ARGUMENTS
    if name != "newton_schulz"
]


def found(name: str, arguments: Callable) -> tuple[torch._ops.OpOverload, list[object]]:
    is_forward = arguments != backward_arguments
    return operation(name if is_forward else f"{name}_backward"), list(arguments(name))


@pytest.mark.parametrize(("name", "arguments"), FORWARD + BACKWARD)
def test_pytorch_finds_the_registration_whole(name, arguments):
    """Schema, autograd, fake tensors, and a compiled call with its gradient."""
    run, given = found(name, arguments)
    opcheck(run, tuple(given))


def wrong(x: Tensor) -> list[tuple[type[Exception], Tensor]]:
    other = torch.bfloat16 if x.dtype == torch.float32 else torch.float32
    changed = [(TypeError, x.to(dtype)) for dtype in (other, torch.int8)]
    return [*changed, (ValueError, x[..., :-1]), (ValueError, x.flatten()[0])]


@pytest.mark.parametrize(("name", "arguments"), FORWARD + BACKWARD)
def test_every_wrong_tensor_is_refused(name, arguments):
    run, given = found(name, arguments)
    with torch.no_grad():
        for i, x in enumerate(given):
            for error, changed in wrong(x) if isinstance(x, Tensor) else ():
                with pytest.raises(error, match=f"fourstage::{name}"):
                    run(*given[:i], changed, *given[i + 1 :])


@pytest.mark.parametrize(("name", "arguments"), BACKWARD)
def test_tensors_that_do_not_fit_the_others_are_refused(name, arguments):
    run, given = found(name, arguments)
    for i, x in enumerate(given):
        if isinstance(x, Tensor):
            with pytest.raises(ValueError, match=f"fourstage::{name}"):
                run(*given[:i], torch.cat((x, x)), *given[i + 1 :])


@pytest.mark.parametrize(("name", "arguments"), FORWARD + BACKWARD)
def test_strides_do_not_matter(name, arguments):
    run, given = found(name, arguments)
    apart = [torch.stack((x, x), -1)[..., 0] if isinstance(x, Tensor) else x for x in given]
    assert not any(x.is_contiguous() for x in apart if isinstance(x, Tensor))
    torch.testing.assert_close(run(*apart), run(*given), rtol=0, atol=0)


def test_what_else_is_refused():
    x, order_M, ends_E = normal(3, 16), *choices(10, 3)
    with pytest.raises(ValueError, match="multiples of 16"):
        kernels.linear(normal(3, 24), normal(48, 24))
    with pytest.raises(ValueError, match="no groups"):
        kernels.attention(normal(1, 2, 8, 16), 5)
    with pytest.raises(ValueError, match="more gains than heads"):
        kernels.heads(normal(1, 2, 8, 16), normal(9, 16), normal(2, 16), normal(2, 16), 1e-5)
    with pytest.raises(TypeError, match="weight_D must be torch.float32 on the CPU"):
        kernels.rms_norm(x, torch.ones(16, dtype=torch.int8), 1e-5)
    with pytest.raises(TypeError, match="on meta"):
        kernels.rms_norm(x, torch.ones(16, device="meta"), 1e-5)
    given = ARGUMENTS["experts"][:4]
    for wrong_ends in (ends_E + 1, ends_E.flip(0), ends_E - 9):
        with pytest.raises(ValueError, match="ends"):
            kernels.experts(*given, order_M, wrong_ends)
    for wrong_order in (order_M + 1, order_M - 1):
        with pytest.raises(ValueError, match="order"):
            kernels.experts(*given, wrong_order, ends_E)


# --- what PyTorch does with them


def test_fake_tensors_have_shapes_alone():
    with FakeTensorMode():
        x, weight = torch.empty(2, 5, 32), torch.empty(48, 32)
        assert ops.applies((x, weight), 32, 48)
        assert ops.linear(x, weight).shape == (2, 5, 48)


def test_they_compile():
    x, weight, gain = normal(4, 32), normal(48, 32), normal(48)

    def both(x: Tensor) -> Tensor:
        y = torch.ops.fourstage.linear(x, weight)
        return torch.ops.fourstage.rms_norm(y, gain, 1e-5)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    grads = [torch.autograd.grad(run(x).square().sum(), (x, weight)) for run in (both, compiled)]
    torch.testing.assert_close(*grads)


def test_autocast_and_functorch_take_the_plain_expressions():
    x, weight = normal(4, 32), normal(48, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, weight).dtype == torch.bfloat16
    rows = torch.func.vmap(torch.func.grad(lambda x: ops.linear(x, weight).square().sum()))(x)
    (want,) = torch.autograd.grad(ops.linear(x, weight).square().sum(), x)
    torch.testing.assert_close(rows, want)


def test_other_weights_than_float32_take_the_plain_expression():
    x, gain = normal(3, 32), normal(32).bfloat16()
    want = torch.nn.functional.rms_norm(x, (32,), gain.float(), 1e-5)
    torch.testing.assert_close(ops.rms_norm(x, gain, 1e-5), want)


def test_a_gradient_has_none_of_its_own():
    x, weight = normal(3, 32), normal(48, 32)
    y = kernels.linear(x, weight).square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


NO_MEMORY = """
import resource
import torch
from fourstage import kernels

torch.set_num_threads(2)
x, weight = torch.zeros(2048, 1024), torch.zeros(1024, 1024)
kernels.linear(x, weight)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, -1))  # its scratch is 64 MiB
try:
    torch.ops.fourstage.linear_backward(x, weight, x)
except MemoryError as error:
    print("MemoryError:", error)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert not kernels.linear(x, weight).any()
print("and on it goes")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_no_memory_is_an_exception():
    done = subprocess.run([sys.executable, "-c", NO_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "MemoryError: fourstage::linear_backward: no memory\nand on it goes\n"
