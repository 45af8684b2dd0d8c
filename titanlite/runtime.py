"""Process life: signals that ask for a stop, the claim on the run folder, what the run leaves on disk about itself.

It knows nothing about training: callers ask whether to stop and say what happened.
"""

import errno
import fcntl
import json
import os
import platform
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
import torch.distributed as dist

from titanlite.log import logger


class RunFailed(Exception):
    """A run ends here, on every rank alike; its text is the one line that the user reads."""


class StopSignal:
    """Remembers SIGTERM and SIGUSR1, the schedulers' words for "you will be preempted"."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace `path` by `content`, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; empty where nothing was written yet."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}


def describe_environment() -> dict[str, Any]:
    """Versions, git commit, host and devices: what a reader of the run's numbers will ask for."""
    packages = ("titanlite", "torch", "tiktoken", "numpy", "tensorboard")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "cuda": torch.version.cuda,
        "git": _git("rev-parse", "HEAD"),
        "git_changes": bool(_git("status", "--porcelain")),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "device": device,
        "devices": torch.cuda.device_count() if torch.cuda.is_available() else os.cpu_count(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "threads_per_rank": torch.get_num_threads(),
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # importable, but not installed
        return None


def _git(*arguments: str) -> str | None:
    here = Path(__file__).parent
    try:
        result = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


@contextmanager
def claim_run_folder(folder: Path) -> Iterator[None]:
    """Hold the run folder for this job alone, and show that every rank sees the same one. Collective.

    Raises RunFailed on all ranks where another live job holds it, or where a rank does not see rank 0's file.
    """
    rank, lock, problem = dist.get_rank(), None, None
    told: list[str] = [""]
    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / ".claim", "a+")  # noqa: SIM115  held until the job ends
            _lock(lock)
            told = [f"{socket.gethostname()} pid {os.getpid()} {secrets.token_hex(8)}"]
            lock.truncate(0)
            lock.write(told[0])
            lock.flush()
            os.fsync(lock.fileno())  # NFS sends a file that stays open to other nodes only now
        except BlockingIOError:
            owner = (folder / ".claim").read_text()
            problem = f"is in use by another job ({owner}): wait for its end or name another folder"
        except OSError as error:
            problem = f"cannot be written ({error.strerror}): name a folder that can"
    dist.broadcast_object_list(told, src=0)
    if rank != 0 and told[0]:
        try:
            seen = (folder / ".claim").read_text()
        except OSError as error:
            seen = str(error)
        if seen != told[0]:
            problem = f"is not the same folder on rank {rank} ({socket.gethostname()}) as on rank 0: it must be shared"
    try:
        agree(f"job.dump_folder = {str(folder)!r} {problem}" if problem else None)
        yield
    finally:
        if lock is not None:
            lock.close()


def _lock(file: TextIO) -> None:
    """Raise BlockingIOError where another process keeps the lock; one that was killed just now gets a moment to die."""
    deadline = time.monotonic() + 5
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            logger.warning("%s: no locks on this storage (%s): a second job is not kept out", file.name, error.strerror)
            return


def agree(problem: str | None) -> None:
    """Raise the same RunFailed on every rank when any rank has a problem. Collective."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise RunFailed("; ".join(dict.fromkeys(p for p in problems if p)))


def agree_on(facts: dict[str, str]) -> None:
    """Raise the same RunFailed on every rank when ranks differ in one of these facts, given by name. Collective."""
    seen: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(seen, facts | {"host": socket.gethostname()})
    for name in facts:
        for rank, its in enumerate(seen):
            if its[name] != seen[0][name]:
                raise RunFailed(
                    f"{name} is not the same on every rank: {seen[0][name]} on rank 0 ({seen[0]['host']}),"
                    f" {its[name]} on rank {rank} ({its['host']}); all ranks must read the same files"
                )


@contextmanager
def agreed() -> Iterator[None]:
    """A user's mistake (ValueError, OSError) on any rank inside is raised on every rank at the end. Collective."""
    problem = None
    try:
        yield
    except (ValueError, OSError) as error:
        problem = str(error) or repr(error)
    agree(problem)
