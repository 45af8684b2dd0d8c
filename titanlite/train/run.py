"""The story of a run: build its parts and resume, get the next step's data, book the step, save, finish.

Every rank makes a Run, and all of its methods are collective. How a step is computed is the trainer's business.
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
from titanlite.config import Config, diff, dump_toml, resolve_degrees
from titanlite.data.cache.writer import available_cores
from titanlite.data.feed import EndOfData
from titanlite.data.loader import Batch, Loader, build_loader
from titanlite.files import read_json, write_json
from titanlite.loading import Found, decide_start, load_tokenizer
from titanlite.log import logger
from titanlite.model.selfcheck import check_starts
from titanlite.model.transformer import flops_per_token, num_parameters
from titanlite.parallel.mesh import build_mesh
from titanlite.run.agreement import RunFailed, agree, agree_on, agreed, describe_environment, summed
from titanlite.run.folder import RunFolder
from titanlite.run.joining import MARGIN_SECONDS, SAVING_SECONDS, Membership
from titanlite.run.log import Report, StepReport
from titanlite.run.metrics import tokenizing_share
from titanlite.run.profiling import Profiling
from titanlite.run.watchdog import Watchdog
from titanlite.trainer import StepResult, Trainer
from titanlite.validation import open_validation, stoppable


@dataclass(frozen=True)
class StepFacts:
    """What a rank knows of the next step; summed over ranks, what all know before they make it."""

    num_targets: int = 0
    num_documents: int = 0
    fingerprint: int = 0
    """Modulo 2^64."""
    stops: int = 0
    """Ranks that were asked to stop."""
    problems: int = 0
    """Ranks that cannot go on."""


@dataclass(frozen=True)
class Step:
    """The next step: this rank's batch, and what it is on all ranks together."""

    batch: Batch
    num_targets: int
    num_documents: int
    """Pieces of documents in the rows."""
    fingerprint: str


