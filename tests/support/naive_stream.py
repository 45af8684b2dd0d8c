"""The order in which rows are dealt, by its definition and Python's integers, for tests."""

import hashlib
from collections.abc import Sequence

MASK = (1 << 64) - 1


def splitmix64(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def dealing_order(seed: int, source: str, first_row: int, num_rows: int) -> list[int]:
    """Of the rows of the window of a source that begins with row `first_row`."""
    key = seed
    for part in (int.from_bytes(hashlib.blake2b(source.encode(), digest_size=8).digest(), "little"), first_row):
        key = splitmix64(splitmix64(key) ^ part)
    return sorted(range(num_rows), key=lambda row: splitmix64(key ^ row))


def dealt_rows(
    epochs: Sequence[int], num_rows: int, seq_len: int, window_rows: int, seed: int, source: str
) -> list[int]:
    """The first rows of packing "split" as they are dealt, by their numbers in natural order; or all that there are.

    epochs: of each token of the source's stream, with a window's more than the rows need.
    """
    rows: list[int] = []
    while len(rows) < num_rows and (len(rows) + 1) * seq_len < len(epochs):
        first, last = len(rows), len(rows) + 1
        while last - first < window_rows and (last + 1) * seq_len < len(epochs):
            if epochs[(last + 1) * seq_len] > epochs[(first + 1) * seq_len]:  # the epoch is dealt
                break
            last += 1
        rows += [first + row for row in dealing_order(seed, source, first, last - first)]
    return rows[:num_rows]
