"""Signals that ask a run to stop. Imports nothing slow: they are to be remembered from a process's first moment on."""

import os
import signal
import weakref
from contextlib import suppress
from types import FrameType


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
