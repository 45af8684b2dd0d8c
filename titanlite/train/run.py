"""One training job: what the loop in train.py needs, opened in order, resumed, and closed in order.

It knows the run folder and the other ranks; it does not know how a step is computed (trainer.py does).
"""

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from titanlite.checkpoint import Checkpointer, CheckpointError, LostFolder, Meta
from titanlite.config import Config, diff, dump_toml
from titanlite.data.feed import EndOfData
from titanlite.data.loader import Batch
from titanlite.files import write_json
from titanlite.loading import Found, decide_start
from titanlite.log import logger
from titanlite.model.selfcheck import check_starts
from titanlite.model.transformer import num_parameters
from titanlite.opening import compare_data, open_data
from titanlite.run.agreement import PeerLost, RunFailed, agree, agreed, describe_environment
from titanlite.run.folder import RunFolder
from titanlite.run.joining import MARGIN_SECONDS, SAVING_SECONDS, Membership
from titanlite.run.log import Report
from titanlite.run.profiling import Profiling
from titanlite.run.watchdog import Watchdog
from titanlite.trainer import StepResult, Trainer
from titanlite.validation import open_validation


@dataclass(frozen=True)
class Step:
    """The next step's batch of this rank, and what all ranks know about the whole global batch."""

    num_targets: int
    num_documents: int
    fingerprint: str
    batch: Batch


