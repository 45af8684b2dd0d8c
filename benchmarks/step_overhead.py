"""What titanlite's step costs over a bare FSDP2 loop: python -m benchmarks.step_overhead [--steps N] [--out FILE]

Both train the same model from the same weights on the same batches, step by step in turn, in one process on the CPU
(2 threads, float32, one rank). The bare loop is what one would write by hand: `fully_shard`, cross-entropy,
`clip_grad_norm_`, fused AdamW, and no config, metrics or checkpoint. On titanlite's side two things are timed:
`train_step`, which the bound of 5 % is about, and the whole step of a run: batch from the loader (which does all of
its work in the step's own thread here, without prefetch), fingerprint, train_step, cursor log, a logged step in ten.

On a machine that is not idle, trust the CPU times and set OMP_WAIT_POLICY=passive: spinning threads count as CPU time.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.common import circumstances, command_line, publish
from titanlite.config import (
    ActivationCheckpointConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    JobConfig,
    LrSchedulerConfig,
    OptimizerConfig,
    TrainingConfig,
)
from titanlite.model.attention import Documents, build_documents
from titanlite.model.documents import labels
from titanlite.model.transformer import Llama, num_parameters
from titanlite.train.run import Run
from titanlite.trainer import param_dtype

BOUND = 1.05
THREADS = 2
ROWS, SEQ_LEN = 2, 2048
WARMUP_STEPS = 3


class BareModel(nn.Module):
    """Model, head and loss in one module, so that one root unit of FSDP2 holds them."""

    def __init__(self, llama: Llama) -> None:
        super().__init__()
        self.llama = llama

    def forward(self, tokens: Tensor, documents: Documents, targets: Tensor) -> Tensor:
        logits = self.llama.output(self.llama(tokens, documents))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class BareLoop:
    """The loop to compare with. It starts from the weights of `like`, which titanlite built and initialised."""

    def __init__(self, config: Config, like: Llama, eos_id: int, backend: str) -> None:
        self.config, self.eos_id, self.backend = config, eos_id, backend
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=param_dtype(config, "cpu"))
        with torch.device("meta"):
            self.model = BareModel(Llama(config.model))
        for block in self.model.llama.layers.values():
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.model, mesh=mesh, mp_policy=policy)
        self.model.to_empty(device="cpu")
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), like.parameters(), strict=True):
                assert isinstance(mine, DTensor)
                assert isinstance(theirs, DTensor)
                mine.to_local().copy_(theirs.to_local())
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def step(self, rows: Tensor) -> Tensor:
        tokens, targets = rows[:, :-1], labels(rows, self.eos_id)
        loss = self.model(tokens, build_documents(tokens, self.eos_id, self.backend), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.training.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


@dataclass(frozen=True)
class Seconds:
    """Wall and CPU time (of all threads of the process) of something that was done."""

    wall: float
    cpu: float

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)


def timed(do: Callable[[], Any]) -> tuple[Any, Seconds]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = do()
    return result, Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def benchmark_config(folder: str, steps: int) -> Config:
    """titanlite's defaults but for what would compare apples with pears."""
    return Config(
        job=JobConfig(dump_folder=folder),
        data=DataConfig(num_workers=0, prefetch=0),  # no loader thread that runs in the other side's time
        training=TrainingConfig(
            steps=WARMUP_STEPS + steps, seq_len=SEQ_LEN, local_batch_size=ROWS, global_batch_size=ROWS
        ),
        optimizer=OptimizerConfig(weight_decay=0.0),  # titanlite decays matrices only, the bare loop has one group
        lr_scheduler=LrSchedulerConfig(decay_ratio=0.0),
        activation_checkpoint=ActivationCheckpointConfig(mode="none"),
        checkpoint=CheckpointConfig(enable=False),
    )


