"""The token cache as a reader: a source's documents from memory-mapped shards, tokenised once for any number of jobs.

Owns the gathering of documents and what a damaged shard does to a run: it ends it, with the file's name. Refuses to
write (writer.py) and to know the files' format (shards.py).
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from titanlite.data.cache.shards import Shard, ShardPlan, plan_shards
from titanlite.data.files import max_open_files
from titanlite.data.index import cache_folder
from titanlite.data.source import Numbering, RecordError, Source, SourceError
from titanlite.data.stream import EncodedDocuments
from titanlite.data.windows import gather

_OPENING_THREADS = 8  # checksums and the latency of network storage
_MAPPED_SHARDS = 1024  # at once; the kernel allows a process 65,530 mappings
_MAPPED_SHARE = 16  # they are at most 1 in so many of the files that the process may open: it may have many sources


def open_cache(source: Source, fingerprint: str, cache_dir: str) -> "CachedReader | None":
    """The source in tokens of the tokenizer with this fingerprint; None where a shard is missing or damaged."""
    folder = cache_folder(cache_dir)
    portions = plan_shards(source, fingerprint)
    with ThreadPoolExecutor(_OPENING_THREADS) as pool:
        facts = list(pool.map(functools.partial(_facts, folder), portions))
    known = [fact for fact in facts if fact is not None]
    return CachedReader(source, folder, portions, known) if len(known) == len(portions) else None


def num_cached_tokens(source: Source, fingerprint: str, cache_dir: str) -> int:
    """Tokens of the shards that are there."""
    shards = (Shard.open(cache_folder(cache_dir), portion) for portion in plan_shards(source, fingerprint))
    return sum(shard.header.num_tokens for shard in shards if shard is not None)


class _ShardFacts:
    """What is kept of a shard that is not mapped."""

    def __init__(self, shard: Shard) -> None:
        self.counts = shard.counts.copy()
        self.num_documents, self.num_bad = shard.header.num_documents, shard.header.num_bad
        self.num_tokens, self.num_text_bytes = shard.table[-1].tolist()


def _facts(folder: str, portion: ShardPlan) -> _ShardFacts | None:
    shard = Shard.open(folder, portion)
    return None if shard is None else _ShardFacts(shard)


class CachedReader:
    """Documents of a source by number, from its shards. Threads may share it."""

    on_demand = True

    def __init__(self, source: Source, folder: str, portions: list[ShardPlan], facts: list[_ShardFacts]) -> None:
        self._source, self._folder, self._portions = source, folder, portions
        self._first = np.cumsum([0, *(fact.num_documents for fact in facts)], dtype=np.int64)
        self._mapped = functools.lru_cache(min(_MAPPED_SHARDS, max_open_files() // _MAPPED_SHARE))(self._map)
        if source.numbering is None:
            self.numbering = Numbering(np.concatenate([np.empty(0, np.int64), *(fact.counts for fact in facts)]))
        else:
            self.numbering = source.numbering
        self.num_tokens = sum(fact.num_tokens for fact in facts)
        self.num_text_bytes = sum(fact.num_text_bytes for fact in facts)
        """UTF-8 bytes of all texts."""
        self.num_bad_records = sum(fact.num_bad for fact in facts)
        self.num_shards = len(portions)

    def locate(self, document: int) -> str:
        return self._source.locate(*self.numbering.place(document))

    def sizes(self, documents: np.ndarray) -> np.ndarray:
        """UTF-8 bytes of each document's text, int64 [n]. Raises SourceError where a shard has vanished."""
        return self._measures(documents)[:, 1]

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of each document, int64 [n], 0 for a bad record. Raises SourceError where a shard has vanished."""
        return self._measures(documents)[:, 0]

    def read(self, documents: np.ndarray, keep: np.ndarray) -> EncodedDocuments:
        """Lengths alone, as stream.Reader says. A shard that has vanished ends the reading: SourceError."""
        which, measures, bad = self._which(documents), np.zeros((len(documents), 2), np.int64), []
        end, error = len(documents), None
        for s in np.unique(which[keep]).tolist():
            mine = np.flatnonzero(keep & (which == s))
            try:
                shard = self._shard(s)
            except (OSError, ValueError) as failure:
                if mine[0] < end:
                    end = int(mine[0])
                    error = SourceError(f"{self.locate(int(documents[end]))}: {failure}")
                continue
            places = documents[mine] - self._first[s]
            measures[mine] = shard.table[places + 1] - shard.table[places]
            for i in mine[measures[mine, 0] == 0].tolist():
                document = int(documents[i])
                bad.append((i, RecordError(self.locate(document), shard.bad[document - int(self._first[s])])))
        bad = sorted((record for record in bad if record[0] < end), key=lambda record: record[0])
        return EncodedDocuments(None, measures[:end, 0], measures[:end, 1], bad, error)

    def tokens(self, documents: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """As stream.Reader says. Raises SourceError, with the first of the documents that a shard which is damaged or
        has vanished held."""
        which = self._which(documents)
        starts = np.zeros(len(documents), np.int64)
        shards: dict[int, np.ndarray] = {}
        end, problem = len(documents), ""
        for s in np.unique(which).tolist():
            mine = np.flatnonzero(which == s)
            try:
                shard = self._shard(s)
                shards[s] = shard.tokens
                starts[mine] = shard.table[documents[mine] - self._first[s], 0] + offsets[mine]
                broken = mine[shard.damaged(starts[mine], starts[mine] + sizes[mine])]
                found = f"{_damaged(shard.path)}"
            except (OSError, ValueError) as failure:
                broken, found = mine, f"{failure}"
            if len(broken) and broken[0] < end:
                end, problem = int(broken[0]), found
        if problem:
            raise SourceError(f"{self.locate(int(documents[end]))}: {problem}")
        return gather(shards, which, starts, sizes)

    def _which(self, documents: np.ndarray) -> np.ndarray:
        """The shard of each document, int64 [n]."""
        return np.searchsorted(self._first, documents, side="right") - 1

    def _measures(self, documents: np.ndarray) -> np.ndarray:
        """Tokens and text bytes of each document, int64 [n, 2]."""
        measures = np.empty((len(documents), 2), np.int64)
        which = self._which(documents)
        for s in np.unique(which).tolist():
            mine = which == s
            table, places = self._shard(s).table, documents[mine] - self._first[s]
            measures[mine] = table[places + 1] - table[places]
        return measures

    def _shard(self, s: int) -> Shard:
        """The shard, as it lies there now: a write to the file would go unseen in what was verified before, and to read
        a mapped file behind where it was cut off ends the process by a signal."""
        path = os.path.join(self._folder, self._portions[s].name)
        try:
            status = os.stat(path)
        except OSError as error:
            raise _damaged(path) from error
        return self._mapped(s, (status.st_ino, status.st_size, status.st_mtime_ns))

    def _map(self, s: int, stamp: tuple[int, int, int]) -> Shard:
        shard = Shard.open(self._folder, self._portions[s])
        if shard is None:
            raise _damaged(os.path.join(self._folder, self._portions[s].name))
        return shard


def _damaged(path: str) -> SourceError:
    return SourceError(
        f"{path}: this shard of the token cache is damaged or gone; delete it, and the next start writes it anew"
    )
