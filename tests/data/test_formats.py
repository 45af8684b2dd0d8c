"""Formats: the same documents from every kind of file, and an error that names it for a file that is damaged."""

import gzip
import io
import itertools
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_source import HOSTILE
from tests.support.loaders import batches, build
from titanlite.config.sections import DataConfig, SourceConfig
from titanlite.data import parquet
from titanlite.data import source as source_module
from titanlite.data.files import find_files
from titanlite.data.order import DocumentOrder
from titanlite.data.source import RecordError, Source, SourceError, open_source

try:
    from compression import zstd  # type: ignore[import-not-found]
except ImportError:
    from backports import zstd

SKIPPABLE = b"\x5a\x2a\x4d\x18\x03\x00\x00\x00any"  # a frame that holds no data
CHECKSUM = {zstd.CompressionParameter.checksum_flag: 1}
PACK: dict[str, Callable[[bytes], bytes]] = {
    "jsonl": lambda content: content,
    "jsonl.gz": lambda content: gzip.compress(content, mtime=0),
    "jsonl.zst": lambda content: zstd.compress(content, options=CHECKSUM),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def opened(*paths: str, **kwargs: Any) -> Source:
    return open_source("data", SourceConfig(paths=paths, **kwargs), "cache")


def records(source: Source) -> list[str | RecordError]:
    return [text for file in range(len(source.files)) for text in source.records(file)]


def by_number(source: Source) -> list[str]:
    assert source.numbering is not None
    return [source.read(document) for document in range(source.numbering.num_documents)]


def outcome(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except (ValueError, SourceError) as error:
        return error


def jsonl(texts: list[str], text_field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, text_field: text}).encode() + b"\n" for i, text in enumerate(texts))


def write_parquet(path: str, texts: Any, **kwargs: Any) -> None:
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, **kwargs)


def in_pieces(content: bytes, pack: Callable[[bytes], bytes], num_pieces: int) -> bytes:
    cuts = sorted(random.Random(num_pieces).choices(range(len(content) + 1), k=num_pieces - 1))
    return b"".join(pack(content[a:b]) for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True))