def measure(steps: int) -> tuple[dict[str, list[Seconds]], Config]:
    """Times of `steps` counted steps by side."""
    times: dict[str, list[Seconds]] = {"bare loop": [], "train_step": [], "whole step": []}
    with TemporaryDirectory() as folder:
        config = benchmark_config(folder, steps)
        with Run(config) as run:
            trainer = run.trainer
            bare = BareLoop(config, trainer.model, run.tokenizer.eos_id, trainer.backend)
            for number in range(WARMUP_STEPS + steps):
                step, load = timed(run.next_step)
                if number % 2:
                    loss, bare_time = timed(lambda: bare.step(step.batch.rows))  # noqa: B023  called at once
                result, own_time = timed(lambda: trainer.train_step(step.batch, step.num_targets))  # noqa: B023
                if number % 2 == 0:
                    loss, bare_time = timed(lambda: bare.step(step.batch.rows))  # noqa: B023
                _, book = timed(lambda: run.finish_step(step, result))  # noqa: B023
                torch.testing.assert_close(result.loss, loss, rtol=1e-4, atol=0)  # both do the same work
                if number >= WARMUP_STEPS:
                    times["bare loop"].append(bare_time)
                    times["train_step"].append(own_time)
                    times["whole step"].append(load + own_time + book)
    return times, config


def ratio(times: list[float], base: list[float]) -> str:
    """Median of the ratios step by step, with the quartiles: what else the machine does hits both sides of a pair."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(times, base, strict=True)], n=4)
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def table(times: dict[str, list[Seconds]]) -> str:
    lines = [
        "| | wall ms, median | CPU ms, median | tokens/s | wall / bare (quartiles) | CPU / bare (quartiles) |",
        "|---|---|---|---|---|---|",
    ]
    bare = times["bare loop"]
    for side, seconds in times.items():
        wall, cpu = [s.wall for s in seconds], [s.cpu for s in seconds]
        lines.append(
            f"| {side} | {statistics.median(wall) * 1e3:.1f} | {statistics.median(cpu) * 1e3:.1f}"
            f" | {ROWS * SEQ_LEN / statistics.median(wall):,.0f}"
            f" | {ratio(wall, [s.wall for s in bare])} | {ratio(cpu, [s.cpu for s in bare])} |"
        )
    return "\n".join(lines)


def report(times: dict[str, list[Seconds]], config: Config, arguments: argparse.Namespace) -> str:
    model = config.model
    pairs = list(zip(times["train_step"], times["bare loop"], strict=True))
    wall = statistics.median(own.wall / bare.wall for own, bare in pairs)
    cpu = statistics.median(own.cpu / bare.cpu for own, bare in pairs)
    policy = os.environ.get("OMP_WAIT_POLICY")
    command = f"python -m benchmarks.step_overhead --steps {arguments.steps}"
    if policy:
        command = f"OMP_WAIT_POLICY={policy} {command}"
    verdict = "met" if wall <= BOUND else "missed"
    return f"""# Step overhead over a bare FSDP2 loop, CPU, {date.today()}

{table(times)}

`train_step` takes {wall:.3f} of the bare loop's wall time (bound {BOUND:.2f}: {verdict}) and {cpu:.3f} of its CPU time.
{arguments.steps} counted steps a side after {WARMUP_STEPS} of warm-up, in turn; who goes first alternates.

- Work: {num_parameters(model) / 1e6:.1f} M parameters (dim {model.dim}, {model.n_layers} layers),
  {ROWS} rows of {SEQ_LEN} = {ROWS * SEQ_LEN} tokens a step, packed documents of the built-in corpus, sdpa attention,
  float32, no activation checkpointing, no compile, one rank. The losses of both sides agree at every step (1e-4).
{circumstances(command, f", {THREADS} threads used")}"""


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=60, help="counted steps of each side (default 60)")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error(f"--steps {arguments.steps}: quartiles need 2 or more")
    torch.set_num_threads(THREADS)
    times, config = measure(arguments.steps)
    text = report(times, config, arguments)
    publish(text, arguments.out)


if __name__ == "__main__":
    main()
