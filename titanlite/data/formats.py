"""What stands in a file: its records as bytes, by number or in order, and the text in a record's bytes.

Owns the formats text and jsonl (plain, gzip, zstd), and the check that a file still is what it was at the start;
parquet has a module of its own. A file that is not what it should be raises OSError; bytes that hold no text raise one
of RECORD_ERRORS. Refuses to repair, replace or leave out anything.
"""

import functools
import gzip
import io
import json
import os
import tokenize
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from titanlite.data.files import SourceFile, content_digest, shown
from titanlite.data.index import load_index

RECORD_ERRORS = (ValueError, RecursionError, SyntaxError, LookupError)
_CHANGED = "the file has changed since the start of the run"
_READ_BYTES = 1 << 18
_FIRST_BYTES = 1 << 20
_DECODER = json.JSONDecoder()
_LINE_ENDS = ("", "\n", "\r\n")
_BOM = b"\xef\xbb\xbf"

_JSON_NAMES = {
    dict: "an object",
    list: "an array",
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


class SectionError(ValueError):
    """A mistake in a source's section of the config; its text goes behind the section's name and a dot."""


class OpenFile:
    """An open file that is watched for change. Closed when the last thread that uses it lets go of it."""

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        self.descriptor = os.open(file.path, os.O_RDONLY)
        self._stamp = (-1, -1, -1)
        self.check()

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def check(self) -> None:
        """Raise OSError where there is no file under its path any more, or one of another sampled content. What is open
        could be read on, but a rank that opens it later could not, and neither could a resume."""
        status = os.stat(self.file.path)
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
        if stamp != self._stamp:
            with open(self.file.path, "rb", buffering=0) as now:
                for descriptor in (self.descriptor, now.fileno()):
                    read = functools.partial(os.pread, descriptor)
                    if content_digest(read, os.fstat(descriptor).st_size) != self.file.digest:  # the size is in it
                        raise OSError(_CHANGED)
            self._stamp = stamp


class Jsonl(OpenFile):
    """A jsonl file with its record boundaries."""

    def __init__(self, file: SourceFile, cache_dir: str, stop: Callable[[], bool]) -> None:
        """stop: see load_index."""
        super().__init__(file)
        self._index = load_index(file.path, file.size, file.digest, cache_dir, stop)
        self.num_records = self._index.num_records

    def sizes(self, records: np.ndarray) -> np.ndarray:
        bounds = self._index.bounds()
        return bounds[records + 1] - bounds[records]

    def places(self, records: np.ndarray) -> np.ndarray:
        """First byte of each record, and that of the next one: int64 [n, 2], for `read`."""
        bounds = self._index.bounds()
        return np.stack([bounds[records], bounds[records + 1]], axis=1)

    def read(self, position: int, end: int) -> bytes:
        if not 0 <= position < end <= self.file.size:
            self._index.forget()
            raise self._index.changed()
        raw = os.pread(self.descriptor, end - position, position)
        while len(raw) < end - position:  # the kernel reads at most 2 GiB at once
            more = os.pread(self.descriptor, end - position - len(raw), position + len(raw))
            if not more:
                raise OSError(_CHANGED)
            raw += more
        newline = raw.find(b"\n")  # most of the changes that `check` does not see leave no line at this place
        if newline != len(raw) - 1 and (newline >= 0 or end != self.file.size):
            self._index.forget()  # it may be older than the change: the run would stop here again and again
            raise OSError(_CHANGED)
        return raw


def read_text(file: SourceFile) -> bytes:
    """All of a file."""
    with open(file.path, "rb", buffering=0) as opened:
        raw = opened.read()
    if content_digest(lambda number, at: raw[at : at + number], len(raw)) != file.digest:  # the size is in it
        raise OSError(_CHANGED)
    return raw


def stream_lines(file: SourceFile, limit: int = -1) -> Iterator[bytes]:
    """The records of a jsonl file of any kind, in order, in the memory of one; those above `limit` bytes in pieces.

    A record is what a newline ends; the empty piece after the last newline is none. Raises OSError where compressed
    data are cut off or corrupt: what is behind could only be left out in silence.
    """
    opened = OpenFile(file)
    with (
        open(opened.descriptor, "rb", buffering=_READ_BYTES, closefd=False) as stored,
        _unpacked(stored, file) as lines,
    ):
        try:
            while lines.peek(1):
                opened.check()
                yield lines.readline(limit)  # held by nobody here: it may be large
        except Exception as error:
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno):
                raise
            opened.check()
            if isinstance(error, EOFError):
                raise OSError("the compressed data are cut off") from error
            raise OSError(f"the compressed data are corrupt ({error})") from error
    opened.check()


