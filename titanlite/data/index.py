"""Where the records of a jsonl file begin: an index of byte offsets, built once and shared by all ranks and jobs.

Owns the index file: its format, its name (content, never time stamps: a copied corpus stays valid), its safe creation
by several processes at once, and what ends that before it is done. Refuses to interpret records.
"""

import contextlib
import hashlib
import mmap
import os
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from tqdm import tqdm

from titanlite.data.files import shown
from titanlite.files import open_lock, remove_leftovers, replacing, try_lock
from titanlite.log import logger

_FORMAT = 1  # part of the key: a new format never reads an old file
_MAGIC = b"titanlite-index\n"
_HEADER = struct.Struct("<16s16sQQI12x")  # magic, key, bytes of the jsonl file, records, crc32; 64 bytes
_SCAN_BYTES = 1 << 20  # the block stays in the processor's cache; larger blocks scanned slower
_LOG_SECONDS = 10.0


def cache_folder(cache_dir: str) -> str:
    """The folder that data.cache_dir means; empty: $XDG_CACHE_HOME/titanlite, else ~/.cache/titanlite."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.expanduser(cache_dir or os.path.join(cache, "titanlite"))


class WritingStopped(Exception):
    """The writing of an index or a cache was given up because its caller was asked to stop."""


class Index:
    """Where the records of a jsonl file lie. Threads may share it."""

    def __init__(self, path: str, mapped: mmap.mmap) -> None:
        self._path, self._mapped = path, mapped
        self._bounds = np.frombuffer(mapped, "<i8", offset=_HEADER.size)
        self.num_records = len(self._bounds) - 1

    def bounds(self) -> np.ndarray:
        """int64 [num_records + 1], memory-mapped; record k is bytes [b[k], b[k + 1]). Raises OSError where the file has
        been cut off: to read it there would end the process by a signal."""
        if self._mapped.size() != len(self._mapped):
            raise self.changed()
        return self._bounds

    def changed(self) -> OSError:
        """What is said where it is not what it was."""
        return OSError(f"its index {self._path} was changed during the run; start again, which builds it anew")

    def forget(self) -> None:
        """The index is not that of the file: let the next start build it."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)


def load_index(path: str, size: int, content: str, cache_dir: str, stop: Callable[[], bool] = lambda: False) -> Index:
    """The index of a jsonl file with this size and content (a hash): taken from `cache_dir` or built there, while other
    processes wait for it.

    A record is what a newline ends; the empty piece after the last newline is none. `stop` is asked for each MB that is
    scanned, and while another process builds: WritingStopped where it says yes. Raises ValueError where the folder
    cannot be written, and where the file changes meanwhile.
    """
    key = hashlib.blake2b(f"{_FORMAT} {size} {content}".encode(), digest_size=16).digest()
    folder = cache_folder(cache_dir)
    index_path = os.path.join(folder, f"jsonl-{key.hex()}.index")
    index = _open(index_path, key, size)
    if index is not None:
        return index
    try:
        os.makedirs(folder, exist_ok=True)
        with _lock(index_path + ".lock", path, stop) as alone:
            index = _open(index_path, key, size)  # another process may have built it meanwhile
            if index is None:
                if os.path.exists(index_path):
                    logger.warning(f"{index_path} is damaged: building it again")
                _build(path, size, key, index_path, stop, clean_up=alone)
                index = _open(index_path, key, size)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir = {cache_dir!r}: cannot write the index of {shown(path)} to {folder} ({error.strerror}); "
            "name a folder that can be written and has room"
        ) from error
    assert index is not None, f"{index_path} is not what was just written"
    return index


