"""The loader end to end: every rank, worker, prefetch and restart sees one stream, and what stops it is said once."""

import gc
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
import torchdata.nodes
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.loaders import batches, build
from tests.support.naive_stream import dealt_rows
from titanlite.config.sections import DataConfig, SourceConfig
from titanlite.data import feed
from titanlite.data.corpus import open_corpus
from titanlite.data.loader import Batch
from titanlite.data.order import DocumentOrder
from titanlite.data.source import RecordError, Source, SourceError
from titanlite.data.stream import SourceCursor
from titanlite.run.metrics import tokenizing_share

MASK = (1 << 64) - 1
WINDOW_TOKENS = 256  # a third of an epoch of TEXTS


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny corpus needs no 256 KB read ahead; several chunks per batch, too, are what is to be tested."""
    monkeypatch.setattr(feed, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(feed, "_ORDER_DOCUMENTS", 100)


def write_jsonl(folder: Path, records: list[str | bytes]) -> DataConfig:
    """A jsonl file of texts; bytes are written as they are."""
    lines = [json.dumps({"text": r}).encode() if isinstance(r, str) else r for r in records]
    (folder / "corpus.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return DataConfig(
        paths=(str(folder / "corpus.jsonl"),),
        cache_dir=str(folder / "cache"),
        window_tokens=WINDOW_TOKENS,
        num_workers=0,
        prefetch=0,
    )


def same(a: Batch, b: Batch) -> None:
    assert a.rows.tolist() == b.rows.tolist()
    assert a.row_index.tolist() == b.row_index.tolist()
    assert a.row_digest.tolist() == b.row_digest.tolist()
    assert [s.tolist() for s in a.begins] == [s.tolist() for s in b.begins]
    assert (a.fingerprint_part, a.ledger, a.cursor) == (b.fingerprint_part, b.ledger, b.cursor)


def generated_texts(num_documents: int, longest: int) -> list[str]:
    """Texts of 0 to `longest` letters from a tiny generator of its own, the same on every machine."""
    state, texts = 1, []
    for _ in range(num_documents):
        letters = []
        state = state * 1103515245 + 12345 & 0x7FFFFFFF
        for _ in range((state >> 8) % (longest + 1)):
            state = state * 1103515245 + 12345 & 0x7FFFFFFF
            letters.append(chr(97 + (state >> 8) % 26))
        texts.append("".join(letters))
    return texts


TEXTS = [*generated_texts(40, 30), "", "x", "", "y" * 500, "é", "\ud800"]


class Row(NamedTuple):
    begin: int
    """Place of the first token in the source's tokens."""
    tokens: list[int]


