"""The corpus of a run: its sources, opened, each with the reader that suits it, and the stream that they make.

Owns which reader is taken and why, what the corpus is (manifest), what defines the stream (identity), and what may
resume in it.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from titanlite.config.sections import DataConfig, SourceConfig, source_configs
from titanlite.data.cache.reader import CachedReader, open_cache
from titanlite.data.cache.writer import available_cores, write_cache
from titanlite.data.feed import CHUNK_BYTES, ReadAhead, SourceRows, StreamSource, one_by_one
from titanlite.data.files import shown
from titanlite.data.mixture import Deck
from titanlite.data.order import DocumentOrder, HeldOut
from titanlite.data.rows import RowStream
from titanlite.data.source import Source, manifest_changes, open_source
from titanlite.data.stream import DocumentEncoder, Reader, SourceCursor, StreamedReader
from titanlite.data.windows import BestFit, Dealing, Packing, Split
from titanlite.log import logger

_MAX_TOKENIZING_SHARE = 0.3  # of the host's cores
_MAX_DECODING = 8.0  # bytes of row groups per byte read: more of them would take a third of the time of tokenising


@dataclass(frozen=True, eq=False)
class Corpus:
    """The sources of a run, by name and in the order of their names: that of the tables does not matter."""

    sources: dict[str, StreamSource]
    texts: dict[str, Source]
    """The same as text, whichever reader the stream takes."""
    deck: Deck
    manifest: dict[str, Any]
    """digest, num_files, num_documents, num_bytes, num_tokens; sources: the same of each, with its files, weight and
    reader. JSON-able. num_tokens is estimated where a source is streamed."""
    identity: dict[str, Any]
    """What defines the stream besides the cursor. JSON-able."""


def open_corpus(
    data: DataConfig,
    tokenizer: DocumentEncoder,
    *,
    seq_len: int,
    seed: int,
    tokenizing_share: float = 0.0,
    stop: Callable[[], bool] = lambda: False,
) -> Corpus:
    """The corpus that `data` names; where a reader needs a token cache, that is written first.

    tokenizing_share: of this host's cores, what tokenising during training would take, as far as known. `stop` is asked
    twice a second while an index or a cache is written: WritingStopped where it says yes. Raises ValueError, in one
    line with the fix, for anything that cannot be read or written.
    """
    weights = _weights(source_configs(data))
    deck = Deck(weights, seed)
    sources: dict[str, StreamSource] = {}
    texts: dict[str, Source] = {}
    manifests: dict[str, dict[str, Any]] = {}
    for name in weights:
        config = source_configs(data)[name]
        texts[name] = source = open_source(name, config, data.cache_dir, stop=stop)
        reader = open_reader(source, data, tokenizer, tokenizing_share, stop)
        sources[name] = _stream_source(source, reader, data, config, seed)
        manifests[name] = _manifest(source, reader, config)
        _describe(name, config.paths, manifests[name])
    identity = {
        "seq_len": seq_len,
        "seed": seed,
        "shuffle_block": data.shuffle_block if data.shuffle else 0,
        "packing": data.packing,
        "window_tokens": data.window_tokens,
        "held_out_fraction": data.held_out_fraction,
        "tokenizer": tokenizer.fingerprint[:32],
        "sources": {
            name: f"{rows} of {deck.num_rows} rows, {manifests[name]['digest']}"
            + ", windows end with its epochs" * (data.packing == "best_fit" and source.max_epochs > 0)
            for (name, source), rows in zip(sources.items(), deck.counts.tolist(), strict=True)
        },
    }
    return Corpus(sources, texts, deck, _join(manifests), identity)


def open_rows(
    corpus: Corpus,
    data: DataConfig,
    *,
    eos_id: int,
    num_rows: int,
    first: int = 0,
    last: int | None = None,
    cursor: Mapping[str, Any] | None = None,
    saved_corpus: Mapping[str, Any] | None = None,
    read_ahead: ReadAhead = one_by_one,
) -> RowStream:
    """The stream of a corpus in steps of `num_rows` rows, from its start or from a cursor on.

    With `saved_corpus` (the manifest of the cursor's time) a refusal names the files that changed. Raises ValueError,
    in one line, for the cursor of another stream.
    """
    if cursor is not None:
        _refuse_other_stream(cursor["stream"], corpus, saved_corpus)
    seq_len, seed = corpus.identity["seq_len"], corpus.identity["seed"]
    lanes, num_rows_of = [], window_rows(corpus, data)
    for name, source in corpus.sources.items():
        packing: Packing = Split(seq_len, num_rows_of[name])
        if data.packing == "best_fit":
            packing = BestFit(seq_len, num_rows_of[name], limited=source.max_epochs > 0)
        lanes.append(
            SourceRows(
                source,
                packing,
                Dealing(seed, name, data.shuffle),
                SourceCursor() if cursor is None else SourceCursor.from_dict(cursor["sources"][name]),
                eos_id,
                read_ahead,
                # The next window, or training would wait for the whole of it at once.
                num_ahead=data.num_workers + 1 + num_rows_of[name] * seq_len * 4 // CHUNK_BYTES,
                skip_bad_records=data.on_bad_record == "skip",
                max_bad_records=data.max_bad_records,
            )
        )
    return RowStream(
        lanes,
        corpus.deck,
        row=0 if cursor is None else cursor["row"],
        num_rows=num_rows,
        first=first,
        last=num_rows if last is None else last,
        identity=corpus.identity,
        max_bad_records=data.max_bad_records,
    )


def window_rows(corpus: Corpus, data: DataConfig) -> dict[str, int]:
    """Rows of a window of each source (in "best_fit", about as many): its share of data.window_tokens."""
    shares = corpus.deck.counts / corpus.deck.num_rows
    rows = shares * (data.window_tokens / corpus.identity["seq_len"])
    return dict(zip(corpus.sources, np.maximum(1, np.rint(rows)).astype(int).tolist(), strict=True))


def corpus_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two corpus manifests, in words; empty when they describe the same documents."""
    changes = [f"source {name} removed" for name in old["sources"] if name not in new["sources"]]
    changes += [f"source {name} added" for name in new["sources"] if name not in old["sources"]]
    for name in new["sources"].keys() & old["sources"].keys():
        changes += manifest_changes(old["sources"][name], new["sources"][name])
    return changes


def _weights(configs: Mapping[str, SourceConfig]) -> dict[str, float]:
    """Of the sources that deal, in the order of their names."""
    weights = {name: config.weight for name, config in sorted(configs.items())}
    if left_out := [name for name, weight in weights.items() if not weight]:
        logger.info(f"sources of weight 0, left out: {', '.join(left_out)}")
    return {name: weight for name, weight in weights.items() if weight}


def _stream_source(source: Source, reader: Reader, data: DataConfig, config: SourceConfig, seed: int) -> StreamSource:
    num_documents = reader.numbering.num_documents
    if not num_documents:
        raise ValueError(f"data source {source.name!r}: {list(config.paths)} holds no record")
    order = DocumentOrder(num_documents, seed, data.shuffle_block if data.shuffle else 0)
    held_out = HeldOut(source.name, [file.name for file in source.files], data.held_out_fraction)
    return StreamSource(source.name, reader, order, held_out, config.max_epochs)


def _manifest(source: Source, reader: Reader, config: SourceConfig) -> dict[str, Any]:
    return source.manifest() | {
        "num_documents": reader.numbering.num_documents,
        "num_tokens": reader.num_tokens,
        "weight": config.weight,
        "reader": "cached" if isinstance(reader, CachedReader) else "streamed",
    }


def open_reader(
    source: Source, data: DataConfig, tokenizer: DocumentEncoder, tokenizing_share: float, stop: Callable[[], bool]
) -> Reader:
    """The reader that suits the source; where that is of a token cache, it is written first. As open_corpus."""
    if data.reader == "streamed" and not source.random_access:
        raise ValueError(
            f'data.reader = "streamed": source {source.name!r} has compressed or otherwise sequential files, whose'
            ' documents cannot be read in a shuffled order: use "auto" or "cached"'
        )
    decoding = source.decoding(data.shuffle_block if data.shuffle else 0) if source.random_access else 1.0
    if data.reader != "streamed":
        cached = open_cache(source, tokenizer.fingerprint, data.cache_dir)
        if cached is not None:
            return cached
        why = ""
        if data.reader == "cached":
            why = 'data.reader = "cached"'
        elif not source.random_access:
            why = "its documents have no random access"
        elif tokenizing_share > _MAX_TOKENIZING_SHARE:
            why = f"tokenising while training would take about {tokenizing_share:.0%} of the cores"
        elif decoding > _MAX_DECODING:
            why = f"in shuffle blocks of {data.shuffle_block} documents, row groups are decoded {decoding:.0f} times"
        if why:
            logger.info(f"source {source.name!r}: writing a token cache ({why})")
            num_processes = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
            stops_on_bad = data.on_bad_record == "stop"
            write_cache(source, tokenizer, data.cache_dir, num_processes, stops_on_bad, data.max_bad_records, stop)
            cached = open_cache(source, tokenizer.fingerprint, data.cache_dir)
            assert cached is not None, "the cache is not what was just written"
            return cached
    elif decoding > _MAX_DECODING:
        logger.warning(
            f"source {source.name!r} will be read slowly: in shuffle blocks of data.shuffle_block ="
            f" {data.shuffle_block} documents, row groups are decoded about {decoding:.0f} times; a smaller block or"
            ' data.reader = "auto" mends it'
        )
    return StreamedReader(source, tokenizer.encode_document)


def _describe(name: str, paths: Sequence[str], manifest: Mapping[str, Any]) -> None:
    about = "" if manifest["reader"] == "cached" else "about "
    logger.info(
        f"source {name!r} ({', '.join(map(shown, paths)) or 'standard library of this Python'}):"
        f" {manifest['num_files']:,} files, {manifest['num_documents']:,} documents, {manifest['num_bytes']:,} bytes,"
        f" {about}{manifest['num_tokens']:,} tokens, {manifest['reader']}"
    )


def _join(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    counts = ("num_files", "num_documents", "num_bytes", "num_tokens")
    digests = "".join(f"{name} {manifest['digest']}\n" for name, manifest in manifests.items())
    return {
        "digest": blake2b(digests.encode(), digest_size=16).hexdigest(),
        **{key: sum(manifest[key] for manifest in manifests.values()) for key in counts},
        "sources": manifests,
    }


def _refuse_other_stream(saved: dict[str, Any], corpus: Corpus, saved_corpus: Mapping[str, Any] | None) -> None:
    if "window_tokens" not in saved:
        raise ValueError(
            "cannot resume in another token stream: rows were dealt in another order before (data.window_tokens); start"
            " anew, or take the weights by checkpoint.init_from"
        )
    names = {
        "seq_len": "training.seq_len",
        "seed": "training.seed",
        "shuffle_block": "data.shuffle_block (0: data.shuffle is off)",
        "packing": "data.packing",
        "window_tokens": "data.window_tokens",
        "held_out_fraction": "data.held_out_fraction",
        "tokenizer": "the tokenizer's fingerprint",
    }
    now = corpus.identity
    differences = [f"{names[key]} was {saved[key]} and is {now[key]}" for key in names if saved[key] != now[key]]
    for name in sorted(saved["sources"].keys() | now["sources"].keys()):
        was, is_now = saved["sources"].get(name, "none"), now["sources"].get(name, "none")
        if was != is_now:
            differences.append(f"source {name} was {was} and is {is_now}")
    if saved["sources"] != now["sources"] and saved_corpus:
        differences += corpus_changes(saved_corpus, corpus.manifest)[:10]
    if differences:
        raise ValueError(f"cannot resume in another token stream: {'; '.join(differences)}; restore it or start anew")
