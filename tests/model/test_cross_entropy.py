"""The chunked loss against torch's own cross-entropy over whole logits, alone and split over the vocabulary."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.gloo import ranks
from titanlite.model.documents import IGNORE_INDEX
from titanlite.model.ops import cross_entropy as loss_module
from titanlite.model.ops.cross_entropy import linear_cross_entropy
from titanlite.model.ops.matmul import matmul

Results = tuple[Tensor, Tensor, Tensor]


def inputs(num_tokens: int, dim: int, vocab_size: int, dtype: torch.dtype, seed: int = 0) -> Results:
    """Hidden states, weight, and labels of which about a quarter is ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, dim, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab_size, dim, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator)
    return hidden, weight, labels.masked_fill(torch.rand(num_tokens, generator=generator) < 0.25, IGNORE_INDEX)


def whole(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float = 0.3,
    product: Callable[[Tensor, Tensor], Tensor] = torch.mm,
) -> Results:
    """Loss and gradients of `scale` times the loss, over logits that exist all at once."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = F.cross_entropy(product(hidden, weight.t()), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight))


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor, scale: float = 0.3) -> Results:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)
    return loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(2, 30), st.integers(1, 400), st.integers(0, 2**31))
def test_any_chunks_give_what_whole_logits_give(num_tokens: int, vocab_size: int, chunk: int, seed: int) -> None:
    tensors = inputs(num_tokens, 5, vocab_size, torch.float64, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss_module.CHUNK_LOGITS, "cpu", chunk)
        for found, exact in zip(chunked(*tensors), whole(*tensors), strict=True):
            assert found.shape == exact.shape
            assert torch.allclose(found, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_rounding_is_no_worse_than_that_of_whole_logits(dtype: torch.dtype) -> None:
    """Against the exact result for the same rounded inputs; eight chunks and the rest of one.

    The whole ones are by the same products, which round in another order than torch's.
    """
    hidden, weight, labels = inputs(4200, 16, 8192, dtype)
    weight = weight * 0.1
    exact = whole(hidden.double(), weight.double(), labels)
    naive, found = whole(hidden, weight, labels, product=matmul), chunked(hidden, weight, labels)
    assert [tensor.dtype for tensor in found] == [torch.float32, dtype, dtype]
    assert error(found[0], exact[0]) < (1e-6 if dtype is torch.float32 else 1e-3)
    for own, usual, true in zip(found[1:], naive[1:], exact[1:], strict=True):
        assert error(own, true) < 1.2 * error(usual, true)


def test_a_sum_over_many_chunks_keeps_what_each_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 one of 512 equal parts is lost when it is added to the others one by one."""
    hidden, weight = torch.ones(4096, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16)
    monkeypatch.setitem(loss_module.CHUNK_LOGITS, "cpu", 16)
    loss, _, grad_weight = chunked(hidden, weight, torch.zeros(4096, dtype=torch.int64), scale=1.0)
    assert float(loss) == pytest.approx(4096 * math.log(2), rel=1e-6)
    assert grad_weight.flatten().tolist() == [-2048.0, 2048.0]


def test_logits_of_any_size_give_a_finite_loss() -> None:
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[3e4], [-3e4], [0.0]])
    loss, grad_hidden, _ = chunked(hidden, weight, torch.tensor([1]))
    assert loss == 6e4
    assert torch.isfinite(grad_hidden).all()


def test_no_valid_target_is_a_loss_of_zero_and_no_gradient() -> None:
    hidden, weight, _ = inputs(8, 3, 5, torch.float32)
    for tensor in chunked(hidden, weight, torch.full((8,), IGNORE_INDEX)):
        assert not tensor.any()


def test_only_the_gradients_that_are_asked_for() -> None:
    hidden, weight, labels = inputs(8, 3, 5, torch.float64)
    exact = whole(hidden, weight, labels)
    assert linear_cross_entropy(hidden, weight, labels) == exact[0]
    for i, tensor in enumerate((hidden, weight)):
        tensor.requires_grad_()
        (found,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels) * 0.3, tensor)
        tensor.requires_grad_(False)
        assert torch.allclose(found, exact[i + 1])


def test_a_second_backward_pass_fails_instead_of_scaling_twice() -> None:
    hidden, weight, labels = inputs(8, 3, 5, torch.float64)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(TypeError):
        loss.backward()


def split(num_tokens: int, vocab_size: int) -> Results:
    """Loss, gradient of hidden and own gradient of the weight on a rank that holds a part of the vocabulary."""
    hidden, weight, labels = inputs(num_tokens, 4, vocab_size, torch.float64)
    size = -(-vocab_size // dist.get_world_size())
    first = dist.get_rank() * size
    own = weight[first : first + size].clone().requires_grad_()
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, own, labels, first, dist.group.WORLD)
    grads = torch.autograd.grad(loss * 0.3, (hidden, own))
    dist.all_reduce(grads[0])
    return loss.detach(), *grads


@pytest.mark.parametrize(("num_tokens", "vocab_size"), [(9, 8), (9, 7), (1500, 6000)])
def test_a_split_vocabulary(num_tokens: int, vocab_size: int) -> None:
    """Of equal parts, of unequal ones, and in more chunks than one."""
    results = ranks(2).run(split, num_tokens, vocab_size)
    loss, grad_hidden, grad_weight = whole(*inputs(num_tokens, 4, vocab_size, torch.float64))
    for found in results:
        assert torch.allclose(found[0], loss, rtol=1e-13)
        assert torch.allclose(found[1], grad_hidden, rtol=1e-10)
    assert torch.allclose(torch.cat([found[2] for found in results]), grad_weight, rtol=1e-10)
