"""Sketches of tensors, so that runs are compared tensor by tensor without keeping either.

A sketch holds a tensor's inner products with NUM_PROJECTIONS random tensors and its squared norm. The inner products of
a difference of two tensors have its norm as their root mean square: a difference stays unseen only if it is at right
angles to every random tensor.
"""

import functools

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

NUM_PROJECTIONS = 8

Sketches = dict[str, np.ndarray]
"""By name, in the order of computation: float64 [..., NUM_PROJECTIONS + 1], the squared norm last."""


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor as one process would hold it. From each replica's own shards, so that replicas can be told apart."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    placements = list(tensor.placements)
    for axis in range(len(placements)):  # the inner split first, which is FSDP2's; full_tensor() would warn of both
        placements[axis] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def sketch_parameter(parameter: Tensor) -> np.ndarray:
    whole = whole_tensor(parameter)
    matrix = whole.reshape(len(whole), -1)
    return sketch(matrix, random_tensor(len(matrix), "rows", matrix.device)).cpu().numpy()


def sketch(x: Tensor, rows: Tensor) -> Tensor:
    """x [..., R, C] and rows [R, NUM_PROJECTIONS] -> [..., NUM_PROJECTIONS + 1].

    Random tensor k is rows[:, k] times columns[:, k]: products of entries with mean 0 and variance 1 have them too.
    """
    x = x.double()
    projections = ((x @ random_tensor(x.shape[-1], "columns", x.device)) * rows).sum(-2)
    return torch.cat([projections, x.square().sum((-2, -1)).unsqueeze(-1)], dim=-1)


@functools.cache
def random_tensor(length: int, axis: str, device: torch.device) -> Tensor:
    """Normal numbers [length, NUM_PROJECTIONS], the same in every process."""
    if length == 1:
        return torch.ones(1, NUM_PROJECTIONS, dtype=torch.float64, device=device)
    generator = torch.Generator().manual_seed(2 * length + (axis == "rows"))
    return torch.randn(length, NUM_PROJECTIONS, dtype=torch.float64, generator=generator).to(device)
