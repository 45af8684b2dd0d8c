"""Files in folders that others read and write too: whole or not at all, and by one writer at a time.

Owns how a file is written aside, fsynced and renamed, the locks of those who write the same one, and the removal of
what killed processes left. A reader sees the old file or the new one. Refuses to make work wrong where a lock does not
hold.
"""

import contextlib
import fcntl
import glob
import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A new file, which takes the place of `path` when the block ends. After an error all is as it was."""
    temporary = os.path.join(os.path.dirname(path), f"{_temporary_prefix(path)}{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path))
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def sync_folder(path: str) -> None:
    """Make renames in it last."""
    descriptor = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` by `content`."""
    with replacing(path) as out:
        out.write(json.dumps(content, indent=2).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; empty where nothing was written yet."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return {}


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


def remove_leftovers(path: str | Path) -> None:
    """Of processes of this host that were killed while they wrote the file. Those of another user may have to stay."""
    for leftover in glob.glob(glob.escape(os.path.join(os.path.dirname(path), _temporary_prefix(path))) + "*.tmp"):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.unlink(leftover)


def _temporary_prefix(path: str | Path) -> str:
    """Of the names under which this host writes the file. Another host may not see our lock, so that what is left under
    its names may still be written."""
    return f"{os.path.basename(path)}.{socket.gethostname()}."
