"""Which part of a parameter a rank holds: told from its placements, for any rank, without communication."""

from collections.abc import Sequence

from torch.distributed.tensor import DTensor


def owned(parameter: DTensor, coordinate: Sequence[int]) -> list[range]:
    """Global indices, along each dim of `parameter`, of what the rank at `coordinate` of its mesh holds.

    Tensor parallelism splits first, FSDP2 splits each part again: the mesh is (..., dp_shard, tp), so axes are walked
    from the last to the first. Both split as torch.chunk does.
    """
    indices = [range(size) for size in parameter.shape]
    for axis in reversed(range(parameter.device_mesh.ndim)):
        placement = parameter.placements[axis]
        if not placement.is_replicate():
            # is_shard() is false for the strided variant that FSDP2 over tensor parallelism makes; both have dim.
            dim = placement.dim  # type: ignore[attr-defined]
            size = -(-len(indices[dim]) // parameter.device_mesh.size(axis))
            indices[dim] = indices[dim][coordinate[axis] * size : (coordinate[axis] + 1) * size]
    return indices
