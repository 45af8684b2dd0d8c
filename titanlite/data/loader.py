"""Batches: this rank's rows of the one global stream as tensors, made ahead of the step by a chain of torchdata nodes.

    documents -> ParallelMapper (tokenise, in order) -> Prefetcher     for each source that is tokenised on the fly
      -> windows -> mixture -> batches -> PinMemory -> Prefetcher -> Loader

Owns the chain and its end. Its state is the stream's cursor, which rides on each batch: what nodes hold ahead of it is
made again. Refuses to let threads, nodes or restarts change what a batch holds.

What the nodes do not do is done here. An error is a value until the step that needs what is after it: a node would hand
it on as text. A node waits without end for one whose thread died of a BaseException, so none may leave our functions.
Nodes end when nobody holds them, but their threads hold the nodes before them: what they wait for must end by itself.
"""

import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torchdata import nodes

from titanlite.config.sections import DataConfig
from titanlite.data.corpus import Corpus, open_corpus, open_rows
from titanlite.data.feed import EndOfData, Portion, ReadAhead, one_by_one
from titanlite.data.rows import RowStream, total
from titanlite.data.stream import Chunk, DocumentEncoder
from titanlite.data.windows import fingerprint_part, row_digest
from titanlite.model.documents import IGNORE_INDEX, Examples


@dataclass(frozen=True, eq=False)
class Batch(Examples):
    """A data-parallel rank's rows of one optimiser step."""

    num_targets: int
    """Labels that are targets."""
    rows: torch.Tensor
    """int64 [rows of this rank, seq_len + 1], as the stream has them: tokens are [:, :-1]."""
    row_index: np.ndarray
    """Number of each row in the stream, int64."""
    row_digest: np.ndarray
    """uint64; windows.row_digest of each row."""
    fingerprint_part: int
    """This rank's share of the step's fingerprint, which is the sum over dp ranks modulo 2^64."""
    begins: list[np.ndarray]
    """Per row the positions in [0, seq_len) where a document begins or, at 0, goes on, as the packing knows them."""
    num_documents: int
    """Pieces of documents in the rows; pads are none."""
    cursor: dict[str, Any]
    """The state of the stream after the whole step (all ranks' rows): what a checkpoint saves. JSON-able."""
    ledger: dict[str, int]
    """stream.Ledger after the whole step, cumulative, of all sources together."""
    source_ledgers: dict[str, dict[str, int]]
    """The same for each source."""
    epochs: dict[str, float]
    """Epochs begun, by source."""


class Closed(Exception):
    """The loader was closed: no batch follows."""


class _Batches(nodes.BaseNode[Batch | Exception]):
    """The steps of a stream as batches, or what stopped it, once, as the last item."""

    def __init__(self, stream: RowStream, make: Callable[[RowStream], Batch]) -> None:
        super().__init__()
        self._stream: RowStream | None = stream
        self._make = make

    def next(self) -> Batch | Exception:
        if self._stream is None:
            raise StopIteration
        try:
            return self._make(self._stream)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit) and _in_main_thread():
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the nodes before this one
            self._stream = None
            return error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")

    def get_state(self) -> dict[str, Any]:
        return {}


