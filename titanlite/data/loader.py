"""Batches: the replicated reader, which tokenises the one global stream on every rank and keeps the rank's rows.

Owns threads, prefetch and pinning (all by torchdata.nodes) and the life of a loader. The state is our cursor, which
rides on each batch; torchdata's is not used, because it would tie a resume to the number of workers. Refuses to let
any of this change what a batch holds.
"""

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torchdata.nodes import BaseNode, ParallelMapper, PinMemory, Prefetcher

from titanlite.config.sections import DataConfig
from titanlite.data.packing import RowPacker, fingerprint_part, row_digest
from titanlite.data.source import Source, manifest_changes, open_source
from titanlite.data.stream import Chunk, Cursor, DocumentOrder, read_chunk
from titanlite.log import logger

_CHUNK_BYTES = 256 * 1024  # text per item of work: handing an item from thread to thread costs up to 0.2 ms
_ORDER_DOCUMENTS = 8192  # documents whose order is computed at once
_WARNINGS = 20  # bad records that are named one by one


class DocumentEncoder(Protocol):
    """What the loader needs of a tokenizer."""

    @property
    def fingerprint(self) -> str:
        """Changes with whatever could change the ids of any text."""

    def encode_document(self, text: str) -> np.ndarray:
        """int32 ids: [bos] text [eos]; never empty."""


@dataclass(frozen=True, eq=False)
class Batch:
    """A data-parallel rank's rows of one optimiser step."""

    rows: torch.Tensor
    """int64 [rows of this rank, seq_len + 1]: inputs are [:, :-1], targets [:, 1:]."""
    row_index: np.ndarray
    """Number of each row in the stream, int64."""
    row_digest: np.ndarray
    """uint64; packing.row_digest of each row."""
    fingerprint_part: int
    """This rank's share of the step's fingerprint, which is the sum over dp ranks modulo 2^64."""
    starts: list[np.ndarray]
    """Per row the positions in [0, seq_len) where a document begins or, at 0, goes on, as the packer knows them."""
    cursor: dict[str, Any]
    """The state of the stream behind the whole step (all ranks' rows): what a checkpoint saves. JSON-able."""
    ledger: dict[str, int]
    """Cumulative counts behind the whole step; tokens_read == targets + document_first + carried + dropped."""

    def pin_memory(self) -> "Batch":
        return replace(self, rows=self.rows.pin_memory())


class Loader:
    """Iterator over a dp rank's batches, one per optimiser step, without end.

    `next` raises what stopped the stream, at the first step that needs what is behind it and ever after: RecordError
    (a ValueError) for a bad record that is not skipped, SourceError for a file that changed, ValueError for a corpus
    without a single token.
    """

    def __init__(self, corpus: dict[str, Any], nodes: BaseNode, closed: threading.Event) -> None:
        self.corpus = corpus
        """Manifest of the corpus: digest, num_files, num_documents, num_bytes, files."""
        self._nodes = nodes
        drainer = threading.Thread(target=_drain, args=(nodes, closed), daemon=True)
        drainer.start()
        # Also runs at garbage collection and at exit, before Python is torn down under threads that run Rust code.
        self._finalizer = weakref.finalize(self, _close, drainer, closed)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        item = next(self._nodes)
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """End all threads, within seconds even where one hangs in a read; `next` then raises StopIteration."""
        self._finalizer()


def build_loader(
    data: DataConfig,
    tokenizer: DocumentEncoder,
    *,
    seq_len: int,
    global_batch_size: int,
    seed: int,
    dp_rank: int,
    dp_degree: int,
    cursor: dict[str, Any] | None = None,
    saved_corpus: dict[str, Any] | None = None,
    pin_memory: bool = False,
) -> Loader:
    """The batches of one dp rank, from the start of the stream or from a batch's `cursor` on.

    On resume the number of ranks, workers, prefetched batches and global_batch_size may be others; what defines the
    stream may not. With `saved_corpus` (the manifest of then) a refusal names the files that changed. Raises
    ValueError, in one line, for a corpus that cannot be read and for a cursor of another stream. Threads begin to
    read at once.
    """
    if global_batch_size % dp_degree:
        raise ValueError(
            f"training.global_batch_size = {global_batch_size} is no multiple of the dp degree {dp_degree}"
        )
    source = open_source(data)
    corpus = source.manifest()
    block = data.shuffle_block if data.shuffle else 0
    stream = {
        "seq_len": seq_len,
        "seed": seed,
        "shuffle_block": block,
        "corpus": corpus["digest"],
        "tokenizer": tokenizer.fingerprint[:32],
    }
    start = Cursor()
    if cursor is not None:
        _refuse_other_stream(cursor["stream"], stream, manifest_changes(saved_corpus, corpus) if saved_corpus else [])
        start = Cursor.from_dict(cursor)
    skip = data.on_bad_record == "skip"
    closed = threading.Event()
    # torchdata's threads call torch.set_num_threads(1), and a thread that has not yet asked for its own number of
    # threads would take that for its own: ask here, before they start.
    torch.get_num_threads()
    nodes: BaseNode = _Work(source, DocumentOrder(source.num_documents, seed, block), start.document, closed)
    nodes = ParallelMapper(
        nodes,
        lambda work: read_chunk(source, tokenizer.encode_document, work[0], work[1], skip),
        num_workers=data.num_workers,
        snapshot_frequency=0,
    )
    packer = RowPacker(seq_len, start)
    nodes = _Batches(nodes, packer, stream, source.num_documents, global_batch_size, dp_rank, dp_degree, closed)
    if pin_memory:
        nodes = PinMemory(nodes, snapshot_frequency=0)
    if data.prefetch:
        nodes = Prefetcher(nodes, data.prefetch, snapshot_frequency=0)
    nodes.reset()
    return Loader(corpus, nodes, closed)


