"""The run folder over a run's life: who holds it, and what status.json says, also where a run cannot say it.

One job at a time holds it, also where locks do not work, and none stands in the way of the next. Owns the file `.claim`
with the owner's host, pid, token and heartbeat. A lock (flock) keeps a second job out where storage has locks.
Elsewhere, and for an owner on another host, the heartbeat decides: only whether it changes while one watches, so that
clocks of hosts do not matter. An owner looks whether the claim is still its own before each beat, and before each
checkpoint counts.
"""

import errno
import fcntl
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from titanlite.checkpoint import list_steps
from titanlite.files import remove_leftovers, write_json
from titanlite.log import logger
from titanlite.run.agreement import agree
from titanlite.run.watchdog import Verdict, Watchdog

RUN_FILES = ("status.json", "env.json", "corpus.json", "metrics.jsonl", "cursor.jsonl")
"""Of the run folder, which are replaced whole."""

_BEAT_SECONDS = 3.0
_SILENT_SECONDS = 20.0  # of an owner that cannot be looked up: some beats, and what NFS may keep a change from us
_DYING_SECONDS = 5.0  # until a process that was killed just now lets go of its lock
_SETTLE_SECONDS = 2.0  # without locks: a second one who claims at the same moment has written by then


class InUse(Exception):
    """Another job holds the folder; its text names the owner."""


class Claim:
    """The hold on one run folder, by one process; heartbeats come from a thread of its own."""

    def __init__(
        self,
        folder: Path,
        lost: Callable[[str], None] = lambda why: None,
        beat_seconds: float = _BEAT_SECONDS,
        silent_seconds: float = _SILENT_SECONDS,
    ) -> None:
        """Raises InUse where a live job holds it; OSError where the folder cannot be written. `lost` hears, in the
        heartbeat's thread, that another job has taken the claim over."""
        self.token = secrets.token_hex(8)
        self._path, self._lost, self._beat_seconds, self._beats = folder / ".claim", lost, beat_seconds, 0
        self._file = open(self._path, "a+")  # noqa: SIM115  its lock is held until the job ends
        try:
            locked = _lock(self._file.fileno(), self._path)
            owner = _read(self._path)
            if owner and not (_is_of_this_machine(owner) and (locked or not _lives(owner))):
                _watch(self._path, owner, silent_seconds)
            self._write()
            if not locked:
                time.sleep(_SETTLE_SECONDS)
                if why := self.taken_over():
                    raise InUse(why)
        except BaseException:
            self._file.close()
            raise
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._thread.start()

    def taken_over(self) -> str | None:
        """Who holds the folder now, where that is not this job any more. Raises OSError where it cannot be read."""
        text = _read(self._path)
        if f" token {self.token} " in text:
            return None
        return f"taken over by another job ({_owner(text)})" if text else "claimed by nobody: .claim was removed"

    def release(self) -> None:
        """Let the next job in at once."""
        self._closed.set()
        self._thread.join()
        with suppress(OSError):
            if not self.taken_over():
                os.truncate(self._path, 0)
        self._file.close()

    def _beat(self) -> None:
        failing = False
        while not self._closed.wait(self._beat_seconds):
            try:
                if why := self.taken_over():
                    self._lost(why)
                    return
                self._write()
                failing = False
            except OSError as error:
                if not failing:
                    logger.warning("%s: no heartbeat could be written (%s)", self._path, error)
                failing = True

    def _write(self) -> None:
        """In place, for a lock belongs to the file; beats are of one length, and closing sends them to other nodes."""
        self._beats += 1
        facts = f"{socket.gethostname()} pid {os.getpid()} machine {_machine()} token {self.token}"
        handle = os.open(self._path, os.O_WRONLY)
        try:
            os.ftruncate(handle, os.pwrite(handle, f"{facts} beat {self._beats:010d}\n".encode(), 0))
        finally:
            os.close(handle)


@contextmanager
def claim_run_folder(folder: Path, lost: Callable[[str], None] = lambda why: None) -> Iterator[Claim | None]:
    """Hold the run folder for this job alone, and show that every rank sees the same one. Collective.

    Yields rank 0's claim. Raises RunFailed on all ranks where another live job holds the folder, or where a rank does
    not see rank 0's file.
    """
    rank, claim, problem = dist.get_rank(), None, None
    told: list[str] = [""]
    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            claim = Claim(folder, lost)
            told = [claim.token]
        except InUse as error:
            problem = f"is {error}: wait for its end or name another folder"
        except OSError as error:
            problem = f"cannot be written ({error.strerror}): name a folder that can"
    dist.broadcast_object_list(told, src=0)
    if rank != 0 and told[0]:
        try:
            seen = _read(folder / ".claim")
        except OSError as error:
            seen = str(error)
        if f" token {told[0]} " not in seen:
            problem = f"is not the same folder on rank {rank} ({socket.gethostname()}) as on rank 0: it must be shared"
    try:
        agree(f"job.dump_folder = {str(folder)!r} {problem}" if problem else None)
        yield claim
    finally:
        if claim is not None:
            claim.release()


def _lock(handle: int, path: Path) -> bool:
    """Whether this storage has locks; raises InUse where another process keeps this one."""
    deadline = time.monotonic() + _DYING_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise InUse(f"in use by another job ({_owner(_read(path))})") from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            logger.warning("%s: no locks on this storage (%s): heartbeats alone keep a second job out", path, error)
            return False


def _watch(path: Path, owner: str, seconds: float) -> None:
    """Return when the owner has been silent for so long; raise InUse as soon as it shows life."""
    logger.warning("%s is held by %s: watching for %g s whether it lives", path, _owner(owner), seconds)
    deadline, over = time.monotonic() + seconds, False
    while not over:
        over = time.monotonic() > deadline  # looked at before the file: a suspended watcher sees what it missed
        text = _read(path)
        if not text:
            return  # released
        if text != owner:
            raise InUse(f"in use by another job ({_owner(text)})")
        time.sleep(min(0.5, seconds / 10))
    logger.warning("%s gave no sign of life: its claim has lapsed", _owner(owner))


def _read(path: Path) -> str:
    try:
        with open(path, errors="replace") as file:  # opened anew: that is when NFS asks for the newest
            return file.read(500)
    except FileNotFoundError:
        return ""


def _owner(text: str) -> str:
    return text.split(" machine ")[0].strip() or "starting"


def _is_of_this_machine(owner: str) -> bool:
    return f" machine {_machine()} " in owner


def _lives(owner: str) -> bool:
    """Whether a process of this machine has the owner's pid."""
    if not (found := re.search(r" pid (\d+) ", owner)):
        return True
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _machine() -> str:
    """Names a running system in whose numbering a pid means something: host, boot and, of a container, its own pids."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts).replace(" ", "")


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
