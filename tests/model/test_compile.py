"""Compiled blocks: float32 operations of their own, plain gradients, few compilations.

Graphs are captured and run without a compiler of machine code, but in the last test.
"""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from fourstage.errors import UserError
from fourstage.job import TrainerConfig
from fourstage.model import Transformer, opaque
from tests.model.configs import VOCAB

ENDS = torch.tensor([3, 3, 10], dtype=torch.int32)  # the second expert has no rows


@pytest.fixture
def device() -> torch.device:
    """Graphs are captured there."""
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def forget():
    """Each test compiles for itself."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ids_of(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(2))


def gradients(model: Transformer, ids: torch.Tensor, valid: torch.Tensor | None = None):
    """The loss, the routers' load and the gradients by name, of a forward with seeded dropout."""
    model.zero_grad()
    torch.manual_seed(4)
    output = model(ids, valid_BT=valid)
    loss = model.logits(output.hidden_BTD).logsumexp(-1).square().mean()
    if output.router is not None:
        loss = loss + output.router.aux_loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "load": model.take_load(), **grads}


def assert_alike(found, expected, tolerance: float = 2e-5) -> None:
    assert found.keys() == expected.keys() and len(found) > 10
    for name, value in expected.items():
        if value is None:
            assert found[name] is None
            continue
        scale = value.abs().max().item()
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- the operations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grouped_product(dtype):
    x = torch.randn(10, 16, dtype=dtype, requires_grad=True)
    w = torch.randn(3, 16, 24, dtype=dtype, requires_grad=True)
    opcheck(opaque.grouped_mm, (x, w, ENDS))
    opcheck(opaque._grouped_outer, (x.detach(), torch.randn(10, 24, dtype=dtype), ENDS))
    weight = torch.randn(10, 24, dtype=dtype)
    found, expected = (
        [y, *torch.autograd.grad((y * weight).sum(), (x, w))]
        for y in (opaque.grouped_mm(x, w, ENDS), F.grouped_mm(x, w, offs=ENDS))
    )
    torch.testing.assert_close(found, expected)


# --- compiled blocks


def compilations(counter: CompileCounterWithBackend) -> int:
    """PyTorch has an empty graph compiled too."""
    return sum(len(graph.graph.nodes) > 0 for graph in counter.graphs)


VARIANTS = {
    "moe": {},
    "dense, tied": {"num_experts": 1, "top_k": 1, "balance": "none", "tie_embeddings": True},
    "shared, switch": {"d_shared": 24, "balance": "switch", "z_loss_coef": 0.1},
    "groups, no qk_norm": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "qk_norm": False},
    "loop": {"expert_path": "loop"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_gradients_are_those_of_plain_blocks(build, variant):
    model = build(**VARIANTS[variant])
    names = model.state_dict().keys()
    valid = torch.arange(40) < torch.tensor([[40], [22], [7]])
    plain = gradients(model, ids_of(3, 40), valid)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_blocks(dynamic=True, backend=counter)
    assert_alike(gradients(model, ids_of(3, 40), valid), plain)
    assert compilations(counter) >= 1
    assert model.state_dict().keys() == names


def operations(graphs: list[torch.fx.GraphModule]) -> set[str]:
    return {str(node.target) for graph in graphs for node in graph.graph.nodes}


def test_what_is_opaque(build):
    """Experts in float32; in bf16 PyTorch has what they need."""
    model, found = build(), []
    for is_bf16 in (False, True):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model.compile_blocks(backend=counter)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            model(ids_of(2, 9))
        found.append({name for name in operations(counter.graphs) if "fourstage" in name})
    assert found == [{"fourstage.grouped_mm.default"}, set()]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiled_and_computed_again(build, dropout):
    """checkpoint_activations with compile; dropout draws the same again."""
    model = build(dropout=dropout)
    model.compile_blocks(dynamic=True, backend="aot_eager")
    kept = gradients(model, ids_of(3, 40))
    model.checkpoint_activations = True
    assert_alike(gradients(model, ids_of(3, 40)), kept)


def test_half_precision_gradients_are_those_of_plain_blocks(build):
    """In bf16, as on a GPU."""
    model = build(d_shared=24)
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(model, ids_of(3, 40))
        model.compile_blocks(backend="aot_eager")
        compiled = gradients(model, ids_of(3, 40))
    for name, gradient in plain.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(compiled[name], gradient, rtol=0.05, atol=0.02 * scale, msg=name)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_any_number_of_rows_and_tokens_is_compiled_once(build, checkpointed):
    model = build()
    model.checkpoint_activations = checkpointed
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_blocks(dynamic=True, backend=counter)
    for rows, tokens in ((4, 70), (4, 33), (3, 45), (7, 64), (2, 129), (5, 8)):
        valid = torch.ones(rows, tokens, dtype=torch.bool)
        gradients(model, ids_of(rows, tokens), valid)
    assert compilations(counter) == 1
    for tokens in (20, 30, 40):
        gradients(model, ids_of(1, tokens), torch.ones(1, tokens, dtype=torch.bool))
    assert compilations(counter) == 2  # a single row is the exception
    gradients(model, ids_of(4, 50))
    assert compilations(counter) == 3  # and so is no padding


# --- the compiler of machine code


def test_without_a_compiler_it_is_one_line():
    from torch._inductor import config

    line = "trainer.compile: torch.compile finds no C\\+\\+ compiler: install one, such as g\\+\\+"
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(UserError, match=line):
        TrainerConfig(accelerator="cpu", compile=True).resolved()
    assert TrainerConfig(accelerator="cpu").resolved().precision == "32-true"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler (g++)")
def test_compiled_to_machine_code(build):
    model = build(d_shared=24)
    plain = [gradients(model, ids_of(3, tokens)) for tokens in (40, 23)]
    model.compile_blocks(dynamic=True)
    for tokens, expected in zip((40, 23), plain, strict=True):
        assert_alike(gradients(model, ids_of(3, tokens)), expected, tolerance=1e-4)