class Job:
    """The open parts of a run. Use as a context; every rank makes one, and all of its methods are collective."""

    def __init__(self, config: Config, watchdog: Watchdog | None = None) -> None:
        self.config = config
        self.watchdog = watchdog or Watchdog(config.comm.grace_seconds)
        self.stop, self._phase = self.watchdog.stop, self.watchdog.mark
        self.folder = Path(config.job.dump_folder)
        self._run_folder = RunFolder(self.folder, self.watchdog)
        self.set_status = self._run_folder.set_status
        self._stack = ExitStack()
        self._saver: Checkpointer | None = None
        self._problem: str | None = None  # that this rank met after its last exchange with the others
        self._ending = "finished"
        self._data_ended: EndOfData | None = None
        self._saved_step = 0  # before the first step there is nothing to save: the next start begins again
        self._failed_saves = 0
        self._warm = False  # a step was made in this process

    def __enter__(self) -> "Job":
        try:
            self._open()
        except BaseException as error:
            self._close(error)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self._close(error)

    def _close(self, error: BaseException | None) -> None:
        # An agreed error is the same on every rank; after another one, a peer may still wait in a collective.
        agreed_on = error is None or isinstance(error, (RunFailed, CheckpointError))
        gone = "" if agreed_on or error is None else self.watchdog.explain(error)
        if agreed_on and self._saver is not None:
            self._phase("ending", at_least=SAVING_SECONDS)
            try:
                self._saver.wait()  # an earlier save may be on its way to the disk: it needs the group and the claim
            except CheckpointError as failure:
                logger.warning("%s", failure)
        if error is not None:
            step = self.trainer.step if hasattr(self, "trainer") else None
            with suppress(OSError):  # a full disk must not keep the error itself from being told
                self.set_status("failed", step, reason=gone or f"{type(error).__name__}: {error}")
        try:
            self._stack.close()
        except OSError as failure:  # rank 0's logs: what they still held cannot be written
            if error is None:
                raise RunFailed(f"the logs cannot be closed: {failure}") from failure
        if agreed_on:
            if hasattr(self, "_membership"):
                self._membership.leave()
            self.watchdog.close()
        if gone:
            raise PeerLost(f"{gone}; the next start goes on from the last checkpoint") from error

    def _open(self) -> None:
        config = self.config
        if config.training.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self._membership = Membership(config, self.watchdog)
        self.mesh = self._membership.mesh
        self._phase("claiming the run folder", at_least=60)
        self._stack.enter_context(self._run_folder.held())
        self.set_status("starting", None)
        checkpoint = config.checkpoint
        # Also without saving: init_from reads through it.
        self.checkpointer = self._saver = Checkpointer(
            str(self.folder / "checkpoint"),
            keep_latest_k=checkpoint.keep_latest_k,
            async_save=checkpoint.async_mode == "async",
            timeout=timedelta(seconds=SAVING_SECONDS + MARGIN_SECONDS),
            fence=self._run_folder.fence,
        )
        self._phase("looking for a checkpoint", at_least=SAVING_SECONDS)
        found = decide_start(config, self.checkpointer)
        if config.job.description:
            logger.info(config.job.description)
        self._open_data(found.meta if found else None)
        self._phase("building the model")
        self._open_trainer()
        self._phase("loading", at_least=SAVING_SECONDS)
        if found:
            self._load(found)
        elif checkpoint.init_from:
            weights = {name: t for name, t in self.trainer.state().items() if name.startswith("model.")}
            self.checkpointer.load(checkpoint.init_from, weights, prefix="model.")
            self.trainer.begin_average()
        self._phase("opening the logs")
        self._open_logs(found.meta.skipped_steps if found else 0)
        self._validate()  # the last process may have left it

    def _open_data(self, meta: Meta | None) -> None:
        self._membership.prepare()
        cursor = meta.cursor if meta else None
        self.tokenizer, self.loader = open_data(self.config, self.mesh, self.folder, cursor, self.watchdog)
        self._stack.callback(self.loader.close)
        self._batches = iter(self.loader)  # it begins to read
        self._validation = open_validation(self.config, self.mesh, self.tokenizer, self.loader.opened, self.watchdog)
        self._membership.start()
        self._phase("comparing data")
        compare_data(self.tokenizer, self.loader.corpus)
        self.cursor, self.ledger = cursor, meta.ledger if meta else {}

    def _open_trainer(self) -> None:
        with agreed():
            self.trainer = Trainer(self.config, self.mesh)
        self.trainer.on_micro_batch = lambda: self._phase("forward, backward, update")
        training = self.config.training
        rows = training.global_batch_size // self.mesh.dp_degree
        logger.info(
            "model: %s parameters, attention = %s, %s on %s; a rank takes %d rows of %d tokens a step, %d at a time",
            f"{num_parameters(self.config.model):,}",
            self.trainer.backend,
            self.mesh.describe,
            self.mesh.device.type,
            rows,
            training.seq_len,
            min(rows, training.local_batch_size),
        )

    def _load(self, found: Found) -> None:
        meta = found.meta
        self.checkpointer.load(found.path, self.trainer.state())
        self.trainer.step = self._saved_step = meta.step
        self.trainer.trained_targets = meta.trained_targets
        if meta.rng:
            torch.set_rng_state(torch.frombuffer(bytearray.fromhex(meta.rng), dtype=torch.uint8))
        for line in diff(meta.config, self.config):
            logger.warning("changed since the checkpoint: %s", line)

    def _open_logs(self, skipped_before: int) -> None:
        with agreed():
            if dist.get_rank() == 0:
                (self.folder / "config.toml").write_text(dump_toml(self.config))
                write_json(self.folder / "env.json", describe_environment())
                write_json(self.folder / "corpus.json", self.loader.corpus)
            self.profiling = Profiling(
                self.config.profiling,
                folder=self.folder,
                rank=dist.get_rank(),
                device=self.mesh.device,
                start_step=self.trainer.step,
            )
            self.report = Report(self.config, self.trainer, skipped_before)
        self._stack.enter_context(self.profiling)
        self._stack.enter_context(self.report)
        self.set_status("running", self.trainer.step)

    def next_step(self) -> Step | None:
        """The next step's data; None where there is none, because any rank was asked to stop or the data ended.

        A data error on any rank is raised on all.
        """
        batch, problem = None, self._problem
        self.watchdog.mark("waiting for its data", self.trainer.step + 1)
        with self.report.throughput.waiting_for_data():
            try:
                batch = next(self._batches, None)
                self._data_ended = self.loader.ended  # at the same step on every rank: it follows from the data alone
            except Exception as error:  # of any kind: the other ranks must hear of it instead of waiting
                problem = str(error) or repr(error)
        shares = torch.zeros(5, dtype=torch.int64)
        shares[3], shares[4] = bool(self.watchdog.stop_asked), problem is not None
        if batch is not None and self.mesh.tp.get_local_rank() == 0:
            shares[0] = batch.num_targets
            shares[1] = batch.num_documents
            shares[2] = torch.tensor(batch.fingerprint_part, dtype=torch.uint64).view(torch.int64)
        self._phase("comparing data")
        dist.all_reduce(shares)  # on the CPU: the step's facts are known to every host, and no device waits
        num_targets, num_documents, fingerprint, stop, problems = shares.tolist()
        if problems:
            agree(problem)
        if stop:
            told = self.watchdog.stop_asked or "another rank was signalled"
            logger.warning("%s: saving a checkpoint and stopping", told)
            self._ending = "preempted"
            return None
        if self._data_ended is not None:
            logger.warning("%s: this is the last step, %d", self._data_ended, self.trainer.step)
            return None
        assert batch is not None
        if not self._warm:
            with agreed():
                check_starts(batch.starts, batch.begins)
            self.watchdog.started()
        return Step(num_targets, num_documents, f"{fingerprint % 2**64:016x}", batch)

    def finish_step(self, step: Step, result: StepResult) -> None:
        """Book the step: cursor, logs at logged steps, a checkpoint where one is due."""
        number, config = self.trainer.step, self.config
        self._phase("logging")
        self.cursor, self.ledger = step.batch.cursor, step.batch.ledger
        if lost := self._run_folder.lost:
            self._problem = lost
            self.report.fall_silent()
        try:
            self.report.step(result, step.fingerprint, step.batch, num_documents=step.num_documents)
            self.profiling.step()
        except OSError as error:
            self._problem = f"the logs of step {number} cannot be written: {error}"
        self._validate()
        if number % config.checkpoint.interval == 0:
            self._tolerate(self.save)
        if not self._warm:
            self._membership.train()
            self._warm = True

    def _validate(self, at_end: bool = False) -> bool:
        """Where it is due; False where a stop was asked for meanwhile."""
        try:
            return self._validation is None or self._validation.run(self.trainer, self.report, at_end=at_end)
        except OSError as error:
            self._problem = f"the validation of step {self.trainer.step} cannot be written: {error}"
            return True

    def save(self) -> None:
        """Save a checkpoint of the step that was finished last, once."""
        if not self.config.checkpoint.enable or self._saved_step == self.trainer.step:
            return
        skipped = self.report.check_finite()
        self._phase("saving", at_least=SAVING_SECONDS)
        with self.report.throughput.paused() as watch:
            self._tolerate(self.checkpointer.wait)
            self.checkpointer.save(self.trainer.step, self.trainer.state(), self._meta(skipped).to_json())
        self._saved_step = self.trainer.step
        self.report.saved(watch.seconds)

    def _tolerate(self, save: Callable[[], None]) -> None:
        """A failure to save, or of the save that is pending, is only told and counted where the config says so."""
        try:
            save()
        except CheckpointError as error:
            if self.config.checkpoint.on_save_error == "stop" or isinstance(error, LostFolder):
                raise
            self._failed_saves += 1
            self._saved_step = -1  # the last one, of this very step, may have been pending: it is due again
            logger.warning(
                '%s: training goes on (checkpoint.on_save_error = "continue"); failed so far: %d',
                error,
                self._failed_saves,
            )

    def _meta(self, skipped: int) -> Meta:
        return Meta(
            step=self.trainer.step,
            config=asdict(self.config),
            tokenizer=self.tokenizer.fingerprint,
            trained_targets=self.trainer.trained_targets,
            skipped_steps=skipped,
            cursor=self.cursor,
            ledger=self.ledger,
            corpus={key: value for key, value in self.loader.corpus.items() if key != "sources"},  # they name files
            layout=self.mesh.describe,
            rng=bytes(torch.get_rng_state().tolist()).hex(),
        )

    def finish(self) -> None:
        """The end of a run that is finished or preempted: save, wait until it is on disk, say so."""
        if self._ending == "finished" and not self._validate(at_end=True):
            self._ending = "preempted"
        self._phase("ending", at_least=SAVING_SECONDS)
        agree(self._problem)
        state = self._ending
        if state == "preempted" and not self.config.checkpoint.enable:
            raise RunFailed(f"stopped after step {self.trainer.step}; checkpoint.enable = false, so nothing was saved")
        self._tolerate(self.checkpointer.wait)
        self.save()
        self.checkpointer.wait()
        facts: dict[str, Any] = {"failed_saves": self._failed_saves} if self._failed_saves else {}
        if self._data_ended and state == "finished":
            facts["reason"] = str(self._data_ended)
        self.set_status(state, self.trainer.step, **facts)
        path = self.folder / "checkpoint" / f"step-{self.trainer.step:08d}"
        checkpoint = str(path) if self.config.checkpoint.enable else "none (checkpoint.enable = false)"
        ledgers = self._data_ended.ledgers if self._data_ended else None
        logger.info("%s\n%s", state, self.report.summary(ledgers, checkpoint) or "no step was made")