def _unpacked(stored: Any, file: SourceFile) -> Any:
    """The file object `stored`, or one that reads what it holds compressed."""
    if file.kind == "jsonl":
        return stored
    if file.kind == "jsonl.gz":
        unpacked = gzip.GzipFile(fileobj=stored)
    else:
        try:
            zstd = import_module("compression.zstd")
        except ImportError:  # before Python 3.14
            zstd = required_module("backports.zstd", file, "backports.zstd")
        # zstd refuses windows above 128 MiB unless told; long-range archives (--long=31) have them
        unpacked = zstd.ZstdFile(stored, options={zstd.DecompressionParameter.window_log_max: 31})
    return io.BufferedReader(unpacked, _READ_BYTES)


def required_module(name: str, file: SourceFile, package: str) -> ModuleType:
    """A module that takes time to import and may not be there."""
    try:
        return import_module(name)
    except ImportError as error:
        raise SectionError(f"paths: {shown(file.path)} needs {name} ({error}): pip install '{package}'") from error


def decode(raw: bytes | memoryview | None, kind: str, text_field: str, first: bool) -> str:
    """The text of a record (`first`: of the first in its file). Raises one of RECORD_ERRORS where there is none."""
    if raw is None:
        raise ValueError(f"the column {text_field!r} is null")
    if isinstance(raw, memoryview):  # of a parquet file
        return str(raw, "utf-8")
    if kind == "text":
        return raw.decode("utf-8-sig")
    if kind == "python":  # as tokenize.open does: the encoding that the source declares, newlines made one kind
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return io.TextIOWrapper(io.BytesIO(raw), encoding).read()
    return _parse_json(raw, text_field, first)


def first_fields(file: SourceFile) -> list[str] | None:
    """Names of the fields of a jsonl file's first record, or None where there is none that is small and an object."""
    raw = next(stream_lines(file, limit=_FIRST_BYTES), b"")
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except RECORD_ERRORS:
        return None
    return list(record) if isinstance(record, dict) else None


def _parse_json(raw: bytes, text_field: str, first: bool) -> str:
    try:  # what nearly every record is, in half the time; all else below, also for the words of an error
        text = raw.decode()
        record, end = _DECODER.raw_decode(text)
        if text[end:] in _LINE_ENDS and type(found := record[text_field]) is str:
            return found
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    begin = len(_BOM) if first and raw.startswith(_BOM) else 0
    end = len(raw) - (2 if raw.endswith(b"\r\n") else 1 if raw.endswith((b"\n", b"\r")) else 0)
    text = str(memoryview(raw)[begin:end], "utf-8")  # json.loads(bytes) would guess UTF-16 from NUL bytes
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


def reason(error: Exception) -> str:
    """Why a record holds no text, in one line."""
    if isinstance(error, UnicodeDecodeError):
        return f"not {error.encoding.upper()}: {error.reason} at byte {error.start} of the document"
    if isinstance(error, json.JSONDecodeError):
        return "a blank line" if not error.doc.strip() else f"bad JSON: {error.msg} at character {error.pos}"
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    return str(error)