class Run:
    """The open parts of a run. A context."""

    def __init__(self, config: Config, watchdog: Watchdog | None = None) -> None:
        self.config = config
        self.watchdog = watchdog or Watchdog(config.comm.grace_seconds)
        self.folder = Path(config.job.dump_folder)
        self._run_folder = RunFolder(self.folder, self.watchdog)
        self._problem: str | None = None  # that this rank met after its last exchange with the others
        self._stopped = False
        self._data_ended: EndOfData | None = None
        self._saved_step = 0  # before the first step there is nothing to save: the next start begins again
        self._failed_saves = 0
        self._warm = False  # a step was made in this process
        self._stack = ExitStack()  # what is to be closed, the last one first

    def __enter__(self) -> "Run":
        with ExitStack() as self._stack:
            self._build()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    # Build

    def _build(self) -> None:
        config, stack, mark = self.config, self._stack, self.watchdog.mark
        if config.training.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self._membership = stack.enter_context(Membership(config.comm, self.watchdog))
        degrees = resolve_degrees(config.parallelism, dist.get_world_size())
        self.mesh = build_mesh(self._membership.device_type, *degrees)
        self._membership.start(self.mesh.groups)
        mark("claiming the run folder", at_least=60)
        stack.enter_context(self._run_folder.held())
        stack.push(self._tell_failure)
        self._run_folder.set_status("starting", None)
        self.checkpointer = Checkpointer(  # also without saving: init_from reads through it
            str(self.folder / "checkpoint"),
            keep_latest_k=config.checkpoint.keep_latest_k,
            async_save=config.checkpoint.async_mode == "async",
            timeout=timedelta(seconds=SAVING_SECONDS + MARGIN_SECONDS),
            fence=self._run_folder.fence,
        )
        stack.push(self._await_pending_save)
        mark("looking for a checkpoint", at_least=SAVING_SECONDS)
        found = decide_start(config, self.checkpointer)
        if config.job.description:
            logger.info(config.job.description)
        self._open_data(found.meta if found else None)
        mark("building the model")
        self._build_trainer()
        mark("loading", at_least=SAVING_SECONDS)
        self._load(found)
        mark("opening the logs")
        self._open_logs(found.meta.skipped_steps if found else 0)
        self._validate()  # the last process may have left it

    def _open_data(self, meta: Meta | None) -> None:
        """Tokenizer, batches and validation set, so that all ranks read the same or none goes on."""
        self._membership.prepare()
        self.cursor, self.ledger = (meta.cursor, meta.ledger) if meta else (None, {})
        with agreed():
            self.tokenizer = load_tokenizer(self.config)
            with stoppable(self.watchdog):
                self.loader = self._build_loader()
        self._stack.callback(self.loader.close)
        self._batches = iter(self.loader)  # it begins to read
        self._validation = open_validation(self.config, self.mesh, self.tokenizer, self.loader.opened, self.watchdog)
        self._membership.start()
        self.watchdog.mark("comparing data")
        corpus = self.loader.corpus
        files = f"{corpus['num_files']:,} files, {corpus['num_bytes']:,} bytes, digest {corpus['digest'][:12]}"
        tokenizer = f"fingerprint {self.tokenizer.fingerprint[:12]}"
        # Each rank found its own: on a node's own disk, or while files were being added.
        agree_on({"the tokenizer in tokenizer.path": tokenizer, "the corpus in data.paths": files})

    def _build_loader(self) -> Loader:
        training, mesh = self.config.training, self.mesh
        flops = flops_per_token(self.config.model, training.seq_len)
        return build_loader(
            self.config.data,
            self.tokenizer,
            seq_len=training.seq_len,
            global_batch_size=training.global_batch_size,
            seed=training.seed,
            dp_rank=mesh.dp_rank,
            dp_degree=mesh.dp_degree,
            cursor=self.cursor,
            saved_corpus=read_json(self.folder / "corpus.json"),
            pin_memory=mesh.device.type == "cuda",
            tokenizing_share=tokenizing_share(flops, available_cores(), mesh.device.type),
            stop=lambda: self.watchdog.ending,
        )

    def _build_trainer(self) -> None:
        with agreed():
            self.trainer = Trainer(self.config, self.mesh)
        self.trainer.on_micro_batch = lambda: self.watchdog.mark("forward, backward, update")
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

    def _load(self, found: Found | None) -> None:
        init_from = self.config.checkpoint.init_from
        if found:
            meta = found.meta
            self.checkpointer.load(found.path, self.trainer.state())
            self.trainer.step = self._saved_step = meta.step
            self.trainer.trained_targets = meta.trained_targets
            if meta.rng:
                torch.set_rng_state(torch.frombuffer(bytearray.fromhex(meta.rng), dtype=torch.uint8))
            for line in diff(meta.config, self.config):
                logger.warning("changed since the checkpoint: %s", line)
        elif init_from:
            weights = {name: t for name, t in self.trainer.state().items() if name.startswith("model.")}
            self.checkpointer.load(init_from, weights, prefix="model.")
            self.trainer.begin_average()

    def _open_logs(self, skipped_before: int) -> None:
        config, trainer, device = self.config, self.trainer, self.mesh.device
        with agreed():
            if dist.get_rank() == 0:
                (self.folder / "config.toml").write_text(dump_toml(config))
                write_json(self.folder / "env.json", describe_environment())
                write_json(self.folder / "corpus.json", self.loader.corpus)
            self.profiling = Profiling(
                config.profiling, folder=self.folder, rank=dist.get_rank(), device=device, start_step=trainer.step
            )
            self.report = Report(
                self.folder,
                config.metrics,
                config.training,
                step=trainer.step,
                tokens=trainer.trained_targets,
                skipped_before=skipped_before,
                bad_steps=trainer.guard.read,
                flops_per_token=flops_per_token(config.model, config.training.seq_len),
                device=device,
            )
        self._stack.enter_context(self.profiling)
        self._stack.enter_context(self.report)
        self._run_folder.set_status("running", trainer.step)

    # The loop

    def train(self) -> None:
        """To the end, or until the run is asked to stop."""
        while self.trainer.step < self.config.training.steps:
            step = self.next_step()
            if step is None:
                break
            result = self.trainer.train_step(step.batch, step.num_targets)
            self.finish_step(step, result)
        self.finish()

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
        self.watchdog.mark("comparing data")
        facts = summed(self._facts(batch, problem))
        if facts.problems:
            agree(problem)
        if facts.stops:
            told = self.watchdog.stop_asked or "another rank was signalled"
            logger.warning("%s: saving a checkpoint and stopping", told)
            self._stopped = True
            return None
        if self._data_ended is not None:
            logger.warning("%s: this is the last step, %d", self._data_ended, self.trainer.step)
            return None
        assert batch is not None
        if not self._warm:
            with agreed():
                check_starts(batch.starts, batch.begins)
            self.watchdog.started()
        return Step(batch, facts.num_targets, facts.num_documents, f"{facts.fingerprint:016x}")

    def _facts(self, batch: Batch | None, problem: str | None) -> StepFacts:
        stops, problems = int(bool(self.watchdog.stop_asked)), int(problem is not None)
        if batch is None or self.mesh.tp.get_local_rank() > 0:  # tensor-parallel peers have the same rows
            return StepFacts(stops=stops, problems=problems)
        return StepFacts(batch.num_targets, batch.num_documents, batch.fingerprint_part, stops, problems)

    def finish_step(self, step: Step, result: StepResult) -> None:
        """Book the step: cursor, logs at logged steps, a validation and a checkpoint where they are due."""
        number, batch = self.trainer.step, step.batch
        self.watchdog.mark("logging")
        self.cursor, self.ledger = batch.cursor, batch.ledger
        if lost := self._run_folder.lost:
            self._problem = lost
            self.report.fall_silent()
        try:
            self.report.step(
                StepReport(
                    number,
                    self.trainer.trained_targets,
                    loss=result.loss,
                    grad_norm=result.grad_norm,
                    lr=result.lr,
                    batch_fingerprint=step.fingerprint,
                    num_documents=step.num_documents,
                    cursor=batch.cursor,
                    ledgers=batch.source_ledgers,
                    epochs=batch.epochs,
                )
            )
            self.profiling.step()
        except OSError as error:
            self._problem = f"the logs of step {number} cannot be written: {error}"
        self._validate()
        if number % self.config.checkpoint.interval == 0:
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

    # Save

    def save(self) -> None:
        """Save a checkpoint of the step that was finished last, once."""
        if not self.config.checkpoint.enable or self._saved_step == self.trainer.step:
            return
        skipped = self.report.check_finite()
        self.watchdog.mark("saving", at_least=SAVING_SECONDS)
        with self.report.throughput.paused() as watch:
            self._tolerate(self.checkpointer.wait)
            self.checkpointer.save(self.trainer.step, self.trainer.state(), self._meta(skipped).to_json())
        self._saved_step = self.trainer.step
        self.report.saved(self.trainer.step, watch.seconds)

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

    # Finish

    def finish(self) -> None:
        """The end of a run that is finished or preempted: save, wait until it is on disk, say so."""
        if not self._stopped and not self._validate(at_end=True):
            self._stopped = True
        self.watchdog.mark("ending", at_least=SAVING_SECONDS)
        agree(self._problem)
        saves, step = self.config.checkpoint.enable, self.trainer.step
        if self._stopped and not saves:
            raise RunFailed(f"stopped after step {step}; checkpoint.enable = false, so nothing was saved")
        self._tolerate(self.checkpointer.wait)
        self.save()
        self.checkpointer.wait()
        state = "preempted" if self._stopped else "finished"
        facts: dict[str, Any] = {"failed_saves": self._failed_saves} if self._failed_saves else {}
        if self._data_ended and not self._stopped:
            facts["reason"] = str(self._data_ended)
        self._run_folder.set_status(state, step, **facts)
        path = str(self.folder / "checkpoint" / f"step-{step:08d}")
        ledgers = self._data_ended.ledgers if self._data_ended else None
        text = self.report.summary(ledgers, path if saves else "none (checkpoint.enable = false)")
        logger.info("%s\n%s", state, text or "no step was made")

    def _await_pending_save(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """It is on its way to the disk, and needs the group and the claim. Not where ranks end without each other."""
        if error is None or isinstance(error, RunFailed | CheckpointError):
            self.watchdog.mark("ending", at_least=SAVING_SECONDS)
            try:
                self.checkpointer.wait()
            except CheckpointError as failure:
                logger.warning("%s", failure)

    def _tell_failure(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            step = self.trainer.step if hasattr(self, "trainer") else None
            why = self._membership.gone(error) or f"{type(error).__name__}: {error}"
            with suppress(OSError):  # a full disk must not keep the error itself from being told
                self._run_folder.set_status("failed", step, reason=why)
