"""Windows against an oracle that writes every token of the stream down and packs one document at a time."""

import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.listed_documents import EOS, rows_of
from tests.support.naive_stream import MASK, dealing_order, splitmix64
from titanlite.data import feed
from titanlite.data.feed import EndOfData, SourceRows
from titanlite.data.order import DocumentOrder
from titanlite.data.stream import Ledger, SourceCursor
from titanlite.data.windows import Rows, best_fit_decreasing, fingerprint_part, row_digest

SEED, NAME = 7, "web"
Token = tuple[int, int] | None  # (document counter, index in the document); None: a pad


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


# The oracle


@dataclass
class Window:
    rows: list[list[Token]]
    """In natural order."""
    counted: list[int]
    """Counters of the documents that the ledger has with this window."""
    cut: set[int]


def naive_windows(lengths: list[int], epoch: int, packing: str, seq_len: int, window_rows: int) -> list[Window]:
    """All windows of documents that end; `epoch` of them are an epoch."""
    if packing == "best_fit":
        windows, run = [], []
        for counter, _ in enumerate(lengths):
            run.append(counter)
            full = sum(lengths[c] for c in run) >= (2 * window_rows - 1) * (seq_len + 1) // 2
            if full or (counter + 1) % epoch == 0:
                windows.append(Window(naive_rows(run, lengths, seq_len), run, set()))
                run = []
        return windows
    stream = [(c, k) for c, n in enumerate(lengths) for k in range(n)]
    natural = [stream[r * seq_len : (r + 1) * seq_len + 1] for r in range(len(stream) // seq_len + 1)]
    num_rows = max(0, (len(stream) - 1) // seq_len)
    windows, counted, first = [], 0, 0
    while first < num_rows:
        last = first + 1
        while last < min(first + window_rows, num_rows):
            if natural[last][-1][0] // epoch > natural[first][-1][0] // epoch:  # all rows of an epoch are dealt
                break
            last += 1
        upto = stream[last * seq_len][0] + 1
        windows.append(Window([[*row] for row in natural[first:last]], [*range(counted, upto)], set()))
        counted, first = upto, last
    for window in windows:
        for c in window.counted:
            whole = any({(c, 0), (c, lengths[c] - 1)} <= {*row} for row in natural)
            if 0 < lengths[c] <= seq_len + 1 and not whole:
                window.cut.add(c)
    return windows


def naive_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The row of each piece, one piece at a time."""
    free: list[int] = []
    rows = [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [(space, row) for row, space in enumerate(free) if space >= lengths[i]]
        if fitting:
            rows[i] = min(fitting)[1]
        else:
            rows[i] = len(free)
            free.append(capacity)
        free[rows[i]] -= lengths[i]
    return rows


def naive_rows(run: list[int], lengths: list[int], seq_len: int) -> list[list[Token]]:
    """Of best fit, in the order of the pieces with which rows begin."""
    pieces: list[list[Token]] = []
    for counter in run:
        document: list[Token] = [(counter, k) for k in range(lengths[counter])]
        while len(document) > seq_len + 1:
            pieces.append(document[: seq_len + 1])
            document = document[seq_len:]
        pieces += [document] if document else []
    rows: dict[int, list[Token]] = {}
    for piece, row in zip(pieces, naive_best_fit([len(p) for p in pieces], seq_len + 1), strict=True):
        rows.setdefault(row, []).extend(piece)  # a row is made with the first of its pieces
    return [row + [None] * (seq_len + 1 - len(row)) for row in rows.values()]


def dealt_rows(windows: list[Window]) -> list[list[Token]]:
    rows: list[list[Token]] = []
    for window in windows:
        rows += [window.rows[k] for k in dealing_order(SEED, NAME, len(rows), len(window.rows))]
    return rows


def naive_ledger(lengths: list[int], windows: list[Window], num_rows: int, packing: str) -> Ledger:
    """Count token by token what the first rows took, with the bytes and bad records of listed_documents."""
    seen = dealt_rows(windows)[:num_rows]
    begun: list[Window] = []
    first_row = 0
    for window in windows:  # one without a row counts with the next
        if first_row < num_rows:
            begun.append(window)
        first_row += len(window.rows)
    start = next((c, 0) for c, n in enumerate(lengths) if n)
    new, read = (new_tokens(part, packing, start) for part in (seen, [row for w in begun for row in w.rows]))
    counted = [c for window in begun for c in window.counted]
    return Ledger(
        tokens_read=read.total(),
        targets=sum(n for (_, k), n in new.items() if k > 0),
        document_first=sum(n for (_, k), n in new.items() if k == 0),
        carried=read.total() - new.total(),
        padding=sum(row.count(None) for row in seen),
        bytes=sum(c + 1 for c in counted if lengths[c]),
        bad_records=sum(not lengths[c] for c in counted),
        fitting=sum(0 < lengths[c] <= len(windows[0].rows[0]) for c in counted) if seen else 0,
        cut=sum(len(window.cut) for window in begun),
    )


def new_tokens(rows: list[list[Token]], packing: str, start: tuple[int, int]) -> Counter[tuple[int, int]]:
    """How often each token is a target (its predecessor stands before it) or the first of a document. In "split" a
    row's first token was the last of another row, but for `start`, that of the stream."""
    new: Counter[tuple[int, int]] = Counter()
    for row in rows:
        for i, token in enumerate(row):
            if token is None:
                continue
            follows = i > 0 and row[i - 1] == (token[0], token[1] - 1)
            opens = token[1] == 0 and (packing == "best_fit" or i > 0 or token == start)
            new[token] += follows or opens
    return +new


def named(rows: Rows, num_documents: int) -> list[list[Token]]:
    """The rows as their pieces name them; the ids must say the same."""
    assert rows.tokens.dtype == np.int32
    result = []
    for ids, starts, counters, offsets in zip(rows.tokens, rows.starts, rows.counters, rows.offsets, strict=True):
        assert starts[0] == 0
        assert {array.dtype for array in (starts, counters, offsets)} == {np.dtype(np.int64)}
        row: list[Token] = []
        for start, end, c, offset in zip(starts, [*starts[1:], len(ids)], counters, offsets, strict=True):
            assert len(row) == start < end
            assert c >= 0 or (c, offset, end) == (-1, 0, start + 1)
            row += [None if c < 0 else (int(c), int(offset) + k) for k in range(end - start)]
        expected = [EOS if token is None else 1000 * (token[0] % num_documents) + token[1] for token in row]
        assert ids.tolist() == expected
        result.append(row)
    return result


def all_rows(rows: SourceRows, num_documents: int) -> list[list[Token]]:
    """One row at a time, to the end of the documents."""
    taken = []
    while True:
        try:
            rows.fill(1)
        except EndOfData:
            return taken
        taken += named(rows.take(1, 0, 1)[0], num_documents)


documents = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 60)), min_size=1, max_size=30).filter(any)
packings = st.sampled_from(["split", "best_fit"])


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_pieces_that_go_in_together_go_where_each_would_go_alone(lengths: list[int], capacity: int) -> None:
    assert best_fit_decreasing(np.array(lengths, np.int64), capacity).tolist() == naive_best_fit(lengths, capacity)