def naive_rows(
    texts: list[str],
    num_rows: int,
    seq_len: int,
    order: DocumentOrder,
    bos: bool,
    seed: int,
    window_tokens: int = WINDOW_TOKENS,
) -> list[Row]:
    """The first rows of the stream: every document in its turn, epoch after epoch, as one list, which is cut, and
    window by window dealt in the order of hashes."""
    tokens: list[int] = []
    epochs: list[int] = []  # of each token
    counter = 0
    while len(tokens) < (num_rows + 1) * seq_len + 2 * window_tokens + 2:
        text = texts[int(order.documents(np.array([counter]))[0])]
        document = [257] * bos + list(text.replace("\ud800", "\ufffd").encode()) + [256]
        tokens += document
        epochs += [counter // len(texts)] * len(document)
        counter += 1
    if order.shuffle_block:
        places = dealt_rows(epochs, num_rows, seq_len, max(1, round(window_tokens / seq_len)), seed, "data")
    else:
        places = list(range(num_rows))
    return [Row(row * seq_len, tokens[row * seq_len : (row + 1) * seq_len + 1]) for row in places]


@settings(max_examples=40)
@given(
    texts=st.lists(st.text(max_size=12) | st.just("z" * 150), min_size=1, max_size=12),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 5)),
    seed=st.integers(0, 5),
    block=st.integers(0, 6),
    bos=st.booleans(),
    workers=st.integers(0, 2),
    prefetch=st.integers(0, 2),
    chunk_bytes=st.sampled_from([1, 40, 10**6]),
)
def test_batches_equal_a_naive_stream(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    shape: tuple[int, int],
    seed: int,
    block: int,
    bos: bool,
    workers: int,
    prefetch: int,
    chunk_bytes: int,
) -> None:
    seq_len, num_rows = shape
    data = replace(write_jsonl(tmp_path_factory.mktemp("corpus"), list(texts)), num_workers=workers, prefetch=prefetch)
    data = replace(data, shuffle=block > 0, shuffle_block=block or 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(feed, "_ORDER_DOCUMENTS", 7)
        made = batches(data, 3, tokenizer=ByteTokenizer(bos), seq_len=seq_len, global_batch_size=num_rows, seed=seed)
    expected = naive_rows(texts, 3 * num_rows, seq_len, DocumentOrder(len(texts), seed, block), bos, seed)
    for step, batch in enumerate(made):
        first = step * num_rows
        rows = [row.tokens for row in expected[first : first + num_rows]]
        assert batch.rows.tolist() == rows
        assert batch.rows.dtype == torch.int64
        assert batch.tokens.tolist() == [row[:-1] for row in rows]
        targets = [[-100 if a == 256 else b for a, b in pairwise(row)] for row in rows]
        assert batch.labels.tolist() == targets  # an eos ends its document
        assert batch.num_targets == sum(target != -100 for row in targets for target in row)
        assert batch.row_index.tolist() == list(range(first, first + num_rows))
        for row, starts, digest in zip(rows, batch.begins, batch.row_digest, strict=True):
            assert starts.tolist() == [p for p in range(seq_len) if p == 0 or row[p - 1] == 256]
            content = b"".join(token.to_bytes(4, "little") for token in row)
            assert int(digest) == int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        ledger = batch.ledger
        assert ledger["tokens_read"] == sum(ledger[k] for k in ("targets", "document_first", "carried", "dropped"))
        seen = expected[: first + num_rows]
        start_is_seen = any(row.begin == 0 for row in seen)
        assert ledger["targets"] + ledger["document_first"] == len(seen) * seq_len + start_is_seen
        assert ledger["document_first"] == sum(row.tokens[:-1].count(256) for row in seen) + start_is_seen
        assert len(json.dumps(batch.cursor)) < 1024


def test_every_dp_degree_worker_count_and_prefetch_gives_the_same_rows(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path, list(TEXTS))
    expected = batches(data, 2, seq_len=4, global_batch_size=840)
    for dp_degree in range(1, 9):
        settings = replace(data, num_workers=dp_degree % 4, prefetch=dp_degree % 3)
        ranks = [
            batches(settings, 2, seq_len=4, global_batch_size=840, dp_rank=rank, dp_degree=dp_degree)
            for rank in range(dp_degree)
        ]
        for step, whole in enumerate(expected):
            parts = [rank[step] for rank in ranks]
            assert torch.equal(torch.cat([part.rows for part in parts]), whole.rows)
            assert np.concatenate([part.row_index for part in parts]).tolist() == whole.row_index.tolist()
            assert np.concatenate([part.row_digest for part in parts]).tolist() == whole.row_digest.tolist()
            assert [s.tolist() for part in parts for s in part.begins] == [s.tolist() for s in whole.begins]
            assert sum(part.fingerprint_part for part in parts) & MASK == whole.fingerprint_part
            assert all(part.cursor == whole.cursor and part.ledger == whole.ledger for part in parts)


@pytest.mark.parametrize("threads", [(0, 0), (2, 2)])
def test_resume_at_every_step_twice_in_a_row_equals_the_uninterrupted_stream(
    tmp_path: Path, threads: tuple[int, int]
) -> None:
    data = replace(write_jsonl(tmp_path, list(TEXTS)), shuffle_block=8)
    length = 30  # steps of 64 tokens; an epoch has about 1,300 tokens, so that restarts lie in two epochs
    expected = batches(data, length)
    assert expected[-1].ledger["document_first"] > len(TEXTS)
    places = [batch.cursor["sources"]["data"] for batch in expected]
    assert any(place["offset"] > 64 for place in places)  # a window begins in the middle of a document
    assert any(place["dealt"] not in (0, 4, 8, 12) for place in places)  # windows of other sizes, at the end of epochs
    other = replace(data, num_workers=threads[0], prefetch=threads[1])
    for k in range(length - 2):
        cursor = json.loads(json.dumps(expected[k].cursor))
        again = batches(other, 2, cursor=cursor)
        same(again[0], expected[k + 1])
        same(again[1], expected[k + 2])
        if k + 3 < length:
            (twice,) = batches(other, 1, cursor=again[1].cursor)
            same(twice, expected[k + 3])


def test_batch_size_may_change_on_resume_and_the_ledger_still_closes(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path, list(TEXTS))
    rows = torch.cat([batch.rows for batch in batches(data, 30, global_batch_size=1)])
    cursor, done = None, 0
    for size in (3, 1, 8, 2, 16):
        (batch,) = batches(data, 1, global_batch_size=size, cursor=cursor)
        assert torch.equal(batch.rows, rows[done : done + size])
        assert batch.row_index.tolist() == list(range(done, done + size))
        done += size
        cursor = batch.cursor
        seen = batch.ledger["targets"] + batch.ledger["document_first"]
        assert seen - done * 16 in (0, 1)  # 1 once the row with which the stream begins is dealt
        assert batch.ledger["tokens_read"] == seen + batch.ledger["carried"]


def test_resume_reads_at_most_a_window_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_jsonl(tmp_path, list(TEXTS))
    cursor = batches(data, 25)[-1].cursor
    assert cursor["sources"]["data"]["dealt"] > 0
    read: list[str] = []
    tokenizer = ByteTokenizer()
    encode = tokenizer.encode_document
    tokenizer.encode_document = lambda text: read.append(text) or encode(text)  # type: ignore[func-returns-value,method-assign]
    monkeypatch.setattr(feed, "CHUNK_BYTES", 1)
    made = build(data, cursor=cursor, tokenizer=tokenizer)
    read.clear()  # the beginnings of some documents, read to estimate the tokens of the corpus
    next(iter(made))
    tokens = sum(len(encode(text)) for text in read)
    assert tokens <= WINDOW_TOKENS + len(encode(read[0])) + len(encode(read[-1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 8}, "training.seq_len was 16 and is 8"),
        ({"seed": 1}, "training.seed was 0 and is 1"),
        ({"tokenizer": ByteTokenizer(bos=False)}, "the tokenizer's fingerprint was bytes, bos True and is"),
    ],
)
def test_cursor_of_another_stream_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    data = write_jsonl(tmp_path, list(TEXTS))
    cursor = batches(data, 1)[0].cursor
    with pytest.raises(ValueError, match=message):
        build(data, cursor=cursor, **change)


