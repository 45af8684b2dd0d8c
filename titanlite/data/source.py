"""Documents: the text, the size and the place of each document of a source, by number or in order.

Owns the numbers of documents, what a broken record and a broken file are called, and the manifest that says what the
source is. Refuses to tokenise, to choose an order, and to repair, replace or leave out anything: what is no text is an
error with its place.
"""

import bisect
import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from titanlite.config.sections import SourceConfig
from titanlite.data.files import SourceFile, find_files, in_threads, max_open_files, shown
from titanlite.data.formats import (
    RECORD_ERRORS,
    Jsonl,
    SectionError,
    decode,
    first_fields,
    read_text,
    reason,
    stream_lines,
)
from titanlite.data.parquet import Parquet, RowGroups, decoding

_OPEN_FILES = 128  # files kept open, each with its index
_OPEN_SHARE = 64  # they are at most 1 in so many of the files that the process may open: it may have many sources
_WHOLE = ("text", "python")  # kinds of files that are one document
_MANIFEST_FILES = 10_000  # a manifest names single files up to this number: it is stored in every checkpoint


class RecordError(ValueError):
    """A document whose bytes hold no text. A pure function of the data: any reader of these bytes gets it."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(place, reason)
        self.place, self.reason = place, reason

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class SourceError(OSError):
    """A file that cannot be read, is damaged, or is not what it was at the start. Never skipped: how much would be
    missing is not known, and another rank may still have read it."""


class Numbering:
    """Documents numbered from 0 in file order, from the number of documents of each file (int64 [files])."""

    def __init__(self, counts: np.ndarray) -> None:
        self._first = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))  # of each file, then their number
        self._first_list: list[int] = self._first.tolist()  # bisect on a list is ten times faster than searchsorted
        self.num_documents = self._first_list[-1]

    def first(self, file: int) -> int:
        """The first document of a file; of the file behind the last one: the number of documents."""
        return self._first_list[file]

    def place(self, document: int) -> tuple[int, int]:
        """The file that holds a document, and the document's number in it."""
        file = bisect.bisect_right(self._first_list, document) - 1
        return file, document - self._first_list[file]

    def places(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`place` of many, int64 [n] each."""
        files = np.searchsorted(self._first, documents, side="right") - 1
        return files, documents - self._first[files]


class _FileFacts(NamedTuple):
    """What is kept of a file that is not open."""

    num_records: int
    random_access: bool
    """Whether each record can be read by itself."""
    groups: np.ndarray
    """Of a parquet file, as there."""


class Source:
    """The documents of a list of files. Threads may share it.

    Making one raises ValueError, in one line, for a parquet file that lacks the column and for what cannot be opened;
    WritingStopped where `stop` ended the building of an index.
    """

    def __init__(
        self,
        name: str,
        files: list[SourceFile],
        text_field: str,
        cache_dir: str,
        key: str = "data",
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.name = name
        self.files = files
        self.text_field = text_field
        self.num_bytes = sum(file.size for file in files)
        self._cache_dir, self._key, self._stop = cache_dir, key, stop
        self._row_groups = RowGroups()
        self._open = functools.lru_cache(min(_OPEN_FILES, max_open_files() // _OPEN_SHARE))(self._open_file)
        # Parquet files are all opened, so that each one's column is checked, even where no number of records is needed.
        parquet = [f for f, file in enumerate(files) if file.kind == "parquet"]
        facts = dict(zip(parquet, in_threads(self._facts, parquet), strict=True))
        compressed = any(file.kind in ("jsonl.gz", "jsonl.zst") for file in files)
        self.random_access = not compressed and all(file_facts.random_access for file_facts in facts.values())
        self.numbering: Numbering | None = None
        """None without random access: how many documents there are is not known then."""
        if self.random_access:
            facts |= {f: self._facts(f) for f, file in enumerate(files) if file.kind == "jsonl"}
            counts = [facts[f].num_records if f in facts else 1 for f in range(len(files))]
            self.numbering = Numbering(np.array(counts, np.int64))
        self._groups = {f: facts[f].groups for f in parquet}
        self._file_size = np.array([file.size for file in files], np.int64)
        self._has_records = np.array([file.kind in ("jsonl", "parquet") for file in files], bool)
        self._stop = lambda: False  # the rest of a run ends with a step, also where an index is built anew

    def read(self, document: int) -> str:
        """The document's text, by random access. Raises RecordError for bytes that hold none, else SourceError."""
        assert self.numbering is not None
        text = next(self.texts(np.array([document])))
        _, changed = self.unchanged(np.array([document]))
        if changed is not None:
            raise changed
        if isinstance(text, RecordError):
            raise text
        return text

    def texts(self, documents: np.ndarray) -> Iterator[str | RecordError]:
        """`read` of each of the documents, int64 [n], at less cost: whether their files are still what they were is
        not looked at; ask `unchanged` after the last of them."""
        assert self.numbering is not None
        files, records = self.numbering.places(documents)
        places = np.full((len(documents), 2), -1)
        for f in np.unique(files[self._has_records[files]]).tolist():
            here = files == f
            with contextlib.suppress(OSError, ValueError):  # reading meets the error again and reports it
                places[here] = self._open(f).places(records[here])
        for f, record, place in zip(files.tolist(), records.tolist(), places.tolist(), strict=True):
            yield self._text(f, record, place)

    def unchanged(self, documents: np.ndarray) -> tuple[int, SourceError | None]:
        """How many of the documents, which were read just now, lie before the first of a file that has changed since
        the start, and the error that says so."""
        assert self.numbering is not None
        files, records = self.numbering.places(documents)
        changed: tuple[int, SourceError | None] = len(documents), None
        for f, first in zip(*np.unique(files, return_index=True), strict=True):
            if self._has_records[f] and first < changed[0]:
                try:
                    self._open(int(f)).check()
                except OSError as error:
                    place = self.locate(int(f), int(records[first]))
                    changed = int(first), SourceError(f"{place}: {_unreadable(error)}")
        return changed

    def records(self, file: int) -> Iterator[str | RecordError]:
        """Every record of a file (its index) in order, of any kind, in the memory of one record and one row group.

        Raises SourceError where the file is not what it was or its data are cut off or corrupt, once it is there.
        """
        record = 0
        try:
            stream = self._stream(file)
            while True:
                try:
                    raw = next(stream)
                except StopIteration:
                    return
                text = self._decode(raw, file, record)
                del raw  # it may be large
                record += 1
                yield text
                del text
        except (OSError, ValueError) as error:
            raise SourceError(f"{self.locate(file, record)}: {_unreadable(error)}") from error

    def sizes(self, documents: np.ndarray) -> np.ndarray:
        """About how many bytes each document has, int64 [n], without reading it: a text's file, a jsonl record's line,
        the mean of a parquet row group. Needs random access."""
        assert self.numbering is not None
        files, records = self.numbering.places(documents)
        sizes = self._file_size[files]
        for f in np.unique(files[self._has_records[files]]).tolist():
            here = files == f
            sizes[here] = self._open(f).sizes(records[here])
        return sizes

    def decoding(self, shuffle_block: int) -> float:
        """Bytes of parquet row groups to decode per byte that is read, in shuffled blocks of so many documents (0: in
        their order); 1 where there are none. Needs random access."""
        if not shuffle_block or not self._groups:
            return 1.0
        assert self.numbering is not None
        starts = [
            self.numbering.first(f) + np.cumsum(groups[:, 0]) - groups[:, 0] for f, groups in self._groups.items()
        ]
        groups, first = np.concatenate([*self._groups.values()]), np.concatenate(starts)
        return decoding(groups, first, self.numbering.num_documents, shuffle_block)

    def locate(self, file: int, record: int) -> str:
        """A document's place for people: its file, for jsonl with the line (from 1), for parquet the row (from 0)."""
        path, kind = shown(self.files[file].path), self.files[file].kind
        return f"{path}: row {record}" if kind == "parquet" else f"{path}:{record + 1}" if "jsonl" in kind else path

    def key_parts(self) -> list[list[Any]]:
        """What decides the documents, JSON-able, per file: kind, name, bytes, digest, and text_field if it matters."""
        return [
            [file.kind, file.name, file.size, file.digest, "" if file.kind in _WHOLE else self.text_field]
            for file in self.files
        ]

    def manifest(self) -> dict[str, Any]:
        """What the source is, JSON-able: name, counts, `files` as [name, bytes, digest] in order, and a digest of
        key_parts. `files` is null for more than 10,000 files, `num_documents` without random access.
        """
        return {
            "name": self.name,
            "digest": hashlib.blake2b(json.dumps(self.key_parts()).encode(), digest_size=16).hexdigest(),
            "num_files": len(self.files),
            "num_documents": self.numbering.num_documents if self.numbering else None,
            "num_bytes": self.num_bytes,
            "files": [[f.name, f.size, f.digest] for f in self.files] if len(self.files) <= _MANIFEST_FILES else None,
        }

    def check_text_field(self) -> None:
        """Raise ValueError when a jsonl file's first record is an object without the field: a mistake in the config."""
        in_threads(self._check_text_field, [f for f, file in enumerate(self.files) if "jsonl" in file.kind])

    def _check_text_field(self, f: int) -> None:
        with self._at_start(f):
            fields = first_fields(self.files[f])
            if fields is not None and self.text_field not in fields:
                has = ", ".join(map(repr, fields)) or "none"
                raise SectionError(
                    f"text_field = {self.text_field!r}: no such field in {self.locate(f, 0)}, which has {has}"
                )

    @contextlib.contextmanager
    def _at_start(self, f: int) -> Iterator[None]:
        """What goes wrong with a file here is the user's to mend: a ValueError that names section and file."""
        try:
            yield
        except SectionError as error:
            raise ValueError(f"{self._key}.{error}") from error
        except OSError as error:
            raise ValueError(f"{self._key}.paths: {shown(self.files[f].path)}: {_unreadable(error)}") from error

    def _text(self, f: int, record: int, place: list[int]) -> str | RecordError:
        file = self.files[f]
        try:
            raw = read_text(file) if file.kind in _WHOLE else self._open(f).read(*place)
        except (OSError, ValueError) as error:
            raise SourceError(f"{self.locate(f, record)}: {_unreadable(error)}") from error
        return self._decode(raw, f, record)

    def _decode(self, raw: bytes | memoryview | None, f: int, record: int) -> str | RecordError:
        try:
            return decode(raw, self.files[f].kind, self.text_field, first=record == 0)
        except RECORD_ERRORS as error:
            bad = RecordError(self.locate(f, record), reason(error))
            bad.__cause__ = error
            return bad

    def _stream(self, f: int) -> Iterator[bytes | memoryview | None]:
        file = self.files[f]
        if file.kind == "parquet":
            return Parquet(file, self.text_field, self._row_groups).stream()
        if "jsonl" in file.kind:
            return stream_lines(file)
        return iter([read_text(file)])

    def _open_file(self, f: int) -> Jsonl | Parquet:
        file = self.files[f]
        return (
            Parquet(file, self.text_field, self._row_groups)
            if file.kind == "parquet"
            else Jsonl(file, self._cache_dir, self._stop)
        )

    def _facts(self, f: int) -> _FileFacts:
        with self._at_start(f):
            opened = self._open(f)
        if isinstance(opened, Parquet):
            return _FileFacts(opened.num_records, opened.random_access, opened.groups)
        return _FileFacts(opened.num_records, True, np.empty((0, 2), np.int64))


def open_source(
    name: str, source: SourceConfig, cache_dir: str, key: str = "", stop: Callable[[], bool] = lambda: False
) -> Source:
    """The documents that a section names: [data], or [data.sources.NAME], or `key`. Raises ValueError, in one line with
    the fix, for anything that cannot be read; stop: see Source."""
    key = key or ("data" if name == "data" else f"data.sources.{name}")
    opened = Source(name, find_files(source, key), source.text_field, cache_dir, key, stop)
    if opened.numbering is not None and not opened.numbering.num_documents:
        raise ValueError(f"{key}.paths = {list(source.paths)}: the corpus is empty, its files hold no record")
    opened.check_text_field()
    return opened


def manifest_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two manifests, in words: an item per file, or counts where files are not known.

    Empty when both describe the same documents in the same order.
    """
    if old["digest"] == new["digest"]:
        return []
    before = {name: rest for name, *rest in old["files"] or []}
    after = {name: rest for name, *rest in new["files"] or []}
    changes = [f"removed: {name}" for name in before if name not in after]
    changes += [f"added: {name}" for name in after if name not in before]
    changes += [f"changed: {name}" for name in after if name in before and before[name] != after[name]]
    if old["files"] and new["files"] and changes:
        return changes
    counts = (f"{key} {_count(old[key])} -> {_count(new[key])}" for key in ("num_files", "num_documents", "num_bytes"))
    return [f"other content, order, format or text_field ({', '.join(counts)})"]


def _count(number: int | None) -> str:
    return "not known" if number is None else f"{number:,}"


def _unreadable(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
