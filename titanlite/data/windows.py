"""Windows: runs of a source's stream, laid into rows, whose rows are dealt in an order of their own.

Owns where a window ends, how pieces of documents fill its rows (data.packing), the order in which they are dealt, and
what each row adds to the ledger. A step of consecutive rows would often be one document: rows that come from all over a
window teach as rows drawn at random do. Refuses to look for documents in the ids, and to let anything but lengths and
seed decide: where chunks, batches and runs begin and end does not enter.
"""

import hashlib
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from titanlite.data.order import splitmix64
from titanlite.data.stream import Chunk, Ledger, Reader

_GAMMA = 0x9E3779B97F4A7C15
_SHORT = 128  # tokens: pieces shorter than this on average are gathered by index, longer ones one by one
_EPOCH_ROWS = 64  # that a window of best fit has when it ends with an epoch: fewer would hold more padding
_NAMED_RECORDS = 20  # bad records of a window that are kept to be named


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
    """Rows of a source. A row is a sequence of pieces of documents; three arrays per row describe them."""

    tokens: np.ndarray
    """int32 [n, seq_len + 1]."""
    starts: list[np.ndarray]
    """Positions in [0, seq_len] where a piece begins; int64, ascending, the first is 0. A piece that begins at seq_len
    is one token, which is no input."""
    counters: list[np.ndarray]
    """Counter of each piece's document, int64; -1: a pad."""
    offsets: list[np.ndarray]
    """Index in its document of each piece's first token, int64."""


@dataclass(frozen=True, eq=False)
class RowLayout:
    """The rows of a window in natural order, as pieces of its documents. What pieces leave of a row is padded."""

    edges: np.ndarray
    """Of rows among the pieces, int64 [rows + 1]."""
    documents: np.ndarray
    """Document of each piece, by its place in the window, int64 [pieces]."""
    offsets: np.ndarray
    """Index in its document of each piece's first token, int64 [pieces]."""
    sizes: np.ndarray
    """Tokens of each piece, int64 [pieces]. All but the first of them are targets."""
    document_first: np.ndarray
    """Documents that the ledger counts as begun with each row, int64 [rows]."""


class Laid(NamedTuple):
    """A window that is closed."""

    layout: RowLayout
    num_documents: int
    """Documents with a token in it, and those of no token between them."""
    next_document: int
    """Place in the window of the document with which the next window begins."""
    next_offset: int
    """Index of the next window's first token in that document."""
    cut: int
    """Documents that a row could hold and that lie in two."""


class Packing(Protocol):
    """How pieces of documents are laid into the rows of a window. What data.packing names."""

    @property
    def seq_len(self) -> int: ...

    @property
    def overlap(self) -> int:
        """Tokens that a window shares with the one before it."""

    def lay(self, lengths: np.ndarray, offset: int, at_start: bool, epoch: tuple[int, int], ended: bool) -> Laid | None:
        """Close a window over documents of these lengths (int64 [n], of which those of 0 are left out), from token
        `offset` of the first of them on; None where more documents are needed, or, at the end, where no row is left.

        at_start: of the stream. epoch: how many documents, from the first of these on, its epoch has left, and how many
        an epoch has. ended: no document follows.
        """