def test_cursor_of_rows_in_another_order_is_refused(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path, list(TEXTS))
    cursor = batches(data, 1)[0].cursor
    with pytest.raises(ValueError, match="data.window_tokens was 256 and is 512"):
        build(replace(data, window_tokens=512), cursor=cursor)
    old = {key: value for key, value in cursor["stream"].items() if key != "window_tokens"}
    with pytest.raises(
        ValueError, match=r"rows were dealt in another order before .*start anew.*checkpoint\.init_from"
    ):
        build(data, cursor=cursor | {"stream": old})  # as of a checkpoint from before there were windows


def test_other_corpus_or_shuffle_is_refused_and_the_file_named(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path, list(TEXTS))
    made = build(data)
    steps = iter(made)
    cursor = next(steps).cursor
    for shuffle in (replace(data, shuffle=False), replace(data, shuffle_block=5)):
        with pytest.raises(ValueError, match=r"shuffle_block .*was 16384 and is [05]"):
            build(shuffle, cursor=cursor)
    write_jsonl(tmp_path, [*TEXTS, "more"])
    with pytest.raises(ValueError, match=r"source data was .*; changed: corpus.jsonl; restore it") as caught:
        build(data, cursor=cursor, saved_corpus=made.corpus)
    assert "\n" not in str(caught.value)


