"""Rows, starts, ledger and digests against a stream that is written down token by token."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from titanlite.data.packing import RowPacker, fingerprint_part, row_digest
from titanlite.data.stream import Chunk, Ledger, SourceCursor

MASK = (1 << 64) - 1


def splitmix64(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_row_digest_is_blake2b_64_of_little_endian_int32() -> None:
    # printf '\x01\x00\x00\x00\x00\x01\x00\x00\xff\xff\x01\x00' | b2sum --length 64
    expected = bytes.fromhex("19c90662feb50f4d")
    assert row_digest(np.array([1, 256, 131071])) == int.from_bytes(expected, "little")
    assert row_digest(np.array([1, 256, 131071], ">i4")) == int.from_bytes(expected, "little")


def test_fingerprint_is_a_number_computed_by_hand() -> None:
    # splitmix64(7) + splitmix64(9 + 0x9E3779B97F4A7C15) + splitmix64(2**64 - 1 + 2 * 0x9E3779B97F4A7C15) modulo 2**64
    assert fingerprint_part(np.array([7, 9, MASK], np.uint64), 0) == 0x5C29648F93547A22


@given(st.lists(st.integers(0, MASK), min_size=1, max_size=20), st.integers(1, 20))
def test_fingerprint_shares_add_up_however_the_rows_are_split(digests: list[int], size: int) -> None:
    array = np.array(digests, np.uint64)
    shares = [fingerprint_part(array[i : i + size], i) for i in range(0, len(digests), size)]
    expected = sum(splitmix64((d + i * 0x9E3779B97F4A7C15) & MASK) for i, d in enumerate(digests)) & MASK
    assert sum(shares) & MASK == expected


def test_fingerprint_sees_rows_exchanged() -> None:
    assert fingerprint_part(np.array([1, 2], np.uint64), 0) != fingerprint_part(np.array([2, 1], np.uint64), 0)


documents = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)


def chunks_of(lengths: list[int], chunk_sizes: list[int], counter: int = 0):  # type: ignore[no-untyped-def]
    """Endless chunks of the documents, repeated; token k of document c is 1000 * c + k. Document c has c + 1 bytes.

    Documents without tokens are bad records where their counter is even, else held out.
    """
    turn = 0
    while True:
        size = chunk_sizes[turn % len(chunk_sizes)]
        turn += 1
        counters = np.arange(counter, counter + size)
        counter += size
        lens = np.array([lengths[c % len(lengths)] for c in counters], np.int64)
        ids = np.concatenate([np.arange(n) + 1000 * c for c, n in zip(counters, lens, strict=True)]).astype(np.int32)
        out, even = lens == 0, counters % 2 == 0
        yield Chunk(int(counters[0]), ids, lens, np.where(out, 0, counters + 1), out & even, out & ~even, [], None)


def take(packer: RowPacker, chunks, num_rows: int, first: int = 0, last: int | None = None):  # type: ignore[no-untyped-def]
    while packer.missing(num_rows):
        packer.append(next(chunks))
    return packer.take(num_rows, first, num_rows if last is None else last)


def naive_stream(lengths: list[int], num_tokens: int) -> list[tuple[int, int]]:
    """The first tokens of the stream as (document counter, index in the document)."""
    stream: list[tuple[int, int]] = []
    counter = 0
    while len(stream) < num_tokens:
        stream += [(counter, k) for k in range(lengths[counter % len(lengths)])]
        counter += 1
    return stream


def naive_ledger(lengths: list[int], stream: list[tuple[int, int]], last: int, seq_len: int) -> Ledger:
    """Count token by token what rows up to stream index `last` took."""
    begun = range(stream[last][0] + 1)
    length = {c: lengths[c % len(lengths)] for c in begun}
    fitting = [c for c in begun if 0 < length[c] <= seq_len + 1]
    where: dict[int, list[int]] = {}
    for index, (c, _) in enumerate(stream):
        where.setdefault(c, []).append(index)
    whole = 0
    for c in fitting:  # all of it in one row; a row shares its last token with the next
        first = where[c][0]
        rows = range(max(0, first // seq_len - 1), first // seq_len + 1)
        whole += any(row * seq_len <= first and first + length[c] - 1 <= (row + 1) * seq_len for row in rows)
    return Ledger(
        tokens_read=sum(length.values()),
        targets=sum(k > 0 for _, k in stream[: last + 1]),
        document_first=sum(k == 0 for _, k in stream[: last + 1]),
        carried=length[stream[last][0]] - stream[last][1] - 1,
        bytes=sum(c + 1 for c in begun if length[c]),
        bad_records=sum(not length[c] and c % 2 == 0 for c in begun),
        held_out=sum(not length[c] and c % 2 == 1 for c in begun),
        fitting=len(fitting),
        cut=len(fitting) - whole,
    )


@given(
    lengths=documents,
    chunk_sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seq_len=st.integers(1, 30),
    num_rows=st.integers(1, 7),
)
@example(lengths=[1], chunk_sizes=[3], seq_len=5, num_rows=2)
@example(lengths=[0, 0, 1], chunk_sizes=[2], seq_len=1, num_rows=1)
@example(lengths=[5], chunk_sizes=[1], seq_len=5, num_rows=1)
def test_rows_starts_and_ledger_equal_a_naive_stream(
    lengths: list[int], chunk_sizes: list[int], seq_len: int, num_rows: int
) -> None:
    steps = 4
    stream = naive_stream(lengths, steps * num_rows * seq_len + seq_len + 100)
    packer, chunks = RowPacker(seq_len, SourceCursor()), chunks_of(lengths, chunk_sizes)
    for step in range(steps):
        rows = take(packer, chunks, num_rows)
        assert rows.tokens.shape == (num_rows, seq_len + 1)
        for i, row in enumerate(rows.tokens):
            begin = (step * num_rows + i) * seq_len
            expected = stream[begin : begin + seq_len + 1]
            assert row.tolist() == [1000 * c + k for c, k in expected]
            starts = [p for p in range(seq_len) if p == 0 or expected[p][1] == 0]
            assert rows.starts[i].tolist() == starts
            assert list(zip(rows.counters[i].tolist(), rows.offsets[i].tolist(), strict=True)) == [
                expected[p] for p in starts
            ]
        last = (step + 1) * num_rows * seq_len
        ledger = packer.cursor.ledger
        assert ledger == naive_ledger(lengths, stream, last, seq_len)
        assert ledger.closes()
        ahead = sum(len(placed.chunk.ids) for placed in packer._placed if placed.begin > last)
        at = next(placed for placed in packer._placed if placed.begin <= last < placed.begin + len(placed.chunk.ids))
        begun = int(np.searchsorted(at.ends, last, side="right"))
        assert packer.unread() == ahead + int(at.chunk.lengths[begun + 1 :].sum())
        assert (packer.cursor.document, packer.cursor.offset) == stream[last]


@given(
    lengths=documents,
    chunk_sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seq_len=st.integers(1, 30),
    batches=st.lists(st.integers(1, 5), min_size=2, max_size=6),
)
def test_any_cut_into_batches_restarts_and_slices_gives_the_same_rows(
    lengths: list[int], chunk_sizes: list[int], seq_len: int, batches: list[int]
) -> None:
    whole = RowPacker(seq_len, SourceCursor())
    expected = take(whole, chunks_of(lengths, [4]), sum(batches))
    cursor, tokens, pieces = SourceCursor(), [], []
    for num_rows in batches:  # every batch by a packer of its own, in two slices
        cut = num_rows // 2
        for first, last in ((0, cut), (cut, num_rows)):
            packer = RowPacker(seq_len, cursor)
            rows = take(packer, chunks_of(lengths, chunk_sizes, cursor.document), num_rows, first, last)
            tokens.append(rows.tokens)
            pieces += zip(rows.starts, rows.counters, rows.offsets, strict=True)
        cursor = packer.cursor
    assert np.concatenate(tokens).tolist() == expected.tokens.tolist()
    for row, parts in enumerate(pieces):
        whole_parts = (expected.starts[row], expected.counters[row], expected.offsets[row])
        assert [part.tolist() for part in parts] == [part.tolist() for part in whole_parts]
    assert cursor == whole.cursor


def test_packer_forgets_what_it_has_cut() -> None:
    packer, chunks = RowPacker(10, SourceCursor()), chunks_of([7], [3])
    for _ in range(50):
        take(packer, chunks, 2)
        kept = packer._placed[0].chunk
        assert kept.counter + len(kept.lengths) > packer.cursor.document


def test_resume_in_a_document_that_became_shorter_is_refused() -> None:
    packer = RowPacker(10, replace(SourceCursor(), row=1, document=3, offset=7))
    with pytest.raises(ValueError, match="cannot resume at token 7 of document 3, which has 7"):
        packer.append(next(chunks_of([7], [3], counter=3)))
