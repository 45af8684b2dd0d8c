"""What every run checks before its first step: the document rule against the packer, the backend against the rule."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from titanlite.model.attention import attend, realise
from titanlite.model.documents import document_starts_from_lengths


def check_starts(starts: Tensor, packed: Sequence[np.ndarray]) -> None:
    """Compare the starts [B, S] that the rule made with the boundaries that the packer placed.

    packed holds for each row the positions at which the packer began a document. Raises ValueError naming the first row
    that differs.
    """
    begins = starts == torch.arange(starts.shape[1])
    for number, (row, placed) in enumerate(zip(begins, packed, strict=True)):
        read = row.nonzero().flatten().tolist()
        if read != list(placed):
            differing = min(set(read) ^ set(placed))
            raise ValueError(
                f"row {number} of the first batch: a document begins at position {differing}"
                f" {'only by the rule' if differing in read else 'only by the packer'}: this is a bug, please report it"
            )


def check_backend(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Compare the backend, forward and backward, with explicit float64 softmax attention on a tiny batch.

    Raises ValueError naming the result whose relative error is more than rounding explains.
    """
    generator = torch.Generator().manual_seed(0)
    starts = document_starts_from_lengths([[1, 100, 27, 64, 64], [256]], 256).to(device)
    q = torch.randn(2, 256, 4, head_dim, generator=generator)
    k, v = torch.randn(2, 2, 256, 2, head_dim, generator=generator)
    weight = torch.randn(q.shape, generator=generator).to(device, dtype)

    def run(exact: bool) -> list[Tensor]:
        inputs = [t.to(device, dtype) for t in (q, k, v)]
        x, y, z = inputs = [(t.double() if exact else t).requires_grad_() for t in inputs]
        out = _dense_attention(x, y, z, starts) if exact else attend(x, y, z, realise(starts, backend))
        return [out, *torch.autograd.grad(out, inputs, weight.to(out.dtype))]

    # Logic, not rounding, is checked: a wrong mask is wrong by 10 % and more. CUDA may use TF32 for float32.
    bound = 1e-10 if dtype is torch.float64 else 2e-2
    for name, expected, actual in zip(("output", "dq", "dk", "dv"), run(True), run(False), strict=True):
        error = ((actual.double() - expected).norm() / expected.norm()).item()
        if not error < bound:
            raise ValueError(
                f"model.attention = {backend!r} is wrong on this machine: its {name} differs from dense attention by"
                f" {error:.1e} (relative, bound {bound:.1e}): use model.attention = 'dense' and report it"
            )


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """The definition, written out: q [B, S, H, D], k and v [B, S, KV, D] -> [B, S, H, D]."""
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    index = torch.arange(q.shape[1], device=q.device)
    visible = (starts[:, :, None] <= index) & (index <= index[:, None])
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)
