"""Writing the token cache: what is missing of it, whether it has room, and what ends the writing before it is done.

A shard that is there stays, so that a killed job goes on with the next one.
"""

import contextlib
import functools
import itertools
import os
import shutil
from collections.abc import Callable, Generator

from titanlite.data.cache.processes import (
    Event,
    Job,
    Progress,
    records,
    telling_the_fix,
    token_width,
    too_many,
    write_in_processes,
)
from titanlite.data.cache.shards import Shard, ShardPlan, plan_shards
from titanlite.data.index import WritingStopped, cache_folder
from titanlite.data.source import Numbering, RecordError, Source
from titanlite.data.stream import DocumentEncoder, encode_or_raise, num_text_bytes
from titanlite.log import logger

_SAMPLED_SHARDS, _SAMPLED_DOCUMENTS, _SAMPLED_CHARS = 8, 4, 16384
_TABLE_BYTES = 16  # of a shard, per document


def write_cache(
    source: Source,
    tokenizer: DocumentEncoder,
    cache_dir: str,
    num_processes: int,
    stop_on_bad_record: bool,
    max_bad_records: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Write what is missing of the source's cache, and wait for what other processes and jobs write of it.

    num_processes = 0: in this process. max_bad_records: of the whole source; 0: no limit. `stop` is asked twice a
    second; WritingStopped where it says yes. Raises ValueError, in one line, where the folder cannot be written or has
    no room, and for bad records when they have to stop it; SourceError for a file that has changed. Finished shards
    stay in any case.
    """
    folder = cache_folder(cache_dir)
    portions = plan_shards(source, tokenizer.fingerprint)
    bad_records = _BadRecords(source, folder, max_bad_records)
    missing = []
    for portion in portions:
        if (shard := Shard.open(folder, portion)) is None:
            missing.append(portion)
        else:
            bad_records.add(portion, shard.header.num_bad)
    if not missing:
        return
    with telling_the_fix(cache_dir):
        os.makedirs(folder, exist_ok=True)
    need, free = _estimate(source, tokenizer, missing), shutil.disk_usage(folder).free
    if need > free:
        raise ValueError(
            f"data.cache_dir = {cache_dir!r}: the token cache of source {source.name!r} takes about {need / 1e9:.2f} "
            f"GB more, and {folder} has {free / 1e9:.2f} GB free; name a folder that has room"
        )
    num_processes = min(num_processes, len(missing))
    logger.info(
        f"token cache of source {source.name!r}: writing {len(missing)} of {len(portions)} shards to {folder}, about "
        f"{need / 1e9:.2f} GB, with {num_processes or 1} processes"
    )
    open_source = functools.partial(Source, source.name, source.files, source.text_field, cache_dir)
    job = Job(open_source, tokenizer, cache_dir, missing, stop_on_bad_record, max_bad_records)
    events: Generator[Event | None, None, None]
    events = write_in_processes(job, num_processes) if num_processes else job.write(source, 0)
    with Progress(source.name, folder, missing) as progress, contextlib.closing(events):
        for event in itertools.chain(events, [None]):
            if stop():
                raise WritingStopped(f"stopped while the token cache of source {source.name!r} was written")
            if event is not None:
                progress.take(*event)
                if event[0] == "done":
                    bad_records.add(missing[event[1]], event[2])
        if not progress.complete:
            raise ValueError(
                "the processes that write the token cache ended before it was done; was memory short? fewer processes "
                "need less (--processes)"
            )


def available_cores() -> int:
    """Of this process: a scheduler may give it less than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _estimate(source: Source, tokenizer: DocumentEncoder, portions: list[ShardPlan]) -> float:
    """About how many bytes the shards will take, judged by a few documents of a few of them."""
    text_bytes = shard_bytes = 0
    for portion in portions[:: max(1, len(portions) // _SAMPLED_SHARDS)]:
        for file, record, text in itertools.islice(records(source, portion), _SAMPLED_DOCUMENTS):
            if isinstance(text, str):
                sample = text[:_SAMPLED_CHARS]
                with contextlib.suppress(RecordError):
                    ids = encode_or_raise(tokenizer.encode_document, sample, source.locate, file, record)
                    shard_bytes += len(ids) * token_width(tokenizer)
                    shard_bytes += _TABLE_BYTES
                    text_bytes += num_text_bytes(sample)
    return sum(portion.weight for portion in portions) * shard_bytes / max(1, text_bytes)


class _BadRecords:
    """Counts those of finished shards."""

    def __init__(self, source: Source, folder: str, limit: int) -> None:
        self._source, self._folder, self._limit, self._num = source, folder, limit, 0

    def add(self, portion: ShardPlan, num_bad: int) -> None:
        """Raises ValueError, with the place of one of them, where these are too many."""
        self._num += num_bad
        if self._num > self._limit > 0 and num_bad:
            raise too_many(self._last(portion), self._limit)

    def _last(self, portion: ShardPlan) -> RecordError:
        shard = Shard.open(self._folder, portion)
        assert shard is not None, "it was there just now"
        document, why = list(shard.bad.items())[-1]
        if self._source.numbering is not None and portion.documents is not None:
            file, record = self._source.numbering.place(portion.documents.start + document)
        else:
            file, record = Numbering(shard.counts).place(document)
            file += portion.files.start
        return RecordError(self._source.locate(file, record), why)
