"""Matrix products in float32 on the CPU by oneDNN, to which torch gives those in bfloat16 only.

Those in float32 it gives to MKL, which leaves AVX-512 unused on processors that are not Intel's: two Zen 5 cores made
0.18 TFLOP/s with it and 0.25 to 0.42 with oneDNN. Sums of thousands of terms are off by 6e-7 of their norm with
oneDNN, and by 3e-7 with MKL.

Owns `torch.ops.titanlite.linear`, which compilers, activation checkpointing and fake tensors see as one operation. It
calls a private operation of torch, the one that torch.compile lowers to. tests/model/test_matmul.py holds its
signature.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import register_flop_formula

_AVAILABLE = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"

_WORTH_MULTIPLICATIONS = 2**22
"""In smaller products the calls through Python would cost what oneDNN gains."""


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] -> [M, N]."""
    return linear(a, b.t()) if _by_onednn(a, a.shape[0] * b.numel()) else torch.mm(a, b)


class Linear(nn.Linear):
    """nn.Linear with these products. Under tensor parallelism (DTensors), torch's."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        if isinstance(self.weight, DTensor) or not _by_onednn(x, x.numel() * self.out_features):
            return super().forward(x)
        out = linear(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias


@torch.library.custom_op("titanlite::linear", mutates_args=(), device_types="cpu")
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """float32 x [M, K] @ weight [N, K].T -> contiguous [M, N]."""
    # oneDNN's call takes the second one in any layout, and the first row by row. Where it must, copy the smaller.
    if x.is_contiguous() or len(x) <= len(weight):
        return _linear(x.contiguous(), weight)
    return _linear(weight.contiguous(), x).t().contiguous()


@linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


@register_flop_formula(torch.ops.titanlite.linear)
def _(x_shape: torch.Size, weight_shape: torch.Size, **_: Any) -> int:
    return 2 * x_shape.numel() * weight_shape[0]


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    for_x, for_weight = ctx.needs_input_grad
    return linear(grad, weight.t()) if for_x else None, linear(grad.t(), x.t()) if for_weight else None


linear.register_autograd(_backward, setup_context=_save)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


def _by_onednn(x: Tensor, multiplications: int) -> bool:
    if not _AVAILABLE or multiplications < _WORTH_MULTIPLICATIONS or torch.is_autocast_enabled("cpu"):
        return False
    return x.device.type == "cpu" and x.dtype is torch.float32