def test_cursor_behind_the_end_of_its_document_stops_every_call(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path, list(TEXTS))
    cursor = batches(data, 4)[-1].cursor
    cursor["sources"]["data"]["offset"] = 10_000
    made = build(data, cursor=cursor)
    steps = iter(made)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"cannot resume in the window from token 10000 of document \d+ on: its"):
            next(steps)
    made.close()


def test_changing_what_does_not_define_the_stream_is_no_hindrance(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path, list(TEXTS))
    first, second = batches(data, 2)
    (tmp_path / "moved").mkdir()
    (tmp_path / "corpus.jsonl").rename(tmp_path / "moved" / "corpus.jsonl")
    moved = replace(data, paths=(str(tmp_path / "moved" / "*"),), cache_dir=str(tmp_path / "other"), prefetch=3)
    same(batches(replace(moved, on_bad_record="skip"), 1, cursor=first.cursor)[0], second)


def test_tokenising_that_would_take_too_many_cores_is_done_ahead(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="titanlite")
    data = write_jsonl(tmp_path, list(TEXTS))
    made = build(data, tokenizing_share=0.29)
    steps = iter(made)
    streamed = next(steps)
    assert made.corpus["sources"]["data"]["reader"] == "streamed"
    assert "token cache" not in caplog.text
    made = build(data, tokenizing_share=0.31)
    steps = iter(made)
    same(next(steps), streamed)
    assert made.corpus["sources"]["data"]["reader"] == "cached"
    assert "writing a token cache (tokenising while training would take about 31% of the cores)" in caplog.text


