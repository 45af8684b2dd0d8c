"""What a checkpoint costs: python -m benchmarks.checkpoint [--rounds N] [--folder DIR] [--out FILE]

On 1 and 2 gloo ranks and for two sizes of state (weights and AdamW's moments, float32, sharded as FSDP2 does), in turn,
round after round: plain `dcp.save`, titanlite's sync save, its async save (how long training stands still, and how long
until it is committed), and a plain copy of the same files. Then loads: titanlite's check of every byte and its load
against `dcp.load`, on as many ranks as saved, and on one rank what two saved.

"Plain DCP" is `dcp.save(state, checkpoint_id=folder)` into a fresh folder with all defaults: it fsyncs every file
(sync_files=True; all but its last buffer) and plans anew each time. The copy is made by each rank of its own file, and
fsynced. What a side wrote is deleted and the disk is synced before the next one begins. Loads find their files in the
page cache.
"""

import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.common import circumstances, command_line, publish
from titanlite.checkpoint import Checkpointer
from titanlite.config import ModelConfig
from titanlite.model.transformer import Llama

MODELS = {
    "100 MB": ModelConfig(),
    "700 MB": ModelConfig(dim=640, n_layers=10, n_heads=10, n_kv_heads=5, ffn_dim=1792, vocab_size=8192),
}
SAVE_BOUND, STALL_BOUND = 1.10, 0.30


@dataclass(frozen=True)
class Cost:
    """Wall seconds of the slowest rank, CPU seconds of all ranks."""

    wall: float
    cpu: float


Costs = dict[str, list[Cost]]


def state_of(model: ModelConfig, mesh: DeviceMesh) -> dict[str, Tensor]:
    """The tensors that a run of this model saves, with the shards that this rank owns."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Llama(model).named_parameters()}
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
            rows = len(torch.empty(shape[0], device="meta").tensor_split(mesh.size())[mesh.get_local_rank()])
            local = torch.randn(rows, *shape[1:])
            tensors[f"{kind}.{name}"] = DTensor.from_local(local, mesh, [Shard(0)], shape=shape, stride=_stride(shape))
        tensors[f"optimizer.step.{name}"] = torch.zeros(())
    return tensors


def _stride(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def timed(do: Callable[[], Any]) -> Cost:
    """What `do` costs when all ranks begin it together."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    do()
    longest, total = torch.tensor([time.perf_counter() - wall]), torch.tensor([time.process_time() - cpu])
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return Cost(longest.item(), total.item())


def settle(*folders: Path) -> None:
    """Delete what one side wrote, so that the next one finds the disk idle."""
    dist.barrier()
    if dist.get_rank() == 0:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        os.sync()
    dist.barrier()


