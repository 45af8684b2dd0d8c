"""Which steps of a run are looked at, where its data end, and the way to any row by the measured lengths alone.

Owns the choice and the walk. Refuses to read documents: packers get their lengths.
"""

import random
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from titanlite.config.sections import DataConfig
from titanlite.data.corpus import Corpus, open_rows
from titanlite.data.feed import EndOfData, SourceRows
from titanlite.data.mixture import Deck
from titanlite.data.stream import Ledger, SourceCursor
from titanlite.verify.census import Census, MeasuredReader

_STRIDE_ROWS = 256


def measured(corpus: Corpus, censuses: Mapping[str, Census]) -> Corpus:
    """The corpus with documents of the measured lengths, whose ids are all 0."""
    sources = {
        name: replace(source, reader=MeasuredReader(source.reader, censuses[name]))
        for name, source in corpus.sources.items()
    }
    return replace(corpus, sources=sources)


def lanes_of(corpus: Corpus, data: DataConfig, eos_id: int) -> list[SourceRows]:
    return open_rows(corpus, data, eos_id=eos_id, num_rows=1).sources


def deal_all(lane: SourceRows) -> tuple[SourceCursor, Ledger]:
    """Where a source with an end has dealt its last row, and its ledger there, with what no row takes any more."""
    for stride in (_STRIDE_ROWS, 1):
        try:
            while True:
                lane.fill(stride)
                lane.take(stride, 0, 0)
        except EndOfData:
            continue
    return lane.cursor, lane.ended()


class Walk:
    """Moves along the stream by lengths alone."""

    def __init__(self, corpus: Corpus, data: DataConfig, eos_id: int) -> None:
        """corpus: a measured one."""
        self._corpus = corpus
        self._lanes = lanes_of(corpus, data, eos_id)

    def to(self, row: int) -> dict[str, Any]:
        """The stream's cursor at a row, not before the last one."""
        for lane, num_rows in zip(self._lanes, self._corpus.deck.dealt(row).tolist(), strict=True):
            while left := num_rows - lane.cursor.row:
                part = min(left, _STRIDE_ROWS)
                lane.fill(part)
                lane.take(part, 0, 0)
        sources = {lane.source.name: lane.cursor.to_dict() for lane in self._lanes}
        return {"row": row, "sources": sources, "stream": self._corpus.identity}


def choose_steps(
    corpus: Corpus, rows_per_epoch: Mapping[str, float], num_rows: int, last: int, number: int
) -> list[int]:
    """The first step and the last, one in the middle of each epoch on the way (some, evenly, of too many), and random
    ones, the same each time, until there are `number`."""
    steps = {1, last}
    for i, rows in enumerate(rows_per_epoch.values()):
        dealt = int(corpus.deck.dealt(last * num_rows)[i])
        num_epochs = max(0, int((dealt - 1) / rows - 0.5))
        room = max(1, (number - 2) // len(rows_per_epoch))
        for epoch in np.unique(np.linspace(1, num_epochs, min(num_epochs, room)).astype(np.int64)).tolist():
            nth = int((epoch + 0.5) * rows)
            steps.add(row_of(corpus.deck, i, nth, last * num_rows) // num_rows + 1)
    draw = random.Random(0)
    while len(steps) < min(number, last):
        steps.add(draw.randint(1, last))
    return sorted(steps)


def row_of(deck: Deck, source: int, nth: int, end: int) -> int:
    """The row of the stream that is a source's nth (from 0); `end` if that is none of the rows before `end`."""
    return bisect_left(range(end), nth + 1, key=lambda row: int(deck.dealt(row + 1)[source]))
