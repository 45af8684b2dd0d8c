"""Initial weights: the same bits on every layout, drawn by each rank for the rows that it owns and no others.

A parameter's rows are cut into chunks; each chunk has a generator of its own, keyed by (seed, parameter name, chunk).
So no value depends on which rank draws it, how many ranks there are, or what was drawn before.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titanlite.sharding import owned

CHUNK_ELEMENTS = 1 << 18


def init_weights(model: nn.Module, mean_std: Callable[[str], tuple[float, float]], seed: int) -> None:
    """Fill every parameter in place from the normal distribution with mean and standard deviation `mean_std(name)`, cut
    at three deviations; a deviation of 0 makes a constant."""
    for name, parameter in model.named_parameters():
        mean, std = mean_std(name)
        local, parts = parameter.detach(), [range(size) for size in parameter.shape]
        if isinstance(parameter, DTensor):
            coordinate = parameter.device_mesh.get_coordinate()
            assert coordinate is not None
            local, parts = parameter.to_local(), owned(parameter, coordinate)
        with torch.no_grad():
            if std == 0:
                local.fill_(mean)
            else:
                assert mean == 0, f"{name}: random parameters are centred"
                rows, columns = parts
                _fill(local, rows, columns, parameter.shape, std, f"{seed}/{name}")


def _fill(local: Tensor, rows: range, columns: range, shape: torch.Size, std: float, key: str) -> None:
    assert local.shape == (len(rows), len(columns)), f"{key}: shard {tuple(local.shape)}, expected rows x columns"
    if not local.numel():
        return
    chunk_rows = max(1, CHUNK_ELEMENTS // shape[1])
    for chunk in range(rows.start // chunk_rows, rows[-1] // chunk_rows + 1):
        start = chunk * chunk_rows
        drawn = torch.empty(min(chunk_rows, shape[0] - start), shape[1], dtype=local.dtype, device=local.device)
        digest = hashlib.blake2b(f"{key}/{chunk}".encode(), digest_size=8).digest()
        generator = torch.Generator(local.device).manual_seed(int.from_bytes(digest, "little") >> 1)
        nn.init.trunc_normal_(drawn, std=std, a=-3 * std, b=3 * std, generator=generator)
        low, high = max(start, rows.start), min(start + len(drawn), rows.stop)
        local[low - rows.start : high - rows.start] = drawn[low - start : high - start, columns.start : columns.stop]
