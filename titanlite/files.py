"""Locks in a folder that several users may share: who may write a file of the cache, and what killed processes left.

Refuses to make work wrong where a lock does not hold: files are written aside and renamed, whole or not at all.
"""

import contextlib
import fcntl
import glob
import os
import socket
from typing import IO


def open_lock(path: str) -> IO[bytes]:
    """The lock file, made if need be. That of another user is only read, which is enough to lock it on a local disk."""
    try:
        return open(path, "ab")
    except PermissionError:
        return open(path, "rb")


def try_lock(file: IO[bytes]) -> bool | None:
    """True: it is ours until the file is closed. False: another process holds it. None: the file system knows no locks;
    work may then be done twice."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def temporary_prefix(path: str) -> str:
    """Of the names under which this host writes the file. Another host may not see our lock, so that what is left under
    its names may still be written."""
    return f"{os.path.basename(path)}.{socket.gethostname()}."


def remove_leftovers(path: str) -> None:
    """Of processes of this host that were killed while they wrote the file. Those of another user may have to stay."""
    for leftover in glob.glob(glob.escape(os.path.join(os.path.dirname(path), temporary_prefix(path))) + "*.tmp"):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.unlink(leftover)
