"""What ranks agree on, and what a run leaves on disk about itself.

It knows nothing about training: callers say what happened.
"""

import ctypes
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from titanlite.log import logger

T = TypeVar("T", bound=Any)

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


class RunFailed(Exception):
    """A run ends here, on every rank alike; its text is the one line that the user reads."""


class PeerLost(RunFailed):
    """Another rank died or failed: each rank that is left says so, for nobody knows which ones are."""


def keep_freed_memory() -> None:
    """On a machine without a GPU, let this process keep the memory that it frees, where its C library is glibc.

    It would give each big tensor back to the system and take it again, page by page, at every step. Has an effect on
    what is allocated from now on; costs as much memory as a step holds at its peak, all the time.
    """
    if not torch.cuda.is_available() and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


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


def summed(facts: T) -> T:
    """The sums over all ranks, modulo 2^64, of a dataclass of whole numbers. Collective: one small all-reduce on the
    CPU, for which no device waits."""
    values = torch.tensor([value % 2**64 for value in astuple(facts)], dtype=torch.uint64).view(torch.int64)
    dist.all_reduce(values)
    return type(facts)(*values.view(torch.uint64).tolist())


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
    """An error on any rank inside is raised on every rank at the end. Collective.

    Of a user's mistake (ValueError, OSError) the text is all there is to say; of another error the log keeps the place.
    """
    problem = None
    try:
        yield
    except (ValueError, OSError) as error:
        problem = str(error) or repr(error)
    except Exception as error:
        logger.exception("not foreseen:")
        problem = f"{type(error).__name__}: {error}"
    agree(problem)
