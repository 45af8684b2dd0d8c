"""Rows: a source's tokens cut every seq_len tokens, with what is known about each row.

Owns where rows begin and end (packing "split"), the pieces of documents in them, the ledger, and the digests by which
anyone can compare two runs. Refuses to look for documents in the ids: it knows their lengths.
"""

import hashlib
from collections import deque
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from titanlite.data.order import splitmix64
from titanlite.data.stream import Chunk, Ledger, SourceCursor

_GAMMA = 0x9E3779B97F4A7C15


def row_digest(row: np.ndarray) -> int:
    """BLAKE2b-64 of the row's tokens as little-endian int32, read as a little-endian number."""
    return int.from_bytes(hashlib.blake2b(row.astype("<i4").tobytes(), digest_size=8).digest(), "little")


def fingerprint_part(row_digests: np.ndarray, first_position: int) -> int:
    """Share of consecutive rows in a step's fingerprint: sum of splitmix64(digest + position * gamma) modulo 2^64.

    row_digests: uint64 [n]; first_position: place of the first of them in the step's global batch. Shares add up to
    the fingerprint modulo 2^64.
    """
    positions = np.arange(first_position, first_position + len(row_digests), dtype=np.uint64)
    return int(splitmix64(row_digests + positions * np.uint64(_GAMMA)).sum(dtype=np.uint64))


@dataclass(frozen=True, eq=False)
class Rows:
    """Consecutive rows of a source. A row is a sequence of pieces of documents; three arrays per row describe them."""

    tokens: np.ndarray
    """int32 [n, seq_len + 1]. split: the last token of a row is the first of the next."""
    starts: list[np.ndarray]
    """Positions in [0, seq_len] where a piece begins; int64, ascending, the first is 0. split: below seq_len, because
    a document whose first token is a row's last begins in the next row."""
    counters: list[np.ndarray]
    """Counter of each piece's document, int64; -1: a pad."""
    offsets: list[np.ndarray]
    """Index in its document of each piece's first token, int64."""


class Packer(Protocol):
    """Makes a source's rows out of chunks that come in the order of the stream, from a cursor on."""

    cursor: SourceCursor
    """Of the next row."""

    def missing(self, num_rows: int) -> bool:
        """Whether the next `num_rows` rows need more chunks."""

    def append(self, chunk: Chunk) -> None:
        """Take the next chunk. Raises ValueError when documents are not what they were at the cursor."""

    def end(self) -> None:
        """No chunk follows."""

    def unread(self) -> int:
        """Tokens of the chunks that the ledger does not count as read yet."""

    def take(self, num_rows: int, first: int, last: int) -> Rows:
        """Move on by `num_rows` rows and return those from `first` to before `last` of them (a rank's slice)."""


@dataclass(frozen=True, eq=False)
class _Placed:
    """A chunk at its place in the stream."""

    chunk: Chunk
    begin: int
    """Stream index of the first token."""
    ends: np.ndarray
    """Stream index behind the last token of each document, int64 [documents]."""
    starts: np.ndarray
    """Stream index of the first token of each document that has tokens, int64."""
    counters: np.ndarray
    """Counter of each of those documents, int64."""


