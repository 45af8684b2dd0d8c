"""What a run says: every step to the cursor log, logged steps to console, metrics and TensorBoard, and its summary.

It also reads, at the same moments, whether loss and gradients are finite, because both wait for the device.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titanlite.config import MetricsConfig, TrainingConfig
from titanlite.log import logger
from titanlite.run.agreement import RunFailed
from titanlite.run.metrics import RunLog, StepMetrics, Throughput, peak_flops, peak_memory_gib

_MEAN_STEPS = 10


@dataclass(frozen=True)
class StepReport:
    """A step that was made."""

    number: int
    tokens: int
    """Target tokens trained by then."""
    loss: Tensor
    """On the device, where nobody waits for it before it is logged; so is the norm."""
    grad_norm: Tensor
    lr: float
    batch_fingerprint: str
    num_documents: int
    """Pieces of documents in the rows of all ranks."""
    cursor: Mapping[str, Any]
    """Of the stream, after the step."""
    ledgers: Mapping[str, Mapping[str, int]]
    """By source, the counts of data/stream.py's Ledger since step 0."""
    epochs: Mapping[str, float]
    """Begun, by source."""


class Report:
    """Of a run, from a step on. Every rank has one; rank 0's writes. A context."""

    def __init__(
        self,
        folder: Path,
        metrics: MetricsConfig,
        training: TrainingConfig,
        *,
        step: int,
        tokens: int,
        skipped_before: int,
        bad_steps: Callable[[], tuple[int, int]],
        flops_per_token: float,
        device: torch.device,
    ) -> None:
        """step, tokens: made and trained by earlier processes. skipped_before: updates that they left out.

        bad_steps: as optim.NonFiniteGuard.read.
        """
        self._folder, self._metrics, self._training, self._device = folder, metrics, training, device
        self._start_step, self._start_tokens, self._start_time = step, tokens, time.perf_counter()
        self._bad_steps, self._skipped_before, self._skipped = bad_steps, skipped_before, skipped_before
        self._fingerprints: dict[int, str] = {}  # of the steps since the last logged one, to name a bad one
        self._last: StepReport | None = None
        self._losses: deque[Tensor] = deque(maxlen=_MEAN_STEPS)  # on the device
        self._stack = ExitStack()
        self.throughput = Throughput(
            step=step,
            tokens=tokens,
            num_devices=dist.get_world_size(),
            flops_per_step=flops_per_token * training.global_batch_size * training.seq_len,
            peak_flops=peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None,
        )
        self._run_log = None
        if dist.get_rank() == 0:
            run_log = RunLog(
                folder,
                start_step=step,
                total_steps=training.steps,
                enable_tensorboard=metrics.enable_tensorboard,
            )
            self._run_log = self._stack.enter_context(run_log)

        self.sampled_step = step
        """The last step with samples, or the one that this process goes on from."""
        last = [self._run_log.validated_step if self._run_log is not None else 0]
        dist.broadcast_object_list(last, src=0)
        self.validated_step = last[0]
        """The last step whose validation the log has, 0: none; the same on every rank."""

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            self._stack.close()
        except OSError as failure:  # what they still held cannot be written
            if error is None:
                raise RunFailed(f"the logs cannot be closed: {failure}") from failure

    def step(self, made: StepReport) -> None:
        """Raises as `check_finite` does, on all ranks, and OSError on rank 0 where its files cannot be written."""
        number, training = made.number, self._training
        self._fingerprints[number], self._last = made.batch_fingerprint, made
        self._losses.append(made.loss)
        logged = number == 1 or number % self._metrics.log_freq == 0 or number == training.steps
        metrics = self._measure(made) if logged else None
        if self._run_log is not None:
            self._run_log.step(number, made.batch_fingerprint, made.cursor)
            if metrics is not None:
                per_row = made.num_documents / training.global_batch_size
                self._run_log.log(metrics, documents_per_row=per_row, **_data_scalars(made))
        if logged:
            self.check_finite()
            self._fingerprints.clear()

    def _measure(self, made: StepReport) -> StepMetrics:
        """The numbers of a logged step. Waits for the device; collective."""
        loss, grad_norm = made.loss.item(), made.grad_norm.item()
        speed = self.throughput.read(made.number, made.tokens)
        # The rank that waits longest, and the one that needs most memory, are the ones to know of.
        worst = torch.tensor([speed.data_wait_fraction, peak_memory_gib(self._device)])
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        data_wait_fraction, peak_memory = worst.tolist()
        return StepMetrics(
            step=made.number,
            loss=loss,
            mean_loss=self._mean_loss(),
            grad_norm=grad_norm,
            lr=made.lr,
            tokens=made.tokens,
            tokens_per_second=speed.tokens_per_second,
            tokens_per_second_per_device=speed.tokens_per_second_per_device,
            mfu=speed.mfu,
            data_wait_fraction=data_wait_fraction,
            step_time_seconds=speed.step_time_seconds,
            peak_memory_gib=peak_memory,
            batch_fingerprint=made.batch_fingerprint,
        )

    def _mean_loss(self) -> float:
        """Over the last steps. Waits for the device."""
        return torch.stack(tuple(self._losses)).mean().item()

    def check_finite(self) -> int:
        """The number of updates left out so far. Waits for the device; the same on every rank.

        Raises RunFailed, naming the first bad step, where the config says that the run must stop.
        """
        training = self._training
        first, num_bad = self._bad_steps()
        skipped = self._skipped_before + num_bad
        if skipped == self._skipped:  # none since the last time
            return skipped
        self._skipped = skipped
        batch = f" (batch {self._fingerprints[first]})" if first in self._fingerprints else ""
        what = f"the loss or gradient of step {first}{batch} is not finite"
        if training.on_nonfinite == "stop":
            raise RunFailed(f"{what}: no update was made from that step on, and no checkpoint saved")
        if skipped > training.max_skipped_steps:
            raise RunFailed(
                f"{what}, and {skipped} updates were left out, more than training.max_skipped_steps ="
                f" {training.max_skipped_steps}"
            )
        logger.warning("%s; updates left out so far: %d", what, skipped)
        return skipped

    def fall_silent(self) -> None:
        """Write nothing more: the files are another job's now."""
        self._run_log = None

    def validated(self, line: str, record: Mapping[str, Any]) -> None:
        """Raises OSError, on rank 0, where its files cannot be written; so does `samples`."""
        self.validated_step = record["step"]
        if self._run_log is not None:
            self._run_log.validated(line, record)

    def samples(self, step: int, texts: Mapping[str, str]) -> None:
        """Continuations by prompt, of the model after a step."""
        self.sampled_step = step
        if self._run_log is not None:
            self._run_log.samples(step, texts)

    def saved(self, step: int, seconds: float) -> None:
        """A save held training up for so long."""
        if self._run_log is not None:
            self._run_log.scalars(step, checkpoint_seconds=seconds)

    def summary(self, ledgers: Mapping[str, Mapping[str, int]] | None, checkpoint: str) -> str | None:
        """The end-of-run text; None where this process made no step. Waits for the device.

        ledgers: of each source, where they are not those of the last step.
        """
        if self._last is None:
            return None
        seconds = time.perf_counter() - self._start_time
        return summary(
            self._folder,
            start_step=self._start_step,
            step=self._last.number,
            loss=self._last.loss.item(),
            mean_loss=self._mean_loss(),
            epochs=self._last.epochs,
            wall_seconds=seconds,
            tokens_per_second=(self._last.tokens - self._start_tokens) / seconds,
            ledgers=self._last.ledgers if ledgers is None else ledgers,
            checkpoint=checkpoint,
        )


