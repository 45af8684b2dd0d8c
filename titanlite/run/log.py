"""What a job says while it runs: every step to the cursor log, logged steps to console, metrics and TensorBoard.

It also reads, at the same moments, whether loss and gradients are finite, because both wait for the device.
"""

import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titanlite.config import Config
from titanlite.data.loader import Batch
from titanlite.log import logger
from titanlite.model.transformer import flops_per_token
from titanlite.run.agreement import RunFailed
from titanlite.run.metrics import RunLog, StepMetrics, Throughput, peak_flops, peak_memory_gib
from titanlite.trainer import StepResult, Trainer

_MEAN_STEPS = 10


class Report:
    """Reports on a trainer from its current step on. Every rank has one; rank 0's writes. A context."""

    def __init__(self, config: Config, trainer: Trainer, skipped_before: int) -> None:
        self._config, self._trainer = config, trainer
        self._folder = Path(config.job.dump_folder)
        self._skipped_before = skipped_before  # updates left out before the last resume
        self._start_step, self._start_tokens = trainer.step, trainer.trained_targets
        self._start_time = time.perf_counter()
        self._fingerprints: dict[int, str] = {}  # of the steps since the last logged one, to name a bad one
        self._result: StepResult | None = None  # of the last step
        self._losses: deque[Tensor] = deque(maxlen=_MEAN_STEPS)  # on the device, where nobody waits for them
        self._batch: Batch | None = None
        self._skipped = skipped_before
        self._stack = ExitStack()
        training = config.training
        self.throughput = Throughput(
            step=trainer.step,
            tokens=trainer.trained_targets,
            num_devices=dist.get_world_size(),
            flops_per_step=flops_per_token(config.model, training.seq_len)
            * (training.global_batch_size * training.seq_len),
            peak_flops=peak_flops(torch.cuda.get_device_name()) if trainer.mesh.device.type == "cuda" else None,
        )
        self._run_log = None
        if dist.get_rank() == 0:
            self._run_log = self._stack.enter_context(
                RunLog(
                    self._folder,
                    start_step=trainer.step,
                    total_steps=training.steps,
                    enable_tensorboard=config.metrics.enable_tensorboard,
                )
            )

        self.sampled_step = trainer.step
        """The last step with samples, or the one that this process goes on from."""
        last = [self._run_log.validated_step if self._run_log is not None else 0]
        dist.broadcast_object_list(last, src=0)
        self.validated_step = last[0]
        """The last step whose validation the log has, 0: none; the same on every rank."""

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def step(self, result: StepResult, fingerprint: str, batch: Batch, *, num_documents: int) -> None:
        """The trainer made a step; num_documents are the pieces of documents in the rows of all ranks.

        Raises as `check_finite` does, on all ranks, and OSError on rank 0 where its files cannot be written.
        """
        number, config = self._trainer.step, self._config
        self._fingerprints[number], self._result, self._batch = fingerprint, result, batch
        self._losses.append(result.loss)
        logged = number == 1 or number % config.metrics.log_freq == 0 or number == config.training.steps
        metrics = self._measure(result, fingerprint) if logged else None
        if self._run_log is not None:
            self._run_log.step(number, fingerprint, batch.cursor)
            if metrics is not None:
                self._run_log.log(
                    metrics,
                    documents_per_row=num_documents / config.training.global_batch_size,
                    **_data_scalars(batch),
                )
        if logged:
            self.check_finite()
            self._fingerprints.clear()

    def _measure(self, result: StepResult, fingerprint: str) -> StepMetrics:
        """The numbers of a logged step. Waits for the device; collective."""
        number, tokens = self._trainer.step, self._trainer.trained_targets
        loss, grad_norm = result.loss.item(), result.grad_norm.item()
        speed = self.throughput.read(number, tokens)
        # The rank that waits longest, and the one that needs most memory, are the ones to know of.
        worst = torch.tensor([speed.data_wait_fraction, peak_memory_gib(self._trainer.mesh.device)])
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        data_wait_fraction, peak_memory = worst.tolist()
        return StepMetrics(
            step=number,
            loss=loss,
            mean_loss=self._mean_loss(),
            grad_norm=grad_norm,
            lr=result.lr,
            tokens=tokens,
            tokens_per_second=speed.tokens_per_second,
            tokens_per_second_per_device=speed.tokens_per_second_per_device,
            mfu=speed.mfu,
            data_wait_fraction=data_wait_fraction,
            step_time_seconds=speed.step_time_seconds,
            peak_memory_gib=peak_memory,
            batch_fingerprint=fingerprint,
        )

    def _mean_loss(self) -> float:
        """Over the last steps. Waits for the device."""
        return torch.stack(tuple(self._losses)).mean().item()

    def check_finite(self) -> int:
        """The number of updates left out so far. Waits for the device; the same on every rank.

        Raises RunFailed, naming the first bad step, where the config says that the run must stop.
        """
        training = self._config.training
        first, num_bad = self._trainer.guard.read()
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

    def samples(self, texts: Mapping[str, str]) -> None:
        """Continuations by prompt, of the model as it is now."""
        self.sampled_step = self._trainer.step
        if self._run_log is not None:
            self._run_log.samples(self._trainer.step, texts)

    def saved(self, seconds: float) -> None:
        """A save held training up for so long."""
        if self._run_log is not None:
            self._run_log.scalars(self._trainer.step, checkpoint_seconds=seconds)

    def summary(self, ledgers: Mapping[str, Mapping[str, int]] | None, checkpoint: str) -> str | None:
        """The end-of-run text; None where this process made no step. Waits for the device.

        ledgers: of each source, where they are not those of the last batch.
        """
        if self._result is None or self._batch is None:
            return None
        seconds = time.perf_counter() - self._start_time
        return summary(
            self._folder,
            start_step=self._start_step,
            step=self._trainer.step,
            loss=self._result.loss.item(),
            mean_loss=self._mean_loss(),
            epochs=self._batch.epochs,
            wall_seconds=seconds,
            tokens_per_second=(self._trainer.trained_targets - self._start_tokens) / seconds,
            ledgers=self._batch.source_ledgers if ledgers is None else ledgers,
            checkpoint=checkpoint,
        )