def test_share_of_the_cores_that_tokenising_takes_is_a_number_computed_by_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """16 H100 at half of 989.4 TFLOPS, 6 GFLOPs a token: 1,319,200 tokens/s, which each of the 8 ranks of this host
    reads whole: 4.22144 of 16 cores, at 2.5 million tokens/s each."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert tokenizing_share(6e9, 16, "cuda") == pytest.approx(0.26384, rel=1e-9)
    assert tokenizing_share(6e9, 16, "cpu") == 0.0  # whose speed nobody knows
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device of next year")
    assert tokenizing_share(6e9, 16, "cuda") == 0.0


def test_degree_that_does_not_divide_the_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training.global_batch_size = 4 is no multiple of the dp degree 3"):
        build(write_jsonl(tmp_path, ["a"]), dp_degree=3)


BAD = b'{"text": 1}'


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 0), (0, 2), (1, 0), (3, 2)])
def test_bad_record_stops_the_step_that_needs_it_and_no_earlier_one(
    tmp_path: Path, workers: int, prefetch: int
) -> None:
    data = write_jsonl(tmp_path, ["a" * 100, "b" * 100, BAD, "c" * 100])
    made = build(replace(data, shuffle=False, window_tokens=64, num_workers=workers, prefetch=prefetch))
    steps = iter(made)
    good = list(islice(steps, 3))  # 193 tokens of the 204 before the bad record
    assert good[-1].ledger["bad_records"] == 0
    for _ in range(2):
        with pytest.raises(
            RecordError, match=r"corpus\.jsonl:3: the field 'text' is no text but a number; data.on_bad"
        ):
            next(steps)
    made.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_records_leave_the_stream_of_the_others(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "good").mkdir()
    records: list[str | bytes] = ["a" * 30, BAD, b"", "b" * 50, "c", BAD, "d" * 70, BAD]
    data = replace(write_jsonl(tmp_path, records), shuffle=False, on_bad_record="skip", num_workers=workers)
    good = replace(write_jsonl(tmp_path / "good", [r for r in records if isinstance(r, str)]), shuffle=False)
    made, expected = batches(data, 9), batches(good, 9)
    for a, b in zip(made, expected, strict=True):
        assert torch.equal(a.rows, b.rows)
        assert {**a.ledger, "bad_records": 0} == b.ledger
    assert made[0].ledger["bad_records"] == 3  # of the whole window
    assert "corpus.jsonl:2: the field 'text' is no text" in caplog.text
    assert "corpus.jsonl:3: a blank line" in caplog.text
    # A resume between bad records counts none twice and forgets none.
    for k in range(7):
        (again,) = batches(data, 1, cursor=made[k].cursor)
        same(again, made[k + 1])


def test_warnings_are_bounded_and_come_from_one_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_jsonl(tmp_path, ["a", *[BAD] * 150])
    data = replace(data, on_bad_record="skip", max_bad_records=0, shuffle=False)
    (batch,) = batches(data, 1, global_batch_size=2, dp_degree=2, dp_rank=1)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    (batch,) = batches(data, 1, global_batch_size=2, dp_degree=2, dp_rank=0)
    assert batch.ledger["bad_records"] > 1000
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert sum("bad record left out" in line for line in lines) == 20
    told = f"{batch.ledger['bad_records']:,} bad records left out by now"
    assert lines[20] == told  # what the ledger counts, and not what is read ahead


@pytest.mark.parametrize(("workers", "max_epochs"), [(0, 0), (2, 0), (0, 1), (2, 1), (0, 2)])
def test_corpus_of_bad_records_only_is_an_error_not_a_loop(tmp_path: Path, workers: int, max_epochs: int) -> None:
    data = replace(write_jsonl(tmp_path, [BAD] * 30), on_bad_record="skip", num_workers=workers, prefetch=workers)
    data = replace(data, max_epochs=max_epochs)
    made = build(data)
    steps = iter(made)
    with pytest.raises(ValueError, match="source 'data': no document is left to train on"):
        next(steps)
    made.close()


def test_one_good_record_among_many_bad_ones_is_a_corpus(tmp_path: Path) -> None:
    data = replace(write_jsonl(tmp_path, [*[BAD] * 300, "a"]), on_bad_record="skip", shuffle_block=7)
    made = batches(data, 4, seq_len=2, global_batch_size=1)
    assert sorted(batch.rows[0, :-1].tolist() for batch in made) == [[97, 256], [256, 257], [257, 97], [257, 97]]


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_too_many_bad_records_stop_the_run_before_all_of_them_are_read(
    tmp_path: Path, packing: Literal["split", "best_fit"], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = replace(write_jsonl(tmp_path, ["a", *[BAD] * 5000]), shuffle=False, packing=packing)
    read: list[str | RecordError] = []
    texts = Source.texts

    def counted(self: Source, documents: np.ndarray) -> Iterator[str | RecordError]:
        for text in texts(self, documents):
            read.append(text)
            yield text

    monkeypatch.setattr(Source, "texts", counted)
    made = build(replace(data, on_bad_record="skip", max_bad_records=10))
    steps = iter(made)
    with pytest.raises(ValueError, match="more bad records than data.max_bad_records = 10"):
        next(steps)
    assert 10 < len(read) < 500


def test_a_bad_record_that_is_left_out_keeps_nothing_of_it_in_memory(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path, ["a", BAD, b"\xff", b'{"other": ""}'])
    corpus = open_corpus(data, ByteTokenizer(), seq_len=16, seed=0)
    read = corpus.sources["data"].reader.read(np.arange(4), np.ones(4, bool))
    assert [i for i, _ in read.bad] == [1, 2, 3]
    for _, bad in read.bad:  # a traceback would hold the variables of all that looked at the record
        assert (bad.__traceback__, bad.__cause__, bad.__context__) == (None, None, None)


class PanicError(BaseException):
    """As tiktoken's PanicException: no Exception."""


