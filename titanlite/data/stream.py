"""The token stream: the order of documents, their tokens, and the position in it.

Owns the shuffle (a closed form: document counter -> epoch and document), the tokens of a run of consecutive documents,
and the cursor, which is all that a resume needs. Nothing here knows of ranks, batches, workers or threads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from titanlite.data.source import RecordError, Source

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


@dataclass(frozen=True)
class Cursor:
    """Where the stream stands: the next row, and the document and token with which it begins. The ledger counts what
    the rows before it took: tokens_read == targets + document_first + carried + dropped.
    """

    row: int = 0
    document: int = 0
    """Counter (epochs included) of the document that holds the next row's first token."""
    offset: int = 0
    """Index of that token in the document."""
    tokens_read: int = 0
    """Tokens of all documents that were begun."""
    targets: int = 0
    """Tokens that were predicted from another token of their document."""
    document_first: int = 0
    """First tokens of documents, which nothing predicts; so also the number of documents begun."""
    carried: int = 0
    """Tokens of the last document that wait for the next row."""
    bad_records: int = 0
    bytes: int = 0
    """Bytes on disk of the documents begun."""

    @property
    def ledger(self) -> dict[str, int]:
        return {
            "documents": self.document_first,
            "tokens_read": self.tokens_read,
            "targets": self.targets,
            "document_first": self.document_first,
            "carried": self.carried,
            "dropped": 0,  # rows are cut from one stream, so that no token falls between them
            "bad_records": self.bad_records,
            "bytes": self.bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "row": self.row,
            "sources": [{"document": self.document, "offset": self.offset, "ledger": self.ledger}],
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "Cursor":
        (source,) = state["sources"]
        counts = {key: value for key, value in source["ledger"].items() if key not in ("documents", "dropped")}
        return cls(state["row"], source["document"], source["offset"], **counts)


@dataclass(frozen=True, eq=False)
class Chunk:
    """The tokens of consecutive documents of the stream, one after the other."""

    counter: int
    """Counter of the first document."""
    ids: np.ndarray
    """int32 [tokens]."""
    lengths: np.ndarray
    """Tokens of each document, int64 [documents]; 0 for a bad record that is left out."""
    sizes: np.ndarray
    """Bytes of each document on disk, int64 [documents]."""
    bad_records: list[RecordError]
    error: Exception | None
    """What ended the stream behind these documents."""


def read_chunk(
    source: Source,
    encode_document: Callable[[str], np.ndarray],
    counter: int,
    documents: np.ndarray,
    skip_bad_records: bool,
) -> Chunk:
    """Read and tokenise documents (numbers in the source, int64 [n]) whose counters begin at `counter`.

    Raises nothing but KeyboardInterrupt and SystemExit: an error travels in the chunk, to be raised by who needs the
    documents behind it.
    """
    ids = [np.empty(0, np.int32)]  # concatenate wants at least one array
    lengths: list[int] = []
    sizes = np.empty(0, np.int64)
    bad_records: list[RecordError] = []
    error: Exception | None = None
    try:
        sizes = source.size(documents)
        for document in documents.tolist():
            try:
                ids.append(_encode(source, encode_document, document))
                lengths.append(len(ids[-1]))
            except RecordError as bad:
                if not skip_bad_records:
                    raise RecordError(f'{bad}; data.on_bad_record = "skip" would leave it out and count it') from bad
                bad_records.append(bad)
                lengths.append(0)
    except Exception as failure:
        error = failure
    return Chunk(counter, np.concatenate(ids), np.array(lengths, np.int64), sizes[: len(lengths)], bad_records, error)


def _encode(source: Source, encode_document: Callable[[str], np.ndarray], document: int) -> np.ndarray:
    text = source.read(document)
    try:
        return encode_document(text)
    except Exception as error:
        raise RuntimeError(f"{source.locate(document)}: cannot tokenise: {type(error).__name__}: {error}") from error
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as panic:  # tiktoken's PanicException, which `except Exception` misses
        raise RecordError(f"{source.locate(document)}: the tokenizer gave up on this text: {panic}") from panic