@given(
    lengths=documents,
    packing=packings,
    seq_len=st.integers(1, 30),
    window_rows=st.integers(1, 6),
    epochs=st.integers(1, 3),
    chunk=st.sampled_from([1, 20, 10**6]),
    on_demand=st.booleans(),
)
@example(lengths=[1], packing="split", seq_len=5, window_rows=1, epochs=3, chunk=1, on_demand=False)
@example(lengths=[0, 0, 1, 0, 0], packing="best_fit", seq_len=1, window_rows=1, epochs=1, chunk=2, on_demand=False)
@example(lengths=[0, 0, 1, 0, 0], packing="split", seq_len=1, window_rows=1, epochs=3, chunk=2, on_demand=True)
@example(lengths=[1] * 40, packing="best_fit", seq_len=3, window_rows=2, epochs=1, chunk=7, on_demand=False)
@example(lengths=[900], packing="split", seq_len=7, window_rows=2, epochs=1, chunk=1, on_demand=False)
@example(lengths=[3, 900, 3], packing="best_fit", seq_len=7, window_rows=2, epochs=1, chunk=5, on_demand=True)
@example(lengths=[8, 9, 15, 16], packing="split", seq_len=7, window_rows=4, epochs=2, chunk=1, on_demand=False)
def test_rows_cursor_and_ledger_equal_the_oracle(
    lengths: list[int], packing: str, seq_len: int, window_rows: int, epochs: int, chunk: int, on_demand: bool
) -> None:
    documents = lengths * epochs
    windows = naive_windows(documents, len(lengths), packing, seq_len, window_rows)
    expected = dealt_rows(windows)
    with patch.multiple(feed, CHUNK_BYTES=chunk, _ORDER_DOCUMENTS=7):
        rows = rows_of(lengths, packing, seq_len, window_rows, max_epochs=epochs, on_demand=on_demand)
        for number, row in enumerate(expected):
            rows.fill(1)
            assert named(rows.take(1, 0, 1)[0], len(lengths)) == [row]
            # Bytes go by the number of a document, which begins anew in each epoch.
            ledger = replace(naive_ledger(documents, windows, number + 1, packing), bytes=rows.cursor.ledger.bytes)
            assert rows.cursor.ledger == ledger
            assert ledger.tokens_read == ledger.targets + ledger.document_first + ledger.carried
        with pytest.raises(EndOfData):
            rows.fill(1)
    ended = rows.ended()
    assert ended.tokens_read == sum(documents) == ended.targets + ended.document_first + ended.dropped
    assert ended.bytes == epochs * sum(d + 1 for d, n in enumerate(lengths) if n)
    assert ended.bad_records == documents.count(0)