class PanickyTokenizer(ByteTokenizer):
    def encode_document(self, text: str) -> np.ndarray:
        if text == "panic":
            raise PanicError("called `Result::unwrap()` on an `Err` value")
        if text == "bug":
            raise KeyError(7)
        return super().encode_document(text)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_panic_of_the_tokenizer_is_a_bad_record_and_hangs_nobody(tmp_path: Path, workers: int) -> None:
    data = replace(write_jsonl(tmp_path, ["a" * 9, "panic", "b" * 9]), shuffle=False, num_workers=workers, prefetch=2)
    made = build(data, tokenizer=PanickyTokenizer())
    steps = iter(made)
    with pytest.raises(RecordError, match=r"corpus\.jsonl:2: the tokenizer gave up on this text: called `Result"):
        next(steps)
    made.close()
    once = replace(data, on_bad_record="skip", max_epochs=1)
    (batch,) = batches(once, 1, tokenizer=PanickyTokenizer(), global_batch_size=1)
    assert (batch.ledger["bad_records"], batch.ledger["document_first"]) == (1, 2)


def test_bug_in_the_tokenizer_is_located_and_never_skipped(tmp_path: Path) -> None:
    data = replace(write_jsonl(tmp_path, ["a", "bug"]), shuffle=False, on_bad_record="skip", num_workers=1)
    made = build(data, tokenizer=PanickyTokenizer())
    steps = iter(made)
    with pytest.raises(RuntimeError, match=r"corpus\.jsonl:2: cannot tokenise: KeyError: 7$"):
        next(steps)
    made.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_file_that_shrinks_during_the_run_stops_it_in_skip_mode_too(tmp_path: Path, workers: int) -> None:
    data = replace(write_jsonl(tmp_path, ["a" * 300_000] * 5), on_bad_record="skip", num_workers=workers)
    made = build(data, global_batch_size=64, seq_len=1024)
    steps = iter(made)
    next(steps)
    os.truncate(tmp_path / "corpus.jsonl", 1000)
    with pytest.raises(SourceError, match=r"corpus\.jsonl:\d: the file has changed"):
        deque_all(steps)
    made.close()


def deque_all(made: Iterator[Batch]) -> None:
    for _ in islice(made, 1000):
        pass


