"""The order of documents: a seeded shuffle in closed form, and which documents are kept out of training.

Owns the permutations (document counter -> document, O(1) memory for any corpus) and the held-out split. Refuses to know
anything of what documents hold.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FEISTEL_ROUNDS = 6


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Output of the SplitMix64 generator at state x, uint64 [n] (Steele, Lea, Flood 2014; Vigna's splitmix64.c)."""
    z = x + _GAMMA
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permute(x: np.ndarray, size: int, keys: np.ndarray, inverse: bool = False) -> np.ndarray:
    """Images of x (uint64 [n], below `size`) under keyed pseudo-random permutations of range(size).

    keys: uint64 [n], one permutation per key. A Feistel network on the next even number of bits, walked along its
    cycle until the image is below `size` again (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    Memory O(n), whatever the size; on average less than four walks, or 64 / size.
    """
    half = max(3, (int(size - 1).bit_length() + 1) // 2)  # halves of 1 or 2 bits shuffle measurably unevenly
    y = _feistel(x, half, keys, inverse)
    while len(outside := np.flatnonzero(y >= np.uint64(size))):
        y[outside] = _feistel(y[outside], half, keys[outside], inverse)
    return y


def _feistel(x: np.ndarray, half: int, keys: np.ndarray, inverse: bool) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> shift, x & mask
    if inverse:  # the same network with the halves exchanged and the rounds reversed
        left, right = right, left
    for r in reversed(range(_FEISTEL_ROUNDS)) if inverse else range(_FEISTEL_ROUNDS):
        left, right = right, left ^ (splitmix64(keys ^ right ^ np.uint64(r << 56)) & mask)
    if inverse:
        left, right = right, left
    return left << shift | right


class DocumentOrder:
    """The order of documents, epoch after epoch: blocks of documents shuffled, then the documents in each block.

    Every epoch is a permutation of all documents, a pure function of (num_documents, seed, epoch, shuffle_block). The
    last block may be shorter; it takes any place among the blocks. shuffle_block = 0: the natural order.
    """

    def __init__(self, num_documents: int, seed: int, shuffle_block: int) -> None:
        assert num_documents > 0
        assert shuffle_block >= 0
        self.num_documents = num_documents
        self.shuffle_block = shuffle_block
        self._seed = np.array([seed % (1 << 64)], np.uint64)

    def documents(self, counters: np.ndarray) -> np.ndarray:
        """The documents (int64 [n]) that the counters (int64 [n], from 0 at the start of training) stand for."""
        epochs, places = np.divmod(counters, self.num_documents)
        if not self.shuffle_block:
            return places
        num_full, rest = divmod(self.num_documents, self.shuffle_block)
        keys = splitmix64(splitmix64(self._seed) ^ epochs.astype(np.uint64))
        if rest:  # blocks behind the short one begin where they would if it were full
            distinct, which = np.unique(keys, return_inverse=True)
            short = np.full(len(distinct), num_full, np.uint64)
            place = permute(short, num_full + 1, distinct, inverse=True).astype(np.int64)[which]
            places = places + np.where(places < place * self.shuffle_block + rest, 0, self.shuffle_block - rest)
        slots, inside = (part.astype(np.uint64) for part in np.divmod(places, self.shuffle_block))
        blocks = permute(slots, num_full + (rest > 0), keys)
        block_keys = splitmix64(splitmix64(keys) ^ blocks)
        full = blocks < np.uint64(num_full)
        for members, size in ((full, self.shuffle_block), (~full, rest)):
            if members.any():
                inside[members] = permute(inside[members], size, block_keys[members])
        return blocks.astype(np.int64) * self.shuffle_block + inside.astype(np.int64)


class HeldOut:
    """Which documents of a source are kept out of training: those whose hash lies below a share of all hashes.

    The hash is of the names of the source and of the document's file and of its place in the file, so that no order,
    no other file, no rank and no time changes the split. share: from 0 to below 1.
    """

    def __init__(self, source: str, file_names: Sequence[str], share: float) -> None:
        self._bound = np.uint64(int(share * 2**64))
        digests = (
            hashlib.blake2b(f"{source}\0{name}".encode("utf-8", "surrogateescape"), digest_size=8)
            for name in file_names
        )
        self._keys = np.array([int.from_bytes(d.digest(), "little") for d in digests] if share else [], np.uint64)

    def __call__(self, files: np.ndarray, records: np.ndarray) -> np.ndarray:
        """bool [n], for documents by file (index) and record in it, both int64 [n]."""
        if not len(self._keys):
            return np.zeros(len(files), bool)
        return splitmix64(self._keys[files] ^ splitmix64(records.astype(np.uint64))) < self._bound
