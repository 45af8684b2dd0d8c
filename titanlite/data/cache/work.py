"""What one process does for a token cache: it tokenises the shards that are missing and that nobody else writes.

Owns what becomes of bad records, of shards that other processes and jobs have begun, and of a folder that cannot be
written.
"""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np

from titanlite.data.cache.progress import Event
from titanlite.data.cache.shard_writer import Tokenised, shard_lock, write_shard
from titanlite.data.cache.shards import Portion, Shard
from titanlite.data.feed import too_many_bad_records
from titanlite.data.files import shown
from titanlite.data.index import cache_folder, stamp
from titanlite.data.source import RecordError, Source, SourceError
from titanlite.data.stream import DocumentEncoder, encode_or_raise, num_text_bytes

_DOCUMENTS = 1024  # read at once
_PAUSE = 0.1  # seconds until a process looks again whether another has finished


class _Busy(Exception):
    """Another process writes this shard."""


@dataclass(frozen=True)
class Job:
    """What a process has to know."""

    open_source: Callable[[], Source]
    tokenizer: DocumentEncoder
    cache_dir: str
    portions: list[Portion]
    stop_on_bad_record: bool
    max_bad_records: int

    def write(self, source: Source, first: int) -> Generator[Event, None, None]:
        """Write, from shard `first` on and round, each that is missing and that nobody else writes, until all are
        there."""
        numbers = range(len(self.portions))
        pending = [*numbers[first:], *numbers[:first]]
        while pending:
            busy = []
            for number in pending:
                try:
                    with telling_the_fix(self.cache_dir):
                        for text_bytes in self._write_one(source, self.portions[number]):
                            yield "writing", number, text_bytes
                        shard = Shard.open(cache_folder(self.cache_dir), self.portions[number])
                    yield "done", number, 0 if shard is None else shard.header.num_bad
                except _Busy:
                    busy.append(number)
            if len(busy) == len(pending):
                yield "busy", busy[0], 0
                time.sleep(_PAUSE)
            pending = busy

    def _write_one(self, source: Source, portion: Portion) -> Iterator[int]:
        folder = cache_folder(self.cache_dir)
        if Shard.open(folder, portion) is not None:
            return
        with shard_lock(folder, portion) as held:
            if held is False:
                raise _Busy
            if Shard.open(folder, portion) is None:  # another process may have written it meanwhile
                yield 0
                documents = _tokenise(source, self.tokenizer, portion, self.stop_on_bad_record, self.max_bad_records)
                yield from write_shard(documents, portion, folder, token_width(self.tokenizer), clean_up=bool(held))


def records(source: Source, portion: Portion) -> Iterator[tuple[int, int, str | RecordError]]:
    """(file, record of the file, text) of all that a portion holds, in order. Raises SourceError for what cannot be
    read, and after the documents that were read of a file that has changed."""
    if portion.documents is None:
        for file in portion.files:
            for record, text in enumerate(source.records(file)):
                yield file, record, text
        return
    assert source.numbering is not None
    for start in portion.documents[::_DOCUMENTS]:
        documents = np.arange(start, min(start + _DOCUMENTS, portion.documents.stop))
        files, numbers = source.numbering.places(documents)
        yield from zip(files.tolist(), numbers.tolist(), source.texts(documents), strict=True)
        if changed := source.unchanged(documents)[1]:
            raise changed


def _tokenise(
    source: Source, tokenizer: DocumentEncoder, portion: Portion, stop_on_bad_record: bool, max_bad_records: int
) -> Iterator[Tokenised]:
    nothing, num_bad = np.empty(0, np.int32), 0
    stamps = {source.files[f].path: stamp(source.files[f].path) for f in portion.files}
    for file, record, text in records(source, portion):
        try:
            if isinstance(text, RecordError):
                raise text
            ids = encode_or_raise(tokenizer.encode_document, text, source.locate, file, record)
        except RecordError as bad:
            if stop_on_bad_record:
                raise ValueError(f'{bad}; data.on_bad_record = "skip" would leave it out and count it') from bad
            num_bad += 1
            if num_bad > max_bad_records > 0:  # a shard may be a large compressed file: do not read all of it first
                raise too_many(bad, max_bad_records) from bad
            yield Tokenised(file, nothing, 0, bad.reason)
        else:
            yield Tokenised(file, ids, num_text_bytes(text))
    for path, before in stamps.items():  # the samples in a shard's name may not show it: the shard would pass for good
        if stamp(path) != before:
            raise SourceError(f"{shown(path)} changed while it was tokenised; start again once it is complete")


def too_many(last: RecordError, limit: int) -> ValueError:
    return ValueError(f"{last}; these are {too_many_bad_records(limit)}")


@contextlib.contextmanager
def telling_the_fix(cache_dir: str) -> Iterator[None]:
    try:
        yield
    except SourceError:
        raise
    except OSError as error:
        raise ValueError(
            f"data.cache_dir = {cache_dir!r}: cannot write the token cache to {cache_folder(cache_dir)} "
            f"({error.strerror}); name a folder that can be written and has room"
        ) from error


def token_width(tokenizer: DocumentEncoder) -> int:
    """Bytes per token."""
    return 2 if tokenizer.vocab_size <= 1 << 16 else 4
