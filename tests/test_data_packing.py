"""Rows, starts, ledger and digests against a stream that is written down token by token."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from titanlite.data.packing import RowPacker, fingerprint_part, row_digest
from titanlite.data.source import RecordError
from titanlite.data.stream import Chunk, Cursor

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
    """Endless chunks of the documents, repeated; token k of document c is 1000 * c + k. Size of document c: c + 1."""
    turn = 0
    while True:
        size = chunk_sizes[turn % len(chunk_sizes)]
        turn += 1
        counters = range(counter, counter + size)
        counter += size
        lens = [lengths[c % len(lengths)] for c in counters]
        ids = [np.arange(n) + 1000 * c for c, n in zip(counters, lens, strict=True)]
        bad = [RecordError("bad") for n in lens if not n]
        sizes = np.array(counters, np.int64) + 1
        yield Chunk(counters[0], np.concatenate(ids).astype(np.int32), np.array(lens, np.int64), sizes, bad, None)


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


def naive_ledger(lengths: list[int], stream: list[tuple[int, int]], last: int) -> dict[str, int]:
    """Count token by token what rows up to stream index `last` took."""
    begun = range(stream[last][0] + 1)
    read = [lengths[c % len(lengths)] for c in begun]
    return {
        "documents": sum(n > 0 for n in read),
        "tokens_read": sum(read),
        "targets": sum(k > 0 for _, k in stream[: last + 1]),
        "document_first": sum(k == 0 for _, k in stream[: last + 1]),
        "carried": lengths[stream[last][0] % len(lengths)] - stream[last][1] - 1,
        "dropped": 0,
        "bad_records": sum(n == 0 for n in read),
        "bytes": sum(c + 1 for c, n in zip(begun, read, strict=True) if n),
    }


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
    stream = naive_stream(lengths, steps * num_rows * seq_len + 2)
    packer, chunks = RowPacker(seq_len, Cursor()), chunks_of(lengths, chunk_sizes)
    for step in range(steps):
        rows = take(packer, chunks, num_rows)
        assert rows.tokens.shape == (num_rows, seq_len + 1)
        for i, (row, starts) in enumerate(zip(rows.tokens, rows.starts, strict=True)):
            begin = (step * num_rows + i) * seq_len
            expected = stream[begin : begin + seq_len + 1]
            assert row.tolist() == [1000 * c + k for c, k in expected]
            assert starts.tolist() == [p for p in range(seq_len) if p == 0 or expected[p][1] == 0]
        last = (step + 1) * num_rows * seq_len
        ledger = packer.cursor.ledger
        assert ledger == naive_ledger(lengths, stream, last)
        assert ledger["tokens_read"] == sum(ledger[k] for k in ("targets", "document_first", "carried", "dropped"))
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
    whole = RowPacker(seq_len, Cursor())
    expected = take(whole, chunks_of(lengths, [4]), sum(batches))
    cursor, tokens, starts = Cursor(), [], []
    for num_rows in batches:  # every batch by a packer of its own, in two slices
        cut = num_rows // 2
        for first, last in ((0, cut), (cut, num_rows)):
            packer = RowPacker(seq_len, cursor)
            if first < last:
                rows = take(packer, chunks_of(lengths, chunk_sizes, cursor.document), num_rows, first, last)
                tokens.append(rows.tokens)
                starts += rows.starts
        cursor = packer.cursor
    assert np.concatenate(tokens).tolist() == expected.tokens.tolist()
    assert [s.tolist() for s in starts] == [s.tolist() for s in expected.starts]
    assert cursor == whole.cursor


def test_packer_forgets_what_it_has_cut() -> None:
    packer, chunks = RowPacker(10, Cursor()), chunks_of([7], [3])
    for _ in range(50):
        take(packer, chunks, 2)
        kept = packer._placed[0].chunk
        assert kept.counter + len(kept.lengths) > packer.cursor.document


def test_resume_in_a_document_that_became_shorter_is_refused() -> None:
    packer = RowPacker(10, replace(Cursor(), row=1, document=3, offset=7))
    with pytest.raises(ValueError, match="cannot resume at token 7 of document 3, which has 7"):
        packer.append(next(chunks_of([7], [3], counter=3)))
