"""The order of documents is a permutation in every epoch, and documents become chunks without a loss."""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.naive_stream import MASK
from tests.support.naive_stream import splitmix64 as splitmix64_in_integers
from titanlite.data.order import DocumentOrder, HeldOut, permute, splitmix64
from titanlite.data.source import Numbering, RecordError, SourceError
from titanlite.data.stream import Chunk, Ledger, SourceCursor, StreamedReader, read_chunk


def documents_in_python(num_documents: int, seed: int, block: int, counter: int) -> int:
    """DocumentOrder.documents for one counter, written a second time: integers, loops and a list of blocks."""

    def image(x: int, size: int, key: int) -> int:
        half = max(3, ((size - 1).bit_length() + 1) // 2)
        while True:
            left, right = x >> half, x % (1 << half)
            for r in range(6):
                left, right = right, left ^ (splitmix64_in_integers(key ^ right ^ (r << 56)) % (1 << half))
            x = (left << half) + right
            if x < size:
                return x

    epoch, place = divmod(counter, num_documents)
    key = splitmix64_in_integers(splitmix64_in_integers(seed % (1 << 64)) ^ epoch)
    blocks = [range(first, min(first + block, num_documents)) for first in range(0, num_documents, block)]
    for b in (image(slot, len(blocks), key) for slot in range(len(blocks))):
        if place < len(blocks[b]):
            return blocks[b][image(place, len(blocks[b]), splitmix64_in_integers(splitmix64_in_integers(key) ^ b))]
        place -= len(blocks[b])
    raise AssertionError


def epoch_of(order: DocumentOrder, epoch: int) -> np.ndarray:
    return order.documents(epoch * order.num_documents + np.arange(order.num_documents))


def test_splitmix64_gives_the_published_numbers() -> None:
    # First outputs of the reference generator (splitmix64.c) seeded with 0 and with 1234567.
    assert splitmix64(np.array([0, 1234567], np.uint64)).tolist() == [0xE220A8397B1DCDAF, 6457827717110365317]


@given(st.lists(st.integers(0, MASK), min_size=1))
def test_splitmix64_equals_python_integers(values: list[int]) -> None:
    assert splitmix64(np.array(values, np.uint64)).tolist() == [splitmix64_in_integers(x) for x in values]


@given(st.integers(1, 3000), st.integers(0, MASK))
@example(1, 0)
@example(2, 0)
@example(4097, 0)
def test_permute_is_a_bijection_and_inverse_undoes_it(size: int, key: int) -> None:
    x = np.arange(size, dtype=np.uint64)
    keys = np.full(size, key, np.uint64)
    y = permute(x, size, keys)
    assert sorted(y.tolist()) == list(range(size))
    assert permute(y, size, keys, inverse=True).tolist() == x.tolist()


@given(
    num_documents=st.integers(1, 500),
    seed=st.integers(-(2**70), 2**70),
    block=st.integers(0, 600),
    epoch=st.sampled_from([0, 1, 2, 1000, 10**9]),
)
@example(num_documents=1, seed=0, block=1, epoch=0)
@example(num_documents=10, seed=0, block=3, epoch=1)
@example(num_documents=12, seed=0, block=3, epoch=1)
def test_every_epoch_holds_every_document_once(num_documents: int, seed: int, block: int, epoch: int) -> None:
    order = epoch_of(DocumentOrder(num_documents, seed, block), epoch).tolist()
    assert sorted(order) == list(range(num_documents))
    if not block:
        assert order == list(range(num_documents))


@given(
    num_documents=st.integers(1, 60),
    seed=st.integers(0, 2**32),
    block=st.integers(0, 70),
    counters=st.lists(st.integers(0, 2**40), min_size=1, max_size=50),
)
def test_a_counter_stands_for_the_same_document_however_it_is_asked(
    num_documents: int, seed: int, block: int, counters: list[int]
) -> None:
    order = DocumentOrder(num_documents, seed, block)
    together = order.documents(np.array(counters)).tolist()
    assert together == [int(order.documents(np.array([c]))[0]) for c in counters]
    if block:
        assert together == [documents_in_python(num_documents, seed, block, c) for c in counters]


def test_blocks_stay_together_and_the_short_block_wanders() -> None:
    block, num_documents = 4, 11
    places = set()
    for seed in range(40):
        order = epoch_of(DocumentOrder(num_documents, seed, block), 0) // block
        runs = [int(b) for i, b in enumerate(order) if i == 0 or b != order[i - 1]]
        assert sorted(runs) == [0, 1, 2]
        places.add(runs.index(2))
    assert places == {0, 1, 2}


def test_order_differs_by_epoch_and_by_seed() -> None:
    orders = {
        tuple(epoch_of(DocumentOrder(300, seed, block), epoch).tolist())
        for seed in (0, 1, 2, 2**63, -1)
        for epoch in (0, 1, 2, 77)
        for block in (64, 1000)
    }
    assert len(orders) == 5 * 4 * 2


@pytest.mark.parametrize(("num_documents", "block"), [(3, 8), (5, 2), (16, 16), (37, 8), (100, 100)])
def test_every_place_is_about_equally_likely(num_documents: int, block: int) -> None:
    # Over 4000 epochs the first place must see every document about equally often (five standard deviations).
    counters = np.arange(4000) * num_documents
    seen = collections.Counter(DocumentOrder(num_documents, 7, block).documents(counters).tolist())
    if num_documents % block == 0 or block >= num_documents:
        mean = 4000 / num_documents
        assert all(abs(seen[d] - mean) < 5 * mean**0.5 for d in range(num_documents)), seen
    else:  # a document of the short block of r comes first with probability 1 / blocks / r
        blocks, rest = -(-num_documents // block), num_documents % block
        for document in range(num_documents):
            size = rest if document >= num_documents - rest else block
            mean = 4000 / blocks / size
            assert abs(seen[document] - mean) < 5 * mean**0.5, (document, seen)


def test_all_permutations_of_a_few_documents_are_about_equally_likely() -> None:
    orders = DocumentOrder(5, 5, 5).documents(np.arange(60_000 * 5)).reshape(-1, 5)
    counts = collections.Counter(map(tuple, orders.tolist()))
    chi_square = sum((counts[p] - 500) ** 2 / 500 for p in itertools.permutations(range(5)))
    assert abs(chi_square - 119) < 5 * (2 * 119) ** 0.5


def test_order_is_the_one_that_checkpoints_rely_on() -> None:
    # A change here changes the data order of every run that resumes.
    assert epoch_of(DocumentOrder(10, 0, 4), 0).tolist() == [6, 4, 5, 7, 8, 9, 0, 2, 1, 3]
    assert epoch_of(DocumentOrder(10, 0, 4), 1).tolist() == [0, 2, 3, 1, 8, 9, 4, 6, 5, 7]
    far = DocumentOrder(10**12 + 7, 42, 4096).documents(np.array([0, 1, 10**12 + 6, 10**13]))
    assert far.tolist() == [536303416464, 536303419308, 284771737718, 307456644887]


def test_cursor_survives_json() -> None:
    cursor = SourceCursor(1, 2, 3, 4, Ledger(*range(5, len(dataclasses.fields(Ledger)) + 5)))
    assert SourceCursor.from_dict(json.loads(json.dumps(cursor.to_dict()))) == cursor
    assert SourceCursor.from_dict(json.loads(json.dumps(SourceCursor().to_dict()))) == SourceCursor()


class Texts:
    """Documents in a list; an exception in it that is no bad record is raised when it is read."""

    def __init__(self, texts: list[str | BaseException]) -> None:
        self.contents = texts
        self.numbering = Numbering([len(texts)])
        self.read_documents: list[int] = []

    def locate(self, file: int, record: int) -> str:
        return f"file:{record + 1}"

    def unchanged(self, documents: np.ndarray) -> tuple[int, SourceError | None]:
        return len(documents), None

    def texts(self, documents: np.ndarray) -> Iterator[str | RecordError]:
        for document in documents.tolist():
            self.read_documents.append(document)
            text = self.contents[document]
            if isinstance(text, BaseException) and not isinstance(text, RecordError):
                raise text
            yield text


class PanicError(BaseException):
    """As tiktoken's PanicException: no Exception."""


def panics(text: str) -> np.ndarray:
    if text == "panic":
        raise PanicError("regex stack")
    if text == "bug":
        raise KeyError("bug")
    if text == "interrupt":
        raise KeyboardInterrupt
    return ByteTokenizer().encode_document(text)


def chunk_of(texts: list[str | BaseException], skip: bool, held_out: tuple[int, ...] = ()) -> tuple[Chunk, Texts]:
    source = Texts(texts)
    reader = StreamedReader(source, panics)  # type: ignore[arg-type]
    out = np.isin(np.arange(len(texts)), held_out)
    return read_chunk(reader, 7, np.arange(len(texts)), out, skip), source


def test_chunk_holds_tokens_lengths_and_bytes() -> None:
    chunk, _ = chunk_of(["ab", "", "\ud800é"], skip=False)
    assert chunk.ids[0].tolist() == [257, 97, 98, 256, 257, 256, 257, *"\ufffdé".encode(), 256]
    assert chunk.ids[0].dtype == np.int32
    assert chunk.lengths.tolist() == [4, 2, 7]
    assert chunk.bytes.tolist() == [2, 0, 5]
    assert (chunk.counter, chunk.bad_records, chunk.error) == (7, [], None)
    assert not chunk.bad.any()


def test_held_out_documents_are_not_read_and_have_no_tokens() -> None:
    chunk, source = chunk_of(["ab", RecordError("file:2", "broken"), "c"], skip=False, held_out=(1,))
    assert source.read_documents == [0, 2]
    assert chunk.lengths.tolist() == [4, 0, 3]
    assert chunk.held_out.tolist() == [False, True, False]
    assert not chunk.bad.any()
    assert chunk.error is None


@pytest.mark.parametrize("bad", [RecordError("file:2", "broken"), "panic"])
def test_bad_record_ends_the_chunk_or_is_left_out(bad: str | BaseException) -> None:
    stopped, _ = chunk_of(["a", bad, "c"], skip=False)
    assert stopped.lengths.tolist() == [3]
    assert stopped.ids[0].tolist() == [257, 97, 256]
    assert stopped.bytes.tolist() == [1]
    assert isinstance(stopped.error, RecordError)
    assert str(stopped.error).startswith("file:2: ")
    assert 'data.on_bad_record = "skip"' in str(stopped.error)
    skipped, _ = chunk_of(["a", bad, "c"], skip=True)
    assert skipped.lengths.tolist() == [3, 0, 3]
    assert skipped.bad.tolist() == [False, True, False]
    assert skipped.error is None
    assert [(place, str(b).split()[0]) for place, b in skipped.bad_records] == [(1, "file:2:")]


@pytest.mark.parametrize("broken", [SourceError("file:2: gone"), "bug"])
def test_what_is_no_fault_of_the_data_is_never_skipped(broken: str | BaseException) -> None:
    chunk, _ = chunk_of(["a", broken, "c"], skip=True)
    assert chunk.lengths.tolist() == [3]
    assert isinstance(chunk.error, (SourceError, RuntimeError))
    assert "file:2: " in str(chunk.error)


@pytest.mark.parametrize("text", [KeyboardInterrupt(), "interrupt"])
def test_keyboard_interrupt_is_not_a_bad_record(text: str | BaseException) -> None:
    with pytest.raises(KeyboardInterrupt):
        chunk_of([text], skip=True)


def test_held_out_share_is_that_of_the_config_and_nested() -> None:
    files, records = np.repeat(np.arange(20), 5000), np.tile(np.arange(5000), 20)
    names = [f"part-{k}.jsonl" for k in range(20)]
    small, large = (HeldOut("web", names, share)(files, records) for share in (0.01, 0.1))
    assert abs(small.mean() - 0.01) < 0.001
    assert abs(large.mean() - 0.1) < 0.003
    assert large[small].all()  # a larger share only adds documents
    assert not HeldOut("web", names, 0.0)(files, records).any()
    assert (HeldOut("books", names, 0.1)(files, records) != large).any()


def test_held_out_split_depends_on_the_document_alone() -> None:
    # blake2b-64 of source and file name, mixed with the record number: computed a second time, in plain Python.
    def is_out(name: str, record: int) -> bool:
        key = int.from_bytes(hashlib.blake2b(f"web\0{name}".encode(), digest_size=8).digest(), "little")
        return splitmix64_in_integers(key ^ splitmix64_in_integers(record)) < int(0.3 * 2**64)

    for names in (["a", "b"], ["b", "new", "a"]):  # other files and another order move no document
        split = HeldOut("web", names, 0.3)
        for f, name in enumerate(names):
            records = np.arange(50)
            assert split(np.full(50, f), records).tolist() == [is_out(name, r) for r in range(50)]


@settings(max_examples=20)
@given(st.integers(1, 10**15), st.integers(1, 10**6))
def test_order_needs_no_memory_of_the_size_of_the_corpus(num_documents: int, block: int) -> None:
    documents = DocumentOrder(num_documents, 3, block).documents(np.arange(100) * (num_documents // 100 + 1))
    assert documents.min() >= 0
    assert documents.max() < num_documents