def loader_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.daemon}


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 0), (0, 3), (2, 0), (3, 3)])
def test_close_ends_every_thread_at_once_and_may_be_repeated(tmp_path: Path, workers: int, prefetch: int) -> None:
    before = loader_threads()
    data = replace(write_jsonl(tmp_path, ["a" * 1000] * 50), num_workers=workers, prefetch=prefetch)
    for consumed in (0, 1, 5):
        made = build(data)
        steps = iter(made)
        list(islice(steps, consumed))
        start = time.monotonic()
        made.close()
        made.close()
        assert time.monotonic() - start < 3
        with pytest.raises(StopIteration):
            next(steps)
    deadline = time.monotonic() + 5
    while (left := loader_threads() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


def test_loader_that_is_dropped_or_failed_ends_its_threads_too(tmp_path: Path) -> None:
    before = loader_threads()
    made = build(replace(write_jsonl(tmp_path, ["a" * 1000] * 50), num_workers=2, prefetch=2))
    steps = iter(made)
    next(steps)
    del made, steps
    gc.collect()  # torchdata's iterator and its loader hold each other
    made = build(replace(write_jsonl(tmp_path, [BAD]), num_workers=2, prefetch=2))
    steps = iter(made)
    with pytest.raises(RecordError):
        next(steps)
    made.close()
    deadline = time.monotonic() + 5
    while (left := loader_threads() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


PROGRAM = """
import sys, torch
import titanlite.train.run
from titanlite.config.sections import Config, DataConfig
from titanlite.data.loader import build_loader
from tests.support.byte_tokenizer import ByteTokenizer
data = DataConfig(paths=(sys.argv[1],), cache_dir=sys.argv[2], num_workers=3, prefetch=4)
if len(sys.argv) == 3:
    loader = build_loader(data, ByteTokenizer(), seq_len=64, global_batch_size=4, seed=0, dp_rank=0, dp_degree=1)
    next(iter(loader))
print(torch.get_num_threads(), flush=True)
raise SystemExit(7)
"""


def test_a_refused_cursor_leaves_no_thread(tmp_path: Path) -> None:
    data = replace(write_jsonl(tmp_path, ["a" * 100]), num_workers=2)
    (batch,) = batches(data, 1)
    threads = set(threading.enumerate())
    with pytest.raises(ValueError, match="cannot resume in another token stream"):
        build(data, seed=1, cursor=batch.cursor)
    for thread in set(threading.enumerate()) - threads:
        thread.join(5)
    assert set(threading.enumerate()) <= threads


def test_process_ends_while_the_loader_runs_and_keeps_its_thread_count(tmp_path: Path) -> None:
    write_jsonl(tmp_path, list(TEXTS))
    arguments = [str(tmp_path / "corpus.jsonl"), str(tmp_path / "cache")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROGRAM, *arguments, *more],
            cwd=Path(__file__).parents[2],
            env={key: value for key, value in os.environ.items() if not key.startswith(("OMP", "MKL"))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for more in ([], ["without a loader"])
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [7, 7], outputs
    # Threads that call torch must not change the main thread's number of threads.
    assert outputs[0] == outputs[1]


@pytest.mark.gpu
def test_pinned_batches_hold_the_same_rows(tmp_path: Path) -> None:
    data = replace(write_jsonl(tmp_path, list(TEXTS)), num_workers=2, prefetch=2)
    pinned, plain = batches(data, 5, pin_memory=True), batches(data, 5)
    for a, b in zip(pinned, plain, strict=True):
        assert all(tensor.is_pinned() for tensor in (a.tokens, a.labels, a.starts))
        same(a, b)


def test_golden_rows_of_a_generated_corpus(tmp_path: Path) -> None:
    # Computed once by plain Python (lists, integers, hashlib). A change means that older runs cannot be resumed.
    data = replace(write_jsonl(tmp_path, list(generated_texts(300, 400))), shuffle_block=64, window_tokens=4096)
    made = batches(data, 3, seq_len=128, seed=42)
    digests = [f"{int(d):016x}" for batch in made for d in batch.row_digest]
    assert digests == [
        "a9229a8f87139bfc",
        "64a22b2087fb292d",
        "3a797222b5b123a2",
        "af02d1f8280b04ad",
        "d82fa52c86eaf9e9",
        "66ea095d83bb1afe",
        "656369cf2c610b7a",
        "72ae7a3d66266c69",
        "b2ef1b6998a7c6c1",
        "1838c5e429e8136e",
        "9c674e5fbee73ef6",
        "cf4e5605fac2cb21",
    ]
    fingerprints = [f"{batch.fingerprint_part:016x}" for batch in made]
    assert fingerprints == ["c457a2e05ee33fe3", "fdc215a696cc6b00", "54421ee6f5645127"]
    assert made[-1].ledger["tokens_read"] == 32 * 128 + 1  # the window


def test_the_state_of_the_loader_is_the_cursor_and_a_plain_loop_resumes(tmp_path: Path) -> None:
    data = replace(write_jsonl(tmp_path, list(TEXTS)), num_workers=2, prefetch=3)
    expected = batches(data, 12)
    loader = build(data)
    assert isinstance(loader, torchdata.nodes.Loader)
    assert loader.state_dict()["root"] == {"row": 0, "sources": {"data": SourceCursor().to_dict()}} | {
        "stream": expected[0].cursor["stream"]
    }
    for k, batch in enumerate(loader):
        same(batch, expected[k])
        state = json.loads(json.dumps(loader.state_dict()))
        assert state["root"] == batch.cursor  # of the batch that was given, not of those made ahead
        if k == 6:
            break
    for again in (loader, build(data)):  # in the same process, and in another
        again.load_state_dict(state)
        for k, batch in zip(range(7, 12), again, strict=False):
            same(batch, expected[k])
        again.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_loop_ends_with_the_data_and_the_loader_says_why(tmp_path: Path, prefetch: int) -> None:
    data = replace(write_jsonl(tmp_path, list(TEXTS)), max_epochs=1, num_workers=prefetch, prefetch=prefetch)
    loader = build(data)
    rows = torch.cat([batch.rows for batch in loader])
    tokens = sum(len(ByteTokenizer().encode_document(text)) for text in TEXTS)
    assert len(rows) == (tokens - 1) // 16 // 4 * 4
    assert str(loader.ended) == "the data ended: source 'data' has no row left after max_epochs = 1"
    assert loader.ended is not None
    assert loader.ended.ledgers["data"]["tokens_read"] == tokens
    assert len([*loader]) == len(rows) // 4  # a loop begins anew
    loader.close()


def test_a_read_that_hangs_keeps_nobody_from_closing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, hangs, goes_on = threading.Event(), threading.Event(), threading.Event()
    texts = Source.texts

    def hang(self: Source, documents: np.ndarray) -> Iterator[str | RecordError]:
        if begun.is_set():
            hangs.set()
            goes_on.wait(60)
        yield from texts(self, documents)

    data = replace(write_jsonl(tmp_path, list(TEXTS)), shuffle=False, num_workers=2, prefetch=2)
    loader = build(data)
    monkeypatch.setattr(Source, "texts", hang)
    steps = iter(loader)
    next(steps)
    begun.set()
    while not hangs.wait(0.05):
        next(steps)
    begin = time.monotonic()
    loader.close()
    assert time.monotonic() - begin < 5
    with pytest.raises(StopIteration):
        next(steps)
    goes_on.set()


class SlowTokenizer(ByteTokenizer):
    """Takes its time, and counts how many are at it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.now = self.most = self.calls = 0

    def encode_document(self, text: str) -> np.ndarray:
        with self.lock:
            self.now, self.calls = self.now + 1, self.calls + 1
            self.most = max(self.most, self.now)
        time.sleep(0.01)
        with self.lock:
            self.now -= 1
        return super().encode_document(text)


@pytest.mark.parametrize("workers", [1, 2])
def test_all_sources_together_tokenise_in_as_many_threads_as_there_are_workers(tmp_path: Path, workers: int) -> None:
    data = write_jsonl(tmp_path, list(TEXTS))
    sources = {name: SourceConfig(paths=data.paths) for name in ("a", "b", "c")}
    data = replace(data, paths=(), sources=sources, num_workers=workers, prefetch=1)
    tokenizer = SlowTokenizer()
    made = build(data, tokenizer=tokenizer)
    tokenizer.most = 0  # of the estimates
    next(iter(made))
    made.close()
    assert tokenizer.most == workers


def test_nothing_is_read_for_a_loader_that_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of thousands of documents would be read to its end otherwise, before its thread noticed."""
    monkeypatch.setattr(feed, "CHUNK_BYTES", 1)
    data = replace(write_jsonl(tmp_path, ["a"] * 5000), window_tokens=10_000, num_workers=1, prefetch=1)
    tokenizer = SlowTokenizer()
    made = build(data, tokenizer=tokenizer)
    iter(made)
    made.close()
    calls = tokenizer.calls
    time.sleep(0.3)
    assert tokenizer.calls <= calls + 1  # what a thread was at