@given(lengths=documents, seq_len=st.integers(1, 30), window_rows=st.integers(1, 6), packing=packings)
def test_every_token_is_trained_once(lengths: list[int], seq_len: int, window_rows: int, packing: str) -> None:
    rows = all_rows(rows_of(lengths, packing, seq_len, window_rows), len(lengths))
    tokens = [(c, k) for c, n in enumerate(lengths) for k in range(n)]
    if packing == "split":
        tokens = tokens[: (len(tokens) - 1) // seq_len * seq_len + 1]
    assert new_tokens(rows, packing, tokens[0]) == Counter(tokens if rows else [])
    for row in rows:
        assert row == [t for t in row if t] + [None] * row.count(None)  # pads only at the end
        assert row[0] is not None
    if packing == "best_fit":  # what fits is not cut
        where = Counter(c for row in rows for c in {token[0] for token in row if token})
        assert where == {c: max(1, -(-(n - 1) // seq_len)) for c, n in enumerate(lengths) if n}


@given(lengths=documents, seq_len=st.integers(1, 30), window_rows=st.integers(1, 6), packing=packings)
def test_the_rows_of_a_window_are_a_permutation_of_the_natural_ones(
    lengths: list[int], seq_len: int, window_rows: int, packing: str
) -> None:
    shuffled = all_rows(rows_of(lengths, packing, seq_len, window_rows), len(lengths))
    natural = all_rows(rows_of(lengths, packing, seq_len, window_rows, shuffle=False), len(lengths))
    first = 0
    for window in naive_windows(lengths, len(lengths), packing, seq_len, window_rows):
        here = slice(first, first + len(window.rows))
        assert natural[here] == window.rows
        assert sorted(map(str, shuffled[here])) == sorted(map(str, window.rows))
        first = here.stop
    assert len(shuffled) == len(natural) == first


def test_the_order_differs_by_seed_source_window_and_epoch() -> None:
    lengths = [9] * 64  # 64 rows an epoch, in two windows of equal documents

    def orders(seed: int, name: str) -> list[tuple[int, ...]]:
        rows = rows_of(lengths, "best_fit", 8, 32, seed=seed, name=name, max_epochs=2)
        counters = [row[0][0] for row in all_rows(rows, 64) if row[0]]
        assert len(counters) == 128
        return [tuple(c - 32 * w for c in counters[32 * w : 32 * (w + 1)]) for w in range(4)]

    found = [order for seed, name in ((1, "a"), (2, "a"), (1, "b")) for order in orders(seed, name)]
    assert len({*found}) == 12
    assert all(sorted(order) == [*range(32)] for order in found)


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_rows_of_a_step_are_neighbours_in_the_stream_no_more_often_than_chance(packing: str) -> None:
    """Of n rows in random order, two that are dealt one after the other are neighbours with probability 2 / n; so are
    any two of a step. Of natural order, 7 of 28 pairs of a step of 8 are."""
    seq_len, window_rows, step = 16, 256, 8

    def share(shuffle: bool) -> float:
        rows = rows_of([2000] * 60, packing, seq_len, window_rows, shuffle=shuffle)  # a document is half a window
        places = [2000 * row[1][0] + row[1][1] for row in all_rows(rows, 60) if row[1]]
        steps = np.array(places[: len(places) // step * step]).reshape(-1, step)
        near = np.abs(steps[:, :, None] - steps[:, None, :]) == seq_len
        return float(near.sum() / (near.shape[0] * step * (step - 1)))

    assert share(shuffle=False) > 0.2
    assert share(shuffle=True) < 2 / window_rows * 1.5


def test_documents_come_from_all_over_a_window() -> None:
    """A step of consecutive rows would be a single document; dealt, its rows come from nearly as many as it has."""
    rows = rows_of([4000] * 64, "split", 16, 64 * 250)
    counters = [row[1][0] for row in all_rows(rows, 64) if row[1]]
    steps = np.array(counters[: len(counters) // 8 * 8]).reshape(-1, 8)
    # 8 draws from 64 documents: 64 * (1 - (63 / 64) ** 8) = 7.57 different ones on average.
    assert np.mean([len({*step}) for step in steps.tolist()]) == pytest.approx(7.57, abs=0.1)


@given(
    lengths=documents,
    packing=packings,
    seq_len=st.integers(1, 30),
    window_rows=st.integers(1, 6),
    batches=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    chunks=st.tuples(st.sampled_from([1, 20, 10**6]), st.sampled_from([3, 8192])),
    shuffle_block=st.integers(0, 4),
)
def test_any_chunks_batches_slices_readers_and_restarts_give_the_same_rows(
    lengths: list[int],
    packing: str,
    seq_len: int,
    window_rows: int,
    batches: list[int],
    chunks: tuple[int, int],
    shuffle_block: int,
) -> None:
    order = DocumentOrder(len(lengths), 3, shuffle_block)

    def at(cursor: SourceCursor | None, on_demand: bool = False) -> SourceRows:
        return rows_of(lengths, packing, seq_len, window_rows, cursor, on_demand=on_demand, max_epochs=2, order=order)

    whole = at(None)
    expected: list[list[int]] = []
    with suppress(EndOfData):
        while True:
            whole.fill(1)
            expected += whole.take(1, 0, 1)[0].tokens.tolist()
    cursor = SourceCursor()
    tokens: list[list[int]] = []
    with patch.multiple(feed, CHUNK_BYTES=chunks[0], _ORDER_DOCUMENTS=chunks[1]):
        going, turn = at(None), 0
        while len(tokens) < len(expected):
            num_rows = min(batches[turn % len(batches)], len(expected) - len(tokens))
            turn += 1
            cut = num_rows // 2
            for first, last in ((0, cut), (cut, num_rows)):  # each slice, empty or not, by rows of its own
                rows = at(cursor, on_demand=first > 0)
                rows.fill(num_rows)
                tokens += rows.take(num_rows, first, last)[0].tokens.tolist()
            going.fill(num_rows)  # and both in one that is never restarted
            assert going.take(num_rows, 0, num_rows)[0].tokens.tolist() == tokens[-num_rows:]
            assert going.cursor == rows.cursor
            cursor = SourceCursor.from_dict(json.loads(json.dumps(rows.cursor.to_dict())))
    assert tokens == expected
    assert cursor == whole.cursor


def test_a_reader_on_demand_gives_the_tokens_of_the_rows_that_are_dealt_and_no_others() -> None:
    rows = rows_of([50] * 100, "split", 20, 40, on_demand=True)
    rows.fill(10)
    rows.take(10, 4, 7)
    assert rows.source.reader.num_read == 3 * 21  # type: ignore[attr-defined]


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_rows_that_are_dealt_are_forgotten_with_their_window(packing: str) -> None:
    with patch.multiple(feed, CHUNK_BYTES=50, _ORDER_DOCUMENTS=64):
        rows = rows_of([7] * 3000, packing, 9, 4)
        for _ in range(200):
            rows.fill(1)
            rows.take(1, 0, 1)
            windows = [ids for window in rows._windows for ids in window._ids.values()]
            held = sum(map(len, windows)) + sum(len(ids) for chunk in rows._open for ids in chunk.ids)
            assert held < 2 * 4 * 10 + 100


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_resume_in_a_window_that_changed_is_refused(packing: str) -> None:
    rows = rows_of([7] * 40, packing, 9, 4)
    rows.fill(6)
    rows.take(6, 0, 0)
    cursor = rows.cursor
    assert cursor.dealt > 0
    before = [7] * cursor.document
    assert cursor.offset == (1 if packing == "split" else 0)
    with pytest.raises(ValueError, match=r"cannot resume in the window from token [01] of document 5 on: its "):
        rows_of([*before, *[1] * 99], packing, 9, 4, cursor).fill(1)


def test_bad_records_are_told_of_with_the_window_that_the_ledger_counts() -> None:
    rows = rows_of([9, 0, 9, 9, 9, 0, 0, 9, 9], "split", 8, 2)
    told = []
    for _ in range(5):
        rows.fill(1)
        told += rows.take(1, 0, 0)[1]
        assert len(told) == rows.cursor.ledger.bad_records
    assert [bad.place for bad in told] == ["document 1", "document 5", "document 6"]


def test_more_bad_records_than_allowed_stop_the_window_that_holds_them() -> None:
    with patch.multiple(feed, CHUNK_BYTES=1, _ORDER_DOCUMENTS=2):
        rows = rows_of([9, 9, 9, *[0] * 5000, 9], "split", 8, 2, max_bad_records=3)
        rows.fill(2)
        rows.take(2, 0, 2)
        with pytest.raises(ValueError, match="more bad records than data.max_bad_records = 3"):
            rows.fill(1)


@pytest.mark.parametrize(
    ("mean", "seq_len", "padding", "cut_by_split"),
    [  # the docs' table: per cent of the tokens of rows, and of the documents that fit into a row
        (100, 2048, 0.05, 4.8),
        (300, 2048, 0.04, 13.6),
        (600, 2048, 0.06, 23.2),
        (1000, 2048, 0.10, 32.1),
        (100, 8192, 0.21, 1.2),
        (300, 8192, 0.19, 3.7),
        (600, 8192, 0.17, 7.1),
        (1000, 8192, 0.19, 11.4),
    ],
)
def test_padding_and_documents_cut(mean: int, seq_len: int, padding: float, cut_by_split: float) -> None:
    sample = np.random.default_rng(mean).lognormal(np.log(mean) - 0.5, 1.0, 16_000_000 // mean)  # sigma 1
    lengths = np.ceil(sample).astype(np.int64)

    def ledger_of(packing: str) -> Ledger:
        rows = rows_of(lengths, packing, seq_len, 2**21 // seq_len, on_demand=True)
        for stride in (64, 1):
            with suppress(EndOfData):
                while True:
                    rows.fill(stride)
                    rows.take(stride, 0, 0)
        return rows.cursor.ledger

    ledger = ledger_of("best_fit")
    assert ledger.tokens_read == lengths.sum() == ledger.targets + ledger.document_first
    assert ledger.fitting == np.count_nonzero(lengths <= seq_len + 1)
    assert ledger.cut == 0
    pieces = np.maximum(1, -(-(lengths - 1) // seq_len))  # each but a document's first repeats a token
    fewest_rows = -(-(lengths + pieces - 1).sum() // (seq_len + 1))
    num_rows = ((lengths + pieces - 1).sum() + ledger.padding) / (seq_len + 1)
    assert fewest_rows <= num_rows <= 1.005 * fewest_rows
    assert 100 * ledger.padding / (num_rows * (seq_len + 1)) == pytest.approx(padding, abs=0.01)
    split = ledger_of("split")
    assert 100 * split.cut / split.fitting == pytest.approx(cut_by_split, abs=0.1)