@settings(max_examples=40)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=20),
    num_pieces=st.integers(1, 4),
    group=st.integers(1, 25),
)
def test_every_format_gives_the_same_documents(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], num_pieces: int, group: int
) -> None:
    content = jsonl(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("formats"))
        for kind, pack in PACK.items():
            Path(f"a.{kind}").write_bytes(in_pieces(content, pack, num_pieces) if kind != "jsonl" else content)
        write_parquet("a.parquet", texts, row_group_size=group)
        for i, text in enumerate(texts):
            Path(f"{i:02}.txt").write_bytes(text.removeprefix("\ufeff").encode())
        for path in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
            source = opened(path)
            assert records(source) == texts
            assert source.random_access == (path in ("a.jsonl", "a.parquet"))
            if source.random_access:
                assert by_number(source) == texts
            else:
                assert source.numbering is None
                assert source.manifest()["num_documents"] is None
        assert records(opened("*.txt")) == [text.removeprefix("\ufeff") for text in texts]
        mixed = opened("a.parquet", "00.txt", "a.jsonl")
        assert by_number(mixed) == [*texts, texts[0].removeprefix("\ufeff"), *texts]


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_line_in_compressed_data_is_the_record_error_of_plain_jsonl(kind: str, name: str) -> None:
    content = b'{"text": "good"}\n' + HOSTILE[name][0] + b'\n{"text": "good"}'
    Path("a.jsonl").write_bytes(content)
    Path(f"b.{kind}").write_bytes(PACK[kind](content))
    with pytest.raises(RecordError) as expected:
        opened("a.jsonl").read(1)
    good, bad, last = records(opened(f"b.{kind}"))
    assert good == last == "good"
    assert isinstance(bad, RecordError)
    assert (bad.reason, str(bad)) == (expected.value.reason, f"b.{kind}:2: {expected.value.reason}")


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("num_pieces", [1, 3])
def test_compressed_file_that_is_cut_off_anywhere_is_an_error(kind: str, num_pieces: int) -> None:
    pack, texts = PACK[kind], ["one", "two", "three", "four"]
    pieces = [pack(jsonl(texts)[i::num_pieces]) for i in range(num_pieces)]
    whole, ends = b"".join(pieces), {sum(map(len, pieces[:i])) for i in range(1, num_pieces)}
    for length in set(range(len(whole))) - ends:  # what ends with a member is a whole file
        Path(f"a.{kind}").write_bytes(whole[:length])
        with pytest.raises(
            (ValueError, SourceError), match=rf"a\.{kind}(:\d)?[ :].*(cut off|corrupt|empty|no (gzip|zstd))"
        ) as caught:
            records(opened(f"a.{kind}"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_flipped_bit_in_compressed_data_is_never_another_text(kind: str) -> None:
    texts = ["one", "two", "three", "four " * 10]
    whole = PACK[kind](jsonl(texts))
    errors = 0
    for i in range(len(whole)):
        for flip in (1, 16, 128):
            Path(f"a.{kind}").write_bytes(whole[:i] + bytes([whole[i] ^ flip]) + whole[i + 1 :])
            found = outcome(lambda: records(opened(f"a.{kind}")))
            if isinstance(found, Exception):
                assert f"a.{kind}" in str(found)
                errors += 1
            else:
                assert found == texts  # the flip was in a time stamp, say
    assert errors > 2 * len(whole)


def test_compressed_data_with_anything_behind_them_are_refused_and_harmless_frames_read() -> None:
    good = jsonl(["one"])
    for name, content, problem in (
        ("a.jsonl.gz", PACK["jsonl.gz"](good) + b"junk", "corrupt .Not a gzipped file"),
        ("a.jsonl.zst", PACK["jsonl.zst"](good) + b"junk", "corrupt .Unable to decompress"),
    ):
        Path(name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"^data\.paths: {name}: the compressed data are {problem}"):
            records(opened(name))
    long_range = io.BytesIO()
    with zstd.ZstdFile(long_range, "w", options={zstd.CompressionParameter.window_log: 30}) as file:
        file.write(good)
    Path("a.jsonl.zst").write_bytes(SKIPPABLE + PACK["jsonl.zst"](good) + SKIPPABLE + long_range.getvalue())
    assert records(opened("a.jsonl.zst")) == ["one", "one"]


@pytest.mark.parametrize("kind", PACK)
def test_first_record_of_each_file_is_asked_for_the_text_field(kind: str) -> None:
    Path(f"a.{kind}").write_bytes(PACK[kind](jsonl(["a"])))
    Path(f"b.{kind}").write_bytes(PACK[kind](jsonl(["b"], "body")))
    with pytest.raises(
        ValueError, match=rf"^data\.text_field = 'text': no such field in b\.{kind}:1, .* 'id', 'body'$"
    ):
        opened(f"*.{kind}")
    Path(f"b.{kind}").write_bytes(PACK[kind](b"broken\n" + jsonl(["b"], "body")))  # what data.on_bad_record is about
    assert [str(text) for text in records(opened(f"b.{kind}"))][1] == f"b.{kind}:2: no field 'text'"
    Path(f"b.{kind}").write_bytes(PACK[kind](b""))
    assert records(opened(f"*.{kind}")) == ["a"]


@pytest.mark.parametrize("kind", [*PACK, "parquet"])
def test_file_that_goes_before_it_is_opened_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_kind(kind, ["a"])
    files = find_files(SourceConfig(paths=(path,)))
    os.unlink(path)
    monkeypatch.setattr(source_module, "find_files", lambda *args: files)
    with pytest.raises(ValueError, match=rf"^data\.paths: {path}: No such file or directory$"):
        opened(path)


@pytest.mark.parametrize("kind", PACK)
def test_records_are_read_in_the_memory_of_a_few(kind: str) -> None:
    line = jsonl(["x" * 100_000])
    Path(f"a.{kind}").write_bytes(PACK[kind](line * 200))
    source = opened(f"a.{kind}")
    assert sum(isinstance(text, str) for text in source.records(0)) == 200  # imports, caches
    tracemalloc.start()
    try:
        assert sum(len(text) for text in source.records(0) if isinstance(text, str)) == 200 * 100_000
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


LARGE = """
import sys
from titanlite.config.sections import SourceConfig
from titanlite.data.source import open_source

def peak():  # in KiB; ru_maxrss would be that of the process that started this one
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

source = open_source("data", SourceConfig(paths=(sys.argv[1],)), "cache")
before = peak()
assert sum(len(text) for text in source.records(0)) == int(sys.argv[2])
assert not source.random_access or sum(len(source.read(d)) for d in range(3)) == int(sys.argv[2])
print((peak() - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("kind", [*PACK, "parquet"])
def test_line_of_200_mb_needs_the_memory_of_a_few(kind: str) -> None:
    number = 200_000_000
    texts = ["a", "word " * (number // 5), "b"]
    if kind == "parquet":
        write_parquet("a.parquet", texts)
    else:
        Path(f"a.{kind}").write_bytes(PACK[kind](jsonl(texts)))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", LARGE, f"a.{kind}", str(number + 2)]
    output = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    print(f"{kind}: {output.strip()} MiB for a line of {number:,} bytes")
    assert int(output) < (1100 if kind == "parquet" else 700)  # pyarrow alone takes five times the line


def test_million_white_characters_are_a_text_or_a_blank_line() -> None:
    white = " \t" * 500_000
    content = jsonl([white]) + white.encode() + b"\n" + white.encode() + jsonl(["end"]) + b'{"text":' + white.encode()
    for kind, pack in PACK.items():
        Path(f"a.{kind}").write_bytes(pack(content))
        first, blank, end, cut = records(opened(f"a.{kind}"))
        assert (first, end) == (white, "end")
        assert isinstance(blank, RecordError)
        assert isinstance(cut, RecordError)
        assert (blank.reason, cut.reason) == ("a blank line", "bad JSON: Expecting value at character 1000008")


# ----------------------------------------------------------------------------------------------------------- parquet


TYPES: dict[str, pa.DataType] = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "dictionary of large_string": pa.dictionary(pa.int32(), pa.large_string()),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize("use_dictionary", [False, True])
def test_parquet_of_any_text_type_equals_what_pyarrow_reads(kind: str, compression: str, use_dictionary: bool) -> None:
    texts = ["é", "", "x" * 5000, *(str(i % 7) for i in range(500)), "\0\ufeff"]
    column = pa.array(texts, TYPES[kind] if "dictionary" not in kind else TYPES[kind].value_type)
    column = column.dictionary_encode() if "dictionary" in kind else column
    write_parquet("a.parquet", column, compression=compression, use_dictionary=use_dictionary, row_group_size=99)
    source = opened("a.parquet")
    assert by_number(source) == records(source) == pq.read_table("a.parquet")["text"].to_pylist() == texts
    sizes = source.sizes(np.arange(len(texts)))
    assert sizes.shape == (len(texts),)
    assert (sizes[:99] == sizes[0]).all()
    assert source.locate(0, 7) == "a.parquet: row 7"


def test_null_and_invalid_utf8_in_parquet_are_record_errors() -> None:
    raw = pa.array([b"good", b"ab\xff", None, b"end"])
    write_parquet("a.parquet", pa.Array.from_buffers(pa.string(), 4, raw.buffers()))
    source = opened("a.parquet")
    found = records(source)
    assert (found[0], found[3]) == ("good", "end")
    for row, problem in (
        (1, "not UTF-8: invalid start byte at byte 2 of the document"),
        (2, "the column 'text' is null"),
    ):
        assert str(found[row]) == f"a.parquet: row {row}: {problem}"
        with pytest.raises(RecordError) as caught:
            source.read(row)
        assert caught.value.reason == problem


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        (
            {"body": ["a"], "id": [1]},
            r"no such column in a\.parquet, whose columns are 'body' \(string\), 'id' \(int64\)",
        ),
        ({"text": [1]}, r"not one column of strings but int64 in a\.parquet, whose columns are 'text' \(int64\)"),
        ({"text": [b"a"]}, r"not one column of strings but binary in"),
        ({"text": [["a"]]}, r"not one column of strings but list<"),
        ({"text": [{"text": "a"}]}, r"not one column of strings but struct<"),
        ({"text": pa.nulls(2)}, r"not one column of strings but null"),
    ],
)
def test_column_that_is_missing_or_no_text_is_named_at_the_start(columns: dict[str, Any], problem: str) -> None:
    pq.write_table(pa.table(columns), "a.parquet")
    with pytest.raises(ValueError, match=rf"^data\.text_field = 'text': {problem}") as caught:
        opened("a.parquet")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^data\.sources\.web\.text_field = 'text': "):
        open_source("web", SourceConfig(paths=("a.parquet",)), "cache")


def test_column_is_found_among_nested_and_doubled_ones() -> None:
    nested = {"a": [{"text": 1, "b": [1, 2]}], "text.b": ["dotted"], "text": ["plain"], "z": [{"text": "no"}]}
    pq.write_table(pa.table(nested), "a.parquet")
    assert by_number(opened("a.parquet")) == ["plain"]
    assert by_number(opened("a.parquet", text_field="text.b")) == ["dotted"]
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), "b.parquet")
    with pytest.raises(ValueError, match="not one column of strings but string, string"):
        opened("b.parquet")


def test_parquet_without_rows_or_groups_is_empty() -> None:
    write_parquet("a.parquet", pa.array([], pa.string()))
    with pytest.raises(ValueError, match="the corpus is empty"):
        opened("a.parquet")
    write_parquet("b.parquet", ["b"])
    assert by_number(opened("*.parquet")) == records(opened("*.parquet")) == ["b"]


def test_parquet_that_is_cut_off_is_an_error_at_the_start() -> None:
    write_parquet("whole", ["one", "two"] * 50, row_group_size=30)
    whole = Path("whole").read_bytes()
    for length in [*range(64), *range(64, len(whole), 7), len(whole) - 1]:
        Path("a.parquet").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"^data\.paths: a\.parquet.*(damaged|no parquet data|empty)") as caught:
            opened("a.parquet")
        assert "\n" not in str(caught.value)


def test_damaged_row_group_is_a_source_error_that_names_it() -> None:
    texts = [f"text {i}" for i in range(40)]
    write_parquet(
        "a.parquet", texts, row_group_size=10, write_page_checksum=True, use_dictionary=False, compression="none"
    )
    content = bytearray(Path("a.parquet").read_bytes())
    content[content.index(b"text 25") + 3] ^= 1
    Path("a.parquet").write_bytes(content)
    source = opened("a.parquet")
    assert [source.read(i) for i in (0, 19, 30)] == ["text 0", "text 19", "text 30"]
    with pytest.raises(SourceError, match=r"^a\.parquet: row 22: row group 2 is damaged: .*CRC") as caught:
        source.read(22)
    assert "\n" not in str(caught.value)
    stream = source.records(0)
    assert [next(stream) for _ in range(20)] == texts[:20]
    with pytest.raises(SourceError, match=r"^a\.parquet: row 20: row group 2 is damaged: .*CRC"):
        next(stream)


def test_number_of_rows_that_is_damaged_is_never_a_shorter_file() -> None:
    texts = [str(i) for i in range(1500)]
    write_parquet("whole", texts, row_group_size=1000)
    whole = Path("whole").read_bytes()
    places = [i for i in range(len(whole) - 1) if whole[i : i + 2] in (b"\xd0\x0f", b"\xb8\x17")]  # 1000 and 1500
    assert len(places) >= 4  # of the file, of the group, of the values of two columns
    for changed_places in itertools.combinations_with_replacement(places, 2):  # all of them would be another file
        content = bytearray(whole)
        for place in set(changed_places):
            content[place] -= 2  # one row less
        Path("a.parquet").write_bytes(content)
        found = outcome(lambda: records(opened("a.parquet")))
        assert isinstance(found, OSError | ValueError) or found == texts
        assert "a.parquet" in str(found) or found == texts


def test_large_row_group_takes_random_access_away(monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(
        "a.parquet",
        ["x" * 1000] * 10,
        use_dictionary=False,
        compression="none",
        row_group_size=5,
        write_statistics=False,
    )
    write_parquet("b.parquet", ["y"])
    monkeypatch.setattr(parquet, "_RANDOM_ACCESS_BYTES", 5500)
    assert opened("*.parquet").random_access
    monkeypatch.setattr(parquet, "_RANDOM_ACCESS_BYTES", 4999)
    source = opened("*.parquet")
    assert (source.random_access, source.numbering) == (False, None)
    assert records(source) == ["x" * 1000] * 10 + ["y"]


def test_decoded_row_groups_are_few_and_shared_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{i:05}" * 200 for i in range(2000)]  # 20 row groups
    write_parquet("a.parquet", texts, row_group_size=100, use_dictionary=False)
    decoded: list[int] = []
    held: list[int] = []
    decode, keep = parquet.Parquet._decode, parquet.RowGroups._keep

    def counted(self: parquet.Parquet, group: int) -> Any:
        decoded.append(group)
        time.sleep(0.001)  # so that threads overlap
        return decode(self, group)

    def watched(self: parquet.RowGroups, key: tuple[str, int], column: Any) -> None:
        keep(self, key, column)
        with self._lock:
            held.append(sum(kept.nbytes for kept in self._kept.values()))
            assert held[-1] == self._bytes

    monkeypatch.setattr(parquet.Parquet, "_decode", counted)
    monkeypatch.setattr(parquet.RowGroups, "_keep", watched)
    monkeypatch.setattr(parquet, "_KEPT_BYTES", 500_000)  # four groups
    source = opened("a.parquet")
    wrong: list[int] = []

    def read(seed: int) -> None:
        order = random.Random(seed).sample(range(400), 400)
        wrong.extend(i for block in range(0, 2000, 400) for i in order if source.read(block + i) != texts[block + i])

    read(0)
    assert (wrong, decoded) == ([], sorted(decoded, key=lambda group: group // 4))
    assert len(decoded) == 20  # once each, where a block of documents fits
    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert max(held) <= 500_000
    decoded.clear()
    for group in (0, 1, 2, 3, 0, 4, 0, 2, 5, 0):  # the one that was not used for longest goes first
        source.read(100 * group)
    assert decoded[-6:] == [0, 1, 2, 3, 4, 5]
    decoded.clear()
    together = threading.Barrier(8)

    def read_one() -> None:
        together.wait()
        source.read(1900)

    threads = [threading.Thread(target=read_one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert decoded == [19]
    monkeypatch.setattr(parquet, "_KEPT_BYTES", 0)
    decoded.clear()
    assert by_number(opened("a.parquet")) == texts
    assert decoded == list(range(20))  # a group alone is kept whatever its size


@pytest.mark.parametrize("block", [0, 1, 5, 20, 100, 400, 5000])
def test_how_often_row_groups_are_decoded_is_known_before_they_are(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{i:04}" * 250 for i in range(2000)]
    for i, name in enumerate(("a", "c")):  # 100 row groups of 10 KB each, a jsonl file between them
        part = texts[1000 * i : 1000 * (i + 1)]
        write_parquet(f"{name}.parquet", part, row_group_size=10, use_dictionary=False, compression="none")
    Path("b.jsonl").write_bytes(jsonl(["x"] * 100))
    monkeypatch.setattr(parquet, "_KEPT_BYTES", 45_000)  # four groups
    source = opened("*")
    decode, decoded = parquet.Parquet._decode, []
    monkeypatch.setattr(parquet.Parquet, "_decode", lambda *args: decoded.append(args[1]) or decode(*args))
    assert source.numbering is not None
    order = DocumentOrder(source.numbering.num_documents, 0, block)
    for document in order.documents(np.arange(source.numbering.num_documents)).tolist():
        source.read(document)
    assert source.decoding(block) == pytest.approx(len(decoded) / 200, rel=0.2)


@pytest.mark.parametrize("reader", ["auto", "streamed"])
def test_row_groups_that_would_be_decoded_often_are_tokenised_ahead_or_warned_of(
    reader: Literal["auto", "streamed"], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_parquet("a.parquet", [f"{i:04}" * 250 for i in range(1000)], row_group_size=10, use_dictionary=False)
    monkeypatch.setattr(parquet, "_KEPT_BYTES", 45_000)
    caplog.set_level(logging.INFO, logger="titanlite")
    data = DataConfig(paths=("a.parquet",), cache_dir="cache", reader=reader, shuffle_block=400)
    batches(replace(data, shuffle=False), 1)  # in their order: once each
    assert "row groups are decoded" not in caplog.text
    made = build(data)
    manifest = made.corpus["sources"]["data"]
    made.close()
    if reader == "auto":
        assert manifest["reader"] == "cached"
        assert "token cache (in shuffle blocks of 400 documents, row groups are decoded 9 times)" in caplog.text
    else:
        assert manifest["reader"] == "streamed"
        assert "will be read slowly: in shuffle blocks of data.shuffle_block = 400 documents, row groups" in caplog.text


def test_text_that_repeats_is_decoded_once() -> None:
    # 1 MB stored, 2 GB when spelled out
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * 1_000_000]))
    pq.write_table(pa.table({"text": column}).replace_schema_metadata(None), "a.parquet", store_schema=False)
    # In a process of its own, whose peak is not that of an earlier test.
    done = subprocess.run([sys.executable, "-c", READ_WHAT_REPEATS], capture_output=True, text=True, check=True)
    kept, peak = map(int, done.stdout.split())
    assert kept < 20_000_000
    assert 1_000_000 < peak < 500_000_000


READ_WHAT_REPEATS = """
import pyarrow as pa
from titanlite.config.sections import SourceConfig
from titanlite.data.source import open_source

source = open_source("data", SourceConfig(paths=("a.parquet",)), "cache")
assert len(source.read(1999)) == 1_000_000
stream = source.records(0)
assert all(isinstance(text, str) and len(text) == 1_000_000 for text in (next(stream) for _ in range(50)))
print(pa.total_allocated_bytes(), pa.default_memory_pool().max_memory())
"""


def test_missing_extra_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet("a.parquet", ["a"])
    Path("a.jsonl.zst").write_bytes(PACK["jsonl.zst"](jsonl(["a"])))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ValueError, match=r"^data\.paths: a\.parquet needs pyarrow .*: pip install 'titanlite\[parquet\]'$"
    ):
        opened("a.parquet")
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    with pytest.raises(
        ValueError, match=r"^data\.paths: a\.jsonl\.zst needs backports\.zstd .*: pip install 'backports"
    ):
        opened("a.jsonl.zst")


# ------------------------------------------------------------------------------------------ files that do not stay


KINDS = [*PACK, "parquet", "txt"]


def write_kind(kind: str, texts: list[str]) -> str:
    if kind == "parquet":
        write_parquet("a.parquet", texts, row_group_size=100, use_dictionary=False)
    else:
        Path(f"a.{kind}").write_bytes(PACK[kind](jsonl(texts)) if kind in PACK else "".join(texts).encode())
    return f"a.{kind}"


def noise(seed: int, number: int) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices("abcdefgh", k=200)) for _ in range(number)]


def changed(path: str, change: str) -> None:
    content = Path(path).read_bytes()
    if change == "gone":
        os.unlink(path)
    elif change == "replaced":
        Path("new").write_bytes(content[::-1])
        os.replace("new", path)
    elif change == "shorter":
        os.truncate(path, len(content) // 2)
    elif change == "longer":
        Path(path).write_bytes(content + content)
    else:
        with open(path, "r+b") as file:  # the same size and name
            file.write(content[1000:] + content[:1000])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["gone", "replaced", "shorter", "longer", "overwritten"])
def test_file_that_does_not_stay_what_it_was_is_an_error_when_it_is_read(kind: str, change: str) -> None:
    path = write_kind(kind, noise(1, 1000))
    source = opened(path)
    if source.random_access:
        source.read(0)
    changed(path, change)
    with pytest.raises(SourceError, match=rf"^a\.{kind}[: ].*(No such file|has changed)"):
        records(source)
    if source.random_access:  # also where the file is open, and only its name went
        for document in (0, 0 if kind == "txt" else 999):
            with pytest.raises(SourceError, match=rf"^a\.{kind}[: ].*(No such file|has changed)"):
                source.read(document)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["gone", "replaced", "shorter", "longer", "overwritten"])
def test_file_that_changes_while_it_is_read_in_order_is_never_silently_another(kind: str, change: str) -> None:
    texts = noise(2, 4000)
    path = write_kind(kind, texts)
    texts = ["".join(texts)] if kind == "txt" else texts
    stream = opened(path).records(0)
    read = [next(stream)]
    changed(path, change)
    found = outcome(lambda: [read.append(text) for text in stream])
    if change != "overwritten":
        assert read == texts[: len(read)]
    else:
        assert read[:-1] == texts[: len(read) - 1]  # the one whose bytes were fetched last may be of both
    if kind == "txt":  # all of it was read at once
        assert len(read) == len(texts)
    else:
        assert isinstance(found, SourceError)
        assert ("No such file" if change == "gone" else "has changed") in str(found)


def test_file_that_is_cut_where_reading_stands_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_kind("jsonl", ["a", "b"])
    length = os.path.getsize(path) // 2
    monkeypatch.setattr("titanlite.data.formats._READ_BYTES", length)
    stream = opened(path).records(0)
    assert next(stream) == "a"
    os.truncate(path, length)
    with pytest.raises(SourceError, match=r"^a\.jsonl:2: the file has changed"):
        next(stream)


def test_new_time_stamp_alone_is_no_change() -> None:
    for kind in KINDS:
        path = write_kind(kind, noise(3, 10))
        source = opened(path)
        os.utime(path, (1, 1))
        assert len(records(source)) == (1 if kind == "txt" else 10)
        if source.random_access:
            source.read(0)


def test_file_that_is_replaced_by_its_copy_is_read_on() -> None:
    for kind in KINDS:
        path = write_kind(kind, noise(3, 10))
        source = opened(path)
        if source.random_access:
            source.read(0)
        shutil.copy(path, "copy")
        os.replace("copy", path)
        assert len(records(source)) == (1 if kind == "txt" else 10)
        if source.random_access:
            source.read(0)


def test_change_that_neither_samples_nor_time_stamp_show_is_seen_where_lines_break() -> None:
    path = write_kind("jsonl", noise(4, 1000))
    source = opened(path)
    status = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(5000)  # the second sample begins at 15 KB
        file.write(b"\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    found = [outcome(lambda document=document: source.read(document)) for document in range(40)]
    assert [d for d, text in enumerate(found) if text != noise(4, 1000)[d]] == [5000 // 224]
    assert str(found[5000 // 224]) == f"a.jsonl:{5000 // 224 + 1}: the file has changed since the start of the run"
    assert len(records(opened(path))) == opened(path).numbering.num_documents == 1001  # its index was built anew


def test_index_that_is_overwritten_during_the_run_is_an_error_and_built_anew() -> None:
    path = write_kind("jsonl", noise(4, 1000))
    source = opened(path)
    (index,) = Path("cache").glob("*.index")
    with index.open("r+b") as file:  # the same inode, which is mapped
        file.write(b"\xff" * index.stat().st_size)
    with pytest.raises(SourceError, match=r"^a\.jsonl:8: its index .*\.index was changed during the run; start again"):
        source.read(7)
    assert opened(path).read(7) == noise(4, 1000)[7]
