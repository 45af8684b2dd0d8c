"""Documents: which files, in which order, with which text; and one clear line for everything that is no document."""

import json
import logging
import os
import shutil
import sys
import sysconfig
import tokenize
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.byte_tokenizer import ByteTokenizer
from titanlite.config.sections import SourceConfig
from titanlite.data import source as source_module
from titanlite.data.source import RecordError, Source, SourceError, manifest_changes
from titanlite.data.stream import StreamedReader


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SourceConfig]:
    """Writes files below the working directory and gives the config that reads `paths` of them."""
    monkeypatch.chdir(tmp_path)

    def write(files: dict[str, bytes | str], *paths: str, **kwargs: str) -> SourceConfig:
        for name, content in files.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        return SourceConfig(paths=paths or tuple(files), **kwargs)  # type: ignore[arg-type]

    return write


def open_source(config: SourceConfig, name: str = "data") -> Source:
    return source_module.open_source(name, config, "cache")


def num_documents(source: Source) -> int:
    assert source.numbering is not None
    return source.numbering.num_documents


def texts(source: Source) -> list[str]:
    in_order = [text for file in range(len(source.files)) for text in source.records(file)]
    assert in_order == [source.read(document) for document in range(num_documents(source))]
    return in_order  # type: ignore[return-value]


def test_built_in_corpus_is_the_standard_library_as_python_reads_it() -> None:
    source = open_source(SourceConfig())
    names = [file.name for file in source.files]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py", "this.py"} <= set(names)
    assert not [n for n in names if {"test", "tests", "site-packages", "__pycache__"} & set(n.split("/"))]
    assert num_documents(source) > 300
    for document in range(0, num_documents(source), 10):
        with tokenize.open(source.files[document].path) as file:
            assert source.read(document) == file.read()


def test_built_in_corpus_decodes_declared_encodings_and_newlines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "a.py").write_bytes(b"# coding: latin-1\r\n# \xe9\r\n")
    (tmp_path / "b.py").write_bytes(b"\xef\xbb\xbfx = 1\n")
    (tmp_path / "c.py").write_bytes(b"\n\n# \xe9\n")
    (tmp_path / "d.py").write_bytes(b"# coding: no-such-code\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "e.py").write_bytes(b"x")
    (tmp_path / "f.txt").write_bytes(b"x")
    source = open_source(SourceConfig())
    assert [source.read(0), source.read(1)] == ["# coding: latin-1\n# \xe9\n", "x = 1\n"]
    for document, reason in ((2, "not UTF-8"), (3, "unknown encoding: no-such-code")):
        with pytest.raises(RecordError, match=f"{'abcd'[document]}.py: {reason}"):
            source.read(document)
    assert num_documents(source) == 4


def test_missing_standard_library_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"data\.paths is empty and this Python has no source files"):
        open_source(SourceConfig())


def test_files_come_in_the_order_of_the_patterns_and_of_their_names(corpus: Callable[..., SourceConfig]) -> None:
    files = {"b/2.txt": "b2", "b/1.txt": "b1", "b/c/3.txt": "b3", "b.txt": "b", "a/1.txt": "a1", "b/x.md": "no"}
    source = open_source(corpus(files, "b/**/*.txt", "a/*.txt", "b.txt"))
    assert texts(source) == ["b1", "b2", "b3", "a1", "b"]
    assert [file.name for file in source.files] == ["1.txt", "2.txt", "c/3.txt", "1.txt", "b.txt"]


def test_kinds_are_told_by_suffix_file_by_file(corpus: Callable[..., SourceConfig]) -> None:
    files = {"1.jsonl": '{"text": "one"}\n{"text": "two"}', "2.txt": "three", "3.jsonl": '{"text": "four"}\n'}
    source = open_source(corpus(files, "*.*"))
    assert texts(source) == ["one", "two", "three", "four"]
    assert source.numbering is not None
    places = [source.numbering.place(d) for d in range(4)]
    assert places == list(zip(*(part.tolist() for part in source.numbering.places(np.arange(4))), strict=True))
    assert [source.locate(*place) for place in places] == ["1.jsonl:1", "1.jsonl:2", "2.txt", "3.jsonl:1"]
    assert [source.numbering.first(f) for f in range(4)] == [0, 2, 3, 4]
    assert source.sizes(np.array([3, 2, 1, 0])).tolist() == [17, 5, 15, 16]
    assert source.num_bytes == 53
    assert texts(open_source(corpus(files, "*.*", format="text")))[0] == files["1.jsonl"]
    assert texts(open_source(corpus({"x.txt": '{"text": "five"}'}, "x.txt", format="jsonl"))) == ["five"]