class _Work(BaseNode[tuple[int, np.ndarray]]):
    """The stream's documents in portions of about _CHUNK_BYTES: (counter of the first, their numbers)."""

    def __init__(self, source: Source, order: DocumentOrder, counter: int, closed: threading.Event) -> None:
        super().__init__()
        self._source, self._order, self._counter, self._closed = source, order, counter, closed
        self._portions: deque[np.ndarray] = deque()

    def next(self) -> tuple[int, np.ndarray]:
        if self._closed.is_set():
            raise StopIteration
        if not self._portions:
            documents = self._order.documents(self._counter + np.arange(_ORDER_DOCUMENTS))
            try:
                sizes = self._source.size(documents)
            except (OSError, ValueError):
                sizes = np.zeros(len(documents), np.int64)  # read_chunk meets the error again and reports it
            portion = (np.cumsum(sizes) - sizes) // _CHUNK_BYTES
            self._portions.extend(np.split(documents, np.flatnonzero(np.diff(portion)) + 1))
        documents = self._portions.popleft()
        self._counter += len(documents)
        return self._counter - len(documents), documents

    def get_state(self) -> dict[str, Any]:
        return {}


class _Batches(BaseNode["Batch | Exception"]):
    """Packs chunks into batches. Errors are values: raised here, torchdata would turn them into the text of one."""

    def __init__(
        self,
        chunks: BaseNode[Chunk],
        packer: RowPacker,
        stream: dict[str, Any],
        num_documents: int,
        num_rows: int,
        dp_rank: int,
        dp_degree: int,
        closed: threading.Event,
    ) -> None:
        super().__init__()
        self._chunks, self._packer, self._stream, self._closed = chunks, packer, stream, closed
        self._num_documents, self._num_rows = num_documents, num_rows
        self._first = dp_rank * num_rows // dp_degree
        self._last = (dp_rank + 1) * num_rows // dp_degree
        self._num_bad = 0
        self._without_token = 0
        self._error: Exception | None = None

    def next(self) -> "Batch | Exception":
        if self._closed.is_set():
            deque(self._chunks, maxlen=0)  # lets the threads before us end
            raise StopIteration
        try:
            while self._packer.missing(self._num_rows):
                if self._error is not None:
                    return self._error
                self._append(next(self._chunks))
            return self._take()
        except StopIteration:
            raise
        except Exception as error:
            self._error = error
            return error

    def _append(self, chunk: Chunk) -> None:
        for bad in chunk.bad_records:
            self._num_bad += 1
            if self._first == 0 and self._num_bad <= _WARNINGS:  # every rank meets it; one speaks
                logger.warning(f"bad record left out: {bad}")
            elif self._first == 0 and str(self._num_bad).strip("0") == "1":  # 100, 1,000, ...
                logger.warning(f"{self._num_bad:,} bad records left out by now; the last: {bad}")
        self._packer.append(chunk)
        self._error = chunk.error
        self._without_token = 0 if len(chunk.ids) else self._without_token + len(chunk.lengths)
        if self._without_token >= 2 * self._num_documents:  # so many in a row hold a whole epoch
            raise ValueError("data.paths: no document of the corpus could be read, all are bad records")

    def _take(self) -> Batch:
        row = self._packer.cursor.row
        rows = self._packer.take(self._num_rows, self._first, self._last)
        digests = np.array([row_digest(tokens) for tokens in rows.tokens], np.uint64)
        return Batch(
            rows=torch.from_numpy(rows.tokens.astype(np.int64)),
            row_index=row + np.arange(self._first, self._last),
            row_digest=digests,
            fingerprint_part=fingerprint_part(digests, self._first),
            starts=rows.starts,
            cursor=self._packer.cursor.to_dict() | {"stream": self._stream},
            ledger=self._packer.cursor.ledger,
        )

    def get_state(self) -> dict[str, Any]:
        return {}


def _refuse_other_stream(saved: dict[str, Any], now: dict[str, Any], corpus_changes: list[str]) -> None:
    names = {
        "seq_len": "training.seq_len",
        "seed": "training.seed",
        "shuffle_block": "data.shuffle_block (0: data.shuffle is off)",
        "corpus": "the corpus's digest",
        "tokenizer": "the tokenizer's fingerprint",
    }
    differences = [f"{names[key]} was {saved[key]} and is {now[key]}" for key in names if saved[key] != now[key]]
    if saved["corpus"] != now["corpus"]:
        differences += corpus_changes[:10]
    if differences:
        raise ValueError(f"cannot resume in another token stream: {'; '.join(differences)}; restore it or start anew")


def _drain(nodes: BaseNode, closed: threading.Event) -> None:
    """When closed, pull until the end, so that torchdata's threads find room in their queues, and leave."""
    closed.wait()
    deque(nodes, maxlen=0)


def _close(drainer: threading.Thread, closed: threading.Event) -> None:
    closed.set()
    drainer.join(timeout=5)
