"""What a run says about itself: the console line, metrics.jsonl, cursor.jsonl, TensorBoard, throughput and memory.

`RunLog` owns these files of the run folder and belongs to rank 0 alone; `Throughput` times the steps of its own rank.
Nothing here talks to other ranks or reads a device tensor: every number arrives as a plain value, already reduced.

TensorBoard tags, over the optimiser step (the names in metrics.jsonl are the same; * is in TensorBoard only):

    loss                          nats per target token of the global batch
    mean_loss                     mean of loss over the last ten steps (of this process): single batches are noisy
    grad_norm                     2-norm of the whole gradient, before clipping
    lr                            learning rate that the step used
    tokens                        target tokens trained since step 0
    tokens_per_second             target tokens per second of training time, all devices (_per_device: divided by them)
    mfu                           model FLOPs per second / dense bf16 peak of the devices; absent where that is unknown
    data_wait_fraction            share of the step time spent waiting for the loader, of the rank that waits longest
    step_time_seconds             training time of a step: wall time without saves
    peak_memory_gib               see `peak_memory_gib`; of the rank that needs most
    * checkpoint_seconds          time for which a save held the training up
    * documents_per_row           pieces of documents in a row of the step's batch
    * bad_records                 left out so far
    * padding_fraction            share of the tokens of all rows so far that are pads; see data.packing
    * cut_fraction                share of the documents so far that a row could hold and that lie in two
    validation_loss               nats per target token of the validation set: the sum over all of it / its targets
    perplexity                    exp(validation_loss)
    bits_per_byte                 that sum / ln 2 / UTF-8 bytes of the text that its targets stand for (an eos is a
                                  target and stands for none): what text costs, whatever the tokenizer
    validation_seconds            time that the validation took
    * source/NAME/...             of each source: epoch, as a fraction, and the counts of its ledger (data/stream.py):
                                  tokens_read = targets + document_first + carried + dropped; padding, bytes, ...
"""

import json
import math
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from titanlite.files import replacing
from titanlite.log import logger


@dataclass(frozen=True)
class StepMetrics:
    """A line of metrics.jsonl, in this order; the units stand in the module's table."""

    step: int
    loss: float
    mean_loss: float
    grad_norm: float
    lr: float
    tokens: int
    tokens_per_second: float
    tokens_per_second_per_device: float
    mfu: float | None
    data_wait_fraction: float
    step_time_seconds: float
    peak_memory_gib: float
    batch_fingerprint: str


