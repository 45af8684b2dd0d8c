"""The census of a source: every document read once, and what is kept of each: tokens, bytes, whether it trains.

Owns the reading, in all threads that it is given, and a reader that stands in for the documents where only their
lengths matter. Keeps 25 bytes per document; refuses to keep texts or tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from titanlite.data.feed import ReadAhead, StreamSource, portions, read_portion
from titanlite.data.order import DocumentOrder, HeldOut
from titanlite.data.source import Numbering, RecordError
from titanlite.data.stream import EncodedDocuments, Reader

NAMED_RECORDS = 20  # bad records whose place and reason are kept
_SLICE = 1 << 18  # documents whose split is computed at once


@dataclass(frozen=True, eq=False)
class Census:
    """What was read, by the number of the document in its source; arrays of [documents]."""

    lengths: np.ndarray
    """Tokens, int64, of what is held out too; 0 for a bad record."""
    bytes: np.ndarray
    """UTF-8 bytes of the text, int64; 0 for a bad record."""
    held_out: np.ndarray
    """Left to validation, bool."""
    trained: np.ndarray
    """Tokens that training reads, int64: lengths, but 0 for what is held out."""
    bad: list[RecordError]
    """The first of the bad records, in the order of documents."""

    @property
    def num_bad(self) -> int:
        return int(np.count_nonzero(self.lengths == 0))


def take_census(
    source: StreamSource,
    read_ahead: ReadAhead,
    num_ahead: int,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> Census:
    """Read every document of a source, in the order of their numbers. `progress` hears of bytes of text read.

    Raises what ends the reading, SourceError or RuntimeError; a bad record does not.
    """
    num_documents = source.order.num_documents
    in_order = DocumentOrder(num_documents, 0, 0)
    everything = replace(source, order=in_order, held_out=HeldOut(source.name, [], 0.0), max_epochs=1)
    lengths, sizes = np.zeros((2, num_documents), np.int64)
    bad: list[RecordError] = []
    num_read = 0
    for chunk in read_ahead(portions(everything, 0), lambda p: read_portion(everything, p, True), num_ahead):
        here = slice(num_read, num_read + len(chunk.lengths))
        lengths[here], sizes[here] = chunk.lengths, chunk.bytes
        bad += [record for _, record in chunk.bad_records[: NAMED_RECORDS - len(bad)]]
        if chunk.error is not None:
            raise chunk.error
        num_read = here.stop
        progress(int(chunk.bytes.sum()))
    assert num_read == num_documents
    held_out = np.empty(num_documents, bool)
    for first in range(0, num_documents, _SLICE):
        documents = np.arange(first, min(first + _SLICE, num_documents))
        held_out[documents] = source.held_out(*source.reader.numbering.places(documents))
    return Census(lengths, sizes, held_out, np.where(held_out, 0, lengths), bad)


class MeasuredReader:
    """A source as its census found it: documents of those lengths, without tokens."""

    on_demand = True

    def __init__(self, reader: Reader, census: Census) -> None:
        self.numbering: Numbering = reader.numbering
        self.num_tokens = int(census.lengths.sum())
        self.locate = reader.locate
        self._census = census

    def sizes(self, documents: np.ndarray) -> np.ndarray:
        return self._census.bytes[documents]

    def read(self, documents: np.ndarray, keep: np.ndarray) -> EncodedDocuments:
        lengths = np.where(keep, self._census.lengths[documents], 0)
        sizes = np.where(keep, self._census.bytes[documents], 0)
        bad = [
            (i, RecordError(self.locate(int(documents[i])), "a bad record"))
            for i in np.flatnonzero(keep & (lengths == 0)).tolist()
        ]
        return EncodedDocuments(None, lengths, sizes, bad)

    def tokens(self, documents: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        return np.zeros(int(sizes.sum()), np.int32)
