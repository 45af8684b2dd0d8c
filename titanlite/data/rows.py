"""The global stream: the rows of all sources in the order of the deck, step by step, from a cursor on.

Owns the state of the whole stream, its identity, and what is said about the data while it is read. Needs no torch: a
command that shows a row answers at once. Refuses to let ranks, threads or the reader change what a row holds.
"""

from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from titanlite.data.feed import EndOfData, SourceRows, too_many_bad_records
from titanlite.data.mixture import Deck
from titanlite.data.source import RecordError
from titanlite.data.stream import Ledger
from titanlite.log import logger

_WARNINGS = 20  # bad records that are named one by one
_MANY_EPOCHS = 4  # repeating data up to here costs little (Muennighoff et al. 2023, arXiv:2305.16264)


@dataclass(frozen=True, eq=False)
class StepRows:
    """A rank's rows of one step."""

    tokens: np.ndarray
    """int32 [n, seq_len + 1]."""
    row_index: np.ndarray
    """Number of each row in the global stream, int64 [n]."""
    sources: np.ndarray
    """Which source dealt each row (index), int64 [n]."""
    starts: list[np.ndarray]
    """Per row, as in windows.Rows; so are counters and offsets."""
    counters: list[np.ndarray]
    offsets: list[np.ndarray]


class RowStream:
    """Steps of `num_rows` rows, of which this rank wants those from `first` to before `last`."""

    def __init__(
        self,
        sources: list[SourceRows],
        deck: Deck,
        *,
        row: int,
        num_rows: int,
        first: int,
        last: int,
        identity: dict[str, Any],
        max_bad_records: int,
    ) -> None:
        self.sources, self.identity = sources, identity
        self._deck, self._row, self._num_rows, self._first, self._last = deck, row, num_rows, first, last
        self._max_bad_records = max_bad_records
        self._speaks = first == 0  # every rank meets the same; one speaks
        self._num_warned = 0
        self._num_bad = total(self.ledgers())["bad_records"]
        self._error: Exception | None = None

    def take(self) -> StepRows:
        """The next step's rows. Raises what stopped the stream, at the first step that needs what is behind it and
        ever after: EndOfData, RecordError (a ValueError) for a bad record that is not skipped, SourceError for a file
        that changed, ValueError for too many bad records or a source without a token.
        """
        if self._error is None:
            try:
                return self._take()
            except Exception as error:
                if isinstance(error, EndOfData):
                    error.ledgers = {s.source.name: asdict(s.ended()) for s in self.sources}
                self._error = error
        raise self._error

    def cursor(self) -> dict[str, Any]:
        """Where the stream stands; JSON-able. With the same identity it is all that a resume needs."""
        sources = {s.source.name: s.cursor.to_dict() for s in self.sources}
        return {"row": self._row, "sources": sources, "stream": self.identity}

    def ledgers(self) -> dict[str, Ledger]:
        return {s.source.name: s.cursor.ledger for s in self.sources}

    def _take(self) -> StepRows:
        dealers = self._deck.sources(self._row, self._num_rows)
        mine = dealers[self._first : self._last]
        wanted, before, inside = (
            np.bincount(part, minlength=len(self.sources)).tolist() for part in (dealers, dealers[: self._first], mine)
        )
        dealing = [i for i, num_rows in enumerate(wanted) if num_rows]
        for i in dealing:
            self.sources[i].fill(wanted[i])
        epochs = [s.epochs for s in self.sources]
        tokens: list[np.ndarray] = [np.empty(0)] * len(mine)
        pieces: list[list[np.ndarray]] = [[np.empty(0)] * len(mine) for _ in range(3)]
        for i in dealing:
            rows, bad_records = self.sources[i].take(wanted[i], before[i], before[i] + inside[i])
            self._warn_of(bad_records)
            for k, place in enumerate(np.flatnonzero(mine == i).tolist()):
                tokens[place] = rows.tokens[k]
                for merged, per_row in zip(pieces, (rows.starts, rows.counters, rows.offsets), strict=True):
                    merged[place] = per_row[k]
        index = np.arange(self._row + self._first, self._row + self._last)
        self._row += self._num_rows
        self._check(epochs)
        return StepRows(np.stack(tokens), index, mine, *pieces)

    def _warn_of(self, bad_records: list[RecordError]) -> None:
        for bad in bad_records[: _WARNINGS - self._num_warned] if self._speaks else []:
            self._num_warned += 1
            logger.warning(f"bad record left out: {bad}")

    def _check(self, epochs_before: list[float]) -> None:
        num_bad = total(self.ledgers())["bad_records"]
        if self._speaks and len(str(num_bad)) > max(2, len(str(self._num_bad))):  # 100, 1,000, ...
            logger.warning(f"{num_bad:,} bad records left out by now")
        self._num_bad = num_bad
        if self._max_bad_records and num_bad > self._max_bad_records:
            raise too_many_bad_records(self._max_bad_records)
        for s, before in zip(self.sources, epochs_before, strict=True):
            if self._speaks and before <= _MANY_EPOCHS < s.epochs:
                logger.warning(
                    f"source {s.source.name!r} is read for more than {_MANY_EPOCHS} epochs: from there on,"
                    " repeated data teaches less and less; max_epochs would end the run instead"
                )


def total(ledgers: dict[str, Ledger]) -> dict[str, int]:
    """The counts of all sources together."""
    return asdict(reduce(add, ledgers.values(), Ledger()))