class RunLog(AbstractContextManager["RunLog"]):
    """Writes the logs of a run that goes on after `start_step`; only rank 0 makes one.

    Entries of later steps, left by an earlier life of the run, are removed, so that each step appears once in every
    log. A line reaches the operating system in the call that writes it: kill -9 loses at most the line being written.
    """

    def __init__(self, folder: str | Path, *, start_step: int, total_steps: int, enable_tensorboard: bool) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._total_steps = total_steps
        self._stack = ExitStack()
        self.validated_step = _last_validated(folder / "metrics.jsonl", start_step)
        """The last one, up to start_step, that the log has a validation of; 0: none."""
        self._metrics = self._stack.enter_context(_open_after(folder / "metrics.jsonl", start_step))
        self._cursors = self._stack.enter_context(_open_after(folder / "cursor.jsonl", start_step))
        self._tensorboard = None
        if enable_tensorboard:
            _wait_for_a_new_second(folder / "tb")
            self._tensorboard = SummaryWriter(str(folder / "tb"), purge_step=start_step + 1)
            self._stack.callback(self._tensorboard.close)
        # disable=None: off where stderr is no terminal
        self._bar = tqdm(initial=start_step, total=total_steps, unit="step", dynamic_ncols=True, disable=None)
        self._stack.callback(self._bar.close)
        if not self._bar.disable:
            self._stack.enter_context(logging_redirect_tqdm([logger]))  # log lines go above the bar

    def step(self, step: int, batch_fingerprint: str, cursor: Mapping[str, Any]) -> None:
        """Every step: append the stream's cursor after this step to cursor.jsonl and move the bar."""
        self._cursors.write(_json_line({"step": step, "batch_fingerprint": batch_fingerprint, **cursor}))
        self._bar.update(step - self._bar.n)

    def log(self, metrics: StepMetrics, **scalars: float) -> None:
        """Every logged step: console, metrics.jsonl and TensorBoard; `scalars` go to TensorBoard only."""
        logger.info(console_line(metrics, self._total_steps))
        self._metrics.write(_json_line(asdict(metrics)))
        numbers = {k: v for k, v in asdict(metrics).items() if isinstance(v, int | float) and k != "step"}
        self.scalars(metrics.step, **numbers, **scalars)

    def validated(self, line: str, record: Mapping[str, Any]) -> None:
        """Console, metrics.jsonl and TensorBoard; record: the step first, then what was found."""
        logger.info(line)
        self._metrics.write(_json_line(record))
        numbers = {k: v for k, v in record.items() if isinstance(v, float)}
        self.scalars(record["step"], **numbers)

    def samples(self, step: int, texts: Mapping[str, str]) -> None:
        """TensorBoard only: continuations by prompt."""
        if self._tensorboard is not None:
            for number, (prompt, text) in enumerate(texts.items(), 1):
                lines = f"**{prompt}**{text}".splitlines()  # Markdown; four spaces are a text as it stands
                self._tensorboard.add_text(f"sample/{number}", "\n".join(f"    {line}" for line in lines), step)
            self._tensorboard.flush()

    def scalars(self, step: int, **values: float) -> None:
        """TensorBoard only: values that belong to a step, such as the checkpoint_seconds of a save after it."""
        if self._tensorboard is not None:
            for tag, value in values.items():
                self._tensorboard.add_scalar(tag, value, step)
            self._tensorboard.flush()  # its own queue could hold them for two minutes

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def console_line(metrics: StepMetrics, total_steps: int) -> str:
    """One aligned line: columns keep their places from step to step."""
    mfu = "-" if metrics.mfu is None else f"{metrics.mfu:.1%}"
    return (
        f"step {metrics.step:>{len(str(total_steps))}}/{total_steps}  loss {metrics.loss:7.4f}"
        f"  mean {metrics.mean_loss:7.4f}  grad_norm {metrics.grad_norm:8.3f}  lr {metrics.lr:.2e}"
        f"  {metrics.tokens_per_second:>10,.0f} tok/s  mfu {mfu:>5}  wait {metrics.data_wait_fraction:>5.1%}"
        f"  mem {metrics.peak_memory_gib:6.2f} GiB"
        f"  batch {metrics.batch_fingerprint}"
    )