def _open(index_path: str, key: bytes, size: int) -> Index | None:
    """The index, or None where the file is absent, of another format, cut short or damaged."""
    try:
        with open(index_path, "rb") as file:
            if os.fstat(file.fileno()).st_size < _HEADER.size:
                return None
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"data.cache_dir: cannot read {index_path} ({error.strerror})") from error
    magic, its_key, its_size, num_records, crc = _HEADER.unpack_from(mapped)
    whole = len(mapped) == _HEADER.size + 8 * (num_records + 1)
    if whole and (magic, its_key, its_size) == (_MAGIC, key, size):
        index = Index(index_path, mapped)
        if _checksum(zlib.crc32(index.bounds().data), num_records) == crc:
            return index
    return None


def _checksum(crc: int, num_records: int) -> int:
    return zlib.crc32(num_records.to_bytes(8, "little"), crc)


@contextlib.contextmanager
def _lock(path: str, of: str, stop: Callable[[], bool]) -> Iterator[bool]:
    """Hold the lock file; yields False where the file system knows no locks: work is then duplicated, not wrong."""
    with open_lock(path) as file:
        waited, told = 0.0, 0.0
        while (held := try_lock(file)) is False:
            _heed(stop, of)
            if waited >= told:
                logger.info(f"waiting for another process that builds an index ({path} is locked)")
                told += _LOG_SECONDS
            time.sleep(0.05)
            waited += 0.05
        yield bool(held)


def _heed(stop: Callable[[], bool], path: str) -> None:
    if stop():
        raise WritingStopped(f"stopped while {shown(path)} was indexed")


def _build(path: str, size: int, key: bytes, index_path: str, stop: Callable[[], bool], clean_up: bool) -> None:
    if clean_up:
        remove_leftovers(index_path)
    with replacing(index_path) as out:
        out.write(bytes(_HEADER.size))
        start, before = time.monotonic(), stamp(path)
        crc, num_records = 0, -1
        for bounds in _scan(path, size):
            _heed(stop, path)
            crc = zlib.crc32(bounds.data, crc)
            num_records += len(bounds)
            out.write(bounds.data)
        if stamp(path) != before:  # the samples in its name may not show it: the index would pass for good
            raise ValueError(f"{shown(path)} changed while it was indexed; start again once it is complete")
        out.seek(0)
        out.write(_HEADER.pack(_MAGIC, key, size, num_records, _checksum(crc, num_records)))
    logger.info(f"indexed {shown(path)}: {num_records:,} records, {size:,} bytes in {time.monotonic() - start:.1f} s")


def stamp(path: str) -> tuple[int, int, int]:
    """Changes with whatever is written to the file."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"cannot read {shown(path)} ({error.strerror})") from error
    return status.st_ino, status.st_size, status.st_mtime_ns


def _scan(path: str, size: int) -> Iterator[np.ndarray]:
    """0, then the end of each record, in memory of one block. Shows a bar on a terminal, log lines elsewhere."""
    buffer = np.empty(_SCAN_BYTES, np.uint8)
    position, end, next_log = 0, 0, time.monotonic() + _LOG_SECONDS
    bar = tqdm(
        total=size,
        desc=f"indexing {shown(os.path.basename(path))}",
        unit="B",
        unit_scale=True,
        delay=1,
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    yield np.zeros(1, "<i8")
    with bar:
        for count in _read_blocks(path, buffer):
            ends = np.flatnonzero(buffer[:count] == ord("\n")).astype("<i8") + (position + 1)
            position += count
            end = int(ends[-1]) if len(ends) else end
            yield ends
            bar.update(count)
            if bar.disable and time.monotonic() >= next_log:
                logger.info(f"indexing {shown(path)}: {position / size:.0%} of {size:,} bytes")
                next_log = time.monotonic() + _LOG_SECONDS
    if position != size:
        raise ValueError(f"{shown(path)} changed from {size:,} to {position:,} bytes while it was indexed; start again")
    if end != size:  # the last record has no newline
        yield np.array([size], "<i8")


def _read_blocks(path: str, buffer: np.ndarray) -> Iterator[int]:
    """Fill `buffer` again and again; yields the number of bytes in it."""
    try:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer.data):
                yield count
    except OSError as error:
        raise ValueError(f"cannot read {shown(path)} ({error.strerror})") from error
