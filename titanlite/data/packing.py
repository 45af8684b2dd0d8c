"""Rows: the token stream cut every seq_len tokens, with what is known about each row.

Owns where rows begin and end, the document starts in them, the ledger, and the digests by which anyone can compare
two runs. Refuses to look for documents in the ids: it knows their lengths.
"""

import hashlib
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from titanlite.data.stream import Chunk, Cursor, splitmix64

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
    """Consecutive rows of the stream."""

    tokens: np.ndarray
    """int32 [n, seq_len + 1]; the last token of a row is the first of the next."""
    starts: list[np.ndarray]
    """Per row the positions in [0, seq_len) where a document begins or, at 0, goes on; int64, ascending."""


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


class RowPacker:
    """Cuts rows out of chunks that come in the order of the stream, from a cursor on."""

    def __init__(self, seq_len: int, cursor: Cursor) -> None:
        self.cursor = cursor
        self.seq_len = seq_len
        self._placed: deque[_Placed] = deque()
        self._end = cursor.row * seq_len - cursor.offset  # stream index behind the last chunk
        self._next_counter = cursor.document

    def missing(self, num_rows: int) -> bool:
        """Whether the next `num_rows` rows need more chunks."""
        return self._end <= (self.cursor.row + num_rows) * self.seq_len

    def append(self, chunk: Chunk) -> None:
        """Take the next chunk. Raises ValueError when the document at the cursor is shorter than it was."""
        assert chunk.counter == self._next_counter, "chunks come in the order of the stream"
        resumed = not self._placed and self.cursor.row > 0
        if resumed and len(chunk.lengths) and chunk.lengths[0] <= self.cursor.offset:
            raise ValueError(
                f"cannot resume at token {self.cursor.offset} of document {chunk.counter}, which has "
                f"{chunk.lengths[0]}: the corpus or the tokenizer is not that of the checkpoint"
            )
        ends = self._end + np.cumsum(chunk.lengths)
        starts = (ends - chunk.lengths)[chunk.lengths > 0]
        self._placed.append(_Placed(chunk, self._end, ends, starts))
        self._end += len(chunk.ids)
        self._next_counter += len(chunk.lengths)

    def take(self, num_rows: int, first: int, last: int) -> Rows:
        """Move on by `num_rows` rows and return those from `first` to before `last` of them (a rank's slice)."""
        row = self.cursor.row
        starts = np.concatenate([placed.starts for placed in self._placed])
        rows = self._cut((row + first) * self.seq_len, last - first, starts)
        self.cursor = self._advance(num_rows, starts)
        while self._placed[0].chunk.counter + len(self._placed[0].chunk.lengths) <= self.cursor.document:
            self._placed.popleft()
        return rows

    def _cut(self, begin: int, num_rows: int, starts: np.ndarray) -> Rows:
        """Rows from stream index `begin` on. starts: stream indices of document starts, ascending."""
        end = begin + num_rows * self.seq_len + 1
        parts = [p.chunk.ids[max(0, begin - p.begin) : max(0, end - p.begin)] for p in self._placed]
        tokens = sliding_window_view(np.concatenate(parts), self.seq_len + 1)[:: self.seq_len]
        edges = begin + self.seq_len * np.arange(num_rows + 1)
        cuts = np.searchsorted(starts, edges)
        inside = [starts[i:j] - edge for i, j, edge in zip(cuts[:-1], cuts[1:], edges[:-1], strict=True)]
        return Rows(tokens, [s if len(s) and s[0] == 0 else np.concatenate(([0], s)) for s in inside])

    def _advance(self, num_rows: int, starts: np.ndarray) -> Cursor:
        old = self.cursor
        begin, end = old.row * self.seq_len, (old.row + num_rows) * self.seq_len  # tokens begin + 1 .. end are new
        at = next(p for p in self._placed if p.begin + len(p.chunk.ids) > end)
        k = int(np.searchsorted(at.ends, end, side="right"))
        document = at.chunk.counter + k
        # The document at the old cursor was counted when it was begun, but at the very start nothing was.
        first_new = old.document + (old.row > 0)
        documents = tokens = bad = size = 0
        for chunk in (p.chunk for p in self._placed):
            new = slice(max(0, first_new - chunk.counter), max(0, document + 1 - chunk.counter))
            read = chunk.lengths[new] > 0
            documents += int(np.count_nonzero(read))
            bad += int(np.count_nonzero(~read))
            tokens += int(chunk.lengths[new].sum())
            size += int(chunk.sizes[new][read].sum())
        firsts = np.searchsorted(starts, [begin, end], side="right")
        cursor = Cursor(
            row=old.row + num_rows,
            document=document,
            offset=end - int(at.ends[k] - at.chunk.lengths[k]),
            tokens_read=old.tokens_read + tokens,
            targets=old.targets + num_rows * self.seq_len - int(firsts[1] - firsts[0]),
            document_first=old.document_first + documents,
            carried=int(at.ends[k]) - (end + 1),
            bad_records=old.bad_records + bad,
            bytes=old.bytes + size,
        )
        assert cursor.tokens_read == cursor.targets + cursor.document_first + cursor.carried, cursor
        return cursor
