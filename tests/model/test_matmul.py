"""Products by oneDNN, against the same in float64 and against torch's own."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.support.calls import Calls
from titanlite.model.ops import matmul
from titanlite.model.ops.matmul import Linear
from titanlite.parallel.apply import _selective_contexts

needs_onednn = pytest.mark.skipif(not matmul._AVAILABLE, reason="a CPU without AVX-512, or a torch without oneDNN")

OP = torch.ops.titanlite.linear.default
LARGE = [(64, 256, 256), (512, 1, 8192), (300, 129, 127), (1, 2048, 2048), (2049, 64, 33)]
"""[M, K, N] with at least 2^22 multiplications each."""


def assert_rounded_only(actual: Tensor, a: Tensor, b: Tensor) -> None:
    """Each sum is off by no more than its rounding (Higham 2002, section 3.1: K eps times the sum of the amounts)."""
    a, b = a.double(), b.double()
    bound = a.shape[1] * torch.finfo(torch.float32).eps * (a.abs() @ b.abs())
    assert ((actual.double() - a @ b).abs() <= bound).all()


def layouts(rows: int, columns: int, seed: int) -> list[Tensor]:
    """The same matrix row by row, column by column, and as part of a larger one."""
    whole = torch.randn(rows + 1, columns + 3, generator=torch.Generator().manual_seed(seed))
    part = whole[1:, 2:-1]
    return [part.contiguous(), part.t().contiguous().t(), part]


@needs_onednn
@pytest.mark.parametrize("shape", LARGE)
def test_products_are_exact_to_rounding_in_every_layout(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    for a in layouts(rows, inner, 0):
        for b in layouts(inner, columns, 1):
            with Calls(OP) as calls:
                actual = matmul.matmul(a, b)
            assert calls.count == 1
            assert actual.is_contiguous()
            assert_rounded_only(actual, a, b)


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("fan_in", "fan_out"), [(96, 320), (320, 96)])
def test_a_linear_layer_and_its_gradients_are_those_of_torch_in_float64(fan_in: int, fan_out: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = Linear(fan_in, fan_out, bias)
    x = torch.randn(4, 70, fan_in, requires_grad=True)
    weight = torch.randn(4, 70, fan_out)
    with Calls(OP) as calls:
        out = layer(x)
        inputs = [x, *layer.parameters()]
        gradients = torch.autograd.grad(out, inputs, weight)
    assert calls.count == 3
    exact = [t.detach().double().requires_grad_() for t in inputs]
    exact_out = F.linear(*exact)
    assert out.shape == exact_out.shape
    for actual, expected in zip(
        [out, *gradients], [exact_out, *torch.autograd.grad(exact_out, exact, weight.double())], strict=True
    ):
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual.double(), expected, atol=2e-5, rtol=1e-5)


@needs_onednn
def test_only_the_gradients_that_are_asked_for_are_computed() -> None:
    layer, x = Linear(256, 256, bias=False), torch.randn(128, 256)
    with Calls(OP) as calls:
        layer(x).sum().backward()
        layer.weight.requires_grad_(False)
        layer(x.requires_grad_()).sum().backward()
    assert calls.count == 4
    assert layer.weight.grad is not None
    assert x.grad is not None


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (torch.randn(2, 3, 64), torch.float32),
        (torch.randn(512, 64), torch.float64),
        (torch.randn(512, 64), torch.bfloat16),
    ],
    ids=["small", "float64", "bfloat16"],
)
def test_the_other_products_are_torchs(x: Tensor, dtype: torch.dtype) -> None:
    layer, x = Linear(64, 512, bias=True).to(dtype), x.to(dtype)
    with Calls(OP) as calls:
        out = layer(x)
        product = matmul.matmul(x.flatten(0, -2), layer.weight.t())
    assert calls.count == 0
    assert torch.equal(out, F.linear(x, layer.weight, layer.bias))
    assert torch.equal(product, torch.mm(x.flatten(0, -2), layer.weight.t()))


def test_autocast_takes_its_own_type() -> None:
    layer, x = Linear(256, 256), torch.randn(128, 256)
    with Calls(OP) as calls, torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert calls.count == 0


@needs_onednn
def test_compilers_and_fake_tensors_see_the_operation_as_it_is() -> None:
    a, b = torch.randn(64, 96), torch.randn(96, 48)
    for pair in [(a, b.t()), (a.t().contiguous().t(), b.t().contiguous()), (b.t(), a)]:
        torch.library.opcheck(matmul.linear, [t.detach().requires_grad_() for t in pair])
    layer, x = Linear(256, 256, bias=True), torch.randn(2, 64, 256, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    weight = torch.randn(2, 64, 256)
    inputs = [x, *layer.parameters()]
    expected = [layer(x), *torch.autograd.grad(layer(x), inputs, weight)]
    actual = [compiled(x), *torch.autograd.grad(compiled(x), inputs, weight)]
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@needs_onednn
def test_the_operation_of_torch_has_the_signature_that_ours_calls() -> None:
    assert str(torch.ops.mkldnn._linear_pointwise.default._schema) == (
        "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm)"
        " -> Tensor Y"
    )


@needs_onednn
def test_selective_activation_checkpointing_recomputes_every_second_product() -> None:
    layers = torch.nn.Sequential(*(Linear(256, 256, bias=False) for _ in range(4)))
    x = torch.randn(128, 256, requires_grad=True)

    def calls_and_gradients(call: Callable[[Tensor], Tensor]) -> tuple[int, tuple[Tensor, ...]]:
        out = call(x)
        with Calls(OP) as calls:
            gradients = torch.autograd.grad(out.square().sum(), [x, *layers.parameters()])
        return calls.count, gradients

    kept, expected = calls_and_gradients(layers)
    recomputed, actual = calls_and_gradients(
        functools.partial(checkpoint, layers, use_reentrant=False, context_fn=_selective_contexts)
    )
    assert (kept, recomputed) == (8, 10)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
