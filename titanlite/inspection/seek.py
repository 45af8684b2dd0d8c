"""Where a row lies: the cursor of any row of the stream, without making the rows before it where that can be avoided.

Owns the jump. The token cache knows the length of every document, and lengths are all that packing looks at: in "split"
whole epochs, then whole shuffle blocks are passed by arithmetic up to the row's window; in "best_fit" windows are
packed without their tokens. Sources without a cache are read and tokenised up to there. Refuses to differ from
training: what stops a run on the way to a row stops the search.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from titanlite.config.sections import DataConfig
from titanlite.data.cache.reader import CachedReader
from titanlite.data.corpus import Corpus, open_rows, window_rows
from titanlite.data.feed import EndOfData, ReadAhead, StreamSource, one_by_one
from titanlite.data.stream import Reader, SourceCursor
from titanlite.log import logger

_BLOCK = 4096  # documents; where the order has no blocks of its own
_STRIDE_DOCUMENTS = 1 << 18  # whose lengths are read at once
_STRIDE_ROWS = 256  # between two moves of the bar


def seek(
    corpus: Corpus, data: DataConfig, *, eos_id: int, row: int, read_ahead: ReadAhead = one_by_one
) -> dict[str, Any]:
    """The cursor of a row of the global stream, as RowStream.cursor gives it after the rows before; its ledgers close,
    but where documents were jumped over they count only what is in the window.

    A bar shows the progress where it takes long. Raises what a run would meet on the way: EndOfData, RecordError,
    SourceError.
    """
    dealt = dict(zip(corpus.sources, corpus.deck.dealt(row).tolist(), strict=True))
    starts = {
        name: _jump(source, dealt[name], window_rows(corpus, data)[name], corpus.identity["seq_len"])
        if data.packing == "split" and _is_smooth(source.reader, data)
        else SourceCursor()
        for name, source in corpus.sources.items()
    }
    start = {"row": 0, "stream": corpus.identity, "sources": {name: c.to_dict() for name, c in starts.items()}}
    lanes = open_rows(corpus, data, eos_id=eos_id, num_rows=1, cursor=start, read_ahead=read_ahead).sources
    with tqdm(total=row, desc="to the row", unit="row", delay=1, leave=False, disable=None) as bar:
        for lane in lanes:
            name = lane.source.name
            if dealt[name] and not lane.source.reader.on_demand:
                logger.info(f"source {name!r} has no token cache: reading its {dealt[name]:,} rows before this step")
            bar.update(lane.cursor.row)
            while left := dealt[name] - lane.cursor.row:
                part = min(left, _STRIDE_ROWS)
                lane.fill(part)
                lane.take(part, 0, 0)
                bar.update(part)
    return {"row": row, "stream": corpus.identity, "sources": {s.source.name: s.cursor.to_dict() for s in lanes}}


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


def _jump(source: StreamSource, row: int, window_rows: int, seq_len: int) -> SourceCursor:
    """The cursor, in packing "split", before the first row of the window that holds a row."""
    reader, order, size = source.reader, source.order, source.order.shuffle_block or _BLOCK
    assert isinstance(reader, CachedReader)
    lengths = _block_sums(source, size)
    if not (epoch_tokens := int(lengths.sum())):
        raise ValueError(f"data source {source.name!r}: no document is left to train on")
    # An epoch's windows begin with the row that holds the last tokens of the epoch before.
    epoch_row = max(0, ((row + 1) * seq_len // epoch_tokens * epoch_tokens - 1) // seq_len)
    row -= (row - epoch_row) % window_rows
    if row == 0:
        return SourceCursor()
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
    return SourceCursor(row, first + at, left - int(ends[at] - inside[at]))


def _block_sums(source: StreamSource, size: int) -> np.ndarray:
    """Tokens of each block of `size` documents, int64."""
    sums = np.zeros(-(-source.order.num_documents // size), np.int64)
    first = 0
    for lengths in trained_lengths(source):
        starts = np.arange(-(first % size), len(lengths), size).clip(0)  # of the blocks that lie here or reach in
        sums[first // size :][: len(starts)] += np.add.reduceat(lengths, starts)
        first += len(lengths)
    return sums
