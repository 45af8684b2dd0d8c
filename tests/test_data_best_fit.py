"""Best fit against an oracle that packs one document at a time and writes every token down."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from titanlite.data import best_fit
from titanlite.data.best_fit import BestFitPacker, best_fit_decreasing
from titanlite.data.packing import Packer, RowPacker, Rows
from titanlite.data.stream import Chunk, Ledger, SourceCursor

MASK = (1 << 64) - 1
EOS = 2**31 - 1
SEED = 7
Token = tuple[int, int] | None  # (document counter, index in the document), None: a pad


def splitmix64(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


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


@dataclass
class Window:
    counters: list[int]
    rows: list[list[Token]]


def naive_windows(lengths: list[int], seq_len: int, window_rows: int, epoch: int, seed: int = SEED) -> list[Window]:
    """All rows of all windows; `epoch` documents are an epoch, and the last one ends with the documents."""
    windows, run = [], []
    for counter, _ in enumerate(lengths):
        run.append(counter)
        full = sum(lengths[c] for c in run) >= (window_rows * (seq_len + 1)) - -(-(seq_len + 1) // 2)
        if full or (counter + 1) % epoch == 0 or counter == len(lengths) - 1:
            windows.append(Window(run, naive_rows(run, lengths, seq_len, seed)))
            run = []
    return windows


def naive_rows(run: list[int], lengths: list[int], seq_len: int, seed: int) -> list[list[Token]]:
    pieces: list[list[Token]] = []
    for counter in run:
        document: list[Token] = [(counter, k) for k in range(lengths[counter])]
        while len(document) > seq_len + 1:
            pieces.append(document[: seq_len + 1])
            document = document[seq_len:]
        pieces += [document] if document else []
    rows: dict[int, list[Token]] = {}
    for piece, row in zip(pieces, naive_best_fit([len(p) for p in pieces], seq_len + 1), strict=True):
        rows.setdefault(row, []).extend(piece)
    for row in rows.values():
        row += [None] * (seq_len + 1 - len(row))
    key = splitmix64(splitmix64(seed) ^ run[0])
    return [rows[row] for row in sorted(rows, key=lambda row: splitmix64(key ^ row))]


def naive_ledger(lengths: list[int], windows: list[Window], num_rows: int, seq_len: int) -> Ledger:
    """Count token by token what the first rows took, with the bytes and bad documents of `chunks_of`."""
    tokens: list[Token] = []
    waiting = 0
    read: list[int] = []
    passed: list[int] = []  # documents of windows without a token, which count with the next row
    for window in windows:
        here = window.rows[: num_rows - len(tokens) // (seq_len + 1)]
        passed += window.counters
        if here:
            read, passed = read + passed, []
            tokens += [token for row in here for token in row]
            waiting = sum(lengths[c] for c in window.counters) - sum(new_tokens(here).values())
    new = new_tokens([tokens[i : i + seq_len + 1] for i in range(0, len(tokens), seq_len + 1)])
    return Ledger(
        tokens_read=sum(lengths[c] for c in read),
        targets=sum(n for (_, k), n in new.items() if k > 0),
        document_first=sum(n for (_, k), n in new.items() if k == 0),
        carried=waiting,
        padding=tokens.count(None),
        bytes=sum(c + 1 for c in read if lengths[c]),
        bad_records=sum(not lengths[c] and c % 3 > 0 for c in read),
        held_out=sum(not lengths[c] and c % 3 == 0 for c in read),
        fitting=sum(0 < lengths[c] <= seq_len + 1 for c in read),
    )


def new_tokens(rows: list[list[Token]]) -> Counter[tuple[int, int]]:
    """How often each token is a target (its predecessor stands before it) or the first of a document."""
    new: Counter[tuple[int, int]] = Counter()
    for row in rows:
        for before, token in zip([None, *row], row, strict=False):
            if token is not None and (token[1] == 0 or before == (token[0], token[1] - 1)):
                new[token] += 1
    return new


def chunks_of(lengths: list[int], chunk_sizes: list[int], counter: int = 0) -> Iterator[Chunk]:
    """The documents from `counter` on; token k of document c is 1000 * c + k.

    Document c has c + 1 bytes; one without tokens has none, and is held out if c % 3 == 0 and bad if not.
    """
    turn = 0
    while counter < len(lengths):
        size = chunk_sizes[turn % len(chunk_sizes)]
        turn += 1
        counters = np.arange(counter, min(counter + size, len(lengths)))
        lens = np.array(lengths[counter : counter + size], np.int64)
        ids = np.concatenate([np.empty(0, np.int32), *(1000 * c + np.arange(lengths[c]) for c in counters)])
        bad, held_out = (lens == 0) & (counters % 3 > 0), (lens == 0) & (counters % 3 == 0)
        sizes = np.where(lens > 0, counters + 1, 0)
        yield Chunk(counter, ids.astype(np.int32), lens, sizes, bad, held_out, [], None)
        counter += size


def fill(packer: BestFitPacker, chunks: Iterator[Chunk], num_rows: int) -> bool:
    """Feed the packer as a loader does; False where the documents end before the rows."""
    while packer.missing(num_rows):
        chunk = next(chunks, None)
        if chunk is None:
            packer.end()
            return not packer.missing(num_rows)
        packer.append(chunk)
    return True


def all_rows(packer: BestFitPacker, chunks: Iterator[Chunk]) -> list[Rows]:
    """One row at a time, to the end of the documents."""
    rows = []
    while fill(packer, chunks, 1):
        rows.append(packer.take(1, 0, 1))
    return rows


def named(rows: Rows) -> list[list[Token]]:
    """The rows as their pieces name them; the ids must say the same."""
    assert rows.tokens.dtype == np.int32
    result = []
    for ids, starts, counters, offsets in zip(rows.tokens, rows.starts, rows.counters, rows.offsets, strict=True):
        assert starts[0] == 0
        assert len(starts) == len(counters) == len(offsets)
        assert {array.dtype for array in (starts, counters, offsets)} == {np.dtype(np.int64)}
        row: list[Token] = []
        for start, end, c, offset in zip(starts, [*starts[1:], len(ids)], counters, offsets, strict=True):
            assert len(row) == start < end
            assert c >= 0 or (c, offset, end) == (-1, 0, start + 1)
            row += [None if c < 0 else (int(c), int(offset) + k) for k in range(end - start)]
        assert ids.tolist() == [EOS if token is None else 1000 * token[0] + token[1] for token in row]
        result.append(row)
    return result


documents = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 60)), min_size=1, max_size=40)
chunk_sizes = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_pieces_that_go_in_together_go_where_each_would_go_alone(lengths: list[int], capacity: int) -> None:
    assert best_fit_decreasing(np.array(lengths, np.int64), capacity).tolist() == naive_best_fit(lengths, capacity)


@given(
    lengths=documents,
    sizes=chunk_sizes,
    seq_len=st.integers(1, 30),
    window_rows=st.integers(1, 6),
    epochs=st.integers(1, 3),
)
@example(lengths=[0], sizes=[1], seq_len=4, window_rows=2, epochs=1)
@example(lengths=[0] * 20, sizes=[3], seq_len=4, window_rows=2, epochs=1)
@example(lengths=[0, 0, 1, 0, 0], sizes=[2], seq_len=1, window_rows=1, epochs=1)
@example(lengths=[1] * 40, sizes=[7], seq_len=3, window_rows=2, epochs=1)
@example(lengths=[900], sizes=[1], seq_len=7, window_rows=2, epochs=1)
@example(lengths=[3, 900, 3], sizes=[5], seq_len=7, window_rows=2, epochs=1)
@example(lengths=[8, 9, 15, 16], sizes=[1], seq_len=7, window_rows=4, epochs=1)
def test_rows_and_ledger_equal_the_oracle(
    lengths: list[int], sizes: list[int], seq_len: int, window_rows: int, epochs: int
) -> None:
    epoch, lengths = len(lengths), lengths * epochs
    windows = naive_windows(lengths, seq_len, window_rows, epoch)
    with patch.object(best_fit, "WINDOW_ROWS", window_rows):
        packer, chunks = BestFitPacker(seq_len, SourceCursor(), EOS, SEED, epoch), chunks_of(lengths, sizes)
        for window in windows:
            for place, row in enumerate(window.rows):
                assert packer.cursor.offset == place
                assert packer.cursor.document == window.counters[0] or place == 0  # empty documents may lie between
                assert fill(packer, chunks, 1)
                assert named(packer.take(1, 0, 1)) == [row]
                ledger = packer.cursor.ledger
                assert ledger == naive_ledger(lengths, windows, packer.cursor.row, seq_len)
                assert ledger.tokens_read == ledger.targets + ledger.document_first + ledger.carried
            assert packer.cursor.ledger.carried == 0
        assert not fill(packer, chunks, 1)
        assert packer.cursor.row == sum(len(window.rows) for window in windows)


@given(lengths=documents, seq_len=st.integers(1, 30), window_rows=st.integers(1, 6))
def test_every_token_is_trained_once_and_nothing_that_fits_is_cut(
    lengths: list[int], seq_len: int, window_rows: int
) -> None:
    with patch.object(best_fit, "WINDOW_ROWS", window_rows):
        rows = all_rows(BestFitPacker(seq_len, SourceCursor(), EOS, SEED, len(lengths)), chunks_of(lengths, [3]))
    tokens = [row for part in rows for row in named(part)]
    assert new_tokens(tokens) == Counter((c, k) for c, n in enumerate(lengths) for k in range(n))
    where: dict[int, list[int]] = {}
    for i, row in enumerate(tokens):
        assert len(row) == seq_len + 1
        assert row == [t for t in row if t] + [None] * row.count(None)  # pads only at the end
        assert row[0] is not None
        for c in {token[0] for token in row if token}:
            where.setdefault(c, []).append(i)
    for c, n in enumerate(lengths):
        assert len(where.get(c, [])) == (0 if n == 0 else max(1, -(-(n - 1) // seq_len)))


@given(lengths=documents, sizes=chunk_sizes, seq_len=st.integers(1, 30), window_rows=st.integers(1, 6))
def test_windows_without_limited_epochs_end_by_their_tokens_alone(
    lengths: list[int], sizes: list[int], seq_len: int, window_rows: int
) -> None:
    lengths = lengths * 4
    oracle = naive_windows(lengths, seq_len, window_rows, len(lengths))
    with patch.object(best_fit, "WINDOW_ROWS", window_rows):
        rows = all_rows(BestFitPacker(seq_len, SourceCursor(), EOS, SEED), chunks_of(lengths, sizes))
    dealt = [row for part in rows for row in named(part)]
    assert dealt in ([row for window in part for row in window.rows] for part in (oracle, oracle[:-1]))


@given(
    lengths=documents.filter(any),
    sizes=chunk_sizes,
    seq_len=st.integers(1, 30),
    window_rows=st.integers(1, 6),
    batches=st.lists(st.integers(1, 9), min_size=1, max_size=5),
)
def test_any_chunks_batches_slices_and_restarts_give_the_same_rows(
    lengths: list[int], sizes: list[int], seq_len: int, window_rows: int, batches: list[int]
) -> None:
    with patch.object(best_fit, "WINDOW_ROWS", window_rows):
        whole = BestFitPacker(seq_len, SourceCursor(), EOS, SEED, len(lengths))
        expected = [row for part in all_rows(whole, chunks_of(lengths, [4])) for row in named(part)]
        cursors = [SourceCursor()]
        going, chunks = BestFitPacker(seq_len, SourceCursor(), EOS, SEED, len(lengths)), chunks_of(lengths, sizes)
        tokens, turn = [], 0
        while len(tokens) < len(expected):
            num_rows = min(batches[turn % len(batches)], len(expected) - len(tokens))
            turn += 1
            cut = num_rows // 2
            parts = []
            for first, last in ((0, cut), (cut, num_rows)):  # each slice, empty or not, by a packer of its own
                packer = BestFitPacker(seq_len, cursors[-1], EOS, SEED, len(lengths))
                assert fill(packer, chunks_of(lengths, sizes, cursors[-1].document), num_rows)
                assert cursors[-1].ledger.tokens_read + packer.unread() == sum(lengths[: packer._next_counter])
                parts.append(packer.take(num_rows, first, last))
            tokens += [row for part in parts for row in named(part)]
            assert fill(going, chunks, num_rows)  # and both in one that is never restarted
            assert named(going.take(num_rows, 0, num_rows)) == tokens[-num_rows:]
            assert going.cursor == packer.cursor
            assert going.cursor.ledger.tokens_read + going.unread() == sum(lengths[: going._next_counter])
            cursors.append(SourceCursor.from_dict(json.loads(json.dumps(packer.cursor.to_dict()))))
    assert tokens == expected
    assert cursors[-1] == whole.cursor


@given(lengths=documents, seq_len=st.integers(1, 30))
def test_starts_are_those_of_the_document_rule(lengths: list[int], seq_len: int) -> None:
    (chunk,) = chunks_of(lengths, [len(lengths)])
    chunk.ids[np.cumsum(chunk.lengths)[chunk.lengths > 0] - 1] = EOS  # as every document ends
    with patch.object(best_fit, "WINDOW_ROWS", 3):
        rows = all_rows(BestFitPacker(seq_len, SourceCursor(), EOS, SEED, len(lengths)), iter([chunk]))
    for part in rows:
        behind_eos = np.flatnonzero(part.tokens[0, :-1] == EOS) + 1
        assert part.starts[0].tolist() == [0, *behind_eos.tolist()]


def test_the_order_of_rows_depends_on_seed_and_window_alone() -> None:
    lengths = [9] * 30 + [2] * 200
    rows = {}
    for seed in (SEED, SEED + 1):
        with patch.object(best_fit, "WINDOW_ROWS", 40):
            packer = BestFitPacker(9, SourceCursor(), EOS, seed, len(lengths))
            rows[seed] = [row for part in all_rows(packer, chunks_of(lengths, [50])) for row in named(part)]
    assert rows[SEED] != rows[SEED + 1]
    key = [str(row) for row in rows[SEED]]
    assert sorted(key) == sorted(str(row) for row in rows[SEED + 1])
    long = [i for i, row in enumerate(rows[SEED]) if row[0] and row[0][0] < 30]
    assert len(long) == 30
    assert long != list(range(30))  # the documents that best fit places first are not dealt first
    assert 0.3 < np.mean(long) / len(key) < 0.7


def test_packer_forgets_what_it_has_dealt() -> None:
    lengths = [7] * 3000
    with patch.object(best_fit, "WINDOW_ROWS", 4):
        packer, chunks = BestFitPacker(9, SourceCursor(), EOS, SEED, len(lengths)), chunks_of(lengths, [3])
        for _ in range(200):
            assert fill(packer, chunks, 1)
            packer.take(1, 0, 1)
            held = sum(len(w.ids) for w in packer._windows) + sum(len(chunk.ids) for chunk in packer._open)
            assert held < 2 * 4 * 10


def test_resume_in_a_window_that_changed_is_refused() -> None:
    lengths = [7] * 40
    with patch.object(best_fit, "WINDOW_ROWS", 4):
        packer = BestFitPacker(9, SourceCursor(), EOS, SEED, len(lengths))
        assert fill(packer, chunks_of(lengths, [5]), 6)
        packer.take(6, 0, 0)
        cursor = packer.cursor
        assert cursor.offset > 0
        for changed in ([7] * cursor.document + [6] * 20, [7] * (cursor.document + 1), [7] * cursor.document + [0]):
            with pytest.raises(ValueError, match="cannot resume at row .* of the window of documents from"):
                fill(BestFitPacker(9, cursor, EOS, SEED, len(changed)), chunks_of(changed, [5], cursor.document), 99)


def ledger_of(packer: Packer, lengths: np.ndarray) -> Ledger:
    """When all rows of these documents are dealt; their ids are zeros."""
    none = np.zeros(len(lengths), bool)
    packer.append(Chunk(0, np.zeros(lengths.sum(), np.int32), lengths, lengths, none, none, [], None))
    packer.end()
    while not packer.missing(64):
        packer.take(64, 0, 0)
    while not packer.missing(1):
        packer.take(1, 0, 0)
    return packer.cursor.ledger


@pytest.mark.parametrize(
    ("mean", "seq_len", "padding", "cut_by_split"),
    [  # the README's table: per cent of the tokens of rows, and of the documents that fit into a row
        (100, 2048, 0.19, 4.8),
        (300, 2048, 0.16, 13.6),
        (600, 2048, 0.24, 23.2),
        (1000, 2048, 0.43, 32.1),
        (100, 8192, 0.21, 1.2),
        (300, 8192, 0.19, 3.7),
        (600, 8192, 0.17, 7.1),
        (1000, 8192, 0.19, 11.4),
    ],
)
def test_padding_and_documents_cut(mean: int, seq_len: int, padding: float, cut_by_split: float) -> None:
    sample = np.random.default_rng(mean).lognormal(np.log(mean) - 0.5, 1.0, 16_000_000 // mean)  # sigma 1
    lengths = np.ceil(sample).astype(np.int64)
    ledger = ledger_of(BestFitPacker(seq_len, SourceCursor(), EOS, SEED, len(lengths)), lengths)
    assert ledger.tokens_read == lengths.sum() == ledger.targets + ledger.document_first
    assert ledger.fitting == np.count_nonzero(lengths <= seq_len + 1)
    assert ledger.cut == 0
    pieces = np.maximum(1, -(-(lengths - 1) // seq_len))  # each but a document's first repeats a token
    fewest_rows = -(-(lengths + pieces - 1).sum() // (seq_len + 1))
    num_rows = ((lengths + pieces - 1).sum() + ledger.padding) / (seq_len + 1)
    assert fewest_rows <= num_rows <= 1.005 * fewest_rows
    assert 100 * ledger.padding / (num_rows * (seq_len + 1)) == pytest.approx(padding, abs=0.01)
    split = ledger_of(RowPacker(seq_len, SourceCursor()), lengths)
    assert 100 * split.cut / split.fitting == pytest.approx(cut_by_split, abs=0.1)
