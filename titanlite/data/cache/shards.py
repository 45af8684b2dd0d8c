"""Shards, the files of the token cache: how a source is cut into them, their names and their format.

A name is made of content, tokenizer and policy, never of time stamps: a copied corpus finds its shards, and a stale one
is never found. Refuses to know how shards are read as documents (reader.py).

A shard file: header, tokens, a table (per document and one more: tokens and text bytes before it), the number of
documents of each file, a checksum per block of tokens, and the bad records as lines of JSON [document, reason]. The
header holds a checksum of all but the tokens, verified at opening; a block of tokens is verified at its first use.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, NamedTuple

import numpy as np

from titanlite.data.source import Source
from titanlite.files import open_lock, remove_leftovers, replacing, try_lock
from titanlite.log import logger

BLOCK_BYTES = 1 << 20  # of tokens, with one checksum: verified in a millisecond

_FORMAT = 1  # part of the key: a new format never reads an old shard
_SPOOL_BYTES = 1 << 24  # of a shard's table; more of it goes to a file without a name
_COPY_BYTES = 1 << 20
_REPORT_BYTES = 1 << 20  # of text between two words on progress
_BATCH_TOKENS, _BATCH_DOCUMENTS = 1 << 16, 1 << 12
_MAGIC = b"titanlite-tokens"
_HEADER = struct.Struct("<16s16sIIQQQQI44x")
_PIECES = 64  # into which a large file is cut, while that keeps a shard between these bytes of source
_SMALL_SHARD, _LARGE_SHARD = 1 << 24, 1 << 26
_DOCUMENT_BYTES = 64  # that a document counts at least, so that a shard holds about a million of them at most
_UNPACKED = {"jsonl.gz": 4, "jsonl.zst": 4, "parquet": 2}  # about how many bytes of text a byte on disk holds


@dataclass(frozen=True)
class ShardPlan:
    """What makes one shard: some consecutive files of a source, or consecutive documents of one file."""

    name: str
    """Of the shard's file."""
    key: bytes
    files: range
    documents: range | None
    """Numbers in the source; None without random access, where a portion is whole files."""
    weight: int
    """About how many bytes of text, for progress and estimates."""


def plan_shards(source: Source, fingerprint: str) -> list[ShardPlan]:
    """How a source is cut into shards, in document order: the same for every job that reads these files."""
    portions = []
    for first, last, begin, end in _cuts(source):
        files = source.files[first:last]
        weight = sum(file.size * _UNPACKED.get(file.kind, 1) for file in files)
        documents = None
        if source.numbering is not None:
            start, behind = int(source.numbering.first(first)), int(source.numbering.first(last))
            documents = range(start + begin, start + end)
            if not documents:
                continue  # empty files
            weight = weight * len(documents) // (behind - start)
        text_field = source.text_field if any(file.kind not in ("text", "python") for file in files) else ""
        content = [[file.kind, file.size, file.digest] for file in files]
        decides = [_FORMAT, fingerprint, text_field, content, None if documents is None else [begin, end]]
        key = hashlib.blake2b(json.dumps(decides).encode(), digest_size=16).digest()
        portions.append(ShardPlan(f"tokens-{key.hex()}.shard", key, range(first, last), documents, weight))
    return portions