def _json_line(record: Mapping[str, Any]) -> str:
    """JSON has no NaN and no infinity: they become null here; the console and TensorBoard show which it was."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _open_after(path: Path, start_step: int) -> TextIO:
    """Open a log for appending, line-buffered (one write per line), without its lines of later steps.

    A line that cannot be read (a write cut off by a kill or a full disk) is left out with a warning. The shorter file
    replaces the old one in one rename: a kill at any moment leaves one or the other.
    """
    if path.exists():
        with open(path, "rb") as old, replacing(path) as new:
            for number, line in enumerate(old, 1):
                try:
                    keep = json.loads(line)["step"] <= start_step
                except (ValueError, TypeError, KeyError):  # ValueError: bad JSON and bad UTF-8
                    keep = False
                    logger.warning("%s, line %d: left out, it was not written whole", path, number)
                if keep:
                    new.write(line.rstrip(b"\n") + b"\n")
    return open(path, "a", buffering=1, encoding="utf-8")


def _last_validated(path: Path, start_step: int) -> int:
    steps = [0]
    if path.exists():
        for line in path.read_bytes().splitlines():
            if b'"validation_loss"' in line:
                with suppress(ValueError, KeyError, TypeError):
                    steps.append(json.loads(line)["step"])
    return max(step for step in steps if step <= start_step)


def _wait_for_a_new_second(folder: Path) -> None:
    """TensorBoard reads event files in the order of their names, whose first part is the second they were made in: of
    two made in one second, the later one might be read first, and its steps purged instead of those it replaces."""
    while any(folder.glob(f"*.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.02)


@dataclass(frozen=True)
class Rates:
    """Speed over a window of steps: the fields of `StepMetrics` with these names."""

    tokens_per_second: float
    tokens_per_second_per_device: float
    mfu: float | None
    data_wait_fraction: float
    step_time_seconds: float


@dataclass
class Stopwatch:
    """Seconds spent in its `running` blocks."""

    clock: Callable[[], float] = time.perf_counter
    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        start = self.clock()
        try:
            yield
        finally:
            self.seconds += self.clock() - start


class Throughput:
    """Times the steps of this rank between logged ones. Times are the host's: read after a device sync.

    `tokens` are cumulative target tokens (the loader's ledger counts them without asking the device), flops_per_step
    the model FLOPs of a step on all devices together, peak_flops (FLOP/s, None: unknown) those of one device.
    """

    def __init__(
        self,
        *,
        step: int,
        tokens: int,
        num_devices: int,
        flops_per_step: float,
        peak_flops: float | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._num_devices, self._flops_per_step, self._peak_flops = num_devices, flops_per_step, peak_flops
        self._clock = clock
        self._open_window(step, tokens)

    def _open_window(self, step: int, tokens: int) -> None:
        self._step, self._tokens = step, tokens
        self._data, self._pauses = Stopwatch(self._clock), Stopwatch(self._clock)
        self._start = self._clock()

    def waiting_for_data(self) -> AbstractContextManager[None]:
        """Around `next(loader)`."""
        return self._data.running()

    @contextmanager
    def paused(self) -> Iterator[Stopwatch]:
        """Around work that is no training, such as a save: it does not count as step time; yields its stopwatch."""
        watch = Stopwatch(self._clock)
        with self._pauses.running(), watch.running():
            yield watch

    def read(self, step: int, tokens: int) -> Rates:
        """Speed since the last call (at first: since the start) to the end of `step`; opens the next window."""
        seconds = self._clock() - self._start - self._pauses.seconds
        steps, per_second = step - self._step, (tokens - self._tokens) / seconds
        flops_per_device = self._flops_per_step * steps / seconds / self._num_devices
        rates = Rates(
            tokens_per_second=per_second,
            tokens_per_second_per_device=per_second / self._num_devices,
            mfu=None if self._peak_flops is None else flops_per_device / self._peak_flops,
            data_wait_fraction=self._data.seconds / seconds,
            step_time_seconds=seconds / steps,
        )
        self._open_window(step, tokens)
        return rates


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory since the process started, in GiB: tensors on a CUDA device, else all of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts ru_maxrss in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# Dense bf16 tensor-core peak with float32 accumulation, in TFLOP/s; half of the figure "with sparsity" that NVIDIA
# prints. Data sheets: A100, A10, A40, L4, L40S, RTX A6000, RTX 6000 Ada, H100 (SXM 989.4, PCIe, NVL), H200 and
# H200 NVL, HGX B200, GB200 NVL72. GeForce: the Ampere GA102, Ada and RTX Blackwell white papers.
# Whole names, because a variant is another chip: a MIG slice, a laptop GPU or a "4090 D" has another peak.
_PEAK_TFLOPS = {
    r"A[18]00[- ]((SXM4?|PCIE)-)?(40|80)GB( PCIe)?": 312,
    r"H[18]00 (80|96)GB HBM3|H200|GH200 \d+GB?( HBM3e)?": 989.4,
    r"H[18]00 PCIe": 756,
    r"H[12]00 NVL": 835.5,
    r"B200": 2250,
    r"GB200": 2500,
    r"A10": 125,
    r"A40": 149.7,
    r"L4": 121,
    r"L40S": 362,
    r"RTX A6000": 154.8,
    r"RTX 6000 Ada Generation": 364.2,
    r"GeForce RTX 3090": 71,
    r"GeForce RTX 4090": 165.2,
    r"GeForce RTX 5090": 209.5,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device, in FLOP/s, by the name that torch.cuda.get_device_name gives; None when unknown."""
    name = device_name.removeprefix("NVIDIA ")
    for pattern, tflops in _PEAK_TFLOPS.items():
        if re.fullmatch(pattern, name):
            return tflops * 1e12
    return None


def tokenizing_share(flops_per_token: float, num_cores: int, device_type: str) -> float:
    """The share of this host's cores that it would take to tokenise the whole stream on each of its ranks; 0: unknown.

    At 2.5 million tokens per second and core, and training at half of the devices' peak.
    """
    peak = peak_flops(torch.cuda.get_device_name()) if device_type == "cuda" else None
    if peak is None:
        return 0.0
    tokens_per_second = dist.get_world_size() * 0.5 * peak / flops_per_token
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return tokens_per_second * ranks_here / 2.5e6 / num_cores