def _data_scalars(made: StepReport) -> dict[str, float]:
    """What TensorBoard shows of the data: see the table in metrics.py."""
    total = _total(made.ledgers)
    scalars: dict[str, float] = {
        "bad_records": total["bad_records"],
        "padding_fraction": total["padding"] / _row_tokens(total),
        "cut_fraction": total["cut"] / max(1, total["fitting"]),
    }
    for name, counts in made.ledgers.items():
        scalars |= {f"source/{name}/{key}": count for key, count in counts.items()}
        scalars[f"source/{name}/epoch"] = made.epochs[name]
    return scalars


def _total(ledgers: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {key: sum(ledger[key] for ledger in ledgers.values()) for key in next(iter(ledgers.values()))}


def _row_tokens(ledger: Mapping[str, int]) -> int:
    return ledger["targets"] + ledger["document_first"] + ledger["padding"]


def summary(
    folder: str | Path,
    *,
    start_step: int,
    step: int,
    loss: float,
    mean_loss: float,
    epochs: Mapping[str, float],
    wall_seconds: float,
    tokens_per_second: float,
    ledgers: Mapping[str, Mapping[str, int]],
    checkpoint: str,
) -> str:
    """The end-of-run report. `checkpoint`: path of the last one, or why there is none.

    `ledgers` hold the counts of data/stream.py's Ledger since step 0, by source; wall_seconds and tokens_per_second
    speak of this process alone.
    """
    resumed = f" (resumed after step {start_step:,})" if start_step else ""
    total = _total(ledgers)
    rows = {
        "steps": f"{step:,}{resumed}",
        "final loss": f"{loss:.4f}, mean of the last {_MEAN_STEPS} steps {mean_loss:.4f}",
        "trained": f"{total['targets']:,} target tokens of {total['document_first']:,} documents"
        + (f", {next(iter(epochs.values())):.3f} epochs" if len(epochs) == 1 else ""),
        "tokens read": _ledger_line(total),
        "packing": f"{total['cut']:,} of {total['fitting']:,} documents that fit into a row were cut;"
        f" {total['padding']:,} pads ({total['padding'] / _row_tokens(total):.2%})",
        **{
            f"  {name}": f"{epochs[name]:.3f} epochs, {ledger['targets'] / total['targets']:.2%} of the targets;"
            f" {_ledger_line(ledger)}"
            for name, ledger in ledgers.items()
            if len(ledgers) > 1
        },
        "wall time": f"{timedelta(seconds=round(wall_seconds))}, {tokens_per_second:,.0f} tokens/s",
        "checkpoint": checkpoint,
        "metrics": str(Path(folder) / "metrics.jsonl"),
        "dashboard": f"tensorboard --logdir {Path(folder) / 'tb'}",
    }
    return "\n".join(f"  {name:<12} {value}" for name, value in rows.items())


def _ledger_line(ledger: Mapping[str, int]) -> str:
    ended = " (the data ended)" if ledger["dropped"] else ""
    held_out = f", {ledger['held_out']:,} documents held out" if ledger["held_out"] else ""
    return (
        f"{ledger['tokens_read']:,} = {ledger['targets']:,} targets + {ledger['document_first']:,} document-first"
        f" + {ledger['carried']:,} carried + {ledger['dropped']:,} dropped{ended};"
        f" {ledger['bad_records']:,} bad records left out{held_out}"
    )
