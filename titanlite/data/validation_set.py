"""The validation set: a fixed finite set of documents that are not trained on, packed into rows once.

Owns which documents they are, the bytes that their targets stand for, and which rows a rank keeps. Documents are packed
whole ("best_fit", whatever data.packing is), so that no number depends on which of them share a row; one of more than
seq_len + 1 tokens is cut every seq_len targets, and each piece begins with the token before them as context. Refuses to
read in training's stream, to take a document that is trained on, and to leave one out in silence.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
from tqdm import tqdm

from titanlite.config.sections import DataConfig, SourceConfig, ValidationConfig
from titanlite.data.corpus import Corpus, open_reader
from titanlite.data.feed import (
    EndOfData,
    SourceRows,
    StreamSource,
    in_threads_of,
    too_many_bad_records,
)
from titanlite.data.files import SourceFile, shown
from titanlite.data.order import DocumentOrder, HeldOut
from titanlite.data.source import open_source
from titanlite.data.stream import Ledger, SourceCursor
from titanlite.data.windows import BestFit, Dealing, Rows
from titanlite.log import logger
from titanlite.tokenizer import Tokenizer

_SLICE = 1 << 16  # documents whose order is computed at once
_WINDOW_ROWS = 256  # packed at once: padding is about 0.25 / this and what best fit leaves


@dataclass(frozen=True, eq=False)
class ValidationSet:
    """The same on every rank, but for `rows`."""

    rows: np.ndarray
    """int32 [passes, rows of this rank in a pass, seq_len + 1]. The last pass is filled with rows of eos, which have no
    target: every rank has as many."""
    num_rows: int
    """Of all ranks, without those."""
    num_documents: int
    num_targets: int
    """Every token but the first one of each document, once."""
    num_bytes: int
    """UTF-8 bytes of the text that the targets stand for: of all texts, but without a bos not those of first tokens. An
    eos stands for none."""
    digest: str
    """Of all rows in their order, 16 hex digits."""

    def __str__(self) -> str:
        return (
            f"{self.num_documents:,} documents, {self.num_targets:,} targets that stand for {self.num_bytes:,} bytes,"
            f" {self.num_rows:,} rows, set {self.digest}"
        )


def validation_sources(
    validation: ValidationConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    corpus: Corpus | None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, StreamSource]:
    """The documents to validate on, as sources of a single epoch, in a pseudo-random order that depends on their number
    alone: those of validation.paths, else those of each of the corpus's sources that are held out.

    corpus: of the training, None where that is not known; needed for what is held out. stop: see corpus.open_corpus.
    Raises ValueError, in one line, for what cannot be read, for nothing, and for files that are trained on.
    """
    if validation.paths:
        v = validation
        config = SourceConfig(v.paths, exclude=v.exclude, format=v.format, text_field=v.text_field)
        source = open_source("validation", config, data.cache_dir, "validation", stop)
        if corpus is not None:
            _refuse_trained(source.files, corpus)
        reader = open_reader(source, data, tokenizer, 0.0, stop)
        order = DocumentOrder(max(1, reader.numbering.num_documents), 0, 0)
        whole = {"validation": StreamSource("validation", reader, order, HeldOut("", [], 0.0))}
    else:
        assert corpus is not None
        whole = corpus.sources
    chosen = {name: _choose(source, not validation.paths, validation.max_documents) for name, source in whole.items()}
    if not sum(map(len, chosen.values())):
        num = sum(source.order.num_documents for source in whole.values())
        if validation.paths:
            raise ValueError(f"validation.paths = {list(validation.paths)}: its files hold no record")
        raise ValueError(
            f"data.held_out_fraction = {data.held_out_fraction} holds out none of {num:,} documents, so there is"
            " nothing to validate on: raise it, or name files in validation.paths"
        )
    nothing = HeldOut("", [], 0.0)
    return {
        name: replace(source, order=_Chosen(chosen[name]), held_out=nothing, max_epochs=1)
        for name, source in whole.items()
        if len(chosen[name])
    }


def build_validation_set(
    sources: Mapping[str, StreamSource],
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    dp_rank: int,
    dp_degree: int,
) -> ValidationSet:
    """Read and pack all documents, and keep what this rank takes: `batch_size` rows in each pass.

    Raises ValueError for bad records, as data.on_bad_record has it, and where no document has a target; SourceError.
    """
    rows: list[np.ndarray] = []
    firsts: list[int] = []
    digest, ledger, num_rows = blake2b(digest_size=8), Ledger(), 0
    num_documents = sum(source.order.num_documents for source in sources.values())
    with (
        tqdm(total=num_documents, desc="validation set", unit="documents", delay=1, leave=False, disable=None) as bar,
        ThreadPoolExecutor(max(1, data.num_workers)) as pool,
    ):
        for source in sources.values():
            lane = SourceRows(
                source,
                BestFit(seq_len, _WINDOW_ROWS, limited=True),
                Dealing(0, source.name, shuffle=False),
                SourceCursor(),
                tokenizer.eos_id,
                in_threads_of(pool),
                num_ahead=data.num_workers + 1,
                skip_bad_records=data.on_bad_record == "skip",
                max_bad_records=data.max_bad_records,
            )
            while (row := _next_row(lane, dp_rank == 0)) is not None:
                begins = row.starts[0][(row.counters[0] >= 0) & (row.offsets[0] == 0)]
                firsts += row.tokens[0][begins].tolist()
                bar.update(len(begins))
                digest.update(row.tokens.astype("<i4").tobytes())
                if num_rows // batch_size % dp_degree == dp_rank:
                    rows.append(row.tokens[0])
                num_rows += 1
            ledger += lane.ended()
    if data.max_bad_records and ledger.bad_records > data.max_bad_records:
        raise too_many_bad_records(data.max_bad_records)
    num_bytes = ledger.bytes - _bytes_of_firsts(np.array(firsts, np.int64), tokenizer)
    if not num_bytes:
        raise ValueError(f"none of the {num_documents:,} documents to validate on holds any text to predict")
    passes = -(-num_rows // (batch_size * dp_degree))
    rows += [np.full(seq_len + 1, tokenizer.eos_id, np.int32)] * (passes * batch_size - len(rows))
    return ValidationSet(
        np.stack(rows).reshape(passes, batch_size, seq_len + 1),
        num_rows,
        ledger.document_first,
        ledger.targets,
        num_bytes,
        digest.hexdigest(),
    )


class _Chosen(DocumentOrder):
    """The documents with these numbers, int64 [n], in this order."""

    def __init__(self, chosen: np.ndarray) -> None:
        super().__init__(len(chosen), 0, 0)
        self._chosen = chosen

    def documents(self, counters: np.ndarray) -> np.ndarray:
        return self._chosen[counters % self.num_documents]


def _choose(source: StreamSource, held_out: bool, limit: int) -> np.ndarray:
    """Numbers of the first `limit` documents (0: of all), of those that are held out where only these count."""
    num_documents = source.reader.numbering.num_documents
    chosen = [np.empty(0, np.int64)]
    for first in range(0, num_documents, _SLICE):
        counters = np.arange(first, min(first + _SLICE, num_documents))
        documents = DocumentOrder(num_documents, 0, num_documents).documents(counters)
        if held_out:
            documents = documents[source.held_out(*source.reader.numbering.places(documents))]
        chosen.append(documents)
        if limit and sum(map(len, chosen)) >= limit:
            break
    return np.concatenate(chosen)[: limit or None]


def _next_row(lane: SourceRows, speaks: bool) -> Rows | None:
    """None where there is none."""
    try:
        lane.fill(1)
    except EndOfData:
        return None
    row, bad_records = lane.take(1, 0, 1)
    for bad in bad_records if speaks else []:
        logger.warning(f"bad record left out of the validation: {bad}")
    return row


def _bytes_of_firsts(firsts: np.ndarray, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes that the first tokens of documents stand for: none where that is bos or eos."""
    ids, counts = np.unique(firsts, return_counts=True)
    special = (tokenizer.eos_id, tokenizer.bos_id)
    pairs = zip(ids.tolist(), counts.tolist(), strict=True)
    return sum(count * len(tokenizer.decode_bytes([i])) for i, count in pairs if i not in special)


def _refuse_trained(files: list[SourceFile], corpus: Corpus) -> None:
    """A file may be in one of the two only; a copy of one is told of."""
    by_digest: dict[str, list[SourceFile]] = {}
    for file in files:
        by_digest.setdefault(file.digest, []).append(file)
    trained = [file for source in corpus.texts.values() for file in source.files]
    alike = [(file, other) for other in trained for file in by_digest.get(other.digest, [])]
    both = {file.path for file, other in alike if os.path.samefile(file.path, other.path)}
    if both:
        raise ValueError(
            f"{len(both):,} files of validation.paths are trained on too, as {shown(min(both))}: leave them out of"
            " training by data.exclude (of a mixture: data.sources.NAME.exclude), or here by validation.exclude"
        )
    if alike:
        logger.warning(
            f"{len({file.path for file, _ in alike}):,} files of validation.paths have the content of files that are"
            f" trained on: {shown(alike[0][0].path)} that of {shown(alike[0][1].path)}"
        )
