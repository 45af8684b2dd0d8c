"""Token caches for tests: small corpora, small shards, a tokenizer that tells on those who use it. No torch, so that
processes which get something from here start quickly."""

import gzip
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np

from tests.support.byte_tokenizer import ByteTokenizer
from titanlite.config.sections import SourceConfig
from titanlite.data.cache import shards
from titanlite.data.cache.reader import CachedReader, open_cache
from titanlite.data.cache.writer import write_cache
from titanlite.data.source import Source, SourceError, open_source
from titanlite.data.stream import EncodedDocuments

NUM_DOCUMENTS, NUM_SHARDS = 120, 7
"""Of what `write` makes of `write_corpus`."""


class Watched(ByteTokenizer):
    """Takes its time, and notes in a file who encodes what, and whether torch is near."""

    def __init__(self, notes: Path, seconds: float = 0.0) -> None:
        super().__init__()
        self.notes, self.seconds = notes, seconds

    def encode_document(self, text: str) -> np.ndarray:
        time.sleep(self.seconds)
        with self.notes.open("a") as notes:
            notes.write(f"{os.getpid()} {'torch' in sys.modules} {text[:12]}\n")
        return super().encode_document(text)


def notes_of(path: Path) -> list[list[str]]:
    """[pid, whether torch was imported, document] of each call."""
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


class Broken(ByteTokenizer):
    def encode_document(self, text: str) -> np.ndarray:
        if text.startswith("document-117"):
            raise KeyError("a bug")
        return super().encode_document(text)


@contextmanager
def small_shards(size: int, block: int = shards.BLOCK_BYTES) -> Iterator[None]:
    """In this process: the sizes of shards reach others with the work, that of blocks does not."""
    with patch.multiple(shards, _SMALL_SHARD=size, _DOCUMENT_BYTES=4, BLOCK_BYTES=block):
        yield


def source_of(folder: Path, *names: str, text_field: str = "text") -> Source:
    paths = tuple(str(folder / name) for name in names)
    return open_source("data", SourceConfig(paths=paths, text_field=text_field), str(folder / "cache"))


def write_jsonl(path: Path, texts: list[str]) -> None:
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_corpus(folder: Path) -> None:
    write_jsonl(folder / "a.jsonl", [f"document-{i:03d} " + "x" * (i * 37 % 90) for i in range(NUM_DOCUMENTS)])


def write(folder: Path, tokenizer: ByteTokenizer, num_processes: int, stop: bool = True) -> None:
    with small_shards(1400):
        write_cache(source_of(folder, "a.jsonl"), tokenizer, str(folder / "cache"), num_processes, stop)


def cached(source: Source, folder: Path, tokenizer: ByteTokenizer | None = None) -> CachedReader:
    tokenizer = tokenizer or ByteTokenizer()
    write_cache(source, tokenizer, str(folder / "cache"), num_processes=0, stop_on_bad_record=False)
    reader = open_cache(source, tokenizer.fingerprint, str(folder / "cache"))
    assert reader is not None
    return reader


def read_whole(reader: CachedReader, documents: np.ndarray, keep: np.ndarray) -> EncodedDocuments:
    """The documents with their tokens; where these cannot be had, the error."""
    read = reader.read(documents, keep)
    try:
        ids = reader.tokens(documents[: len(read.lengths)], np.zeros_like(read.lengths), read.lengths)
    except SourceError as error:
        return replace(read, error=error)
    return replace(read, ids=ids)


def everything(reader: CachedReader) -> EncodedDocuments:
    documents = np.arange(reader.numbering.num_documents)
    return read_whole(reader, documents, np.ones(len(documents), bool))


def whole(folder: Path) -> bool:
    """Whether the cache is there and equals the documents, tokenised one by one."""
    with small_shards(1400):
        reader = open_cache(source_of(folder, "a.jsonl"), ByteTokenizer().fingerprint, str(folder / "cache"))
        if reader is None:
            return False
        lines = (folder / "a.jsonl").read_text().splitlines()
        ids = [ByteTokenizer().encode_document(json.loads(line)["text"]) for line in lines]
        got = everything(reader)
        return (
            got.ids is not None
            and np.array_equal(got.ids, np.concatenate(ids))
            and got.lengths.tolist() == [len(i) for i in ids]
        )


def shard_files(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("*.shard"))


def leftovers(folder: Path) -> list[str]:
    """What else lies in the folder, but for the index."""
    names = [path.name for path in (folder / "cache").iterdir() if path.suffix != ".shard"]
    return [name for name in names if not name.startswith("jsonl-")]
