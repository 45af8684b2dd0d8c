"""Saves and loads that all ranks make together: sync and async saving, the newest valid checkpoint, loading.

Operates on a flat dict of tensors (DTensors on any mesh, or plain tensors that are equal on all ranks) and a JSON dict;
knows nothing of models, optimisers or what the JSON means. Every phase ends with an exchange of outcomes over a gloo
group of its own, so that a full disk on one rank is the same one-line CheckpointError on all of them, never a hang.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from titanlite.checkpoint import folder as folders
from titanlite.checkpoint import tensors as files
from titanlite.checkpoint.folder import CheckpointError, DamagedCheckpoint, LostFolder
from titanlite.log import logger

T = TypeVar("T")


class Checkpointer:
    """Checkpoints in `folder`, which all ranks share. Construction, save, wait, newest and load are collective.

    keep_latest_k: number of newest checkpoints to keep, 0 keeps all. timeout: how long ranks wait for each other, which
    must cover the slowest rank's writing. fence: asked on rank 0 before a save touches `folder` and right before it
    commits; a text says why the folder is no longer this run's, and is raised as LostFolder on all ranks.
    """

    def __init__(
        self,
        folder: str,
        *,
        keep_latest_k: int,
        async_save: bool,
        timeout: timedelta = timedelta(minutes=30),
        fence: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.folder, self._keep, self._fence = os.path.normpath(folder), keep_latest_k, fence
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        self._planner = files.caching_planner()
        self._signature: list[Any] = []
        self._verified: set[str] = set()
        self._current = -1  # the step whose state is known to be on disk: saved here, or resumed from
        self._pending: Future[None] | None = None
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._stager = None
        if async_save:
            cuda = torch.cuda.is_available()
            # Staging copies are kept between saves: page faults make the first one some forty times dearer.
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=cuda,
                    use_non_blocking_copy=cuda,
                    use_shared_memory=False,
                    use_async_staging=False,  # the state may change as soon as save returns
                )
            )

    def save(self, step: int, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        """Save the state of `step`: all of it (sync), or a copy to be written in the background (async).

        Returns when the checkpoint is committed (sync) or the state may change (async). Raises CheckpointError, equal
        on all ranks, when this save or the pending one failed; older checkpoints are intact then.
        """
        self.wait()
        if step == self._current:
            logger.info("checkpoint step %d: already on disk", step)
            return
        began = time.perf_counter()
        # A copy, in JSON, now: an async save must not see what the caller changes later.
        meta_json = ""
        signature: list[Any] = []

        def prepare() -> tuple[str, bool]:
            nonlocal meta_json
            for key, tensor in tensors.items():
                if not isinstance(tensor, torch.Tensor):
                    raise CheckpointError(f"{key} is a {type(tensor).__name__}: only tensors go with tensors, see meta")
            meta_json = json.dumps(meta, allow_nan=False)
            signature.extend((key, tensor.shape, tensor.dtype) for key, tensor in tensors.items())
            return (self._begin(step, tensors) if self._rank == 0 else ""), signature != self._signature

        not_saved = f"checkpoint step {step} not saved: "
        prepared = self._agree(prepare, not_saved)
        path = prepared[0][0]
        if any(changed for _, changed in prepared):
            self._planner = files.caching_planner()
        self._signature = signature
        if self._stager is None:
            self._write(step, path, tensors, json.loads(meta_json), began)
            self._pending = self._executor.submit(self._prune)  # deleting takes as long as a fifth of a save
            return
        staged: dict[str, Any] = {}
        # Detached: a parameter would bring its Python attributes along. None returned: outcomes travel, tensors do not.
        stage, plain = self._stager.stage, {key: tensor.detach() for key, tensor in tensors.items()}
        self._agree(lambda: staged.update(cast(dict, stage(plain))), not_saved)
        logger.info("checkpoint step %d requested: training waited %.3f s", step, time.perf_counter() - began)

        def write_and_prune() -> None:
            self._write(step, path, staged, json.loads(meta_json), began)
            self._prune()

        self._pending = self._executor.submit(write_and_prune)

    def wait(self) -> None:
        """Return when nothing happens in the background any more; raises a pending save's CheckpointError on all ranks.

        To be called before exit; every other collective method begins with it.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            if self._stager is None:
                pending.result()  # it was pruning, which warns but never raises: nothing to agree on
            else:
                self._agree(pending.result)

    def newest(self, step: int = -1) -> str | None:
        """Path of the newest checkpoint whose every file is right, or None if there is no checkpoint.

        A damaged one is set aside with a warning and the next older one is taken. `step` >= 0: exactly that one or
        CheckpointError. Each rank checks a share of the bytes.
        """
        self.wait()
        for link in folders.links_of_steps(self.folder) if self._rank == 0 else []:
            logger.warning("%s is a link and does not count as a checkpoint: move the folder itself here", link)
        refused: list[str] = []
        while True:
            path = self._agree(lambda: self._candidate(step, refused) if self._rank == 0 else None)[0]
            if path is None:
                return None
            try:
                self._verify(path)
            except DamagedCheckpoint as error:
                if step >= 0:
                    raise
                refused.append(path)
                if self._rank == 0:
                    self._set_aside(path, str(error))
            else:
                return path

    def damaged(self) -> list[str]:
        """Names of the folders that were set aside as damaged, now or earlier."""
        return self._agree(lambda: folders.list_damaged(self.folder) if self._rank == 0 else [])[0]

    def load(self, path: str, tensors: dict[str, torch.Tensor], prefix: str = "") -> None:
        """Fill `tensors` in place, on any layout, from checkpoint `path`, checked first unless `newest` gave it.

        Raises one CheckpointError with every missing and unexpected key and every other shape or dtype. `prefix`: keys
        of the checkpoint that do not begin with it may be absent from `tensors`.
        """
        self.wait()
        if path not in self._verified:
            self._verify(path)
        began = time.perf_counter()
        manifest: dict[str, Any] = {}
        metadata: list[Any] = []

        def compare() -> None:
            manifest.update(folders.read_manifest(path))
            metadata.append(files.read_metadata(path, manifest["files"]))
            if found := files.differences(metadata[0], tensors, prefix):
                raise CheckpointError(f"{path} does not fit this run: {'; '.join(found)}")

        self._agree(compare)
        self._agree(lambda: files.read(path, metadata[0], tensors, self._group), f"{path} not loaded: ")
        if not prefix and os.path.dirname(os.path.normpath(path)) == self.folder:
            self._current = manifest["step"]
        logger.info("checkpoint %s loaded in %.3f s", path, time.perf_counter() - began)

    def _check_owner(self) -> None:
        if lost := self._fence():
            raise LostFolder(lost)

    def _begin(self, step: int, tensors: dict[str, torch.Tensor]) -> str:
        self._check_owner()  # leftovers are removed next: they could be another run's work
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        overhead = 2048 * len(tensors) * self._num_ranks + (1 << 20)  # torch.save's envelope of a shard; JSON, metadata
        return folders.begin(self.folder, step, needed + overhead)

    def _write(
        self, step: int, path: str, tensors: dict[str, torch.Tensor], meta: dict[str, Any], began: float
    ) -> None:
        staged = self._stager is not None
        written: list[files.Written] = []

        def commit() -> str | None:
            if self._rank != 0:
                return None
            records = {name: record for rank in written for name, record in rank.files.items()}
            versions = {"torch": str(torch.__version__), "python": platform.python_version()}
            return folders.commit(path, step, records, meta, versions, self._check_owner)

        not_saved = f"checkpoint step {step} not saved: "
        try:
            outcomes = self._agree(lambda: files.write(path, tensors, self._planner(), self._group, staged), not_saved)
            written = [outcome for outcome in outcomes if outcome is not None]
            assert len(written) == self._num_ranks
            final = self._agree(commit, not_saved)[0]
        except CheckpointError as error:
            self._planner = files.caching_planner()  # a failed save may leave ranks with different caches
            if self._rank == 0:
                folders.remove(path)
            if staged:
                logger.warning("%s (training hears of it before its next save)", error)
            raise
        self._current = step
        size = sum(record["size"] for rank in written for record in rank.files.values())
        logger.info(
            "checkpoint step %d committed %.3f s after its request (plan %.3f s, write %.3f s): %.1f MB, %s",
            step,
            time.perf_counter() - began,
            max(rank.plan_seconds for rank in written),
            max(rank.write_seconds for rank in written),
            size / 1e6,
            final,
        )

    def _prune(self) -> None:
        if self._rank == 0:
            folders.prune(self.folder, self._keep)

    def _candidate(self, step: int, refused: list[str]) -> str | None:
        found = {number: path for number, path in folders.list_steps(self.folder).items() if path not in refused}
        if step < 0:
            return found[max(found)] if found else None
        if step not in found:
            raise CheckpointError(f"{self.folder}: no checkpoint of step {step} (there are: {sorted(found) or 'none'})")
        return found[step]

    def _verify(self, path: str) -> None:
        """Check every file of `path`, each rank a share; the verdict is the same on all ranks."""

        def first() -> dict[str, Any] | None:
            if self._rank != 0:
                return None
            manifest = folders.read_manifest(path)
            folder, name = os.path.split(path)
            if folder == self.folder and name != folders.step_name(manifest["step"]):
                raise DamagedCheckpoint(f"{path}: its manifest says that this is step {manifest['step']}")
            files.read_metadata(path, manifest["files"])
            return dict(manifest["files"])

        records = self._agree(first)[0]
        assert records is not None
        by_size = sorted(records, key=lambda name: (-records[name]["size"], name))

        def share() -> None:
            for name in by_size[self._rank :: self._num_ranks]:
                folders.check_file(path, name, records[name])

        self._agree(share)
        self._verified.add(path)

    def _set_aside(self, path: str, reason: str) -> None:
        try:
            folders.set_aside(path, "bad", reason)
        except OSError as error:
            logger.warning("checkpoint %s is damaged (%s) and cannot be renamed: %s", path, reason, error)

    def _agree(self, phase: Callable[[], T], label: str = "") -> list[T]:
        """Run `phase` on every rank and return all results in rank order; if any rank raised, raise alike on all."""
        result: Any = None
        error: Exception | None = None
        try:
            result = phase()
        except Exception as caught:
            error = caught
        failure = None
        if error is not None:
            failure = type(error) if isinstance(error, CheckpointError) else CheckpointError, str(error) or repr(error)
        outcomes: list[Any] = [None] * self._num_ranks
        dist.all_gather_object(outcomes, (result, failure), group=self._group)
        failures = {rank: failure for rank, (_, failure) in enumerate(outcomes) if failure is not None}
        if not failures:
            return [result for result, _ in outcomes]
        texts = {text for _, text in failures.values()}
        if len(texts) == 1 and len(failures) == self._num_ranks:
            message = texts.pop()
        else:
            message = "; ".join(f"rank {rank}: {text}" for rank, (_, text) in failures.items())
        kinds = {kind for kind, _ in failures.values()}
        raise (kinds.pop() if len(kinds) == 1 else CheckpointError)(" ".join((label + message).split())) from error
