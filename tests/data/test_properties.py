"""The promise of the token stream, on random corpora: whatever reads it, in whatever pieces, the rows are the same."""

import gzip
import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.byte_tokenizer import ByteTokenizer
from titanlite.config.sections import DataConfig, SourceConfig
from titanlite.data import feed, order
from titanlite.data.cache.writer import write_cache
from titanlite.data.loader import Batch, Loader, build_loader
from titanlite.data.source import open_source

EOS = ByteTokenizer.eos_id
STEPS = 6


@pytest.fixture(autouse=True, scope="module")
def _small_portions() -> Any:
    """Tiny corpora are to have many chunks and windows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "CHUNK_BYTES", 100)
        patch.setattr(feed, "_ORDER_DOCUMENTS", 9)
        yield


def write(folder: Path, kind: str, texts: list[str]) -> str:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if kind == "text":
        (folder / "texts").mkdir()
        for k, text in enumerate(texts):
            (folder / "texts" / f"{k:04}.txt").write_bytes(text.encode("utf-8", "replace"))
        return str(folder / "texts/*.txt")
    if kind == "parquet":
        pa.parquet.write_table(pa.table({"text": texts}), folder / "a.parquet", row_group_size=5)
        return str(folder / "a.parquet")
    path = folder / ("a.jsonl.gz" if kind == "gz" else "a.jsonl")
    path.write_bytes(gzip.compress(lines) if kind == "gz" else lines)
    return str(path)


def build(data: DataConfig, shape: tuple[int, int], seed: int, **kwargs: Any) -> Loader:
    return build_loader(data, ByteTokenizer(), seq_len=shape[0], global_batch_size=shape[1], seed=seed, **kwargs)


def take(loader: Loader, number: int) -> list[Batch]:
    try:
        return list(islice(loader, number))
    finally:
        loader.close()


corpora = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    st.tuples(
        st.sampled_from(["text", "jsonl", "gz", "parquet"]),
        st.lists(st.text(st.characters(codec="utf-8"), max_size=9) | st.just("long " * 30), min_size=1, max_size=14),
        st.sampled_from([0.2, 1.0, 3.0]),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=settings().max_examples * 3 // 10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    corpus=corpora,
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 24), st.sampled_from([24, 8, 7, 5, 1])),
    packing=st.sampled_from(["split", "best_fit"]),
    window_tokens=st.sampled_from([1, 40, 100, 300]),
    held_out=st.sampled_from([0.0, 0.0, 0.3]),
    block=st.integers(0, 5),
    lives=st.lists(
        st.tuples(st.integers(1, 8), st.booleans(), st.integers(0, 3), st.integers(0, 2)),
        min_size=STEPS,
        max_size=STEPS,
    ),
)
def test_rows_do_not_depend_on_ranks_readers_threads_and_restarts(
    tmp_path_factory: pytest.TempPathFactory,
    corpus: dict[str, tuple[str, list[str], float]],
    seed: int,
    shape: tuple[int, int],
    packing: str,
    window_tokens: int,
    held_out: float,
    block: int,
    lives: list[tuple[int, bool, int, int]],
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    sources = {}
    for name, (kind, texts, weight) in corpus.items():
        (folder / name).mkdir()
        sources[name] = SourceConfig(paths=(write(folder / name, kind, texts),), weight=weight)
        left = order.HeldOut(name, [f"{k:04}.txt" for k in range(len(texts))], held_out)
        if held_out and kind != "text" and len(texts) < 12:
            held_out = 0.0  # or nothing may be left to train on
        if held_out and left(np.arange(len(texts)), np.zeros(len(texts), np.int64)).all():
            held_out = 0.0
    data = DataConfig(
        sources=sources,
        cache_dir=str(folder / "cache"),
        packing=packing,  # type: ignore[arg-type]
        window_tokens=window_tokens,
        held_out_fraction=held_out,
        shuffle=block > 0,
        shuffle_block=block or 16384,
        num_workers=0,
        prefetch=0,
    )
    for name, source in sources.items():
        if corpus[name][0] == "gz" or any(cached for _, cached, _, _ in lives):
            opened = open_source(name, source, data.cache_dir)
            write_cache(opened, ByteTokenizer(), data.cache_dir, 0, True)
    streamed = replace(data, reader="streamed")
    if any(kind == "gz" for kind, _, _ in corpus.values()):
        streamed = data
    expected = take(build(streamed, shape, seed), STEPS)
    cursor = None
    for step, (dp_degree, cached, workers, prefetch) in enumerate(lives):  # every step is a life of its own
        dp_degree = max(d for d in range(1, dp_degree + 1) if shape[1] % d == 0)
        life = replace(data if cached else streamed, num_workers=workers, prefetch=prefetch)
        if cached:
            life = replace(life, reader="cached")
        ranks = [
            take(build(life, shape, seed, dp_rank=rank, dp_degree=dp_degree, cursor=cursor), 1)[0]
            for rank in range(dp_degree)
        ]
        assert np.concatenate([rank.rows.numpy() for rank in ranks]).tolist() == expected[step].rows.tolist()
        assert sum(rank.fingerprint_part for rank in ranks) % 2**64 == expected[step].fingerprint_part
        for rank in ranks:
            assert (rank.cursor, rank.source_ledgers) == (expected[step].cursor, expected[step].source_ledgers)
        cursor = json.loads(json.dumps(expected[step].cursor))
    for batch in expected:
        for ledger in batch.source_ledgers.values():
            assert ledger["tokens_read"] == sum(ledger[k] for k in ("targets", "document_first", "carried", "dropped"))


@settings(max_examples=settings().max_examples * 3 // 10)
@given(
    texts=st.lists(st.text("abcdé", max_size=20), min_size=1, max_size=20),
    seed=st.integers(0, 2**32),
    seq_len=st.integers(1, 24),
    block=st.integers(0, 6),
    kind=st.sampled_from(["text", "jsonl", "gz", "parquet"]),
    share=st.sampled_from([0.0, 0.3]),
)
def test_every_document_is_read_once_per_epoch(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    seed: int,
    seq_len: int,
    block: int,
    kind: str,
    share: float,
) -> None:
    """The stream is taken apart again at its eos tokens: no other knowledge of the order is used. Windows are of one
    row, so that rows come in natural order."""
    folder = tmp_path_factory.mktemp("corpus")
    data = DataConfig(paths=(write(folder, kind, texts),), cache_dir=str(folder / "cache"), num_workers=0, prefetch=0)
    data = replace(data, shuffle=block > 0, shuffle_block=block or 16384, held_out_fraction=share, window_tokens=1)
    if kind == "gz":
        write_cache(
            open_source("data", SourceConfig(paths=data.paths), data.cache_dir),
            ByteTokenizer(),
            data.cache_dir,
            0,
            True,
        )
    name = (lambda k: f"{k:04}.txt") if kind == "text" else lambda k: {"gz": "a.jsonl.gz"}.get(kind, f"a.{kind}")
    places = [(k, 0) if kind == "text" else (0, k) for k in range(len(texts))]
    out = order.HeldOut("data", [name(k) for k in range(len(texts) if kind == "text" else 1)], share)
    held_out = out(*(np.array(axis) for axis in zip(*places, strict=True))).tolist()
    kept = Counter(text for text, is_out in zip(texts, held_out, strict=True) if not is_out)
    if not kept:
        return
    tokens_per_epoch = sum(len(text.encode()) + 2 for text in kept.elements())
    steps = 3 * tokens_per_epoch // (2 * seq_len) + 1
    batches = take(build(data, (seq_len, 2), seed), steps)
    stream = [token for batch in batches for row in batch.rows.tolist() for token in row[:-1]]
    documents: list[str] = []
    while EOS in stream:
        end = stream.index(EOS)
        assert stream[0] == 257
        documents.append(bytes(stream[1:end]).decode())
        del stream[: end + 1]
    assert len(documents) >= 2 * kept.total()
    for epoch in range(2):
        assert Counter(documents[epoch * kept.total() : (epoch + 1) * kept.total()]) == kept