def copy(source: Path, target: Path) -> None:
    """What this rank wrote into checkpoint `source`, copied by the kernel and fsynced."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob(f"__{dist.get_rank()}_*"):
        with file.open("rb") as old, (target / file.name).open("wb") as new:
            shutil.copyfileobj(old, new, 1 << 24)
            os.fsync(new.fileno())


def measure_saves(folder: Path, tensors: dict[str, Tensor], rounds: int) -> Costs:
    """Leaves a checkpoint in folder/kept."""
    kept, plain, sync, background = (folder / name for name in ("kept", "plain", "sync", "async"))
    keeper = Checkpointer(str(kept), keep_latest_k=0, async_save=False)
    keeper.save(1, tensors, {})
    settle()
    savers = [Checkpointer(str(path), keep_latest_k=0, async_save=path is background) for path in (sync, background)]
    costs: Costs = {name: [] for name in ("plain dcp.save", "sync save", "async save: stall", "async save", "copy")}

    def run_plain() -> None:
        costs["plain dcp.save"].append(timed(lambda: dcp.save(tensors, checkpoint_id=plain / "step-1")))

    def run_sync() -> None:
        costs["sync save"].append(timed(lambda: savers[0].save(step, tensors, {})))
        savers[0].wait()

    def run_async() -> None:
        stall = timed(lambda: savers[1].save(step, tensors, {}))
        rest = timed(savers[1].wait)
        costs["async save: stall"].append(stall)
        costs["async save"].append(Cost(stall.wall + rest.wall, stall.cpu + rest.cpu))

    def run_copy() -> None:
        costs["copy"].append(timed(lambda: copy(kept / "step-00000001", folder / "copy")))

    sides = [run_plain, run_sync, run_async, run_copy]
    for step in range(1, rounds + 2):
        for side in sides[step % 4 :] + sides[: step % 4]:  # another one goes first in every round
            side()
            settle(plain, sync, background, folder / "copy")
    return {name: found[1:] for name, found in costs.items()}  # first saves plan, and touch their memory first


def measure_loads(folder: Path, tensors: dict[str, Tensor], rounds: int) -> Costs:
    path = str(folder / "kept" / "step-00000001")
    costs: Costs = {name: [] for name in ("plain dcp.load", "check of every byte", "load after the check")}
    for _ in range(rounds):
        costs["plain dcp.load"].append(timed(lambda: dcp.load(tensors, checkpoint_id=path)))
        checkpointer = Checkpointer(str(folder / "kept"), keep_latest_k=0, async_save=False)
        costs["check of every byte"].append(timed(checkpointer.newest))
        costs["load after the check"].append(timed(lambda: checkpointer.load(path, tensors)))  # noqa: B023
    return costs


def rank_main(rank: int, num_ranks: int, folder: Path, model: ModelConfig, rounds: int, saves: bool) -> None:
    warnings.simplefilter("ignore")  # DCP's plain calls use what torch itself deprecates
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{num_ranks}-{saves}"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    tensors = state_of(model, init_device_mesh("cpu", (num_ranks,)))
    costs = measure_saves(folder, tensors, rounds) if saves else {}
    costs |= measure_loads(folder, tensors, rounds)
    if rank == 0:
        torch.save({name: [(c.wall, c.cpu) for c in found] for name, found in costs.items()}, folder / "costs.pt")
    dist.destroy_process_group()


def measure(folder: Path, num_ranks: int, model: ModelConfig, rounds: int, saves: bool = True) -> Costs:
    mp.spawn(rank_main, (num_ranks, folder, model, rounds, saves), nprocs=num_ranks)
    return {name: [Cost(*pair) for pair in found] for name, found in torch.load(folder / "costs.pt").items()}


def ratios(costs: Costs, side: str, base: str, of: str) -> tuple[float, str]:
    """Median of the ratios round by round, and it with the quartiles."""
    pairs = zip(costs[side], costs[base], strict=True)
    low, middle, high = statistics.quantiles([getattr(a, of) / getattr(b, of) for a, b in pairs], n=4)
    return middle, f"{middle:.2f} ({low:.2f}-{high:.2f})"


def table(costs: Costs, base: str, num_bytes: int) -> str:
    lines = [
        f"| | wall s, median | CPU s, median | MB/s | wall / {base} (quartiles) | CPU / {base} (quartiles) |",
        "|---|---|---|---|---|---|",
    ]
    for side, found in costs.items():
        wall, cpu = statistics.median(c.wall for c in found), statistics.median(c.cpu for c in found)
        speed = "" if "stall" in side else f"{num_bytes / wall / 1e6:,.0f}"
        both = [ratios(costs, side, base, of)[1] for of in ("wall", "cpu")]
        lines.append(f"| {side} | {wall:.3f} | {cpu:.3f} | {speed} | {both[0]} | {both[1]} |")
    return "\n".join(lines)


def section(folder: Path, name: str, num_ranks: int, rounds: int) -> str:
    """Measure one size on so many ranks, and say what was found."""
    costs = measure(folder, num_ranks, MODELS[name], rounds)
    path = folder / "kept" / "step-00000001"
    num_bytes = sum(file.stat().st_size for file in path.iterdir())
    loads = {side: costs.pop(side) for side in list(costs) if "load" in side or "check" in side}
    more, more_text = ratios(costs, "sync save", "plain dcp.save", "wall")
    stall, stall_text = ratios(costs, "async save: stall", "sync save", "wall")
    text = f"""
## {num_bytes / 1e6:,.0f} MB on {num_ranks} rank{"s" * (num_ranks > 1)}

{table(costs, "plain dcp.save", num_bytes)}

- A sync save takes {more_text} of plain DCP's wall time (bound {SAVE_BOUND:.2f}: {verdict(more, SAVE_BOUND)}) and
  {ratios(costs, "sync save", "plain dcp.save", "cpu")[1]} of its CPU time.
- An async save stops training for {stall_text} of a sync save (bound {STALL_BOUND:.2f}: {verdict(stall, STALL_BOUND)}).

{table(loads, "plain dcp.load", num_bytes)}
"""
    if num_ranks > 1:
        resharded = measure(folder, 1, MODELS[name], rounds, saves=False)
        text += f"\nThe same checkpoint on 1 rank:\n\n{table(resharded, 'plain dcp.load', num_bytes)}\n"
    shutil.rmtree(folder / "kept")
    return text


def verdict(found: float, bound: float) -> str:
    return "met" if found <= bound else "missed"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds after one of warm-up (default 15)")
    parser.add_argument("--sizes", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], help="numbers of ranks (default: 1 2)")
    parser.add_argument("--folder", type=Path, help="where to write; default: the folder for temporary files")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds}: quartiles need 2 or more")
    before = os.getloadavg()[0]
    with TemporaryDirectory(dir=arguments.folder) as folder:
        found = []
        for name in arguments.sizes:
            for num_ranks in arguments.ranks:
                inner = Path(folder) / f"{name.split()[0]}-{num_ranks}"
                inner.mkdir()
                found.append(section(inner, name, num_ranks, arguments.rounds))
    command = f"python -m benchmarks.checkpoint --rounds {arguments.rounds}"
    load = f", 1 thread per rank. The machine's load was {before:.1f} before and {os.getloadavg()[0]:.1f} at the end"
    publish(f"# Checkpoints, CPU, {date.today()}\n{''.join(found)}\n{circumstances(command, load)}", arguments.out)


if __name__ == "__main__":
    main()