def _data_scalars(batch: Batch) -> dict[str, float]:
    """What TensorBoard shows of the data: see the table in metrics.py."""
    ledger = batch.ledger
    row_tokens = ledger["targets"] + ledger["document_first"] + ledger["padding"]
    scalars: dict[str, float] = {
        "bad_records": ledger["bad_records"],
        "padding_fraction": ledger["padding"] / row_tokens,
        "cut_fraction": ledger["cut"] / max(1, ledger["fitting"]),
    }
    for name, counts in batch.source_ledgers.items():
        scalars |= {f"source/{name}/{key}": count for key, count in counts.items()}
        scalars[f"source/{name}/epoch"] = batch.epochs[name]
    return scalars


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
    total = {key: sum(ledger[key] for ledger in ledgers.values()) for key in next(iter(ledgers.values()))}
    row_tokens = total["targets"] + total["document_first"] + total["padding"]
    rows = {
        "steps": f"{step:,}{resumed}",
        "final loss": f"{loss:.4f}, mean of the last {_MEAN_STEPS} steps {mean_loss:.4f}",
        "trained": f"{total['targets']:,} target tokens of {total['document_first']:,} documents"
        + (f", {next(iter(epochs.values())):.3f} epochs" if len(epochs) == 1 else ""),
        "tokens read": _ledger_line(total),
        "packing": f"{total['cut']:,} of {total['fitting']:,} documents that fit into a row were cut;"
        f" {total['padding']:,} pads ({total['padding'] / row_tokens:.2%})",
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
