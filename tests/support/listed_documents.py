"""A source of documents of given lengths, for tests of what is made of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from titanlite.data.feed import SourceRows, StreamSource
from titanlite.data.order import DocumentOrder, HeldOut
from titanlite.data.source import Numbering, RecordError
from titanlite.data.stream import EncodedDocuments, SourceCursor
from titanlite.data.windows import BestFit, Dealing, Split

EOS = 2**31 - 1


class ListedReader:
    """Token k of document d is 1000 * d + k, and d has d + 1 bytes. A document without tokens is a bad record."""

    def __init__(self, lengths: Sequence[int], on_demand: bool = False) -> None:
        self.on_demand = on_demand
        self.numbering = Numbering(np.array([len(lengths)]))
        self.lengths = np.array(lengths, np.int64)
        self.num_tokens = int(self.lengths.sum())
        self.num_read = 0
        """Tokens that were given."""

    def sizes(self, documents: np.ndarray) -> np.ndarray:
        return self.lengths[documents]

    def read(self, documents: np.ndarray, keep: np.ndarray) -> EncodedDocuments:
        lengths = np.where(keep, self.lengths[documents], 0)
        bad = [(i, RecordError(self.locate(int(documents[i])), "bad")) for i in np.flatnonzero(keep & (lengths == 0))]
        ids = None if self.on_demand else self.tokens(documents, np.zeros_like(lengths), lengths)
        return EncodedDocuments(ids, lengths, np.where(lengths > 0, documents + 1, 0), bad)

    def tokens(self, documents: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        self.num_read += int(sizes.sum())
        triples = zip(documents.tolist(), offsets.tolist(), sizes.tolist(), strict=True)
        parts = [np.arange(1000 * d + offset, 1000 * d + offset + size) for d, offset, size in triples]
        return np.concatenate([np.empty(0), *parts]).astype(np.int32)

    def locate(self, document: int) -> str:
        return f"document {document}"


def rows_of(
    lengths: Sequence[int],
    packing: str,
    seq_len: int,
    window_rows: int,
    cursor: SourceCursor | None = None,
    *,
    seed: int = 7,
    name: str = "web",
    shuffle: bool = True,
    on_demand: bool = False,
    max_epochs: int = 1,
    order: DocumentOrder | None = None,
    **options: Any,
) -> SourceRows:
    """The rows of one source of these documents, in their order if no other is given."""
    reader = ListedReader(lengths, on_demand)
    order = order or DocumentOrder(len(lengths), 0, 0)
    return SourceRows(
        StreamSource(name, reader, order, HeldOut(name, [], 0.0), max_epochs),
        Split(seq_len, window_rows) if packing == "split" else BestFit(seq_len, window_rows, max_epochs > 0),
        Dealing(seed, name, shuffle),
        cursor or SourceCursor(),
        EOS,
        skip_bad_records=True,
        **options,
    )
