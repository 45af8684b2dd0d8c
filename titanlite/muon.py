"""Muon on sharded matrices: each whole one is orthogonalised on one rank, and the shards of the result travel back.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) as torch.optim.Muon has it: Nesterov momentum, which a few
Newton-Schulz iterations bring near the closest matrix with orthonormal rows or columns. The rate is matched to AdamW's
as in Moonlight (Liu et al. 2025, arXiv:2502.16982). Refuses what is no sharded matrix: the rest is AdamW's.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titanlite.sharding import owned

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7  # of the norm that a matrix is divided by: one of zeros stays one of zeros


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, DTensors over all ranks, and `others` for the rest: one optimiser to its user.

    Its groups and its state are those of both. As with fused AdamW, a `found_inf` of 1 makes a step leave weights and
    state alone; it is a float32 scalar on the matrices' device. A step is collective and does not wait for the device.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], others: torch.optim.AdamW, *, momentum: float, ns_steps: int
    ) -> None:
        """The rate and the decay of the matrices are those of the first group of `others`."""
        first = others.param_groups[0]
        defaults = {"lr": first["lr"], "weight_decay": first["weight_decay"]}
        super().__init__(matrices, {**defaults, "momentum": momentum, "ns_steps": ns_steps})
        self._group, self._others = self.param_groups[0], others
        self._exchange = Exchange(self._group["params"])
        self.found_inf = torch.zeros((), device=self._group["params"][0].device)
        self.param_groups += others.param_groups
        self.state = others.state
        for p in self._group["params"]:
            self.state[p] = {"momentum_buffer": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no step here asks for the loss again
        self._others.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._others.step()
        group, skip = self._group, self.found_inf > 0
        updates = self._exchange.gather([self._momentum(p, skip) for p in group["params"]])
        for number, update in updates.items():
            updates[number] = orthogonalised(update, group["ns_steps"])
        for p, update in zip(group["params"], self._exchange.scatter(updates), strict=True):
            weight = p.to_local()
            rate = group["lr"] * 0.2 * math.sqrt(max(p.shape))
            updated = weight.mul(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)
            weight.copy_(torch.where(skip, weight, updated))  # what is skipped may be NaN: no factor would do

    def _momentum(self, p: DTensor, skip: Tensor) -> Tensor:
        """Take this rank's part of the gradient into the momentum, and return what is to be orthogonalised of it."""
        assert isinstance(p.grad, DTensor)
        gradient, buffer = p.grad.to_local(), self.state[p]["momentum_buffer"].to_local()
        buffer.copy_(torch.where(skip, buffer, buffer.lerp(gradient, 1 - self._group["momentum"])))
        return gradient.lerp(buffer, self._group["momentum"]).to(working_type(p.dtype))


def working_type(dtype: torch.dtype) -> torch.dtype:
    """In which matrices of type `dtype` travel and are orthogonalised: bfloat16 will do, but not for a proof."""
    return dtype if dtype == torch.float64 else torch.bfloat16


