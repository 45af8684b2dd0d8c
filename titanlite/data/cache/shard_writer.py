"""Writing one shard: who may, and how it comes to be: under a name of its own, then fsync and rename, whole or not at
all. What a shard is, shards.py says."""

import contextlib
import itertools
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple

import numpy as np

from titanlite.data.cache.shards import BLOCK_BYTES, Header, Portion
from titanlite.files import open_lock, remove_leftovers, replacing, try_lock

_SPOOL_BYTES = 1 << 24  # of a shard's table; more of it goes to a file without a name
_COPY_BYTES = 1 << 20
_REPORT_BYTES = 1 << 20  # of text between two words on progress
_BATCH_TOKENS, _BATCH_DOCUMENTS = 1 << 16, 1 << 12


class Tokenised(NamedTuple):
    """A document of a shard."""

    file: int
    """Index of its file in the source."""
    ids: np.ndarray
    """int32 [tokens]; none for a bad record."""
    num_bytes: int
    """UTF-8 bytes of its text."""
    reason: str = ""
    """Why it is a bad record."""


@contextlib.contextmanager
def shard_lock(folder: str, portion: Portion) -> Iterator[bool | None]:
    """Try to be the one who writes a shard. True: we are. False: another process is. None: the file system knows no
    locks; work may then be done twice, which is not wrong."""
    path = os.path.join(folder, portion.name + ".lock")
    with open_lock(path) as file:
        held = try_lock(file)
        yield held
        if held is not False:  # the shard is there: whoever gets the lock of an unlinked file finds it
            with contextlib.suppress(FileNotFoundError, PermissionError):  # that of another user stays
                os.unlink(path)


def write_shard(
    documents: Iterable[Tokenised], portion: Portion, folder: str, width: int, clean_up: bool
) -> Iterator[int]:
    """Write the portion's shard, with `width` bytes per token. Yields the bytes of text that are done, now and then.

    clean_up: nobody else is writing it, so what killed processes left is removed.
    """
    path = os.path.join(folder, portion.name)
    if clean_up:
        remove_leftovers(path)
    with replacing(path) as out, _spool(folder) as table, _spool(folder) as bad:
        builder = _Builder(out, table, bad, portion, width)
        reported = 0
        for document in documents:
            builder.add(document)
            if builder.text_bytes - reported >= _REPORT_BYTES:
                reported = builder.text_bytes
                yield reported
        builder.finish()


class _Builder:
    """Lays out a shard file as documents come, in the memory of a batch, a block and two spools."""

    def __init__(self, out: IO[bytes], table: IO[bytes], bad: IO[bytes], portion: Portion, width: int) -> None:
        self._out, self._table, self._bad, self._portion, self._width = out, table, bad, portion, width
        self._batch: list[Tokenised] = []  # arrays cost less per document when there are many of them at once
        self._batch_tokens = 0
        self._tokens = bytearray()  # not written yet
        self._counts = np.zeros(len(portion.files), "<i8")
        self._checksums: list[int] = []
        self._before = np.zeros((1, 2), "<i8")  # the table's last row
        self._num_bad = self.text_bytes = 0
        out.write(Header(portion.key, width, 0, 0, 0, 0, 0).pack())
        table.write(self._before.tobytes())

    def add(self, document: Tokenised) -> None:
        self._batch.append(document)
        self.text_bytes += document.num_bytes
        self._batch_tokens += len(document.ids)
        if self._batch_tokens >= _BATCH_TOKENS or len(self._batch) >= _BATCH_DOCUMENTS:
            self._take_batch()

    def _take_batch(self) -> None:
        files, arrays, sizes, reasons = zip(*self._batch, strict=True)
        ids = np.concatenate(arrays)
        assert ids.max(initial=0) < 1 << min(8 * self._width, 31), "an id beyond the vocabulary"
        self._tokens += ids.astype(f"<u{self._width}").data
        while len(self._tokens) >= BLOCK_BYTES:
            self._write_block()
        for i in np.flatnonzero([reason != "" for reason in reasons]).tolist():
            self._bad.write(json.dumps([int(self._counts.sum()) + i, reasons[i]]).encode() + b"\n")
            self._num_bad += 1
        rows = self._before + np.cumsum([[len(array) for array in arrays], sizes], axis=1).T
        self._table.write(rows.astype("<i8").tobytes())
        self._before = rows[-1:]
        self._counts += np.bincount(np.array(files) - self._portion.files.start, minlength=len(self._counts))
        self._batch, self._batch_tokens = [], 0

    def finish(self) -> None:
        if self._batch:
            self._take_batch()
        if self._tokens:
            self._write_block()
        num_tokens = int(self._before[0, 0])
        numbers = [len(self._counts), int(self._counts.sum()), num_tokens, self._num_bad, self._bad.tell()]
        header = Header(self._portion.key, self._width, *numbers)
        self._out.write(bytes(-self._width * num_tokens % 8))
        crc = zlib.crc32(header.pack())
        counts, checksums = self._counts.tobytes(), np.array(self._checksums, "<u4").tobytes()
        for part in itertools.chain(_parts(self._table), [counts, checksums], _parts(self._bad)):
            crc = zlib.crc32(part, crc)
            self._out.write(part)
        self._out.seek(0)
        self._out.write(Header(*header[:-1], crc=crc).pack())

    def _write_block(self) -> None:
        block = bytes(self._tokens[:BLOCK_BYTES])
        del self._tokens[:BLOCK_BYTES]
        self._checksums.append(zlib.crc32(block))
        self._out.write(block)


def _spool(folder: str) -> IO[bytes]:
    return tempfile.SpooledTemporaryFile(_SPOOL_BYTES, dir=folder)


def _parts(spool: IO[bytes]) -> Iterator[bytes]:
    spool.seek(0)
    while part := spool.read(_COPY_BYTES):
        yield part