class _Root(nodes.BaseNode[Batch]):
    """The end of the chain: it raises what stopped the stream, and its state is the cursor of the last batch."""

    def __init__(self, build: "Callable[[Mapping[str, Any] | None], _Chain]", cursor: Mapping[str, Any] | None) -> None:
        """cursor: where the stream begins that is asked for without a state."""
        super().__init__()
        self._build, self._cursor = build, cursor
        self._chain: _Chain | None = None
        self.ended: EndOfData | None = None

    def reset(self, initial_state: Mapping[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.close()
        self._error: Exception | None = None
        self.ended = None
        self._chain = self._build(self._cursor if initial_state is None else initial_state)
        self._state: Mapping[str, Any] = self._chain.start

    def next(self) -> Batch:
        if self._error is None and self._chain is not None:
            item = next(self._chain.last)
            if isinstance(item, Batch):
                self._state = item.cursor
                return item
            self._error = item
        if isinstance(self._error, EndOfData):
            self.ended = self._error
        if self._error is None or isinstance(self._error, EndOfData | Closed):
            raise StopIteration
        raise self._error

    def get_state(self) -> Mapping[str, Any]:
        return self._state

    def close(self) -> None:
        if self._chain is not None:
            self._chain.closed.set()
        self._chain = None  # its threads end as the nodes do


@dataclass(frozen=True, eq=False)
class _Chain:
    """The nodes before the root."""

    last: nodes.BaseNode[Batch | Exception]
    closed: threading.Event
    """Set: no document is read any more."""
    start: dict[str, Any]
    """The cursor before the first batch."""


class Loader(nodes.Loader[Batch]):
    """A dp rank's batches, one per optimiser step, as a torchdata Loader: `state_dict` is JSON-able, `load_state_dict`
    takes that of any number of ranks. Iterating ends with the data; `ended` then says why.

    Its iterator raises what stopped the stream, at the first step that needs what is after it and ever after:
    RecordError (a ValueError) for a bad record that is not skipped, SourceError for a file that changed, ValueError for
    a corpus without a single token. Each call of `iter` begins anew, from a loaded state or the start.
    """

    def __init__(self, root: _Root, opened: Corpus) -> None:
        super().__init__(root, restart_on_stop_iteration=False)
        self.opened = opened
        self.corpus = opened.manifest
        """Manifest of the corpus: digest, counts, and the same for each source."""
        # At garbage collection and at exit, before Python is torn down under threads that run Rust code.
        weakref.finalize(self, root.close)

    @property
    def ended(self) -> EndOfData | None:
        """Why no batch follows; None while one may, and after `close`."""
        return self.root.ended

    def close(self) -> None:
        """End all threads, within seconds even where one hangs in a read; the iterator then raises StopIteration."""
        self.root.close()


def build_loader(
    data: DataConfig,
    tokenizer: DocumentEncoder,
    *,
    seq_len: int,
    global_batch_size: int,
    seed: int,
    dp_rank: int = 0,
    dp_degree: int = 1,
    cursor: Mapping[str, Any] | None = None,
    saved_corpus: Mapping[str, Any] | None = None,
    pin_memory: bool = False,
    tokenizing_share: float = 0.0,
    stop: Callable[[], bool] = lambda: False,
) -> Loader:
    """The batches of one dp rank, from the start of the stream or from a batch's `cursor` on.

    On resume the number of ranks, readers, workers, prefetched batches and global_batch_size may be others; what
    defines the stream may not. With `saved_corpus` (the manifest of then) a refusal names the files that changed.
    tokenizing_share, stop: see `corpus.open_corpus`. Raises ValueError, in one line, for a corpus that cannot be read
    and for a cursor of another stream; WritingStopped where `stop` ended the writing of an index or a cache. Threads
    begin to read with `iter`.
    """
    if global_batch_size % dp_degree:
        raise ValueError(
            f"training.global_batch_size = {global_batch_size} is no multiple of the dp degree {dp_degree}"
        )
    corpus = open_corpus(data, tokenizer, seq_len=seq_len, seed=seed, tokenizing_share=tokenizing_share, stop=stop)
    first, last = (rank * global_batch_size // dp_degree for rank in (dp_rank, dp_rank + 1))

    def stream_from(cursor: Mapping[str, Any] | None, read_ahead: ReadAhead) -> RowStream:
        return open_rows(
            corpus,
            data,
            eos_id=tokenizer.eos_id,
            num_rows=global_batch_size,
            first=first,
            last=last,
            cursor=cursor,
            saved_corpus=saved_corpus,
            read_ahead=read_ahead,
        )

    def build(cursor: Mapping[str, Any] | None) -> _Chain:
        closed = threading.Event()
        stream = stream_from(cursor, _tokenise_ahead(data.num_workers, closed))
        chain: nodes.BaseNode[Batch | Exception] = _Batches(
            stream, lambda stream: _make_batch(stream, first, tokenizer.eos_id)
        )
        if pin_memory:  # named, or the thread would make a context on GPU 0, whichever this rank's is
            chain = nodes.PinMemory(chain, "cuda", snapshot_frequency=0)
        if data.prefetch:
            chain = nodes.Prefetcher(chain, data.prefetch, snapshot_frequency=0)
        start = stream.cursor()
        chain.reset()
        return _Chain(chain, closed, start)

    torch.get_num_threads()  # settles this thread's number: torchdata's threads set that of all later ones to 1
    stream_from(cursor, one_by_one)  # refuses another stream now
    return Loader(_Root(build, cursor), corpus)


def _tokenise_ahead(num_workers: int, closed: threading.Event) -> ReadAhead:
    """Chunks by nodes: as many threads tokenise at once as there are workers, of all sources together."""
    slots = threading.Semaphore(max(1, num_workers))

    def read_ahead(portions: Iterator[Portion], read: Callable[[Portion], Chunk], num_ahead: int) -> Iterator[Chunk]:
        def read_one(portion: Portion) -> Chunk:
            with slots:
                try:
                    return Chunk.failed(portion.counter, Closed()) if closed.is_set() else read(portion)
                except SystemExit as error:  # a thread would end by it without a word
                    return Chunk.failed(portion.counter, RuntimeError(f"SystemExit: {error}"))

        source = nodes.IterableWrapper(portions)
        chunks = nodes.ParallelMapper(source, read_one, num_workers, snapshot_frequency=0)
        if not num_workers:
            return chunks
        ahead = nodes.Prefetcher(chunks, num_ahead, snapshot_frequency=0)
        ahead.reset()
        return ahead

    return read_ahead


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _make_batch(stream: RowStream, first: int, eos_id: int) -> Batch:
    rows = stream.take()
    tokens = torch.from_numpy(rows.tokens.astype(np.int64))
    examples = Examples.by_eos(tokens, eos_id)
    digests = np.array([row_digest(tokens) for tokens in rows.tokens], np.uint64)
    seq_len = rows.tokens.shape[1] - 1
    ledgers = stream.ledgers()
    begins = [begins[begins < seq_len] for begins in rows.starts]
    return Batch(
        tokens=examples.tokens,
        labels=examples.labels,
        starts=examples.starts,
        num_targets=int((examples.labels != IGNORE_INDEX).sum()),
        rows=tokens,
        row_index=rows.row_index,
        row_digest=digests,
        fingerprint_part=fingerprint_part(digests, first),
        begins=begins,
        num_documents=sum(
            int(np.count_nonzero(counters[: len(inside)] >= 0))
            for counters, inside in zip(rows.counters, begins, strict=True)
        ),
        cursor=stream.cursor(),
        ledger=total(ledgers),
        source_ledgers={name: asdict(ledger) for name, ledger in ledgers.items()},
        epochs={source.source.name: source.epochs for source in stream.sources},
    )
