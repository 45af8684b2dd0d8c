"""What no trainer of this model can go below: its matrix products, and the attention that its documents need.

The products are titanlite's, which are torch.mm's or faster.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.throughput.work import Case, document_lengths
from titanlite.model.ops.matmul import matmul

HEAD_CHUNK = 512
"""Tokens whose logits exist at once. The whole batch's do not fit the caches, and the products are slower."""


class Gemms:
    """Forward and backward products of every linear layer. The operands are there already."""

    def __init__(self, case: Case) -> None:
        model, tokens = case.model, case.rows * case.seq_len
        kv_dim = model.head_size * model.n_kv_heads
        dtype = getattr(torch, case.dtype)
        layer = [(model.dim, model.dim)] * 2 + [(model.dim, kv_dim)] * 2
        layer += [(model.dim, model.ffn_dim)] * 2 + [(model.ffn_dim, model.dim)]
        self.products = [(*_operands(tokens, *shape, dtype), model.n_layers) for shape in layer]
        self.head = _operands(tokens, model.dim, model.vocab_size, dtype, chunk=HEAD_CHUNK)
        self.chunks = -(-tokens // HEAD_CHUNK)

    def step(self, rows: Tensor) -> None:
        del rows
        for x, weight, grad, times in self.products:
            for _ in range(times):
                _multiply(x, weight, grad)
        for _ in range(self.chunks):
            _multiply(*self.head)


class GemmsAndAttention(Gemms):
    """The same, and one call of causal attention per document and layer, forward and backward."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.case = case

    def step(self, rows: Tensor) -> None:
        super().step(rows)
        for _ in range(self.case.model.n_layers):
            for length in document_lengths(rows):
                q, k, v, grad = self._tensors(length)
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                torch.autograd.grad(out, (q, k, v), grad)

    def _tensors(self, length: int) -> Iterator[Tensor]:
        """Query, key, value and the gradient of the output of a document, contiguous."""
        model = self.case.model
        for heads, learns in (
            (model.n_heads, True),
            (model.n_kv_heads, True),
            (model.n_kv_heads, True),
            (model.n_heads, False),
        ):
            shape = (1, heads, length, model.head_size)
            yield torch.ones(shape, dtype=getattr(torch, self.case.dtype), requires_grad=learns)


def _operands(
    tokens: int, fan_in: int, fan_out: int, dtype: torch.dtype, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and gradient of the output."""
    tokens = min(tokens, chunk or tokens)
    return (
        torch.randn(tokens, fan_in, dtype=dtype),
        torch.randn(fan_out, fan_in, dtype=dtype),
        torch.randn(tokens, fan_out, dtype=dtype),
    )


def _multiply(x: Tensor, weight: Tensor, grad: Tensor) -> None:
    matmul(x, weight.t())
    matmul(grad, weight)
    matmul(grad.t(), x)
