"""Parquet files: one text column, read by row groups.

Owns the use of pyarrow (an extra), the check of the column, and how much decoded data is kept. Memory is bounded by
what a row group holds encoded: the column is decoded as a dictionary, so that a text that repeats is kept once.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np

from titanlite.data.files import SourceFile, shown
from titanlite.data.formats import OpenFile, SectionError, required_module

_RANDOM_ACCESS_BYTES = 64 << 20  # of a row group's column: to read one document, all of it is decoded
_KEPT_BYTES = 256 << 20  # decoded row groups of a source: a shuffle block of documents of 16 KB
_BATCH_BYTES = 4 << 20  # decoded at once when read in order
_SAMPLED_BLOCKS = 1024


class RowGroups:
    """Row groups as they were last used, shared by threads: at least one, and at most about _KEPT_BYTES."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[str, int], decoding: threading.Lock, decode: Callable[[], Any]) -> Any:
        """The column under the key (path, row group); `decoding` is its file's lock, held while it is decoded."""
        if (column := self._find(key)) is None:
            with decoding:
                if (column := self._find(key)) is None:  # else another thread was first
                    column = decode()
                    self._keep(key, column)
        return column

    def _find(self, key: tuple[str, int]) -> Any:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _keep(self, key: tuple[str, int], column: Any) -> None:
        with self._lock:
            replaced = self._kept.pop(key, None)
            self._kept[key] = column
            self._bytes += column.nbytes - (0 if replaced is None else replaced.nbytes)
            while self._bytes > _KEPT_BYTES and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes


class Parquet(OpenFile):
    """A parquet file's text column. Raises SectionError where there is no such column, OSError for a damaged file."""

    def __init__(self, file: SourceFile, text_field: str, row_groups: RowGroups) -> None:
        super().__init__(file)
        self._field, self._row_groups = text_field, row_groups
        self._decoding = threading.Lock()  # pyarrow's reader of a file is for one thread at a time
        pyarrow = required_module("pyarrow", file, "titanlite[parquet]")
        self._errors = (OSError, pyarrow.ArrowException, ValueError)
        parquet_file = required_module("pyarrow.parquet", file, "titanlite[parquet]").ParquetFile
        stored = open(self.descriptor, "rb", closefd=False)  # noqa: SIM115  OpenFile closes the descriptor
        try:
            plain = parquet_file(stored)
            schema = plain.schema_arrow
        except self._errors as error:
            raise OSError(f"not a parquet file, or a damaged one: {_line(error)}") from error
        _check_column(schema, pyarrow.types, file, text_field)
        groups = [plain.metadata.row_group(g) for g in range(plain.num_row_groups)]
        leaf = next(i for i in range(len(plain.schema)) if plain.schema.column(i).path == text_field)
        rows = np.array([group.num_rows for group in groups], np.int64)
        columns = [group.column(leaf) for group in groups]
        column_bytes = np.array([column.total_uncompressed_size for column in columns], np.int64)
        if rows.sum() != plain.metadata.num_rows or any(rows != [column.num_values for column in columns]):
            raise OSError("a damaged parquet file: the numbers of rows in its footer contradict each other")
        self._first = np.concatenate(([0], np.cumsum(rows)))
        self.groups = np.stack([rows, column_bytes], axis=1)
        """Records and bytes of each row group's column, int64 [groups, 2]."""
        self._row_bytes = column_bytes // np.maximum(rows, 1)
        self.num_records = int(self._first[-1])
        self.random_access = bool((column_bytes <= _RANDOM_ACCESS_BYTES).all())
        self._file = parquet_file(
            stored,
            metadata=plain.metadata,
            # a text that repeats is then kept once; a long one would be copied several times
            read_dictionary=[text_field] if self.random_access else None,
            page_checksum_verification=True,
        )

    def sizes(self, records: np.ndarray) -> np.ndarray:
        return self._row_bytes[np.searchsorted(self._first, records, side="right") - 1]

    def places(self, records: np.ndarray) -> np.ndarray:
        """Row group of each record, and its row there: int64 [n, 2], for `read`."""
        groups = np.searchsorted(self._first, records, side="right") - 1
        return np.stack([groups, records - self._first[groups]], axis=1)

    def read(self, group: int, row: int) -> memoryview | None:
        column = self._row_groups.get((self.file.path, group), self._decoding, lambda: self._decode(group))
        return self._content(column, row, group)

    def stream(self) -> Iterator[memoryview | None]:
        """All rows in order, in the memory of a row group as it is stored. Not for an object that threads share."""
        for group, row_bytes in enumerate(self._row_bytes.tolist()):
            num_rows = 0
            batches = self._file.iter_batches(
                batch_size=min(4096, _BATCH_BYTES // (row_bytes + 1) + 1),
                row_groups=[group],
                columns=[self._field],
                use_threads=False,
            )
            while True:
                try:
                    column = next(batches).column(self._field)
                except StopIteration:
                    break
                except self._errors as error:
                    self._raise(error, group)
                num_rows += len(column)
                for i in range(len(column)):
                    yield self._content(column, i, group)
            self._check_rows(num_rows, group)
        self.check()

    def _decode(self, group: int) -> Any:
        try:
            column = self._file.read_row_group(group, columns=[self._field], use_threads=False).column(self._field)
        except self._errors as error:
            self._raise(error, group)
        self._check_rows(len(column), group)
        self.check()
        return column

    def _content(self, column: Any, i: int, group: int) -> memoryview | None:
        """Bytes of a text, neither copied nor decoded: what is no UTF-8 is the record's error, not pyarrow's."""
        try:
            value = column[i].value if hasattr(column[i], "dictionary") else column[i]
            buffer = value.as_buffer() if value is not None else None
        except self._errors as error:
            self._raise(error, group)
        return None if buffer is None else memoryview(buffer)

    def _check_rows(self, num_rows: int, group: int) -> None:
        if num_rows != self._first[group + 1] - self._first[group]:
            self._raise(ValueError(f"{num_rows:,} rows"), group)

    def _raise(self, error: Exception, group: int) -> NoReturn:
        self.check()
        raise OSError(f"row group {group} is damaged: {_line(error)}") from error


def decoding(groups: np.ndarray, first: np.ndarray, num_documents: int, shuffle_block: int) -> float:
    """Bytes of row groups that have to be decoded per byte that is read, in blocks of documents that are shuffled.

    groups: as of Parquet, of all files. first: number in the source of the first document of each, int64 [groups]. At
    least 1; estimated from some blocks. Where the row groups of a block are more than are kept, a document's is likely
    to be gone when its turn comes.
    """
    behind = first + groups[:, 0]
    before = np.concatenate(([0], np.cumsum(groups[:, 1])))
    num_blocks = -(-num_documents // shuffle_block)
    begin = np.unique(np.linspace(0, num_blocks - 1, min(num_blocks, _SAMPLED_BLOCKS)).astype(np.int64)) * shuffle_block
    end = np.minimum(begin + shuffle_block, num_documents)
    low, high = np.searchsorted(behind, begin, side="right"), np.searchsorted(first, end)
    touched, num_groups = before[high] - before[low], np.maximum(high - low, 1)
    missing = np.maximum(0, 1 - _KEPT_BYTES / np.maximum(touched, 1)) * (end - begin)
    decoded = np.maximum(touched, missing * (touched / num_groups))
    edges, bytes_at = np.stack([first, behind], axis=1).ravel(), np.stack([before[:-1], before[1:]], axis=1).ravel()
    read = np.interp(end, edges, bytes_at) - np.interp(begin, edges, bytes_at)
    return float(max(1.0, decoded.sum() / max(1.0, read.sum())))


def _check_column(schema: Any, types: Any, file: SourceFile, text_field: str) -> None:
    wanted = [field.type for field in schema if field.name == text_field]
    values = [kind.value_type if types.is_dictionary(kind) else kind for kind in wanted]
    if len(wanted) == 1 and (types.is_string(values[0]) or types.is_large_string(values[0])):
        return
    problem = "no such column" if not wanted else f"not one column of strings but {', '.join(map(str, wanted))}"
    columns = ", ".join(f"{field.name!r} ({field.type})" for field in schema) or "none"
    raise SectionError(f"text_field = {text_field!r}: {problem} in {shown(file.path)}, whose columns are {columns}")


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
