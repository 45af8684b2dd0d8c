"""Shards, the files of the token cache: how a source is cut into them, their names and their format.

A name is made of content, tokenizer and policy, never of time stamps: a copied corpus finds its shards, and a stale one
is never found. Refuses to know how shards are written safely (shard_writer.py) and read as documents (reader.py).

A shard file: header, tokens, a table (per document and one more: tokens and text bytes before it), the number of
documents of each file, a checksum per block of tokens, and the bad records as lines of JSON [document, reason]. The
header holds a checksum of all but the tokens, verified at opening; a block of tokens is verified at its first use.
"""

import functools
import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from titanlite.data.source import Source
from titanlite.log import logger

BLOCK_BYTES = 1 << 20  # of tokens, with one checksum: verified in a millisecond

_FORMAT = 1  # part of the key: a new format never reads an old shard
_MAGIC = b"titanlite-tokens"
_HEADER = struct.Struct("<16s16sIIQQQQI44x")
_PIECES = 64  # into which a large file is cut, while that keeps a shard between these bytes of source
_SMALL_SHARD, _LARGE_SHARD = 1 << 24, 1 << 26
_DOCUMENT_BYTES = 64  # that a document counts at least, so that a shard holds about a million of them at most
_UNPACKED = {"jsonl.gz": 4, "jsonl.zst": 4, "parquet": 2}  # about how many bytes of text a byte on disk holds


@dataclass(frozen=True)
class Portion:
    """What makes one shard: some consecutive files of a source, or consecutive documents of one file."""

    name: str
    """Of the shard's file."""
    key: bytes
    files: range
    documents: range | None
    """Numbers in the source; None without random access, where a portion is whole files."""
    weight: int
    """About how many bytes of text, for progress and estimates."""


def plan_shards(source: Source, fingerprint: str) -> list[Portion]:
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
        portions.append(Portion(f"tokens-{key.hex()}.shard", key, range(first, last), documents, weight))
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
    def open(cls, folder: str, portion: Portion) -> "Shard | None":
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
