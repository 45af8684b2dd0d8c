"""Initial weights: the same bits on every layout, drawn by each rank for the rows that it owns and no others.

A parameter's rows are cut into chunks; each chunk has a generator of its own, keyed by (seed, parameter name, chunk).
So no value depends on which rank draws it, how many ranks there are, or what was drawn before.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

CHUNK_ELEMENTS = 1 << 18


def init_weights(model: nn.Module, mean_std: Callable[[str], tuple[float, float]], seed: int) -> None:
    """Fill every parameter in place from the normal distribution with mean and standard deviation `mean_std(name)`, cut
    at three deviations; a deviation of 0 makes a constant."""
    for name, parameter in model.named_parameters():
        mean, std = mean_std(name)
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        with torch.no_grad():
            if std == 0:
                local.fill_(mean)
            else:
                assert mean == 0, f"{name}: random parameters are centred"
                rows, columns = _owned(parameter)
                _fill(local, rows, columns, parameter.shape, std, f"{seed}/{name}")


def _owned(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Global indices of the rows and columns that this rank's shard holds.

    Tensor parallelism splits first, FSDP splits each part again: the mesh is (..., dp_shard, tp), so axes are walked
    from the last to the first. Both split as torch.chunk does.
    """
    indices = [torch.arange(n) for n in parameter.shape[:2]]
    if isinstance(parameter, DTensor):
        coordinate = parameter.device_mesh.get_coordinate()
        assert coordinate is not None
        for axis in reversed(range(parameter.device_mesh.ndim)):
            placement = parameter.placements[axis]
            if not placement.is_replicate():
                # is_shard() is false for the strided variant that FSDP2 over tensor parallelism makes; both have dim.
                dim = placement.dim  # type: ignore[attr-defined]
                parts = indices[dim].chunk(parameter.device_mesh.size(axis))
                mine = coordinate[axis]
                indices[dim] = parts[mine] if mine < len(parts) else indices[dim][:0]
    return indices[0], indices[1]


def _fill(local: Tensor, rows: Tensor, columns: Tensor, shape: torch.Size, std: float, key: str) -> None:
    assert local.shape == (len(rows), len(columns)), f"{key}: shard {tuple(local.shape)}, expected rows x columns"
    if not local.numel():
        return
    chunk_rows = max(1, CHUNK_ELEMENTS // shape[1])
    first_row, first_column = int(rows[0]), int(columns[0])
    for chunk in range(first_row // chunk_rows, int(rows[-1]) // chunk_rows + 1):
        start = chunk * chunk_rows
        drawn = torch.empty(min(chunk_rows, shape[0] - start), shape[1], dtype=local.dtype, device=local.device)
        digest = hashlib.blake2b(f"{key}/{chunk}".encode(), digest_size=8).digest()
        generator = torch.Generator(local.device).manual_seed(int.from_bytes(digest, "little") >> 1)
        nn.init.trunc_normal_(drawn, std=std, a=-3 * std, b=3 * std, generator=generator)
        low, high = max(start, first_row), min(start + len(drawn), int(rows[-1]) + 1)
        local[low - first_row : high - first_row] = drawn[
            low - start : high - start, first_column : first_column + len(columns)
        ]
