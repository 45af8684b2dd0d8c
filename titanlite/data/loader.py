"""Batches: this rank's rows of the one global stream as tensors, made ahead of the step.

Owns prefetch, pinning and the life of a loader. Its state is the stream's cursor, which rides on each batch. Refuses to
let any of this change what a batch holds.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from titanlite.config.sections import DataConfig
from titanlite.data.corpus import Corpus, open_corpus, open_rows
from titanlite.data.feed import Threads
from titanlite.data.packing import fingerprint_part, row_digest
from titanlite.data.rows import RowStream, total
from titanlite.data.stream import DocumentEncoder

_CLOSE_SECONDS = 5.0


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
    num_documents: int
    """Pieces of documents in the rows; pads are none."""
    cursor: dict[str, Any]
    """The state of the stream behind the whole step (all ranks' rows): what a checkpoint saves. JSON-able."""
    ledger: dict[str, int]
    """stream.Ledger behind the whole step, cumulative, of all sources together."""
    source_ledgers: dict[str, dict[str, int]]
    """The same for each source."""
    epochs: dict[str, float]
    """Epochs begun, by source."""

    def pin_memory(self) -> "Batch":
        return replace(self, rows=self.rows.pin_memory())


class Loader:
    """Iterator over a dp rank's batches, one per optimiser step.

    `next` raises what stopped the stream, at the first step that needs what is behind it and ever after: EndOfData
    where a source may be read no further, RecordError (a ValueError) for a bad record that is not skipped, SourceError
    for a file that changed, ValueError for a corpus without a single token.
    """

    def __init__(self, make: Callable[[], Batch], opened: Corpus, prefetch: int, pools: list[Threads]) -> None:
        self.opened = opened
        self.corpus = opened.manifest
        """Manifest of the corpus: digest, counts, and the same for each source."""
        self._make, self._prefetch = make, prefetch
        self._maker = Threads(1, _same_device()) if prefetch else None
        self._ahead: deque[Future[Batch]] = deque()
        # Also runs at garbage collection and at exit, before Python is torn down under threads that run Rust code.
        self._finalizer = weakref.finalize(self, _close, [*pools, *([self._maker] if self._maker else [])])
        self._make_ahead()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._finalizer.alive:
            raise StopIteration
        if self._maker is None:
            return self._make()
        batch = self._ahead.popleft()
        try:
            return self._maker.result(batch)
        except CancelledError:  # closed by another thread
            raise StopIteration from None
        finally:
            self._make_ahead()

    def _make_ahead(self) -> None:
        while self._maker is not None and len(self._ahead) < self._prefetch:
            self._ahead.append(self._maker.submit(self._make))

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
    begin to read at once.
    """
    if global_batch_size % dp_degree:
        raise ValueError(
            f"training.global_batch_size = {global_batch_size} is no multiple of the dp degree {dp_degree}"
        )
    corpus = open_corpus(data, tokenizer, seq_len=seq_len, seed=seed, tokenizing_share=tokenizing_share, stop=stop)
    first, last = (rank * global_batch_size // dp_degree for rank in (dp_rank, dp_rank + 1))
    threads = Threads(data.num_workers) if data.num_workers else None
    try:
        stream = open_rows(
            corpus,
            data,
            eos_id=tokenizer.eos_id,
            num_rows=global_batch_size,
            first=first,
            last=last,
            cursor=cursor,
            saved_corpus=saved_corpus,
            threads=threads,
        )
    except BaseException:  # the cursor of another stream: nobody else would end them
        if threads is not None:
            threads.close()
        raise
    return Loader(
        lambda: _make_batch(stream, first, pin_memory),
        corpus,
        data.prefetch,
        [threads] if threads else [],
    )


def _make_batch(stream: RowStream, first: int, pin_memory: bool) -> Batch:
    rows = stream.take()
    digests = np.array([row_digest(tokens) for tokens in rows.tokens], np.uint64)
    seq_len = rows.tokens.shape[1] - 1
    ledgers = stream.ledgers()
    batch = Batch(
        rows=torch.from_numpy(rows.tokens.astype(np.int64)),
        row_index=rows.row_index,
        row_digest=digests,
        fingerprint_part=fingerprint_part(digests, first),
        starts=[starts[starts < seq_len] for starts in rows.starts],
        num_documents=sum(int(np.count_nonzero(counters >= 0)) for counters in rows.counters),
        cursor=stream.cursor(),
        ledger=total(ledgers),
        source_ledgers={name: asdict(ledger) for name, ledger in ledgers.items()},
        epochs={source.source.name: source.epochs for source in stream.sources},
    )
    return batch.pin_memory() if pin_memory else batch


def _same_device() -> Callable[[], None]:
    """For a new thread: it would pin memory through GPU 0, and make a context there, whichever GPU is this rank's."""
    if not torch.cuda.is_available():
        return lambda: None
    device = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(device)


def _close(pools: list[Threads]) -> None:
    for pool in pools:
        pool.close()
    for pool in pools:
        pool.join(_CLOSE_SECONDS)
