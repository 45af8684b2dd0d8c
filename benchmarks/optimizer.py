"""What a step with Muon costs over one with AdamW: python -m benchmarks.optimizer [--steps N] [--quick] [--out FILE]

Two trainers, alike but for `optimizer.name`, make the same step in turn on 2 gloo ranks (one thread each, float32,
FSDP2). The update is what comes behind the backward pass: norm, clipping, optimiser. Its time does not depend on the
tokens of a step, so the ratio does: at the 524,288 tokens of train_configs/llama_150m.toml it is smaller than here.
`--quick` takes a tiny model, which shows that the program runs and nothing else: its ratio is judged by nobody.
"""

import statistics
import sys
import time
from dataclasses import astuple, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Literal

import torch.distributed as dist
from tqdm import trange

from benchmarks.common import circumstances, command_line, publish
from benchmarks.throughput.measure import in_processes
from benchmarks.throughput.ours import config_of
from benchmarks.throughput.report import Bound
from benchmarks.throughput.work import EOS, Case, rows_of
from titanlite.config import ModelConfig, load_config
from titanlite.model.documents import Examples
from titanlite.model.transformer import num_parameters
from titanlite.parallel.mesh import build_mesh
from titanlite.run.agreement import keep_freed_memory
from titanlite.trainer import Trainer

BOUND = 1.15
WARMUP_STEPS = 1
NAMES: tuple[Literal["adamw", "muon"], ...] = ("adamw", "muon")
SHIPPED = Path(__file__).resolve().parent.parent / "train_configs/llama_150m.toml"
TINY = ModelConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=48, vocab_size=128)


@dataclass(frozen=True)
class Step:
    """Wall seconds of a step on rank 0, and of its update."""

    whole: float
    update: float


def measure(case: Case, argument: tuple[int, int]) -> dict[str, list[Step]]:
    """Counted steps by optimiser, each of so many micro-batches on this rank. argument: micro-batches, steps."""
    micro_batches, steps = argument
    keep_freed_memory()
    mesh, rows = build_mesh("cpu", 1, case.processes, 1), rows_of(case, micro_batches, dist.get_rank()).flatten(0, 1)
    config = config_of(case)
    training = replace(config.training, local_batch_size=case.rows, global_batch_size=len(rows) * case.processes)
    config, examples = replace(config, training=training), Examples.by_eos(rows, EOS)
    trainers = {n: Trainer(replace(config, optimizer=replace(config.optimizer, name=n)), mesh) for n in NAMES}
    found: dict[str, list[Step]] = {name: [] for name in NAMES}
    backward_ended = 0.0

    def note() -> None:
        nonlocal backward_ended
        backward_ended = time.perf_counter()

    for number in trange(WARMUP_STEPS + steps, desc="a step of each", disable=dist.get_rank() != 0):
        for name in NAMES if number % 2 else reversed(NAMES):
            trainers[name].on_gradients = note
            dist.barrier()
            began = time.perf_counter()
            trainers[name].train_step(examples, rows[:, 1:].numel() * case.processes)
            ended = time.perf_counter()
            if number >= WARMUP_STEPS:
                found[name].append(Step(ended - began, ended - backward_ended))
    return found


def bound_of(found: dict[str, list[Step]]) -> Bound:
    pairs = zip(found["muon"], found["adamw"], strict=True)
    low, middle, high = statistics.quantiles([muon.whole / adamw.whole for muon, adamw in pairs], n=4)
    return Bound("Muon's step over AdamW's", (low, middle, high), BOUND, at_most=True)


def report(case: Case, found: dict[str, list[Step]], tokens: int, command: str, judged: bool) -> str:
    bound = bound_of(found)
    low, middle, high = bound.ratios
    lines = []
    for name, steps in found.items():
        whole, update = (statistics.median(seconds) for seconds in zip(*map(astuple, steps), strict=True))
        lines.append(f"| {name} | {whole:.3f} | {update:.3f} |")
    verdict = f"bound {BOUND:.2f}: {bound.verdict}" if judged else "a tiny model: not judged"
    return f"""# Muon's step beside AdamW's, CPU, {date.today()}

| | s of a step, median | s of its update, median |
|---|---|---|
{chr(10).join(lines)}

{bound.text}: {middle:.3f} (quartiles {low:.3f}-{high:.3f}; {verdict}).

- Work: {num_parameters(case.model):,} parameters, {tokens:,} tokens a step in {case.name}; {len(found["muon"])} counted
  steps of each after {WARMUP_STEPS}, in turn; who goes first alternates
{circumstances(command, "")}"""


def main() -> int:
    """Exit code: 1 where the bound is missed by more than the noise."""
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=7, help="counted steps of each (default 7)")
    parser.add_argument("--micro_batches", type=int, default=8, help="of a rank, each one row of 2048 (default 8)")
    parser.add_argument("--quick", action="store_true", help="with a tiny model and rows of 64")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error(f"--steps {arguments.steps}: quartiles need 2 or more")
    model = TINY if arguments.quick else load_config(["--job.config_file", str(SHIPPED)]).model
    case = Case(64 if arguments.quick else 2048, 300, processes=2, model=model)
    found = in_processes(case, measure, (arguments.micro_batches, arguments.steps))
    command = " ".join(["python -m benchmarks.optimizer", *sys.argv[1:]])
    tokens = arguments.micro_batches * case.tokens
    publish(report(case, found, tokens, command, judged=not arguments.quick), arguments.out)
    return int(not arguments.quick and bound_of(found).missed)


if __name__ == "__main__":
    sys.exit(main())
