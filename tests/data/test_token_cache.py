"""The token cache: the same documents as without it, found by content, verified, and cut so that it can be shared."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.token_caches import cached, everything, read_whole, shard_files, small_shards, source_of, write_jsonl
from titanlite.data import windows
from titanlite.data.cache import reader as cache_reader
from titanlite.data.cache.reader import open_cache
from titanlite.data.cache.shards import plan_shards
from titanlite.data.files import SourceFile
from titanlite.data.source import Numbering, Source, SourceError
from titanlite.data.stream import EncodedDocuments, StreamedReader


class WideTokenizer(ByteTokenizer):
    """Ids that two bytes cannot hold."""

    vocab_size = 70_258

    def __init__(self) -> None:
        super().__init__()
        self.fingerprint = "wide"

    def encode_document(self, text: str) -> np.ndarray:
        return super().encode_document(text) + 70_000


def same(a: EncodedDocuments, b: EncodedDocuments) -> bool:
    arrays = [(a.ids, b.ids), (a.lengths, b.lengths), (a.bytes, b.bytes)]
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in arrays) and [
        (i, type(bad), str(bad), bad.reason) for i, bad in a.bad
    ] == [(i, type(bad), str(bad), bad.reason) for i, bad in b.bad]


BROKEN = [b"", b"{", b"null", b'{"other": 1}', b'{"text": 3}', b"\xff", b'{"text": "a"} {}', b"[" * 5000]
LINES = st.one_of(
    st.text(max_size=80).map(lambda text: json.dumps({"text": text}).encode()),
    st.sampled_from(
        [json.dumps({"text": text}).encode() for text in ("", "\ud800", "a\ud83d\ude42b", "x" * 500, "\0")]
    ),
    st.sampled_from(BROKEN),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data(), files=st.lists(st.lists(LINES, max_size=25), min_size=1, max_size=4))
def test_cached_documents_equal_streamed_ones(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, files: list[list[bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("cached")
    for i, lines in enumerate(files):
        (folder / f"{i}.jsonl").write_bytes(b"\n".join([b'{"text": "a first record that is good"}', *lines]))
    (folder / "z.txt").write_bytes(data.draw(st.sampled_from([b"", b"text\r\n", b"\xef\xbb\xbfBOM", b"\xff"])))
    tokenizer = data.draw(st.sampled_from([ByteTokenizer(), ByteTokenizer(bos=False), WideTokenizer()]))
    with small_shards(data.draw(st.sampled_from([30, 200, 5000])), block=64), pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_SHORT", data.draw(st.sampled_from([0, 20, 10**9])))  # both ways to gather
        patch.setattr(cache_reader, "_MAPPED_SHARDS", data.draw(st.sampled_from([1, 1024])))
        source = source_of(folder, "*.jsonl", "z.txt")
        reader, streamed = cached(source, folder, tokenizer), StreamedReader(source, tokenizer.encode_document)
        num_documents = reader.numbering.num_documents
        assert num_documents == 1 + sum(1 + len(lines) - (lines[-1:] == [b""]) for lines in files)
        documents = np.array(data.draw(st.lists(st.integers(0, num_documents - 1), max_size=60)), np.int64)
        keep = np.array(data.draw(st.lists(st.booleans(), min_size=len(documents), max_size=len(documents))), bool)
        got, expected = read_whole(reader, documents, keep), streamed.read(documents, keep)
        assert got.error is None
        assert same(got, expected)
        assert np.array_equal(reader.lengths(documents)[keep], expected.lengths[keep])
        assert np.array_equal(reader.sizes(documents)[keep], expected.bytes[keep])
        whole = everything(reader)
        assert reader.num_tokens == len(whole.ids)
        assert reader.num_text_bytes == whole.bytes.sum()
        assert reader.num_bad_records == len(whole.bad)


@pytest.mark.parametrize("size", [200, 10**6])  # a shard per file, or one for all
def test_compressed_files_get_their_numbers_from_the_cache(tmp_path: Path, size: int) -> None:
    texts = [f"document {i} " * (i % 9) for i in range(90)]
    for plain, packed, part in (("a.jsonl", "a.jsonl.gz", texts[:50]), ("b.jsonl", "b.jsonl.gz", texts[50:])):
        write_jsonl(tmp_path / plain, part)
        write_jsonl(tmp_path / packed, part)
    (tmp_path / "empty.jsonl").touch()
    with small_shards(size):
        plain = cached(source_of(tmp_path, "a.jsonl", "empty.jsonl", "b.jsonl"), tmp_path)
        packed = cached(source_of(tmp_path, "a.jsonl.gz", "empty.jsonl", "b.jsonl.gz"), tmp_path)
        assert same(everything(plain), everything(packed))
    assert [packed.numbering.first(file) for file in range(4)] == [0, 50, 50, 90]
    assert packed.locate(51).endswith("b.jsonl.gz:2")


def test_tokens_take_two_bytes_where_the_vocabulary_allows_it(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["x" * 10_000])
    source = source_of(tmp_path, "a.jsonl")
    sizes = []
    for tokenizer in (ByteTokenizer(), WideTokenizer()):
        cached(source, tmp_path, tokenizer)
        sizes.append(shard_files(tmp_path)[0].stat().st_size)
        shutil.rmtree(tmp_path / "cache")
        source = source_of(tmp_path, "a.jsonl")
    assert 20_000 < sizes[0] < 20_300
    assert 40_000 < sizes[1] < 40_300


@pytest.fixture
def five_shards(tmp_path: Path) -> Iterator[tuple[Path, Source]]:
    write_jsonl(tmp_path / "a.jsonl", [chr(97 + i % 26) * 40 for i in range(100)])
    with small_shards(1100, block=64):
        source = source_of(tmp_path, "a.jsonl")
        cached(source, tmp_path)
        assert len(shard_files(tmp_path)) == 5
        yield tmp_path, source


@pytest.mark.parametrize("place", ["empty", "cut", "longer", "header", "table", "counts", "last byte", "other key"])
def test_damage_is_seen_at_opening_and_mended(
    five_shards: tuple[Path, Source], place: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, source = five_shards
    first, second = shard_files(folder)[:2]
    good = first.read_bytes()
    flip = {"header": 60, "table": 128 + 42 * 2 * 20 + 100, "counts": -4 * 27 - 6, "last byte": -1}.get(place, 0)
    flipped = bytearray(good)
    flipped[flip] ^= 4
    bad = {"empty": b"", "cut": good[:-1], "longer": good + b"\0", "other key": second.read_bytes()}
    first.write_bytes(bad.get(place, bytes(flipped)))
    assert open_cache(source, ByteTokenizer().fingerprint, str(folder / "cache")) is None
    assert "is damaged" in caplog.text
    cached(source, folder)
    assert first.read_bytes() == good


def test_damaged_tokens_end_the_reading_where_they_are_needed(five_shards: tuple[Path, Source]) -> None:
    folder, source = five_shards
    reader, expected = cached(source, folder), everything(cached(source, folder))
    path = folder / "cache" / plan_shards(source, ByteTokenizer().fingerprint)[1].name
    content = bytearray(path.read_bytes())
    content[128 + 5 * 84 + 1] ^= 1  # a token of the shard's sixth document, the corpus's 26th: 84 bytes each
    path.write_bytes(content)
    reader = cached(source, folder)  # opening does not see it, and nobody writes it again
    touched = {25, 24, 26} & {20 + i for i in range(20) if i * 84 // 64 <= 421 // 64 <= (i * 84 + 83) // 64}
    keep = np.ones(100, bool)
    keep[list(touched)] = False
    assert read_whole(reader, np.arange(100), keep).error is None  # blocks that nobody needs do not matter
    for order in (np.arange(100), np.arange(100)[::-1], np.array([60, 3, 25, 4])):
        got = read_whole(reader, order, np.ones(len(order), bool))
        end = min(i for i, document in enumerate(order) if document in touched)
        assert isinstance(got.error, SourceError)
        assert str(got.error).startswith(f"{folder}/a.jsonl:{order[end] + 1}: {path}: this shard")
        assert "delete it" in str(got.error)
        before = read_whole(reader, order[:end], np.ones(end, bool))
        assert np.array_equal(before.ids, expected.ids.reshape(100, 42)[order[:end]].ravel())


def test_a_shard_that_vanishes_ends_the_reading(
    five_shards: tuple[Path, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, source = five_shards
    monkeypatch.setattr(cache_reader, "_MAPPED_SHARDS", 1)
    reader = cached(source, folder)
    portions = plan_shards(source, ByteTokenizer().fingerprint)
    for gone in (2, 4):
        (folder / "cache" / portions[gone].name).unlink()
    got = everything(reader)
    assert len(got.lengths) == 40
    assert len(got.ids) == 40 * 42
    assert isinstance(got.error, SourceError)
    assert portions[2].name in str(got.error)
    with pytest.raises(SourceError, match="gone"):
        reader.lengths(np.array([50]))


@pytest.mark.parametrize("damage", ["flip", "flip in the table", "cut off", "emptied", "grown", "gone"])
def test_a_shard_that_was_read_and_is_damaged_later_ends_the_reading(
    five_shards: tuple[Path, Source], damage: str
) -> None:
    """Also without the signal that ends a process which reads a map behind the end of its file."""
    folder, source = five_shards
    reader, expected = cached(source, folder), everything(cached(source, folder))
    assert everything(reader).error is None  # mapped, and every block verified
    path = folder / "cache" / plan_shards(source, ByteTokenizer().fingerprint)[2].name
    content = bytearray(path.read_bytes())
    content[{"flip": 140, "flip in the table": -200}.get(damage, 0)] ^= 1
    if "flip" in damage:
        with path.open("r+b") as file:  # in place
            file.write(content)
    elif damage == "gone":
        path.unlink()
    else:
        os.truncate(path, {"cut off": 200, "emptied": 0, "grown": 9000}[damage])
    got = everything(reader)
    assert isinstance(got.error, SourceError)
    assert str(got.error).startswith(f"{folder}/a.jsonl:41: {path}: this shard")
    if damage != "flip":  # lengths lie elsewhere in the file
        assert len(got.lengths) == 40
        assert np.array_equal(got.ids, expected.ids[: 40 * 42])


def test_a_shard_that_another_job_wrote_again_is_read_on(five_shards: tuple[Path, Source]) -> None:
    folder, source = five_shards
    reader, expected = cached(source, folder), everything(cached(source, folder))
    for path in shard_files(folder):
        shutil.copy(path, folder / "copy")
        (folder / "copy").replace(path)
    got = everything(reader)
    assert got.error is None
    assert np.array_equal(got.ids, expected.ids)


def test_a_cache_is_found_by_content(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    cached(source_of(tmp_path, "a.jsonl"), tmp_path)

    def found(source: Source, fingerprint: str = ByteTokenizer().fingerprint) -> bool:
        return open_cache(source, fingerprint, str(tmp_path / "cache")) is not None

    os.utime(tmp_path / "a.jsonl", (1, 1))
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "copy.jsonl")
    assert found(source_of(tmp_path, "a.jsonl"))
    assert found(source_of(tmp_path, "copy.jsonl"))
    assert not found(source_of(tmp_path, "a.jsonl"), "another tokenizer")
    (tmp_path / "copy.jsonl").write_text('{"text": "one", "more": "two"}\n')
    assert not found(source_of(tmp_path, "copy.jsonl"))
    cached(source_of(tmp_path, "copy.jsonl"), tmp_path)
    assert not found(source_of(tmp_path, "copy.jsonl", text_field="more"))


def test_a_read_only_folder_with_a_complete_cache_is_enough(
    five_shards: tuple[Path, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, source = five_shards

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    for function in ("makedirs", "replace", "unlink", "mkdir"):  # chmod would not stop root
        monkeypatch.setattr(os, function, refuse)
    assert everything(cached(source, folder)).error is None


def plan(*files: tuple[int, int]) -> list[tuple[range, range | None]]:
    """Of files of (size, documents)."""
    source = Source.__new__(Source)
    source.files = [SourceFile(f"/{i}", f"{i}", "jsonl", size, f"{size}") for i, (size, _) in enumerate(files)]
    source.text_field = "text"
    source.numbering = Numbering(np.array([count for _, count in files], np.int64))
    return [(portion.files, portion.documents) for portion in plan_shards(source, "tokenizer")]


MIB = 1 << 20


@pytest.mark.parametrize(
    ("files", "num_shards"),
    [
        ([(1, 1)], 1),
        ([(0, 0), (5, 1), (0, 0)], 1),
        ([(0, 0)], 0),
        ([(10**9, 10**6)], 60),
        ([(10**9, 1)], 1),  # a document is never cut
        ([(10**12, 10**9)], 14_902),
        ([(10**9, 10**9)], 954),  # empty documents: a million at most
        ([(17 * MIB, 100)], 2),
        ([(MIB, 10)] * 100, 7),
        ([(MIB, 10), (10**9, 10**6), (MIB, 10)], 62),
    ],
)
def test_plan_holds_every_document_once_in_bounded_shards(files: list[tuple[int, int]], num_shards: int) -> None:
    planned = plan(*files)
    assert len(planned) == num_shards
    ends = [0]
    for _, documents in planned:
        assert documents is not None
        assert documents.start == ends[-1]
        assert 0 < len(documents) <= 1.1 * MIB
        ends.append(documents.stop)
    assert ends[-1] == sum(count for _, count in files)


def test_shards_of_a_large_file_stay_whatever_stands_beside_it(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "large.jsonl", ["x" * 40] * 100)
    for name in ("a", "b", "c", "z"):
        write_jsonl(tmp_path / f"{name}.jsonl", [name] * 3)
    with small_shards(1100):
        alone = {portion.name for portion in plan_shards(source_of(tmp_path, "large.jsonl"), "")}
        among = {
            portion.name for portion in plan_shards(source_of(tmp_path, "[abc].jsonl", "large.jsonl", "z.jsonl"), "")
        }
    assert len(alone) == 5
    assert alone < among
    assert len(among) == 7


def test_opening_needs_no_memory_per_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ""}\n' * 30_000)
    source = source_of(tmp_path, "a.jsonl")
    cached(source, tmp_path)
    tracemalloc.start()
    try:
        reader = cached(source, tmp_path)
        got = read_whole(reader, np.arange(20_000, 20_100), np.ones(100, bool))
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()
    assert got.ids.tolist() == [257, 256] * 100


OPEN_MANY = """
import resource, sys
from pathlib import Path
import numpy as np
resource.setrlimit(resource.RLIMIT_NOFILE, (60, int(sys.argv[2])))
from tests.support.token_caches import cached, small_shards, source_of, write_jsonl
from titanlite.data.files import max_open_files

folder = Path(sys.argv[1])
for i in range(100):
    write_jsonl(folder / f"{i}.jsonl", [f"document {i} {k}" for k in range(4)])
sources = [source_of(folder, "*.jsonl") for _ in range(2)]
with small_shards(50):
    readers = [cached(source, folder) for source in sources]
assert readers[0].num_shards >= 200
for document in range(400):
    for source, reader in zip(sources, readers):
        source.read(document)
        read = reader.read(np.array([document]), np.array([True]))
        assert read.error is None, read.error
print(max_open_files())
"""


@pytest.mark.parametrize("limit", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_few_files_are_open_at_once_whatever_the_number_of_files_and_shards(tmp_path: Path, limit: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", OPEN_MANY, str(tmp_path), str(limit)], capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout.split()) == (0, [str(limit)]), ended.stderr