def orthogonalised(matrix: Tensor, steps: int) -> Tensor:
    """The matrix with its singular values near 1 (0.7 to 1.2 for most), by a quintic Newton-Schulz iteration.

    Its coefficients have the largest slope at 0 and do not converge to 1: see Jordan et al. 2024.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def cost(rows: int, columns: int) -> int:
    """Multiplications of an iteration for a matrix of that shape."""
    short, long = sorted((rows, columns))
    return short * short * (2 * long + short)


def spread(costs: Sequence[int], num_ranks: int) -> list[int]:
    """A rank for each of the costs, the dearest first, always to the rank that has least to do so far."""
    loads, ranks = [0] * num_ranks, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda n: -costs[n]):
        ranks[number] = loads.index(min(loads))
        loads[ranks[number]] += costs[number]
    return ranks


class Exchange:
    """Brings each whole matrix to one rank, its owner, and parts of matrices back. The plan is the same on all ranks.

    Of replicas (HSDP) only the owner's own sends its shards; all of them get the result, so that they stay equal.
    """

    def __init__(self, matrices: Sequence[DTensor]) -> None:
        mesh, rank = matrices[0].device_mesh, dist.get_rank()
        coordinates = list(product(*map(range, mesh.shape)))  # by rank: the last axis is the innermost
        assert mesh.size() == dist.get_world_size()
        assert tuple(mesh.get_coordinate() or ()) == coordinates[rank]
        assert all(m.ndim == 2 and m.device_mesh == mesh for m in matrices)
        owners = spread([cost(*m.shape) for m in matrices], mesh.size())

        def gives(rank: int, number: int) -> bool:
            placements, pair = matrices[number].placements, (coordinates[rank], coordinates[owners[number]])
            return all(a == b for p, a, b in zip(placements, *pair, strict=True) if p.is_replicate())

        self._rank, self._empty = rank, matrices[0].to_local().new_empty(0, dtype=working_type(matrices[0].dtype))
        self._shapes = [m.shape for m in matrices]
        self._parts = [[owned(m, coordinate) for coordinate in coordinates] for m in matrices]  # by matrix and rank
        self._owned_by = [[n for n, owner in enumerate(owners) if owner == other] for other in range(mesh.size())]
        self._given_by = [[n for n in self._owned_by[rank] if gives(other, n)] for other in range(mesh.size())]
        self._given_to = [[n for n in numbers if gives(rank, n)] for numbers in self._owned_by]

    def gather(self, shards: Sequence[Tensor]) -> dict[int, Tensor]:
        """This rank's shards of all matrices -> the whole ones that it owns, by number. Collective."""
        received = self._travel(
            [[shards[n] for n in numbers] for numbers in self._given_to],
            [[self._parts[n][other] for n in numbers] for other, numbers in enumerate(self._given_by)],
        )
        wholes = {n: self._empty.new_empty(self._shapes[n]) for n in self._owned_by[self._rank]}
        for other, numbers in enumerate(self._given_by):
            for n, part in zip(numbers, received[other], strict=True):
                _part_of(wholes[n], self._parts[n][other]).copy_(part)
        return wholes

    def scatter(self, wholes: Mapping[int, Tensor]) -> list[Tensor]:
        """The whole matrices that this rank owns -> its shards of all matrices. Collective."""
        num_ranks = len(self._owned_by)
        received = self._travel(
            [[_part_of(whole, self._parts[n][other]) for n, whole in wholes.items()] for other in range(num_ranks)],
            [[self._parts[n][self._rank] for n in numbers] for numbers in self._owned_by],
        )
        shards = {n: part for pair in zip(self._owned_by, received, strict=True) for n, part in zip(*pair, strict=True)}
        return [shards[n] for n in range(len(self._shapes))]

    def _travel(self, given: list[list[Tensor]], expected: list[list[list[range]]]) -> list[list[Tensor]]:
        """Give each rank what is meant for it; what each one gives this rank, as parts of the expected sizes."""
        shapes = [[tuple(map(len, part)) for part in parts] for parts in expected]
        sizes = [[math.prod(shape) for shape in of_rank] for of_rank in shapes]
        outgoing = torch.cat([self._empty, *(part.flatten() for parts in given for part in parts)])
        incoming = self._empty.new_empty(sum(map(sum, sizes)))
        given_sizes = [sum(part.numel() for part in parts) for parts in given]
        dist.all_to_all_single(incoming, outgoing, [*map(sum, sizes)], given_sizes)
        flat = iter(incoming.split([size for of_rank in sizes for size in of_rank]))
        return [[next(flat).view(shape) for shape in of_rank] for of_rank in shapes]


def _part_of(whole: Tensor, part: Sequence[range]) -> Tensor:
    rows, columns = part
    return whole[rows.start : rows.stop, columns.start : columns.stop]