class RowPacker:
    """packing = "split": rows of seq_len tokens, one after the other, whatever documents they cut."""

    def __init__(self, seq_len: int, cursor: SourceCursor) -> None:
        self.cursor = cursor
        self.seq_len = seq_len
        self._placed: deque[_Placed] = deque()
        self._end = cursor.row * seq_len - cursor.offset  # stream index behind the last chunk
        self._next_counter = cursor.document

    def missing(self, num_rows: int) -> bool:
        return self._end <= (self.cursor.row + num_rows) * self.seq_len

    def append(self, chunk: Chunk) -> None:
        assert chunk.counter == self._next_counter, "chunks come in the order of the stream"
        resumed = not self._placed and self.cursor.row > 0
        if resumed and len(chunk.lengths) and chunk.lengths[0] <= self.cursor.offset:
            raise ValueError(
                f"cannot resume at token {self.cursor.offset} of document {chunk.counter}, which has "
                f"{chunk.lengths[0]}: the corpus or the tokenizer is not that of the checkpoint"
            )
        ends = self._end + np.cumsum(chunk.lengths)
        some = np.flatnonzero(chunk.lengths > 0)
        self._placed.append(_Placed(chunk, self._end, ends, (ends - chunk.lengths)[some], chunk.counter + some))
        self._end += len(chunk.ids)
        self._next_counter += len(chunk.lengths)

    def end(self) -> None:
        """What is left is less than a row."""

    def unread(self) -> int:
        counted = self.cursor.row * self.seq_len + (self.cursor.row > 0) + self.cursor.ledger.carried
        return self._end - counted

    def take(self, num_rows: int, first: int, last: int) -> Rows:
        row = self.cursor.row
        starts = np.concatenate([placed.starts for placed in self._placed])
        counters = np.concatenate([placed.counters for placed in self._placed])
        rows = self._cut((row + first) * self.seq_len, last - first, starts, counters)
        self.cursor = self._advance(num_rows, starts)
        while self._placed[0].chunk.counter + len(self._placed[0].chunk.lengths) <= self.cursor.document:
            self._placed.popleft()
        return rows

    def _cut(self, begin: int, num_rows: int, starts: np.ndarray, counters: np.ndarray) -> Rows:
        """Rows from stream index `begin` on. starts: stream indices of document starts, ascending."""
        if not num_rows:  # a mixture may deal none of a source's rows to this rank
            return Rows(np.empty((0, self.seq_len + 1), np.int32), [], [], [])
        end = begin + num_rows * self.seq_len + 1
        parts = [p.chunk.ids[max(0, begin - p.begin) : max(0, end - p.begin)] for p in self._placed]
        tokens = sliding_window_view(np.concatenate(parts), self.seq_len + 1)[:: self.seq_len]
        edges = begin + self.seq_len * np.arange(num_rows + 1)
        rows = Rows(tokens, [], [], [])
        # A row's first piece belongs to the document that is open at its edge; the others begin in the row.
        opened = np.searchsorted(starts, edges[:-1], side="right") - 1
        behind = np.searchsorted(starts, edges[1:])
        for edge, i, j in zip(edges.tolist(), opened.tolist(), behind.tolist(), strict=False):
            inside = starts[i:j] - edge
            rows.starts.append(np.maximum(inside, 0))
            rows.counters.append(counters[i:j])
            rows.offsets.append(np.maximum(-inside, 0))
        return rows

    def _advance(self, num_rows: int, starts: np.ndarray) -> SourceCursor:
        old = self.cursor
        begin, end = old.row * self.seq_len, (old.row + num_rows) * self.seq_len  # tokens begin + 1 .. end are new
        at = next(p for p in self._placed if p.begin + len(p.chunk.ids) > end)
        k = int(np.searchsorted(at.ends, end, side="right"))
        document = at.chunk.counter + k
        firsts = np.searchsorted(starts, [begin, end], side="right")
        # The document at the old cursor was counted when it was begun, but at the very start nothing was.
        first_new = old.document + (old.row > 0)
        new = Ledger(targets=num_rows * self.seq_len - int(firsts[1] - firsts[0]))
        for placed in self._placed:
            first = placed.chunk.counter
            new += self._count(placed, slice(max(0, first_new - first), max(0, document + 1 - first)))
        ledger = replace(old.ledger + new, carried=int(at.ends[k]) - (end + 1))
        assert ledger.closes(), ledger
        return SourceCursor(old.row + num_rows, document, end - int(at.ends[k] - at.chunk.lengths[k]), ledger)

    def _count(self, placed: _Placed, begun: slice) -> Ledger:
        """What the documents that were begun add to the ledger."""
        chunk, ends = placed.chunk, placed.ends[begun]
        lengths = chunk.lengths[begun]
        fitting = (lengths > 0) & (lengths <= self.seq_len + 1)
        row_ends = ((ends - lengths) // self.seq_len + 1) * self.seq_len  # of the row in which each begins
        return Ledger(
            tokens_read=int(lengths.sum()),
            document_first=int(np.count_nonzero(lengths)),
            bytes=int(chunk.bytes[begun].sum()),
            bad_records=int(np.count_nonzero(chunk.bad[begun])),
            held_out=int(np.count_nonzero(chunk.held_out[begun])),
            fitting=int(np.count_nonzero(fitting)),
            cut=int(np.count_nonzero(fitting & (ends - 1 > row_ends))),
        )