def _cuts(source: Source) -> Iterator[tuple[int, int, int, int]]:
    """(first file, file behind the last, first record, record behind the last), records counted from the first file's.

    A large file is cut by itself, so that its shards stay valid whatever stands beside it. Small ones share a shard.
    """
    start = group_bytes = group_records = 0
    for f, file in enumerate(source.files):
        records = 0
        if source.numbering is not None:
            records = int(source.numbering.first(f + 1) - source.numbering.first(f))
        size = max(file.size * _UNPACKED.get(file.kind, 1), records * _DOCUMENT_BYTES)
        if f > start and max(size, group_bytes) >= _SMALL_SHARD:
            yield start, f, 0, group_records
            start, group_bytes, group_records = f, 0, 0
        if size < _SMALL_SHARD:
            group_bytes, group_records = group_bytes + size, group_records + records
        else:
            pieces = math.ceil(size / min(max(size // _PIECES, _SMALL_SHARD), _LARGE_SHARD))
            pieces = max(1, min(pieces, records))  # one without random access
            for i in range(pieces):
                yield f, f + 1, records * i // pieces, records * (i + 1) // pieces
            start = f + 1
    if start < len(source.files):
        yield start, len(source.files), 0, group_records


class Header(NamedTuple):
    """The first 128 bytes of a shard file."""

    key: bytes
    width: int
    """Bytes per token: 2 where the vocabulary allows it, else 4."""
    num_files: int
    num_documents: int
    num_tokens: int
    num_bad: int
    bad_size: int
    """Bytes of the lines of bad records."""
    crc: int = 0
    """Of this header with a crc of 0, then of all that follows the tokens."""

    def pack(self) -> bytes:
        return _HEADER.pack(_MAGIC, *self)

    @classmethod
    def unpack(cls, data: np.ndarray, key: bytes) -> "Header | None":
        """None where the file does not begin as the shard of this key, or where its length is not what it says."""
        if len(data) < _HEADER.size:
            return None
        magic, *fields = _HEADER.unpack(data[: _HEADER.size].tobytes())
        header = cls(*fields)
        whole = magic == _MAGIC and header.key == key and header.width in (2, 4)
        return header if whole and len(data) == _HEADER.size + sum(header.sections()) else None

    def sections(self) -> list[int]:
        """Bytes of tokens (filled up to a multiple of 8), table, documents of files, checksums, bad records."""
        size = self.width * self.num_tokens
        table, counts = 16 * (self.num_documents + 1), 8 * self.num_files
        return [-(-size // 8) * 8, table, counts, -(-size // BLOCK_BYTES) * 4, self.bad_size]


class Shard:
    """A mapped shard file. Threads may share it."""

    def __init__(self, path: str, header: Header, data: np.ndarray) -> None:
        self.path, self.header = path, header
        ends = np.cumsum(header.sections())
        tokens, table, counts, checksums, bad = np.split(data[_HEADER.size :], ends[:-1])
        self._bytes = tokens[: header.width * header.num_tokens]
        self.tokens = self._bytes.view("<u2" if header.width == 2 else "<i4")
        """[num_tokens], uint16 or int32."""
        self.table = table.view("<i8").reshape(-1, 2)
        """int64 [num_documents + 1, 2]: tokens and text bytes before each document."""
        self.counts = counts.view("<i8")
        """Documents of each file, int64 [num_files]."""
        self._checksums, self._bad = checksums.view("<u4"), bad
        self._state = np.zeros(len(self._checksums), np.uint8)  # of each block: 0 not verified, 1 good, 2 damaged

    @classmethod
    def open(cls, folder: str, portion: ShardPlan) -> "Shard | None":
        """The portion's shard, verified but for its tokens. None where there is none, and, with a warning, where it is
        damaged."""
        path = os.path.join(folder, portion.name)
        try:
            data = np.asarray(np.memmap(path, np.uint8, "r"))  # a plain view: indexing a memmap object is slower
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ValueError(f"data.cache_dir: cannot read {path} ({error.strerror})") from error
        except ValueError:  # an empty file cannot be mapped
            data = np.empty(0, np.uint8)
        header = Header.unpack(data, portion.key)
        if header is not None:
            rest = data[_HEADER.size + header.sections()[0] :]
            if zlib.crc32(rest.data, zlib.crc32(Header(*header[:-1]).pack())) == header.crc:
                return cls(path, header, data)
        logger.warning(f"{path} is damaged: this part of the token cache has to be written again")
        return None

    def damaged(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Which of the spans of tokens (starts and ends, int64 [n]) touch a damaged block, bool [n]."""
        if (self._state == 1).all():
            return np.zeros(len(starts), bool)
        width, num_blocks = self.header.width, len(self._state)
        first = starts * width // BLOCK_BYTES
        behind = np.where(ends > starts, (ends * width - 1) // BLOCK_BYTES + 1, first)
        opened, closed = (np.bincount(block, minlength=num_blocks + 1) for block in (first, behind))
        touched = np.cumsum(opened - closed)[:num_blocks] > 0
        for b in np.flatnonzero(touched & (self._state == 0)).tolist():
            block = self._bytes[b * BLOCK_BYTES : (b + 1) * BLOCK_BYTES]
            self._state[b] = 1 if zlib.crc32(block.data) == self._checksums[b] else 2
        before = np.concatenate(([0], np.cumsum(self._state == 2)))
        return np.asarray(before[behind] > before[first])

    @functools.cached_property
    def bad(self) -> dict[int, str]:
        """Why a document of the shard is a bad record."""
        return dict(json.loads(line) for line in self._bad.tobytes().splitlines())


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
def shard_lock(folder: str, portion: ShardPlan) -> Iterator[bool | None]:
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
    documents: Iterable[Tokenised], portion: ShardPlan, folder: str, width: int, clean_up: bool
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

    def __init__(self, out: IO[bytes], table: IO[bytes], bad: IO[bytes], portion: ShardPlan, width: int) -> None:
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
