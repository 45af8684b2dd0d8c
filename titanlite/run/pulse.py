"""What each rank tells the others once a second, by a thread of its own, and how long each has been silent.

Owns the exchange over the store: a pulse of every rank (who and where it is), and words that one rank says to all, of
which the first one counts. The thread may block where the store's process is stopped; nobody waits for it.
Clocks of different processes are never compared: a rank is silent while its pulse does not change.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import Store

PULSE_SECONDS = 1.0
SILENT_SECONDS = 3.0  # without a pulse: stopped or dead, not only slow
_PULSES_PER_SECOND = 32  # that one rank reads at most: the store serves the square of their number


class Pulses:
    """Of all ranks; before `connect`, of this one alone. own: makes this rank's pulse."""

    def __init__(self, own: Callable[[], dict[str, Any]]) -> None:
        self.rank, self.world_size, self.period = 0, 1, math.inf
        self.now = 0.0
        """Seconds by the clock of who asks for silences."""
        self.lost_store = ""
        """Why nothing is heard any more."""
        self._own, self._left = own, False
        self._said: dict[str, str] = {}  # by this rank
        self._heard: dict[str, str] = {}
        self._last: dict[int, dict[str, Any]] = {}
        self._changed: dict[int, float] = {}
        self._read = 0.0
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def connected(self) -> bool:
        return self._thread is not None and not self.lost_store

    def connect(self, store: "Store", rank: int, world_size: int) -> None:
        """Begin. The connection must be nobody else's."""
        self.rank, self.world_size = rank, world_size
        self.period = max(PULSE_SECONDS, world_size / _PULSES_PER_SECOND)
        self._thread = threading.Thread(target=self._run, args=(store,), name="pulse", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Tell the others that this rank leaves in order."""
        self._left = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(PULSE_SECONDS)

    def say(self, word: str, text: str) -> None:
        """To all ranks, as soon as can be; in vain where another rank was first."""
        self._said.setdefault(word, text)
        self._wake.set()

    def beat(self) -> None:
        """Send this rank's pulse now."""
        self._wake.set()

    def heard(self, word: str) -> str:
        """What was said first; empty: nothing yet."""
        return self._heard.get(word, "")

    def all(self) -> dict[int, dict[str, Any]]:
        """The last pulses of the ranks that have not left, and this rank's own of now."""
        return {**self.others(), self.rank: self._own()}

    def others(self) -> dict[int, dict[str, Any]]:
        return {rank: pulse for rank, pulse in self._last.items() if rank != self.rank and not pulse["left"]}

    def silent(self, seconds: float = SILENT_SECONDS) -> list[int]:
        """The other ranks whose pulse did not change for so long, as far as this rank has looked."""
        limit = max(seconds, 2.5 * self.period)
        return [rank for rank in self.others() if self._read - self._changed[rank] > limit]

    def describe(self, ranks: Iterable[int]) -> str:
        """Who they are, and where they stand."""
        pulses, chosen = self.all(), list(ranks)
        shown = [
            f"{name(rank, pulses[rank])} in step {pulses[rank]['step']}, {pulses[rank]['phase']}"
            + (f" ({pulses[rank]['failed']})" if pulses[rank]["failed"] else "")
            for rank in chosen[:8]
        ]
        return " and ".join(shown) + (f" and {len(chosen) - 8} more ranks" if len(chosen) > 8 else "")

    def _run(self, store: "Store") -> None:
        keys, all_there, due = [f"pulse/{rank}" for rank in range(self.world_size)], False, 0.0
        try:
            while True:
                left = self._left
                store.set(keys[self.rank], json.dumps({**self._own(), "time": time.monotonic(), "left": left}))
                if left:
                    return
                for word in ("stop", "verdict"):
                    if said := store.compare_set(f"word/{word}", "", self._said.get(word, "")).decode():
                        self._heard[word] = said
                all_there = all_there or store.check(keys)
                if all_there and time.monotonic() >= due:
                    self._take([json.loads(pulse) for pulse in store.multi_get(keys)])
                    due = time.monotonic() + self.period - PULSE_SECONDS / 2
                self._wake.wait(PULSE_SECONDS)
                self._wake.clear()
        except RuntimeError as error:  # the connection is lost
            self.lost_store = str(error).splitlines()[0]

    def _take(self, pulses: list[dict[str, Any]]) -> None:
        now = self.now
        for rank, pulse in enumerate(pulses):
            if self._last.get(rank, {}).get("time") != pulse["time"]:
                self._changed[rank] = now
        self._last, self._read = dict(enumerate(pulses)), now


def name(rank: int, pulse: dict[str, Any]) -> str:
    return f"rank {rank} ({pulse['host']}, pid {pulse['pid']})"
