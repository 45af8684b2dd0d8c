"""Initial weights: one set of bits per (seed, name), whoever draws it, and the distribution that was asked for."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.support.gloo import ranks
from titanlite.parallel.init import CHUNK_ELEMENTS, init_weights

ROWS, COLUMNS = 3001, 250  # neither divides by 2 or by the chunk's rows; rows make three chunks


def mean_std(name: str) -> tuple[float, float]:
    return {"norm.weight": (1.0, 0.0), "rows_by_tp.bias": (0.0, 0.0)}.get(name, (0.0, 0.02))


def build() -> nn.Module:
    model = nn.Sequential()
    model.rows_by_tp = nn.Linear(COLUMNS, ROWS)
    model.columns_by_tp = nn.Linear(ROWS - 1, COLUMNS, bias=False)
    model.norm = nn.RMSNorm(3)  # fewer elements than ranks
    return model


def whole(seed: int = 5) -> dict[str, Tensor]:
    model = build()
    init_weights(model, mean_std, seed)
    return {name: p.detach() for name, p in model.named_parameters()}


def sharded(shape: tuple[int, int], axes: tuple[str, str]) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=axes)
    model = build()
    if axes[1] == "tp":
        parallelize_module(model, mesh["tp"], {"columns_by_tp": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
    else:
        fully_shard(model, mesh=mesh)
    init_weights(model, mean_std, 5)
    gathered = {}
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor)
        gathered[name] = p.full_tensor().detach()
    return gathered


def sharded_rows() -> dict[str, Tensor]:
    """FSDP over tensor parallelism on the same dimension: _StridedShard."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential()
    model.rows_by_tp = nn.Linear(COLUMNS, ROWS - 1, bias=False)
    parallelize_module(model, mesh["tp"], {"rows_by_tp": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    init_weights(model, mean_std, 5)
    return {name: p.full_tensor().detach() for name, p in model.named_parameters() if isinstance(p, DTensor)}


@pytest.mark.parametrize(("shape", "axes"), [((1, 4), ("replicate", "dp")), ((2, 2), ("dp", "tp"))])
def test_every_layout_draws_the_same_bits(shape: tuple[int, int], axes: tuple[str, str]) -> None:
    expected = whole()
    assert expected["rows_by_tp.weight"].numel() > 2 * CHUNK_ELEMENTS
    for gathered in ranks(4).run(sharded, shape, axes):
        assert gathered.keys() == expected.keys()
        for name, value in gathered.items():
            assert torch.equal(value, expected[name]), name


def test_rows_split_twice_draw_the_same_bits() -> None:
    model = nn.Sequential()
    model.rows_by_tp = nn.Linear(COLUMNS, ROWS - 1, bias=False)
    init_weights(model, mean_std, 5)
    for gathered in ranks(4).run(sharded_rows):
        assert torch.equal(gathered["rows_by_tp.weight"], model.rows_by_tp.weight)


def test_distribution_and_constants() -> None:
    weights = whole()
    weight = weights["rows_by_tp.weight"]
    # A normal cut at 3 standard deviations has 0.9866 of the deviation.
    assert abs(weight.std().item() / 0.02 - 0.9866) < 0.005
    assert abs(weight.mean().item()) < 1e-4
    assert weight.abs().max().item() <= 0.06
    assert weights["norm.weight"].eq(1).all()
    assert weights["rows_by_tp.bias"].eq(0).all()


def test_values_depend_on_seed_name_and_chunk() -> None:
    weight, other = whole(5), whole(6)
    assert not torch.equal(weight["rows_by_tp.weight"], other["rows_by_tp.weight"])
    flat = weight["rows_by_tp.weight"]
    rows_per_chunk = CHUNK_ELEMENTS // COLUMNS
    assert not torch.equal(flat[:rows_per_chunk], flat[rows_per_chunk : 2 * rows_per_chunk])
    assert not torch.equal(flat[:COLUMNS, :COLUMNS], weight["columns_by_tp.weight"][:, :COLUMNS])
