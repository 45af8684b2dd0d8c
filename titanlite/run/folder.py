"""The run folder over a run's life: who holds it, and what status.json says, also where a run cannot say it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from titanlite.checkpoint import list_steps
from titanlite.files import remove_leftovers, write_json
from titanlite.run.claim import Claim, claim_run_folder
from titanlite.run.watchdog import Verdict, Watchdog

RUN_FILES = ("status.json", "env.json", "corpus.json", "metrics.jsonl", "cursor.jsonl")
"""Of the run folder, which are replaced whole."""


class RunFolder:
    """A rank's view of it. One rank writes the status: 0, or the lowest that is left when 0 is to blame."""

    def __init__(self, path: Path, watchdog: Watchdog) -> None:
        self.path, self._watchdog = path, watchdog
        self.lost = ""
        """Why it is not this job's to write any more, as far as rank 0 has seen; empty: it is."""
        self._held = False
        self._claim: Claim | None = None
        watchdog.last_words = self._last_words

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold it for this job; from then on the watchdog may write the status. Collective; raises RunFailed."""
        with claim_run_folder(self.path, self._taken_over) as self._claim:
            if self._claim is not None:
                for name in RUN_FILES:
                    remove_leftovers(self.path / name)
            self._held = True
            yield

    def fence(self) -> str | None:
        """Asked on rank 0: why a checkpoint must not be committed any more; None: it may."""
        if why := self._claim.taken_over() if self._claim is not None else None:
            self._lose(why)
        return self.lost or None

    def set_status(self, state: str, step: int | None, **facts: Any) -> None:
        """Nothing before the claim is had, nor once it is lost: the status is the other job's then."""
        if self._held and not self.lost and dist.get_rank() == self._watchdog.speaker:
            status = {"state": state, "step": step, "pid": os.getpid(), **facts}
            write_json(self.path / "status.json", status)

    def _taken_over(self, why: str) -> None:
        self._lose(why)
        self._watchdog.end(1, "failed", f"{self.lost}: ending without a save")

    def _lose(self, why: str) -> None:
        self.lost = f"job.dump_folder = {str(self.path)!r} is {why}"

    def _last_words(self, verdict: Verdict) -> None:
        saved = 0
        with suppress(OSError, ValueError):
            saved = max(list_steps(str(self.path / "checkpoint")), default=0)
        self.set_status(verdict.state, saved if verdict.code == 0 else self._watchdog.step, reason=verdict.text)