@dataclass(frozen=True)
class Split:
    """packing = "split": rows are cut every seq_len tokens, whatever documents they cut; nothing is padded.

    The last token of a row is the first of the next, so that every token but the first of a document is a target once.
    A window ends with the last row that lies in its epoch: a corpus that is smaller than a window is dealt once before
    any of it is dealt again.
    """

    seq_len: int
    window_rows: int
    overlap = 1

    def lay(self, lengths: np.ndarray, offset: int, at_start: bool, epoch: tuple[int, int], ended: bool) -> Laid | None:
        num_tokens = int(lengths.sum()) - offset - 1  # after the first
        num_rows, end = self.window_rows, epoch[0]
        while end <= len(lengths):
            if (of_epoch := (int(lengths[:end].sum()) - offset - 1) // self.seq_len) > 0:
                num_rows = min(num_rows, of_epoch)
                break
            end += epoch[1]  # the window begins with the rest of an epoch, which is no row
        if num_tokens < num_rows * self.seq_len:
            num_rows = num_tokens // self.seq_len
            if not ended or num_rows < 1:
                return None
        ends = np.cumsum(lengths) - offset  # from the window's first token on
        starts = ends - lengths
        edge = num_rows * self.seq_len  # the window's last token, and the next one's first
        last = int(np.searchsorted(ends, edge, side="right"))  # the document that holds it
        some = np.flatnonzero(lengths[: last + 1])
        first = starts[some]
        begun = some[first > 0]  # documents that begin in these rows: each begins a piece
        row_of = (starts[begun] - 1) // self.seq_len  # a row's first token was the last target of the row before
        begins = self.seq_len * np.arange(num_rows)
        per_row = np.bincount(row_of, minlength=num_rows)
        edges = np.append(0, np.cumsum(per_row + 1))
        documents, offsets, places = np.zeros((3, int(edges[-1])), np.int64)
        opened = some[np.searchsorted(first, begins, side="right") - 1]  # documents at the edges of rows
        documents[edges[:-1]], offsets[edges[:-1]] = opened, begins - starts[opened]
        inside = np.arange(len(begun)) + row_of + 1
        documents[inside], places[inside] = begun, starts[begun] - begins[row_of]
        sizes = np.append(places[1:], 0)
        sizes[edges[1:] - 1] = self.seq_len + 1
        fitting = (lengths > 0) & (lengths <= self.seq_len + 1)
        cut = fitting & (ends - 1 > (starts // self.seq_len + 1) * self.seq_len)
        per_row[0] += at_start
        layout = RowLayout(edges, documents, offsets, sizes - places, per_row)
        counted = slice(0 if at_start else 1, last + 1)
        return Laid(layout, last + 1, last, edge - int(starts[last]), int(np.count_nonzero(cut[counted])))


@dataclass(frozen=True)
class BestFit:
    """packing = "best_fit": documents are packed whole into rows, which are padded.

    A window ends with the first document with which it has tokens for half a row less than window_rows rows: with the
    whole of it, most windows would begin one row more than they can fill. It ends with its epoch, too, where it then
    has 64 rows, or where epochs are limited: their number would change rows before the last of them. A document of more
    than seq_len + 1 tokens fills rows of its own, each of which repeats the last token of the one before as context, so
    that every token but the first is a target once; what is left of it, again with that token, is packed like a
    document. Pads stand at the end of a row: eos_id, each a document of its own.
    """

    seq_len: int
    window_rows: int
    limited: bool
    """Whether the source's epochs are."""
    overlap = 0

    def lay(self, lengths: np.ndarray, offset: int, at_start: bool, epoch: tuple[int, int], ended: bool) -> Laid | None:
        ends = np.cumsum(lengths)
        num_documents = int(np.searchsorted(ends, self._tokens(self.window_rows))) + 1
        left, of_epoch = epoch
        if not self.limited:  # the first epoch's end with enough rows
            enough = int(np.searchsorted(ends, self._tokens(min(_EPOCH_ROWS, self.window_rows)))) + 1
            left += max(0, -((left - enough) // of_epoch)) * of_epoch
        num_documents = min(num_documents, left)
        if num_documents > len(lengths):
            if not ended or not len(lengths):
                return None
            num_documents = len(lengths)
        documents, offsets, sizes = _pieces(lengths[:num_documents], self.seq_len)
        rows = best_fit_decreasing(sizes, self.seq_len + 1)
        # Best fit opens rows for the longest documents first; natural is the order of the documents they begin with.
        _, first = np.unique(rows, return_index=True)
        rows = np.argsort(np.argsort(first))[rows]
        order = np.argsort(rows, kind="stable")
        edges = np.append(0, np.cumsum(np.bincount(rows)))
        begun = np.bincount(rows, offsets == 0).astype(np.int64)
        layout = RowLayout(edges, documents[order], offsets[order], sizes[order], begun)
        return Laid(layout, num_documents, num_documents, 0, 0)

    def _tokens(self, num_rows: int) -> int:
        return (2 * num_rows - 1) * (self.seq_len + 1) // 2


def _pieces(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pieces of documents: the document of each, the index of its first token in it, and its length, int64 [n].

    A row has seq_len targets and a document of n tokens has n - 1, so that it needs as many rows; but one at least.
    """
    num_pieces = np.where(lengths > 0, np.maximum(1, -((1 - lengths) // seq_len)), 0)
    documents = np.repeat(np.arange(len(lengths)), num_pieces)
    nth = np.arange(len(documents)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    return documents, nth * seq_len, np.minimum(seq_len, lengths[documents] - 1 - nth * seq_len) + 1


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece, int64 [n], rows numbered as they are opened.

    lengths: int64 [n], from 1 to `capacity`. The longest piece first, of equal ones the first, each into the row with
    the least space that still holds it, of equal ones the first (Johnson et al. 1974, "Worst-case performance bounds
    for simple one-dimensional packing algorithms"). Pieces of one length go in together: the row that is the tightest
    for the first of them stays the tightest until it is full.
    """
    sizes, counts = np.unique(lengths, return_counts=True)
    free: list[int] = []  # space << 32 | row of the rows with space, ascending
    rows: list[int] = []
    fills: list[int] = []
    num_rows = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            at = bisect_left(free, size << 32)
            if at < len(free):
                space, row = divmod(free.pop(at), 1 << 32)
            else:
                space, row = capacity, num_rows
                num_rows += 1
            fill = min(count, space // size)
            rows.append(row)
            fills.append(fill)
            count -= fill
            if space > fill * size:
                insort(free, space - fill * size << 32 | row)
    placed = np.empty(len(lengths), np.int64)
    placed[np.argsort(-lengths, kind="stable")] = np.repeat(np.array(rows, np.int64), np.array(fills, np.int64))
    return placed


@dataclass(frozen=True)
class Dealing:
    """In which order the rows of a source's windows are dealt: drawn anew for each window from seed and source name, or
    the natural one."""

    seed: int
    source: str
    shuffle: bool

    def order(self, first_row: int, num_rows: int) -> np.ndarray:
        """The rows of the window that begins with row `first_row` of the source, int64 [num_rows]."""
        if not self.shuffle:
            return np.arange(num_rows)
        name = hashlib.blake2b(self.source.encode(), digest_size=8).digest()
        key = np.array([self.seed % (1 << 64)], np.uint64)
        for part in (int.from_bytes(name, "little"), first_row):
            key = splitmix64(splitmix64(key) ^ np.uint64(part))
        return np.argsort(splitmix64(key ^ np.arange(num_rows, dtype=np.uint64)), kind="stable")


class Window:
    """A closed window: its documents, its rows, and the order in which they are dealt."""

    def __init__(self, documents: Chunk, laid: Laid, order: np.ndarray, seq_len: int, num_counted: int) -> None:
        """documents: from the window's first one on, of which the first laid.num_documents are its own. num_counted: of
        them, in the ledger with the window before."""
        self._layout, self._order, self._seq_len = laid.layout, order, seq_len
        self.counter, self.next = documents.counter, (documents.counter + laid.next_document, laid.next_offset)
        self._numbers = documents.numbers[: laid.num_documents]
        lengths = documents.lengths[: laid.num_documents]
        self._begins = np.cumsum(lengths) - lengths  # of documents, among the tokens from the first one's on
        self._ids = None if documents.ids is None else dict(enumerate(documents.ids))
        self._edges = np.cumsum([0, *(len(ids) for ids in documents.ids or [])])[:-1]
        self.num_rows = len(order)
        self._targets = np.add.reduceat(laid.layout.sizes - 1, laid.layout.edges[:-1]) if self.num_rows else order
        self._used = np.add.reduceat(laid.layout.sizes, laid.layout.edges[:-1]) if self.num_rows else order
        num_tokens = int(self._targets.sum() + laid.layout.document_first.sum())
        counted = slice(num_counted, laid.num_documents)
        self.read = Ledger(tokens_read=num_tokens, carried=num_tokens, cut=laid.cut) + documents.count(counted, seq_len)
        bad = [record for place, record in documents.bad_records if counted.start <= place < counted.stop]
        self.bad_records = bad[:_NAMED_RECORDS]
        """The first of the bad records that the ledger counts with this window."""

    def dealt(self, first: int, last: int) -> Ledger:
        """What dealing the rows from `first` to before `last`, in the order of dealing, adds to the ledger."""
        rows = self._order[first:last]
        targets, begun = int(self._targets[rows].sum()), int(self._layout.document_first[rows].sum())
        padding = len(rows) * (self._seq_len + 1) - int(self._used[rows].sum())
        return Ledger(targets=targets, document_first=begun, carried=-targets - begun, padding=padding)

    def rows(self, first: int, last: int, reader: Reader, eos_id: int) -> Rows:
        """The rows from `first` to before `last`, in the order of dealing. Raises what reading raises."""
        layout, rows = self._layout, self._order[first:last]
        num_pieces = layout.edges[rows + 1] - layout.edges[rows]
        pieces = ranges(layout.edges[rows], num_pieces)
        documents, offsets, sizes = layout.documents[pieces], layout.offsets[pieces], layout.sizes[pieces]
        if self._ids is None:
            ids = reader.tokens(self._numbers[documents], offsets, sizes)
        else:
            starts = self._begins[documents] + offsets
            which = np.searchsorted(self._edges, starts, side="right") - 1
            ids = gather(self._ids, which, starts - self._edges[which], sizes)
        capacity, used = self._seq_len + 1, self._used[rows]
        tokens = np.full((len(rows), capacity), eos_id, np.int32)
        tokens[np.arange(capacity) < used[:, None]] = ids
        found = Rows(tokens, [], [], [])
        ends = np.cumsum(num_pieces)
        for begin, end, pads_from in zip((ends - num_pieces).tolist(), ends.tolist(), used.tolist(), strict=True):
            pads = np.arange(pads_from, capacity)
            starts = np.cumsum(sizes[begin:end]) - sizes[begin:end]
            found.starts.append(np.concatenate((starts, pads)))
            found.counters.append(np.concatenate((self.counter + documents[begin:end], np.full_like(pads, -1))))
            found.offsets.append(np.concatenate((offsets[begin:end], np.zeros_like(pads))))
        return found


def gather(tokens: dict[int, np.ndarray], which: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """tokens[which[i]][starts[i] : starts[i] + lengths[i]] for all i, one after the other, int32."""
    total = int(lengths.sum())
    if not total:
        return np.empty(0, np.int32)
    if total >= _SHORT * len(lengths):
        spans = zip(which.tolist(), starts.tolist(), (starts + lengths).tolist(), strict=True)
        return np.concatenate([tokens[s][start:end] for s, start, end in spans]).astype(np.int32, copy=False)
    if len(tokens) == 1:
        return next(iter(tokens.values())).take(ranges(starts, lengths)).astype(np.int32, copy=False)
    ids = np.empty(total, np.int32)
    places = np.cumsum(lengths) - lengths
    for s in tokens:
        mine = which == s
        ids[ranges(places[mine], lengths[mine])] = tokens[s][ranges(starts[mine], lengths[mine])]
    return ids


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[i], ..., starts[i] + lengths[i] - 1 for all i, one after the other, int64."""
    places = np.cumsum(lengths) - lengths
    return np.repeat(starts - places, lengths) + np.arange(lengths.sum())
