"""The watchdog of a rank: a thread that sees what the main thread cannot while it works or waits, and ends the process.

Owns three verdicts: a rank hangs (it is named, with its step, phase and stack), a stop was asked for and took longer
than the grace, and nobody is left to run for (the launcher is dead). One rank says a verdict, all ranks hear of it
through the store and leave by os._exit, whatever their main threads and the backend do.
Time is this process's monotonic clock, and a suspension of the whole process (Ctrl-Z, a scheduler) does not count.
It knows nothing of run folders, collectives or devices, and does not import torch: it begins before that.
"""

import faulthandler
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any

from titanlite.log import logger
from titanlite.run.pulse import PULSE_SECONDS, SILENT_SECONDS, Pulses, name

_TICK_SECONDS = 0.25
_LONGEST_TICK_SECONDS = 2.0  # of a longer one this much counts: the process was suspended
_SETTLE_SECONDS = 1.0  # from a verdict to the end: the others hear of it, the last words are written
_STARTING_SECONDS = 10.0  # that a stop during the start waits for the main thread: nothing is lost there
_ENDING_SECONDS = 10.0  # that a process with an error may take to end: a thread of it may wait for a dead rank
_STORE_GONE_SECONDS = 5.0


class StopSignal:
    """Remembers SIGTERM and SIGUSR1, the schedulers' words for "you will be preempted". Made in the main thread.

    Python runs a handler when its main thread comes back from what it waits in, a collective for instance. So they
    come through a pipe too, into which Python writes at once, for a thread to see.
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._reader, writer = os.pipe()
        for end in (self._reader, writer):
            os.set_blocking(end, False)
            # When the next one has taken the signals over; not at exit, where one may still come.
            weakref.finalize(self, os.close, end).atexit = False
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    @property
    def received(self) -> str | None:
        """The name of the signal."""
        with suppress(BlockingIOError):
            for number in os.read(self._reader, 1000):
                if number in (signal.SIGTERM, signal.SIGUSR1):
                    self._received = signal.Signals(number).name
        return self._received

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name


if TYPE_CHECKING:
    from torch.distributed import Store


@dataclass(frozen=True)
class Verdict:
    """How a job ends that does not end by itself. ranks: those to blame."""

    code: int
    state: str
    text: str
    ranks: list[int]


@dataclass(frozen=True)
class _Mark:
    number: int
    step: int
    phase: str
    limit: float


class Watchdog:
    """One per process, made and marked by the main thread; heeds SIGTERM and SIGUSR1 from its construction on."""

    def __init__(self, grace_seconds: float = 0) -> None:
        self.stop = StopSignal()
        self.speaker = 0
        """The rank that tells the world how the job ends: the lowest of those that are not to blame."""
        self.last_words: Callable[[Verdict], None] = lambda verdict: None
        """Called at a verdict, on every rank, in a thread that gets a second."""
        self._timeout, self._timeout_name = math.inf, ""
        self._grace = grace_seconds or math.inf
        self._patience = min(self._grace, _STARTING_SECONDS)
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._mark = _Mark(0, 0, "starting", math.inf)
        self._seen_mark, self._idle, self._stopping, self._store_gone = 0, 0.0, 0.0, 0.0
        self._failed = ""
        self._verdict: Verdict | None = None
        self._pulses = Pulses(self._pulse)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    # What the main thread calls

    def connect(self, store: "Store", rank: int, world_size: int) -> None:
        """Join the other ranks' watchdogs through a connection that nobody else uses."""
        self._pulses.connect(store, rank, world_size)

    def set_timeout(self, seconds: float, name: str) -> None:
        """From the next mark on, a main thread that stands still for so long ends the job; name: of the key for it."""
        self._timeout, self._timeout_name = seconds, name

    def mark(self, phase: str, step: int | None = None, at_least: float = 0) -> None:
        """Say what comes now, as every rank does. at_least: seconds that it may take, whatever the timeout."""
        before = self._mark
        step = before.step if step is None else step
        self._mark = _Mark(before.number + 1, step, phase, max(self._timeout, at_least))

    def started(self) -> None:
        """The first step begins: from now on a stop waits for a step and its save, as long as the grace."""
        self._patience = self._grace

    @property
    def rank(self) -> int:
        return self._pulses.rank

    @property
    def step(self) -> int:
        return self._mark.step

    @property
    def stop_asked(self) -> str:
        """Who was asked to stop, by what, on any rank; empty: nobody."""
        own = f"{self.stop.received} to {name(self.rank, self._pulse())}" if self.stop.received else ""
        return self._pulses.heard("stop") or own

    @property
    def ending(self) -> bool:
        """Whether a stop was asked for or a verdict said, on any rank: what can be left is to be left in order now."""
        return bool(self._verdict or self._pulses.heard("verdict") or self.stop_asked)

    def explain(self, error: BaseException) -> str:
        """What the others have to do with an error of this rank: who of them is gone, or empty. Takes seconds.

        Does not return where a verdict explains it. The process then has some seconds to end in.
        """
        if not self._pulses.connected:
            self.close()
            return ""
        gone = self._who_is_gone() if isinstance(error, RuntimeError) else ""
        self._failed = f"{type(error).__name__}: {error}".splitlines()[0]
        self._mark = replace(self._mark, number=self._mark.number + 1, limit=_ENDING_SECONDS)
        self._pulses.beat()
        return gone

    def end(self, code: int, state: str, text: str) -> None:
        """End the job on all ranks. May be called by any thread; returns, and the process ends soon after."""
        self._verdict = self._verdict or Verdict(code, state, text, [])

    def close(self) -> None:
        """The main thread is done: what the others or the launcher do is no concern any more."""
        self._closed.set()
        self._pulses.close()
        self._thread.join(_SETTLE_SECONDS)

    def _who_is_gone(self) -> str:
        period = self._pulses.period
        fresh = time.monotonic() + period + PULSE_SECONDS / 2  # by then, what was sent before has arrived
        before: dict[int, float] = {}
        while self._pulses.connected:
            while self._verdict or self._pulses.heard("verdict"):
                time.sleep(_TICK_SECONDS)  # the watching thread ends the process
            pulses = self._pulses.others()
            if failed := [rank for rank, pulse in pulses.items() if pulse["failed"]]:
                self._blame(failed)
                return f"{self._pulses.describe(failed)} failed"
            if time.monotonic() > fresh:
                before = before or {rank: pulse["time"] for rank, pulse in pulses.items()}
                gone = [rank for rank, pulse in pulses.items() if pulse["time"] == before[rank]]
                if not gone:
                    return ""
                if time.monotonic() > fresh + max(SILENT_SECONDS, 2 * period):
                    self._blame(gone)
                    return f"{self._pulses.describe(gone)} gives no sign of life any more"
            time.sleep(_TICK_SECONDS)
        return ""

    def _blame(self, ranks: list[int]) -> None:
        self.speaker = min({*range(self._pulses.world_size)} - {*ranks}, default=0)

    # The thread that judges

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(_TICK_SECONDS):
            now = time.monotonic()
            seconds, last = min(now - last, _LONGEST_TICK_SECONDS), now
            self._pulses.now += seconds
            if self._launcher is not None and os.getppid() != self._launcher:
                self._leave_alone(f"the launcher (pid {self._launcher}) is gone")
            self._store_gone = self._store_gone + seconds if self._pulses.lost_store else 0.0
            if self._store_gone > _STORE_GONE_SECONDS:
                self._leave_alone(f"the store at which the ranks meet is gone ({self._pulses.lost_store})")
            self._verdict = self._verdict or self._judge(seconds)
            if (self._verdict or self._pulses.heard("verdict")) and not self._closed.is_set():
                self._carry_out()

    def _judge(self, seconds: float) -> Verdict | None:
        mark = self._mark
        self._idle = self._idle + seconds if mark.number == self._seen_mark else 0.0
        self._seen_mark = mark.number
        if asked := self.stop_asked:
            self._pulses.say("stop", asked)
            self._stopping += seconds
            if self._stopping > self._patience:
                return self._out_of_patience(asked, mark)
        if self._idle > mark.limit:
            return self._hang(mark.limit)
        # A rank whose process is stopped is found also in phases that have no limit.
        return self._hang(self._timeout) if self._pulses.silent(max(self._timeout, 2 * SILENT_SECONDS)) else None

    def _out_of_patience(self, asked: str, mark: _Mark) -> Verdict:
        if gone := self._pulses.silent():  # then the launcher's signal means that they died
            return Verdict(1, "failed", f"{self._pulses.describe(gone)} gives no sign of life any more", gone)
        if self._patience == self._grace:
            why = f"comm.grace_seconds = {self._grace:g} were over in step {mark.step}, {mark.phase}"
        else:
            why = f"before a step was made ({mark.phase})"
        return Verdict(0, "preempted", f"{asked}: {why}; the last checkpoint stands", [])

    def _hang(self, limit: float) -> Verdict:
        """Who is to blame: a process without life; else who is behind; else who does not stand in a collective."""
        pulses = self._pulses.all()
        marks = [pulse["marks"] for pulse in pulses.values()]
        behind = [rank for rank, pulse in pulses.items() if pulse["marks"] == min(marks) < max(marks)]
        busy = [rank for rank, pulse in pulses.items() if not pulse["waits"]]
        if silent := self._pulses.silent():
            ranks, why = silent, "no sign of life from the process since then"
        elif behind:
            ranks, why = behind, "the others have passed this and wait"
        elif 0 < len(busy) < len(pulses):
            ranks, why = busy, "the others wait for it"
        else:
            ranks, why = sorted(pulses), "nobody is ahead" if len(pulses) > 1 else "it stands still"
        where = self._pulses.describe(ranks)
        return Verdict(
            1,
            "failed",
            f"no progress for {limit:g} s ({self._timeout_name} = {self._timeout:g}): {where}: {why}",
            ranks,
        )

    def _carry_out(self) -> None:
        began = time.monotonic()
        if self._verdict is not None:
            self._pulses.say("verdict", json.dumps(asdict(self._verdict)))
        while not (said := self._pulses.heard("verdict")):
            if not self._pulses.connected or time.monotonic() > began + _SETTLE_SECONDS / 2:
                break
            time.sleep(_TICK_SECONDS / 10)
        verdict = Verdict(**json.loads(said)) if said else self._verdict  # the first that was said is what all say
        assert verdict is not None
        self._blame(verdict.ranks)

        def speak() -> None:
            logger.log(40 if verdict.code else 30, "%s", verdict.text)
            if self.rank in verdict.ranks:
                faulthandler.dump_traceback(file=2, all_threads=True)  # by number: sys.stderr may be no file
            self.last_words(verdict)

        _try(speak)
        time.sleep(max(0.0, began + _SETTLE_SECONDS - time.monotonic()))
        os._exit(verdict.code)

    def _leave_alone(self, why: str) -> None:
        _try(lambda: logger.error("%s: ending at once, without a save", why))
        os._exit(1)

    def _pulse(self) -> dict[str, Any]:
        mark = self._mark
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "marks": mark.number,
            "step": mark.step,
            "phase": mark.phase,
            "waits": _waits_for_others(),
            "failed": self._failed,
        }


def _waits_for_others() -> bool:
    """Whether the main thread stands in a collective: a function of torch.distributed is where Python calls C++."""
    frame, depth = sys._current_frames().get(threading.main_thread().ident or 0), 0
    while frame is not None and depth < 3:
        path = frame.f_code.co_filename.replace(os.sep, "/")
        if path.endswith(("distributed/distributed_c10d.py", "distributed/_functional_collectives.py")):
            return True
        if "distributed/fsdp/_fully_shard/" in path:
            return True
        frame, depth = frame.f_back, depth + 1
    return False


def _try(act: Callable[[], None]) -> None:
    """Do it where that takes no more than a moment: the disk or the pipe of stderr may hang too."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(_SETTLE_SECONDS)
