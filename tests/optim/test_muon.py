"""Muon on real ranks against torch.optim.Muon on whole matrices in one process, bit by bit."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from tests.support.calls import Calls
from tests.support.gloo import ranks
from titanlite.config import OptimizerConfig
from titanlite.muon import cost, orthogonalised, spread
from titanlite.optim import NonFiniteGuard, build_optimizer, set_lr

SHAPES = {"wide": (6, 10), "tall": (14, 4), "square": (8, 8), "small": (2, 4), "another": (6, 10)}
CONFIG = OptimizerConfig(name="muon", weight_decay=0.3, muon_momentum=0.9, muon_ns_steps=4)
RATES = [0.02, 0.05, 0.01]
State = dict[str, Tensor]


def tensors(seed: int) -> State:
    """A value for each parameter: the matrices, and a norm that is AdamW's."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator) for n, shape in {**SHAPES, "norm": (6,)}.items()}


def by_torch(steps: list[int]) -> State:
    """Weights after the updates of these steps, of torch's own optimisers."""
    weights = {name: nn.Parameter(value) for name, value in tensors(0).items()}
    muon = torch.optim.Muon(
        [p for p in weights.values() if p.ndim == 2],
        weight_decay=0.3,
        momentum=0.9,
        ns_steps=4,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW([weights["norm"]], betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in steps:
        for name, gradient in tensors(step).items():
            weights[name].grad = gradient
        for optimizer in (muon, adamw):
            set_lr(optimizer, RATES[step - 1])
            optimizer.step()
    return {name: p.detach() for name, p in weights.items()}


class Matrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (rows, columns) in SHAPES.items():
            self.add_module(name, nn.Linear(columns, rows, bias=False))
        self.norm = nn.RMSNorm(6)

    def parameters_by_name(self) -> dict[str, DTensor]:
        found = {name.removesuffix(".weight"): p for name, p in self.named_parameters()}
        assert all(isinstance(p, DTensor) for p in found.values())
        return found  # type: ignore[return-value]


def sharded(degrees: tuple[int, int, int]) -> Matrices:
    """With the values of seed 0; by tensor parallelism matrices are split by rows or by columns."""
    mesh = init_device_mesh("cpu", degrees, mesh_dim_names=("replicate", "shard", "tp"))
    model = Matrices()
    if degrees[2] > 1:
        styles = {"wide": ColwiseParallel(), "tall": ColwiseParallel(), "norm": SequenceParallel()}
        parallelize_module(model, mesh["tp"], {name: RowwiseParallel() for name in SHAPES} | styles)
    fully_shard(model, mesh=mesh["replicate", "shard"] if degrees[0] > 1 else mesh["shard"])
    for name, p in model.parameters_by_name().items():
        with torch.no_grad():
            p.copy_(like(p, tensors(0)[name]))
    return model


def like(p: DTensor, whole: Tensor) -> DTensor:
    """As p is sharded, by torch."""
    found = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
    assert torch.equal(found.full_tensor(), whole)
    return found


def train(degrees: tuple[int, int, int], bad_step: int = 0, sticky: bool = False) -> tuple[State, int]:
    """Weights after three steps, of which one may have a gradient that is not finite, and how many matrices this rank
    orthogonalised in a step."""
    model = sharded(degrees)
    parameters = model.parameters_by_name()
    optimizer = build_optimizer(model.parameters(), CONFIG, model.parameters())
    guard = NonFiniteGuard(torch.device("cpu"), sticky)
    for step in (1, 2, 3):
        for name, gradient in tensors(step).items():
            parameters[name].grad = like(parameters[name], gradient)
            if step == bad_step:
                parameters[name].grad.to_local().fill_(math.nan)
        guard.observe(step, torch.tensor(step != bad_step))
        before = [t.full_tensor().clone() for t in everything(model, optimizer)]
        optimizer.found_inf = guard.found_inf  # type: ignore[attr-defined]
        set_lr(optimizer, RATES[step - 1])
        with Calls(torch.ops.aten.linalg_vector_norm.default) as norms:
            optimizer.step()
        left_alone = step == bad_step or (sticky and 0 < bad_step < step)
        for old, new in zip(before, everything(model, optimizer), strict=True):
            assert torch.equal(old, new.full_tensor()) == left_alone
    return {name: p.full_tensor().detach() for name, p in parameters.items()}, norms.count


def everything(model: Matrices, optimizer: torch.optim.Optimizer) -> list[DTensor]:
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, DTensor)]
    assert len(states) == len(SHAPES) + 2
    return [*model.parameters_by_name().values(), *states]


LAYOUTS = [(1, 1, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2)]


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_weights_are_those_of_torch_bit_by_bit(degrees: tuple[int, int, int]) -> None:
    """Shapes that do not divide by the ranks, some with fewer rows: also ranks that hold nothing of a matrix."""
    results = ranks(math.prod(degrees)).run(train, degrees)
    for name, expected in by_torch([1, 2, 3]).items():
        for weights, _ in results:
            assert torch.equal(weights[name], expected), name
    assert sum(count for _, count in results) == len(SHAPES)  # none is orthogonalised twice


@pytest.mark.parametrize("sticky", [True, False])
def test_gradients_that_are_not_finite_change_nothing(sticky: bool) -> None:
    for weights, _ in ranks(4).run(train, (2, 2, 1), 2, sticky):
        for name, expected in by_torch([1] if sticky else [1, 3]).items():
            assert torch.equal(weights[name], expected), name


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7)], ids=str)
def test_singular_values_go_through_the_polynomial(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert (values > 0.6).all()
    torch.testing.assert_close(orthogonalised(matrix, 5), u * values @ v, rtol=0, atol=1e-12)
    assert orthogonalised(torch.zeros(shape), 5).eq(0).all()


def test_work_is_spread_by_cost() -> None:
    assert spread([1, 5, 2, 2, 2], 2) == [0, 0, 1, 1, 1]
    block = [cost(*shape) for shape in ((1024, 1024), (256, 1024), (256, 1024), (1024, 1024), *3 * [(2816, 1024)])]
    costs = 12 * block
    for num_ranks in (2, 7, 64):
        loads = [0] * num_ranks
        for number, rank in enumerate(spread(costs, num_ranks)):
            loads[rank] += costs[number]
        assert max(loads) <= sum(costs) / num_ranks + max(costs)
    assert len(set(spread(costs[:7], 64))) == 7
