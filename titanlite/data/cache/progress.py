"""What people see of the writing of a token cache: a bar on a terminal, log lines elsewhere, and what it waits for."""

import logging
import os
import sys
import time
from typing import Any

from tqdm import tqdm

from titanlite.data.cache.shards import Portion
from titanlite.log import logger

_LOG_SECONDS = 10.0

Event = tuple[str, int, int]
"""What happened, the shard's number among the missing ones, a count: see Progress.take."""


class Progress:
    """Adds up what the writing processes say of the shards that were missing."""

    def __init__(self, name: str, folder: str, missing: list[Portion]) -> None:
        self._name, self._folder, self._missing = name, folder, missing
        self._written = [0] * len(missing)  # source bytes
        self._open = {portion.name for portion in missing}
        self._building: set[int] = set()
        self._start = time.monotonic()
        self._next_log, self._next_wait = self._start + _LOG_SECONDS, self._start
        self._bar = tqdm(
            total=sum(portion.weight for portion in missing),
            desc=f"tokenising {name}",
            unit="B",
            unit_scale=True,
            delay=1,
            leave=False,
            disable=not sys.stderr.isatty() or not logger.isEnabledFor(logging.INFO),  # one rank draws
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.close()
        if exception[0] is None:
            seconds = time.monotonic() - self._start
            logger.info(f"token cache of source {self._name!r}: complete after {seconds:.1f} s")

    @property
    def complete(self) -> bool:
        return not self._open

    def take(self, event: str, shard: int, count: int) -> None:
        """What happened to a shard: "writing" (so many bytes of text are done), "done" (here or elsewhere; it has so
        many bad records), "busy" (another process writes it, and there is nothing else to do)."""
        weight = self._missing[shard].weight
        if event == "writing":
            self._building.add(shard)
            self._set(shard, min(count, weight))
        elif event == "done":
            self._building.discard(shard)
            self._open.discard(self._missing[shard].name)
            self._set(shard, weight)
        elif not self._building and time.monotonic() >= self._next_wait:
            path = os.path.join(self._folder, self._missing[shard].name)
            logger.info(f"waiting for another process that writes {path} ({path}.lock is locked)")
            self._next_wait = time.monotonic() + _LOG_SECONDS
        self._log()

    def _set(self, shard: int, num_bytes: int) -> None:
        self._bar.update(num_bytes - self._written[shard])
        self._written[shard] = num_bytes

    def _log(self) -> None:
        now = time.monotonic()
        if not self._bar.disable or now < self._next_log:
            return
        self._next_log = now + _LOG_SECONDS
        done, total = sum(self._written), sum(portion.weight for portion in self._missing)
        rate = done / (now - self._start)
        left = f"{(total - done) / rate / 60:.1f} minutes left" if rate else "time left not known yet"
        logger.info(
            f"tokenising {self._name}: {done / max(1, total):.1%} of {total:,} bytes, {rate / 1e6:.1f} MB/s, {left}"
        )
