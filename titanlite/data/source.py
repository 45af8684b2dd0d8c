"""Documents: the text, the size and the place of each document of a corpus, by number.

Owns reading and decoding, what counts as a broken record, and the manifest that says what the corpus is. Refuses to
tokenise, to choose an order, and to repair, replace or leave out anything: what is no text is an error with its place.
"""

import bisect
import functools
import hashlib
import io
import json
import os
import tokenize
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from titanlite.config.sections import DataConfig
from titanlite.data.files import SourceFile, find_files
from titanlite.data.index import load_index
from titanlite.log import logger

_OPEN_FILES = 128  # jsonl files kept open, each with its index; a process may often have 1024 descriptors
_MANIFEST_FILES = 10_000  # a manifest names single files up to this number: it is stored in every checkpoint

_JSON_NAMES = {
    dict: "an object",
    list: "an array",
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


class RecordError(ValueError):
    """A document whose bytes hold no text. A pure function of the data: any reader of these bytes gets it."""


class SourceError(OSError):
    """A file that is not what it was at the start. Never skipped: another rank may still have read the old one."""


class Source:
    """The documents of a list of files, numbered from 0 in file order. Threads may share it."""

    def __init__(self, files: list[SourceFile], text_field: str, cache_dir: str) -> None:
        self.files = files
        self._text_field = text_field
        self._cache_dir = cache_dir
        self._jsonl = functools.lru_cache(maxsize=_OPEN_FILES)(self._open_jsonl)
        counts = [len(self._jsonl(f).bounds) - 1 if file.kind == "jsonl" else 1 for f, file in enumerate(files)]
        self._first = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))  # of each file, then their number
        self._first_list: list[int] = self._first.tolist()  # bisect on a list is ten times faster than searchsorted
        self._file_size = np.array([file.size for file in files], np.int64)
        self._is_jsonl = np.array([file.kind == "jsonl" for file in files], bool)
        self.num_documents = self._first_list[-1]
        self.num_bytes = int(self._file_size.sum())

    def size(self, documents: np.ndarray) -> np.ndarray:
        """Bytes of each document on disk, int64, without reading it; a jsonl record is as long as its line."""
        files = np.searchsorted(self._first, documents, side="right") - 1
        sizes = self._file_size[files]
        for f in np.unique(files[self._is_jsonl[files]]):
            here = files == f
            records = documents[here] - self._first[f]
            bounds = self._jsonl(int(f)).bounds
            sizes[here] = bounds[records + 1] - bounds[records]
        return sizes

    def locate(self, document: int) -> str:
        """The document's place for people: its file, for jsonl with the line number (from 1)."""
        f = bisect.bisect_right(self._first_list, document) - 1
        file = self.files[f]
        return f"{file.path}:{document - self._first_list[f] + 1}" if file.kind == "jsonl" else file.path

    def read(self, document: int) -> str:
        """The document's text. Raises RecordError for bytes that hold none, SourceError when the file has changed."""
        f = bisect.bisect_right(self._first_list, document) - 1
        file = self.files[f]
        record = document - self._first_list[f]
        try:
            raw = self._jsonl(f).read(record) if file.kind == "jsonl" else _read_all(file)
        except (OSError, ValueError) as error:
            raise SourceError(f"{self.locate(document)}: could be read at the start of the run: {error}") from error
        if raw is None:
            raise SourceError(f"{self.locate(document)}: the file has changed since the start of the run")
        try:
            if file.kind == "jsonl":
                return _parse_record(raw, self._text_field, first=record == 0)
            return _decode_python(raw) if file.kind == "python" else raw.decode("utf-8-sig")
        except (ValueError, RecursionError, SyntaxError, LookupError) as error:
            raise RecordError(f"{self.locate(document)}: {_reason(error)}") from error

    def manifest(self) -> dict[str, Any]:
        """What the corpus is, JSON-able: counts, `files` as [name, bytes, digest] in order, and a digest over all that.

        `files` is null for more than 10,000 files.
        """
        entries = [[file.name, file.size, file.digest] for file in self.files]
        decides = [[file.kind for file in self.files], self._text_field if self._is_jsonl.any() else "", entries]
        return {
            "digest": hashlib.blake2b(json.dumps(decides).encode(), digest_size=16).hexdigest(),
            "num_files": len(self.files),
            "num_documents": self.num_documents,
            "num_bytes": self.num_bytes,
            "files": entries if len(entries) <= _MANIFEST_FILES else None,
        }

    def check_text_field(self) -> None:
        """Raise ValueError when the first record of a file is an object without the field: a mistake in the config."""
        for f, file in enumerate(self.files):
            if file.kind == "jsonl" and self._first_list[f] < self._first_list[f + 1]:
                try:
                    record = json.loads((self._jsonl(f).read(0) or b"").decode("utf-8-sig"))
                except (ValueError, RecursionError):
                    continue  # a broken record, which data.on_bad_record is about
                if isinstance(record, dict) and self._text_field not in record:
                    raise ValueError(
                        f"data.text_field = {self._text_field!r}: no such field in {file.path}:1, "
                        f"which has {', '.join(map(repr, record)) or 'none'}"
                    )

    def _open_jsonl(self, f: int) -> "_Jsonl":
        file = self.files[f]
        return _Jsonl(file.path, load_index(file.path, file.size, file.digest, self._cache_dir))


