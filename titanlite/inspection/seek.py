"""Where a row lies: the cursor of any row of the stream, without making the rows before it where that can be avoided.

Owns the jump. The token cache knows the length of every document, and lengths are all that packing looks at: in "split"
whole epochs, then whole shuffle blocks are passed by arithmetic; in "best_fit" windows are packed without their tokens.
Sources without a cache are read and tokenised up to there. Refuses to differ from training: what stops a run on the
way to a row stops the search.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm import tqdm

from titanlite.config.sections import DataConfig
from titanlite.data.corpus import Corpus, open_rows
from titanlite.data.feed import EndOfData, StreamSource, Threads
from titanlite.data.source import Numbering
from titanlite.data.stream import Documents, Ledger, Reader, SourceCursor
from titanlite.data.token_cache import CachedReader
from titanlite.log import logger

_BLOCK = 4096  # documents; where the order has no blocks of its own
_STRIDE_DOCUMENTS = 1 << 18  # whose lengths are read at once
_LIGHTER = 64  # than text are lengths alone, by about this factor
_STRIDE_ROWS = 256  # between two moves of the bar


def seek(corpus: Corpus, data: DataConfig, *, eos_id: int, row: int, threads: Threads | None = None) -> dict[str, Any]:
    """The cursor of a row of the global stream, as RowStream.cursor gives it behind the rows before; its ledgers close,
    but where documents were jumped over they count only what is in hand.

    A bar shows the progress where it takes long. Raises what a run would meet on the way: EndOfData, RecordError,
    SourceError.
    """
    quick = {
        name: replace(source, reader=_Lengths(source.reader)) if isinstance(source.reader, CachedReader) else source
        for name, source in corpus.sources.items()
    }
    lanes = open_rows(replace(corpus, sources=quick), data, eos_id=eos_id, num_rows=1, threads=threads).sources
    cursors: dict[str, SourceCursor] = {}
    with tqdm(total=row, desc="to the row", unit="row", delay=1, leave=False, disable=None) as bar:
        for lane, num_rows in zip(lanes, corpus.deck.dealt(row).tolist(), strict=True):
            name, packer = lane.source.name, lane.packer
            if data.packing == "split" and _is_smooth(corpus.sources[name].reader, data):
                cursors[name] = _jump(corpus.sources[name], num_rows, corpus.identity["seq_len"])
                bar.update(num_rows)
                continue
            if num_rows and not isinstance(lane.source.reader, _Lengths):
                logger.info(f"source {name!r} has no token cache: reading its {num_rows:,} rows before this step")
            while left := num_rows - packer.cursor.row:
                part = min(left, _STRIDE_ROWS)
                lane.fill(part)
                packer.take(part, 0, 0)
                bar.update(part)
            cursors[name] = packer.cursor
    sources = {name: cursor.to_dict() for name, cursor in cursors.items()}
    return {"row": row, "sources": sources, "stream": corpus.identity}


def trained_lengths(source: StreamSource) -> Iterator[np.ndarray]:
    """Tokens of each document in the order of their numbers, int64; 0 for bad records and what is held out. Needs the
    token cache."""
    reader = source.reader
    assert isinstance(reader, CachedReader)
    for first in range(0, source.order.num_documents, _STRIDE_DOCUMENTS):
        documents = np.arange(first, min(first + _STRIDE_DOCUMENTS, source.order.num_documents))
        yield np.where(source.held_out(*reader.numbering.places(documents)), 0, reader.lengths(documents))


def _is_smooth(reader: Reader, data: DataConfig) -> bool:
    """Whether all lengths are known and no bad record would end a run."""
    return isinstance(reader, CachedReader) and (data.on_bad_record == "skip" or not reader.num_bad_records)


def _jump(source: StreamSource, row: int, seq_len: int) -> SourceCursor:
    """The cursor of a row in packing "split": that of token row * seq_len of the source's stream."""
    if row == 0:
        return SourceCursor()
    reader, order, size = source.reader, source.order, source.order.shuffle_block or _BLOCK
    assert isinstance(reader, CachedReader)
    lengths = _block_sums(source, size)
    if not (epoch_tokens := int(lengths.sum())):
        raise ValueError(f"data source {source.name!r}: no document is left to train on")
    epoch, left = divmod(row * seq_len, epoch_tokens)
    if source.max_epochs and epoch >= source.max_epochs:
        raise EndOfData(
            f"the data ended: source {source.name!r} has no row left after max_epochs = {source.max_epochs}"
        )
    # The s-th block of an epoch is that of its (s * size)-th document, whatever place the short block has.
    first = epoch * order.num_documents
    blocks = order.documents(first + np.arange(0, order.num_documents, size)) // size
    ends = np.cumsum(lengths[blocks])
    at = int(np.searchsorted(ends, left, side="right"))
    sizes = np.minimum(size, order.num_documents - blocks * size)
    first += int(sizes[:at].sum())
    left -= int(ends[at] - lengths[blocks[at]])
    documents = order.documents(np.arange(first, first + int(sizes[at])))
    held_out = source.held_out(*reader.numbering.places(documents))
    inside = np.where(held_out, 0, reader.lengths(documents))
    ends = np.cumsum(inside)
    at = int(np.searchsorted(ends, left, side="right"))
    offset = left - int(ends[at] - inside[at])
    carried = int(inside[at]) - offset - 1
    return SourceCursor(row, first + at, offset, Ledger(tokens_read=carried, carried=carried))


def _block_sums(source: StreamSource, size: int) -> np.ndarray:
    """Tokens of each block of `size` documents, int64."""
    sums = np.zeros(-(-source.order.num_documents // size), np.int64)
    first = 0
    for lengths in trained_lengths(source):
        starts = np.arange(-(first % size), len(lengths), size).clip(0)  # of the blocks that lie here or reach in
        sums[first // size :][: len(starts)] += np.add.reduceat(lengths, starts)
        first += len(lengths)
    return sums


class _Lengths:
    """A cache as a reader of documents whose ids are all 0 and take no memory."""

    def __init__(self, reader: Reader) -> None:
        assert isinstance(reader, CachedReader)
        self._reader = reader
        self.numbering: Numbering = reader.numbering
        self.num_tokens = reader.num_tokens
        self.locate = reader.locate

    def sizes(self, documents: np.ndarray) -> np.ndarray:
        """Less than they are, so that portions are larger: lengths take little time and, until packed, no memory."""
        return self._reader.sizes(documents) // _LIGHTER

    def read(self, documents: np.ndarray, keep: np.ndarray) -> Documents:
        try:
            lengths = np.where(keep, self._reader.lengths(documents), 0)
            sizes = np.where(keep, self._reader.sizes(documents), 0)
            broken = np.flatnonzero(keep & (lengths == 0))
            bad = self._reader.read(documents[broken], np.ones(len(broken), bool)).bad
        except (OSError, ValueError) as error:
            none = np.empty(0, np.int64)
            return Documents(none.astype(np.int32), none, none, [], error)
        ids = np.broadcast_to(np.int32(0), int(lengths.sum()))
        return Documents(ids, lengths, sizes, [(int(broken[i]), record) for i, record in bad], None)