def test_text_is_kept_as_it_is(corpus: Callable[..., SourceConfig]) -> None:
    files = {"bom": b"\xef\xbb\xbfa", "crlf": b"a\r\nb\r", "empty": b"", "nul": b"a\0b", "only bom": b"\xef\xbb\xbf"}
    assert texts(open_source(corpus(files))) == ["a", "a\r\nb\r", "", "a\0b", ""]


def test_jsonl_tolerates_bom_crlf_other_fields_and_odd_text(corpus: Callable[..., SourceConfig]) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "bom"}',
        b'{"id": [{}], "text": "crlf"}\r',
        b' {"text": ""} ',
        b'{"text": "\\ud800"}',
    ]
    source = open_source(corpus({"a.jsonl": b"\n".join([*lines, '{"text": "\\u0000é"}'.encode()])}))
    assert texts(source) == ["bom", "crlf", "", "\ud800", "\0é"]


def test_many_jsonl_files_share_few_descriptors(
    corpus: Callable[..., SourceConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("titanlite.data.source._OPEN_FILES", 4)
    files = {f"{k:03}.jsonl": f'{{"text": "{k}"}}\n' * (k % 3) for k in range(60)}
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    source = open_source(corpus(files, "*.jsonl"))
    assert texts(source) == [str(k) for k in range(60) for _ in range(k % 3)]
    sizes = source.sizes(np.arange(num_documents(source)))
    assert sizes.tolist() == [len(f'{{"text": "{k}"}}\n') for k in range(60) for _ in range(k % 3)]
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) <= before + 8


GOOD = b'{"text": "good"}'
HOSTILE = {
    "invalid UTF-8": (b'{"text": "\xff"}', "not UTF-8: invalid start byte at byte 10 of the document"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16-le"), "bad JSON: .* at character 1"),
    "NUL bytes": (b"\0\0\0\0", "bad JSON: Expecting value at character 0"),
    "truncated": (b'{"text": "go', "bad JSON: Unterminated string starting at at character 9"),
    "blank": (b"", "a blank line"),
    "white": (b" \t\r", "a blank line"),
    "two objects": (GOOD + GOOD, "bad JSON: Extra data at character 16"),
    "plain text": (b"good", "bad JSON: Expecting value at character 0"),
    "BOM inside": (b"\xef\xbb\xbf" + GOOD, "bad JSON: Unexpected UTF-8 BOM"),
    "deep": (b"[" * 200_000, "JSON nested too deeply"),
    "null": (b"null", "the JSON is no object but null"),
    "number": (b"12", "the JSON is no object but a number"),
    "string": (b'"good"', "the JSON is no object but a text"),
    "array": (b'["text", "good"]', "the JSON is no object but an array"),
    "long number": (b'{"n": ' + b"9" * 5000 + b"}", "Exceeds the limit|no field"),
    "missing field": (b'{"Text": "good"}', "no field 'text'"),
    "null field": (b'{"text": null}', "the field 'text' is no text but null"),
    "number field": (b'{"text": 1.5}', "the field 'text' is no text but a number"),
    "boolean field": (b'{"text": true}', "the field 'text' is no text but true or false"),
    "array field": (b'{"text": ["good"]}', "the field 'text' is no text but an array"),
    "object field": (b'{"text": {"text": "good"}}', "the field 'text' is no text but an object"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_hostile_line_is_an_error_with_its_place_and_leaves_the_others_alone(
    corpus: Callable[..., SourceConfig], name: str, newline: bytes
) -> None:
    line, reason = HOSTILE[name]
    source = open_source(corpus({"a.jsonl": GOOD + newline + line + newline + GOOD + newline}))
    assert num_documents(source) == 3
    assert source.read(0) == source.read(2) == "good"
    with pytest.raises(RecordError, match=rf"^a\.jsonl:2: {reason}") as caught:
        source.read(1)
    assert "\n" not in str(caught.value)


def test_depth_that_is_too_deep_does_not_depend_on_the_stack(corpus: Callable[..., SourceConfig]) -> None:
    # Without a stack of its own a reader deep in calls would refuse what another reader takes.
    depth = 500
    nested = '{"text": "good", "x": ' + "[" * depth + "]" * depth + "}"
    source = open_source(corpus({"a.jsonl": nested}))

    def deep(calls: int) -> str:
        return deep(calls - 1) if calls else source.read(0)

    assert deep(sys.getrecursionlimit() - 400) == "good"


def test_invalid_text_file_is_a_record_error(corpus: Callable[..., SourceConfig]) -> None:
    source = open_source(corpus({"a.txt": b"ab\xff", "b.txt": b"b"}))
    with pytest.raises(RecordError, match=r"^a\.txt: not UTF-8: invalid start byte at byte 2"):
        source.read(0)


def changed_files(name: str) -> None:
    if name == "shorter":
        os.truncate("a.jsonl", 20)
        os.truncate("b.txt", 1)
    elif name == "other content":
        Path("a.jsonl").write_bytes(b'{"text":\n' * 7)
        Path("b.txt").write_bytes(b"longer than it was")
    else:
        shutil.rmtree("cache")
        Path("a.jsonl").unlink()
        Path("b.txt").unlink()


@pytest.mark.parametrize("open_files", [0, 8])
@pytest.mark.parametrize("change", ["shorter", "other content", "gone"])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_files_that_change_during_the_run_are_errors_that_nothing_skips(
    corpus: Callable[..., SourceConfig], monkeypatch: pytest.MonkeyPatch, change: str, open_files: int
) -> None:
    monkeypatch.setattr("titanlite.data.source._OPEN_FILES", open_files)
    source = open_source(corpus({"a.jsonl": b'{"text": "good one"}\n' * 3, "b.txt": "text"}))
    changed_files(change)
    for document, place in ((1, "a.jsonl:2"), (3, "b.txt")):
        with pytest.raises(SourceError, match=f"^{place}: ") as caught:
            source.read(document)
        assert "\n" not in str(caught.value)


MISTAKES: dict[str, tuple[dict[str, bytes], tuple[str, ...], str]] = {
    "no match": ({"a.txt": b"a"}, ("a.txt", "*.md"), r"data\.paths: \*\.md matches no file .*relative paths start at"),
    "missing": ({"a.txt": b"a"}, ("b.txt",), r"data\.paths: b\.txt matches no file"),
    "folder": ({"d/a.txt": b"a"}, ("d",), r"data\.paths: d is a folder; name its files, as in d/\*\*/\*\.txt"),
    "folders only": ({"d/e/a.txt": b"a"}, ("d/*",), r"data\.paths: d/\* matches no file \(1 folders\)"),
    "pipe": ({"a.txt": b"a"}, ("a.txt", "pipe"), r"data\.paths: pipe is a pipe or device, not a regular file"),
    "dangling": ({"a.txt": b"a"}, ("link",), r"data\.paths: cannot read link \(No such file"),
    "empty corpus": ({"a.jsonl": b""}, ("*.jsonl",), r"data\.paths = \['\*\.jsonl'\]: the corpus is empty"),
    "field": ({"a.jsonl": b'{"body": "a", "id": 1}'}, (), r"data\.text_field = 'text': .* a\.jsonl:1.*'body', 'id'"),
    "field, second file": ({"a.jsonl": GOOD, "b.jsonl": b"{}"}, (), r"data\.text_field .* b\.jsonl:1, which has none"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_in_one_line_at_the_start(corpus: Callable[..., SourceConfig], mistake: str) -> None:
    files, paths, message = MISTAKES[mistake]
    os.symlink("nowhere", "link")
    os.mkfifo("pipe")
    with pytest.raises(ValueError, match=message) as caught:
        open_source(corpus(files, *paths))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file that cannot be read by root either")
def test_unreadable_file_is_named_at_the_start(corpus: Callable[..., SourceConfig]) -> None:
    with pytest.raises(ValueError, match=r"data\.paths: cannot read /proc/self/mem \(Input/output error\)"):
        open_source(corpus({}, "/proc/self/mem"))


@pytest.mark.parametrize("pattern", ["d/**/*.txt", "d/**", "d/*/*.txt"])
def test_unreadable_folder_is_not_passed_over(
    corpus: Callable[..., SourceConfig], monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    config = corpus({"d/a.txt": "a", "d/secret/b.txt": "b"}, pattern)
    monkeypatch.setattr(os, "access", lambda path, mode: "secret" not in path)  # chmod would not stop root
    with pytest.raises(ValueError, match=r"data\.paths: .* reaches the folder d/secret/, which cannot be read"):
        open_source(config)


def test_what_a_pattern_leaves_out_is_said(
    corpus: Callable[..., SourceConfig], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="titanlite")
    config = corpus({"d/a.txt": "a", "d/e/b.txt": "b"}, "d/**", "d/z", "pipe*")
    os.symlink("nowhere", "d/dangling")
    os.symlink("loop", "d/loop")
    os.symlink("a.txt", "d/z")
    os.mkfifo("pipe")
    Path("pipe.txt").write_bytes(b"p")
    source = open_source(config)
    assert texts(source) == ["a", "b", "p"]
    assert [file.path for file in source.files] == ["d/a.txt", "d/e/b.txt", "pipe.txt"]
    assert "d/** matches 2 dangling links or special files, left out: ['d/dangling', 'd/loop']" in caplog.text
    assert "pipe* matches 1 dangling links or special files, left out: ['pipe']" in caplog.text
    assert "d/** matches 2 folders too; only files count" in caplog.text
    assert "reaches 2 files once more by another name; each counts once" in caplog.text


def test_names_that_look_like_patterns_are_names(corpus: Callable[..., SourceConfig]) -> None:
    files = {"a[1].txt": "bracket", "a1.txt": "one", "*?.txt": "star", "new\nline \udcff": "odd"}
    source = open_source(corpus(files))
    assert texts(source) == ["bracket", "one", "star", "odd"]
    json.dumps(source.manifest())


def test_manifest_stays_with_the_content_and_names_what_changed(
    corpus: Callable[..., SourceConfig], tmp_path: Path
) -> None:
    files = {"d/a.txt": "a", "d/b.jsonl": b'{"text": "b"}\n' * 2, "d/c.txt": "c"}
    before = open_source(corpus(files, "d/*")).manifest()
    assert json.loads(json.dumps(before)) == before
    assert [before[k] for k in ("num_files", "num_documents", "num_bytes")] == [3, 4, 30]
    shutil.copytree("d", "elsewhere/d")
    os.utime("elsewhere/d/a.txt", (1, 1))
    copy = open_source(SourceConfig(paths=(f"{tmp_path}/elsewhere/d/*",))).manifest()
    assert copy == before
    assert manifest_changes(before, copy) == []
    Path("d/a.txt").write_bytes(b"A")
    Path("d/c.txt").rename("d/d.txt")
    after = open_source(corpus({}, "d/*")).manifest()
    assert manifest_changes(before, after) == ["removed: c.txt", "added: d.txt", "changed: a.txt"]


def test_manifest_of_the_same_files_in_another_order_or_by_another_field_differs(
    corpus: Callable[..., SourceConfig],
) -> None:
    files = {"a.jsonl": '{"text": "a", "b": "b"}', "b.txt": "b"}
    manifest = open_source(corpus(files)).manifest()
    for other in (corpus(files, "b.txt", "a.jsonl"), corpus(files, text_field="b"), corpus(files, format="text")):
        (change,) = manifest_changes(manifest, open_source(other).manifest())
        assert change.startswith("other content, order, format or text_field (num_files 2 -> 2")


def test_manifest_of_very_many_files_lists_none(
    corpus: Callable[..., SourceConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("titanlite.data.source._MANIFEST_FILES", 1)
    manifest = open_source(corpus({"a": "a", "b": "b"})).manifest()
    assert manifest["files"] is None
    changed = open_source(corpus({"a": "a", "b": "c!"})).manifest()
    assert manifest_changes(manifest, changed)[0].endswith("num_bytes 2 -> 3)")


def test_what_was_read_of_a_file_that_had_changed_by_then_is_no_bad_record(tmp_path: Path) -> None:
    """Documents are read without a look at their files, and these are looked at after the last of them."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name}{k}"}) + "\n" for k in range(4)))
    config = SourceConfig(paths=(str(tmp_path / "*.jsonl"),))
    source = source_module.open_source("data", config, str(tmp_path / "cache"))
    reader, everything = StreamedReader(source, ByteTokenizer().encode_document), np.ones(8, bool)
    assert reader.read(np.arange(8), everything).error is None
    path = tmp_path / "b.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"text"', b"{broken"))  # as many bytes and lines
    read = reader.read(np.arange(8), everything)
    assert isinstance(read.error, SourceError)
    assert str(read.error) == f"{path}:1: the file has changed since the start of the run"
    assert (len(read.lengths), len(read.bytes), len(read.ids)) == (4, 4, 4 * 4)  # those of the other file
    assert read.bad == []