def open_source(data: DataConfig) -> Source:
    """The corpus that `data` names. Raises ValueError, in one line with the fix, for anything that cannot be read."""
    source = Source(find_files(data), data.text_field, data.cache_dir)
    if not source.num_documents:
        raise ValueError(f"data.paths = {list(data.paths)}: the corpus is empty, its files hold no record")
    source.check_text_field()
    logger.info(
        f"corpus: {', '.join(data.paths) or 'standard library of this Python'}: {len(source.files):,} files, "
        f"{source.num_documents:,} documents, {source.num_bytes:,} bytes"
    )
    return source


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
    counts = (f"{key} {old[key]:,} -> {new[key]:,}" for key in ("num_files", "num_documents", "num_bytes"))
    return [f"other content, order, format or text_field ({', '.join(counts)})"]


class _Jsonl:
    """An open jsonl file and its record boundaries. Closed when the last thread that uses it lets go of it."""

    def __init__(self, path: str, bounds: np.ndarray) -> None:
        self.bounds = bounds
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, record: int) -> bytes | None:
        """The bytes of a record, or None where the file no longer has exactly one line there."""
        position, end = int(self.bounds[record]), int(self.bounds[record + 1])
        raw = os.pread(self._descriptor, end - position, position)
        while len(raw) < end - position:  # the kernel reads at most 2 GiB at once
            more = os.pread(self._descriptor, end - position - len(raw), position + len(raw))
            if not more:
                return None
            raw += more
        last = record == len(self.bounds) - 2
        return raw if raw.find(b"\n", 0, -1) < 0 and (last or raw.endswith(b"\n")) else None


def _read_all(file: SourceFile) -> bytes | None:
    with open(file.path, "rb") as opened:
        raw = opened.read()
    return raw if len(raw) == file.size else None


def _decode_python(raw: bytes) -> str:
    """As tokenize.open does: the encoding that the source declares, newlines made one kind."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
    return io.TextIOWrapper(io.BytesIO(raw), encoding).read()


def _parse_record(raw: bytes, text_field: str, first: bool) -> str:
    text = raw.rstrip(b"\r\n").decode(
        "utf-8-sig" if first else "utf-8"
    )  # json.loads(bytes) would guess UTF-16 from NUL bytes
    try:
        record = json.loads(text)
    except RecursionError:
        # What is too deep depends on the stack we stand on. A skip must not: let an empty stack decide.
        with ThreadPoolExecutor(1) as fresh:
            record = fresh.submit(json.loads, text).result()
    if not isinstance(record, dict):
        raise ValueError(f"the JSON is no object but {_JSON_NAMES[type(record)]}")
    if text_field not in record:
        raise ValueError(f"no field {text_field!r}")
    if not isinstance(record[text_field], str):
        raise ValueError(f"the field {text_field!r} is no text but {_JSON_NAMES[type(record[text_field])]}")
    return str(record[text_field])


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not {error.encoding.upper()}: {error.reason} at byte {error.start} of the document"
    if isinstance(error, json.JSONDecodeError):
        return "a blank line" if not error.doc.strip() else f"bad JSON: {error.msg} at character {error.pos}"
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    return str(error)
