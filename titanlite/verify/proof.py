"""The proof that the stream is what the documents say: chosen steps, made a second time from single documents.

Owns the comparison of rows, cursors and fingerprints. Refuses to go on behind the first difference, which it names by
source, document, step and row.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from titanlite.config.sections import DataConfig
from titanlite.data.cache.reader import CachedReader, open_cache
from titanlite.data.corpus import Corpus, open_rows, window_rows
from titanlite.data.feed import in_threads_of
from titanlite.data.rows import StepRows
from titanlite.data.stream import DocumentEncoder, SourceCursor, encode_or_raise
from titanlite.data.windows import Dealing, fingerprint_part, row_digest
from titanlite.inspection.seek import seek
from titanlite.verify.account import (
    Account,
    AccountsDiffer,
    Piece,
    check_cursor,
    first_unequal,
    pieces_of,
    splitmix64,
)
from titanlite.verify.census import Census

_SEQUENTIAL_BYTES = 1 << 28  # of files without random access that are read again as text
_MASK = (1 << 64) - 1
_PLACE = ("row", "document", "offset", "dealt")


class _Texts:
    """Tokens of single documents of a source: from the text, and from the token cache where there is one."""

    def __init__(self, corpus: Corpus, name: str, tokenizer: DocumentEncoder, cache_dir: str) -> None:
        self._source, self._text, self._tokenizer = corpus.sources[name], corpus.texts[name], tokenizer
        reader = self._source.reader
        cached = reader if isinstance(reader, CachedReader) else None
        self._cached = cached or open_cache(self._text, tokenizer.fingerprint, cache_dir)
        self._room = _SEQUENTIAL_BYTES

    def tokens(self, documents: list[int], threads: ThreadPoolExecutor, ways: Counter[str]) -> dict[int, np.ndarray]:
        """By document; `ways` counts where they are from. Raises AccountsDiffer where text and cache differ."""
        found = self._from_text(documents, threads)
        if self._cached is None:
            ways["text"] += len(found)
            return found
        ways["text and cache"] += len(found)
        ways["cache alone"] += len(documents) - len(found)
        wanted = np.array(documents, np.int64)
        lengths = self._cached.lengths(wanted)
        whole = self._cached.tokens(wanted, np.zeros_like(wanted), lengths)
        for document, ids in zip(documents, np.split(whole, np.cumsum(lengths)[:-1]), strict=True):
            text_ids = found.setdefault(document, ids)
            if _mismatch(text_ids, ids) is not None:
                raise AccountsDiffer(
                    f"source {self._source.name}, document {document}, {self._source.reader.locate(document)}:"
                    f" {_first_difference(ids, 'in the token cache', text_ids, 'by its text')}"
                )
        return found

    def _from_text(self, documents: list[int], threads: ThreadPoolExecutor) -> dict[int, np.ndarray]:
        if self._text.random_access:
            futures = {d: threads.submit(lambda d=d: self._encode(d, self._text.read(d))) for d in documents}  # type: ignore[misc]
            return {document: future.result() for document, future in futures.items()}
        found: dict[int, np.ndarray] = {}
        files, records = self._source.reader.numbering.places(np.array(documents, np.int64))
        for file in np.unique(files).tolist():
            if (size := self._text.files[file].size) > self._room:
                continue
            self._room -= size
            wanted = dict(
                zip(records[files == file].tolist(), np.array(documents)[files == file].tolist(), strict=True)
            )
            for record, text in enumerate(self._text.records(file)):
                if record in wanted and isinstance(text, str):
                    found[wanted[record]] = self._encode(wanted[record], text)
        return found

    def _encode(self, document: int, text: str) -> np.ndarray:
        return encode_or_raise(self._tokenizer.encode_document, text, self._source.reader.locate, document)


@dataclass(frozen=True)
class ProvenStep:
    number: int
    fingerprint: str
    num_rows: int
    num_pieces: int
    ways: Counter[str]
    """Documents, by where their tokens were taken from to compare."""
    documents: dict[str, tuple[int, int]]
    """Lowest and highest counter, by source that deals."""
    cursor: dict[str, Any]
    """Behind the step."""


class Prover:
    """Makes steps again and compares them with what the training stream gives."""

    def __init__(
        self,
        corpus: Corpus,
        data: DataConfig,
        tokenizer: DocumentEncoder,
        censuses: Mapping[str, Census],
        num_rows: int,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._corpus, self._data, self._eos_id = corpus, data, tokenizer.eos_id
        self._num_rows, self._threads = num_rows, threads
        self._seq_len: int = corpus.identity["seq_len"]
        rows = window_rows(corpus, data)
        dealings = {name: Dealing(corpus.identity["seed"], name, data.shuffle) for name in corpus.sources}
        self._accounts = {
            name: Account(source, censuses[name], data.packing, dealings[name], self._seq_len, rows[name])
            for name, source in corpus.sources.items()
        }
        self._texts = {name: _Texts(corpus, name, tokenizer, data.cache_dir) for name in corpus.sources}
        # By the lengths in the cache a search takes a moment; without it, it reads all the steps before.
        self.seeks = all(isinstance(source.reader, CachedReader) for source in corpus.sources.values())

    def prove(self, number: int, before: dict[str, Any]) -> ProvenStep:
        """Compare a step after those that were compared. before: the cursor before it, with its ledger from the first
        row on.

        Raises AccountsDiffer, and what reading raises.
        """
        row = (number - 1) * self._num_rows
        if self.seeks:
            self._check_seek(number, seek(self._corpus, self._data, eos_id=self._eos_id, row=row), before)
        parts, fingerprint, after = self._read(number, before)
        pieces: dict[str, list[list[Piece]]] = {}
        dealers = self._corpus.deck.sources(row, self._num_rows)
        for i, (name, account) in enumerate(self._accounts.items()):
            place = SourceCursor.from_dict(before["sources"][name])
            account.take(place.row - account.cursor.row)
            check_cursor(f"step {number}, source {name}, the cursor before it", place, account.cursor)
            pieces[name] = account.take(int(np.count_nonzero(dealers == i)))
            found = SourceCursor.from_dict(after["sources"][name])
            check_cursor(f"step {number}, source {name}, the cursor after it", found, account.cursor)
        ways: Counter[str] = Counter()
        rows, spans = self._compose(dealers, pieces, ways)
        k = num_pieces = 0
        for part in parts:
            for j in range(len(part.tokens)):
                where = f"step {number}, row {k} (row {row + k} of the stream)"
                num_pieces += self._check_row(where, part, j, row + k, int(dealers[k]), *rows[k])
                k += 1
        if (own := plain_fingerprint([ids for ids, _ in rows])) != fingerprint:
            raise AccountsDiffer(f"step {number}: its fingerprint is {fingerprint}, and {own} by hashlib")
        return ProvenStep(number, fingerprint, self._num_rows, num_pieces, ways, spans, after)

    def _read(self, number: int, before: dict[str, Any]) -> tuple[list[StepRows], str, dict[str, Any]]:
        """The step as two ranks get it (one, of a single row), its fingerprint, and the cursor after it."""
        middle = self._num_rows // 2
        parts, total, cursors = [], 0, []
        for first, last in ((0, middle), (middle, self._num_rows)):
            if first == last:
                continue
            stream = open_rows(
                self._corpus,
                self._data,
                eos_id=self._eos_id,
                num_rows=self._num_rows,
                first=first,
                last=last,
                cursor=before,
                read_ahead=in_threads_of(self._threads),
            )
            parts.append(stream.take())
            total += fingerprint_part(np.array([row_digest(row) for row in parts[-1].tokens], np.uint64), first)
            cursors.append(stream.cursor())
        if cursors[0] != cursors[-1]:
            raise AccountsDiffer(f"step {number}: rank 0 ends at the cursor {cursors[0]} and rank 1 at {cursors[-1]}")
        return parts, f"{total & _MASK:016x}", cursors[0]

    def _compose(
        self, dealers: np.ndarray, pieces: dict[str, list[list[Piece]]], ways: Counter[str]
    ) -> tuple[list[tuple[np.ndarray, list[Piece]]], dict[str, tuple[int, int]]]:
        """Tokens and pieces of each row, document by document, and the span of counters of each source."""
        by_source: list[Iterator[tuple[np.ndarray, list[Piece]]]] = []
        spans = {}
        for name, rows in pieces.items():
            order = self._corpus.sources[name].order
            counters = sorted({counter for row in rows for _, counter, _ in row if counter >= 0})
            numbers = order.documents(np.array(counters, np.int64)).tolist()
            tokens = self._texts[name].tokens(sorted(set(numbers)), self._threads, ways) if numbers else {}
            document = dict(zip(counters, numbers, strict=True))
            if counters:
                spans[name] = (counters[0], counters[-1])
            by_source.append(iter([(self._row(row, document, tokens), row) for row in rows]))
        return [next(by_source[i]) for i in dealers.tolist()], spans

    def _row(self, row: list[Piece], document: dict[int, int], tokens: dict[int, np.ndarray]) -> np.ndarray:
        """int32 [seq_len + 1], or shorter where a document is."""
        ends = [position for position, _, _ in row[1:]] + [self._seq_len + 1]
        return np.concatenate(
            [
                tokens[document[counter]][offset : offset + end - position]
                if counter >= 0
                else np.full(end - position, self._eos_id, np.int32)
                for (position, counter, offset), end in zip(row, ends, strict=True)
            ]
        )

    def _check_row(
        self, where: str, part: StepRows, j: int, row: int, dealer: int, ids: np.ndarray, pieces: list[Piece]
    ) -> int:
        """Compare row j of a rank's part with tokens and pieces; the number of pieces."""
        if (part.row_index[j], part.sources[j]) != (row, dealer):
            raise AccountsDiffer(
                f"{where}: row {part.row_index[j]} of source {part.sources[j]} in the stream, {row} of {dealer} by the"
                " mixture's deck"
            )
        name = list(self._corpus.sources)[dealer]
        source = self._corpus.sources[name]
        place = _mismatch(part.tokens[j], ids)
        if place is not None:
            position, counter, offset = max(piece for piece in pieces if piece[0] <= place)
            document = int(source.order.documents(np.array([max(counter, 0)]))[0])
            raise AccountsDiffer(
                f"{where}, source {name}, document {document} ({source.reader.locate(document)}), its token"
                f" {offset + place - position}: {_first_difference(part.tokens[j], 'in the row', ids, 'by itself')}"
            )
        stream = pieces_of(part.starts[j], part.counters[j], part.offsets[j])
        if unequal := first_unequal(stream, pieces):
            raise AccountsDiffer(
                f"{where}, source {name}: (position, document, offset) of a piece is {unequal[0]} in the stream and"
                f" {unequal[1]} by the lengths of the documents"
            )
        return sum(counter >= 0 for _, counter, _ in pieces)

    def _check_seek(self, number: int, found: dict[str, Any], before: dict[str, Any]) -> None:
        for name, cursor in found["sources"].items():
            one, other = ([state[key] for key in _PLACE] for state in (cursor, before["sources"][name]))
            if one != other:
                raise AccountsDiffer(
                    f"step {number}, source {name}: (row, document, offset, dealt) before it is {one} by the search for"
                    f" it and {other} by the lengths of the documents"
                )


def plain_fingerprint(rows: Iterable[np.ndarray]) -> str:
    """A step's fingerprint from all its rows, by its definition and the standard library alone."""
    total = 0
    for position, row in enumerate(rows):
        digest = hashlib.blake2b(struct.pack(f"<{len(row)}i", *row.tolist()), digest_size=8).digest()
        total += splitmix64(int.from_bytes(digest, "little") + position * 0x9E3779B97F4A7C15)
    return f"{total & _MASK:016x}"


def _first_difference(one: np.ndarray, of_one: str, other: np.ndarray, of_other: str) -> str:
    if len(one) != len(other):
        return f"{len(one)} tokens {of_one} and {len(other)} {of_other}"
    at = _mismatch(one, other)
    return f"token {at} is {one[at]} {of_one} and {other[at]} {of_other}"


def _mismatch(one: np.ndarray, other: np.ndarray) -> int | None:
    """Index of the first token that differs, or that one of them lacks."""
    common = min(len(one), len(other))
    unequal = np.flatnonzero(one[:common] != other[:common])
    return int(unequal[0]) if len(unequal) else common if len(one) != len(other) else None
