"""Mixtures: which source deals a row of the stream.

Owns the deck, a run of rows in which every source has its exact share; the next deck has the same shares in another
order. So the dealer of row g is a closed form of (weights, seed, g), and no state is kept.
"""

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from titanlite.data.order import splitmix64

_MAX_ROWS = 1 << 20


class Deck:
    """Deals rows to sources by their weights, which are shares of rows and so, rows being equally long, of tokens.

    A deck is the shortest that holds every share exactly; shares that need more than about a million rows (weights like
    0.3333333333) are rounded to that deck by largest remainder. Within a deck a source's rows are spread evenly, from a
    start that is drawn anew for each deck and source.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        """Raises ValueError for a weight above 0 whose share is less than a row of the longest deck."""
        parts = [Fraction(str(weight)) for weight in weights.values()]  # 0.1 means a tenth, not its binary neighbour
        shares = [part / sum(parts) for part in parts]
        self.num_rows = min(math.lcm(*(share.denominator for share in shares)), _MAX_ROWS)
        counts = [math.floor(share * self.num_rows) for share in shares]
        rests = [share * self.num_rows - count for share, count in zip(shares, counts, strict=True)]
        for i in sorted(range(len(rests)), key=lambda i: -rests[i])[: self.num_rows - sum(counts)]:
            counts[i] += 1
        for name, part, count in zip(weights, parts, counts, strict=True):
            if part and not count:
                raise ValueError(
                    f"data.sources.{name}.weight = {weights[name]} is less than a row in {_MAX_ROWS:,} of the mixture:"
                    " use a larger weight, or 0 to leave the source out"
                )
        self.counts = np.array(counts, np.int64)
        """Rows of each source in a deck."""
        self._seed = np.array([seed % (1 << 64)], np.uint64)
        self._deck = -1  # whose order is kept
        self._order = np.empty(0, np.int64)

    def sources(self, first: int, num_rows: int) -> np.ndarray:
        """The source (index, int64 [num_rows]) that deals each of the rows from `first` on."""
        if self.num_rows == 1:  # a single source
            return np.full(num_rows, int(np.argmax(self.counts)), np.int64)
        dealt, row = [np.empty(0, np.int64)], first
        while row < first + num_rows:
            deck, place = divmod(row, self.num_rows)
            dealt.append(self._order_of(deck)[place : place + first + num_rows - row])
            row += len(dealt[-1])
        return np.concatenate(dealt)

    def dealt(self, row: int) -> np.ndarray:
        """Rows that each source deals before `row`, int64 [sources]."""
        deck, place = divmod(row, self.num_rows)
        return deck * self.counts + np.bincount(self._order_of(deck)[:place], minlength=len(self.counts))

    def _order_of(self, deck: int) -> np.ndarray:
        if deck != self._deck:
            sources = np.repeat(np.arange(len(self.counts)), self.counts)
            nth = np.arange(self.num_rows) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
            keys = splitmix64(splitmix64(self._seed) ^ np.uint64(deck))
            starts = splitmix64(keys ^ splitmix64(np.arange(len(self.counts), dtype=np.uint64))) >> np.uint64(32)
            # The n-th of a source's rows stands at the share (n + start) / count of the deck, start in [0, 1).
            places = ((nth << 32) + starts.astype(np.int64)[sources]) // self.counts[sources]
            self._order = sources[np.argsort(places, kind="stable")]
            self._deck = deck
        return self._order
