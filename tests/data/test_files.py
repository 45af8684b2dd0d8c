"""Which files make a source: globs, excludes, kinds, and one line for what is left out or cannot be read."""

import bz2
import gzip
import json
import logging
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from titanlite.config.sections import SourceConfig
from titanlite.data.files import find_files, in_threads, shown
from titanlite.data.source import RecordError, SourceError, open_source


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(*names: str, content: bytes = b"content") -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)


TREE = (
    "src/a.py",
    "src/a.min.js",
    "src/sub/b.py",
    "src/sub/test_b.py",
    "src/tests/c.py",
    "src/tests/deep/d.py",
    "src/é.py",
)


@pytest.mark.parametrize(
    ("exclude", "left_out"),
    [
        ("a.py", {"src/a.py"}),
        ("*.min.js", {"src/a.min.js"}),
        ("test_*", {"src/sub/test_b.py"}),
        ("tests/*", {"src/tests/c.py"}),
        ("tests/*.py", {"src/tests/c.py"}),
        ("tests/**", {"src/tests/c.py", "src/tests/deep/d.py"}),
        ("**/tests/**", {"src/tests/c.py", "src/tests/deep/d.py"}),
        ("tests/**/*.py", {"src/tests/c.py", "src/tests/deep/d.py"}),
        ("src/*/?.py", {"src/sub/b.py", "src/tests/c.py"}),
        ("src/**/[bc].py", {"src/sub/b.py", "src/tests/c.py"}),
        ("[!a-d].py", {"src/é.py"}),
        ("./src/a.py", {"src/a.py"}),
        ("{cwd}/src/*.py", {"src/a.py", "src/é.py"}),
        ("{cwd}/**/deep/*", {"src/tests/deep/d.py"}),
        ("/src/a.py", set()),
        ("b", set()),
        (".py", set()),
        ("A.PY", set()),
        ("ub/b.py", set()),
        ("[", set()),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_exclude_matches_the_end_of_a_path(
    exclude: str, left_out: set[str], absolute: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="titanlite")
    write(*TREE)
    exclude = exclude.replace("{cwd}", os.getcwd())
    root = f"{os.getcwd()}/" if absolute else ""
    files = find_files(SourceConfig(paths=(f"{root}src/**/*",), exclude=(exclude,)))
    assert [file.path for file in files] == sorted(root + name for name in set(TREE) - left_out)
    said = f"leaves out {len(left_out)} files" if left_out else f"matches none of the {len(TREE)} files"
    (line,) = [record for record in caplog.records if "data.exclude" in record.getMessage()]
    assert line.getMessage() == f"data.exclude: {exclude} {said}"
    assert line.levelno == (logging.INFO if left_out else logging.WARNING)


def test_excludes_add_up_and_may_not_leave_nothing() -> None:
    write(*TREE)
    names = ("*.js", "tests/**", "sub/*")
    files = find_files(SourceConfig(paths=("src/**/*",), exclude=names))
    assert [file.name for file in files] == ["a.py", "é.py"]
    with pytest.raises(ValueError, match=r"^data\.sources\.web\.exclude = \['\*'\] leaves out all 7 files of data\."):
        open_source("web", SourceConfig(paths=("src/**/*",), exclude=("*",)), "cache")


def test_exclude_reaches_the_built_in_corpus_which_has_no_file_of_the_machine() -> None:
    every = find_files(SourceConfig())
    assert not [file.name for file in every if "_sysconfigdata" in file.name]
    fewer = find_files(SourceConfig(exclude=("json/*.py", "**/os.py")))
    assert {file.name for file in every} - {file.name for file in fewer} >= {"json/decoder.py", "os.py"}
    assert "posixpath.py" in {file.name for file in fewer}


def test_excluded_files_are_not_even_opened() -> None:
    write("a.txt", "b.pdf")
    os.symlink("/proc/self/mem", "c.txt")
    files = find_files(SourceConfig(paths=("*",), exclude=("*.pdf", "c.*")))
    assert [file.name for file in files] == ["a.txt"]


def tar(path: str) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add("plain")


def archive(path: str) -> None:
    with zipfile.ZipFile(path, "w") as opened:
        opened.write("plain")


UNREADABLE: dict[str, tuple[str, str, Callable[[str], object], str]] = {
    "gzip by suffix": ("a.gz", "auto", lambda p: write(p), r'a\.gz ends in \.gz, .* data\.format = "jsonl"; read are'),
    "json.gz": (
        "a.json.gz",
        "auto",
        lambda p: write(p),
        r'a\.json\.gz ends in \.gz, .* data\.format = "jsonl"; read are',
    ),
    "bzip2": ("a.jsonl.bz2", "auto", lambda p: write(p), r"a\.jsonl\.bz2 ends in \.bz2; read are text, jsonl"),
    "upper case": ("A.PDF", "auto", lambda p: write(p), r"A\.PDF ends in \.pdf"),
    "newline": ("a\nb.zip", "auto", lambda p: write(p), r"'a\\nb\.zip' ends in \.zip"),
    "gzip inside": (
        "a.txt",
        "auto",
        lambda p: write(p, content=gzip.compress(b"a")),
        "should be text and is gzip data",
    ),
    "gzip as jsonl": (
        "a.jsonl",
        "auto",
        lambda p: write(p, content=gzip.compress(b"a")),
        "should be jsonl and is gzip",
    ),
    "gzip as text": (
        "a.gz",
        "text",
        lambda p: write(p, content=gzip.compress(b"a")),
        "should be text and is gzip data",
    ),
    "xz inside": ("a", "auto", lambda p: write(p, content=lzma.compress(b"a")), "should be text and is xz data"),
    "bzip2 inside": ("a", "jsonl", lambda p: write(p, content=bz2.compress(b"a")), "should be jsonl and is bzip2 data"),
    "tar inside": ("a", "auto", tar, "should be text and is tar data"),
    "zip inside": ("a", "text", archive, "should be text and is zip data"),
    "numpy inside": ("a", "text", lambda p: np.save(open(p, "wb"), np.zeros(3)), "should be text and is numpy data"),  # noqa: SIM115
    "text as gzip": ("a.jsonl.gz", "auto", lambda p: write(p), r"should be jsonl\.gz and is no gzip data"),
    "text as zstd": ("a.zst", "jsonl", lambda p: write(p), r"should be jsonl\.zst and is no zstd data"),
    "text as parquet": ("a", "parquet", lambda p: write(p), "should be parquet and is no parquet data"),
    "empty gzip": ("a.jsonl.gz", "auto", lambda p: write(p, content=b""), r"should be jsonl\.gz and is empty"),
    "empty parquet": ("a.parquet", "auto", lambda p: write(p, content=b""), r"should be parquet and is empty"),
}


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_file_of_another_kind_is_refused_at_the_start(name: str) -> None:
    path, kind, make, problem = UNREADABLE[name]
    write("plain", content=b"plain " * 1000)
    make(path)
    with pytest.raises(ValueError, match=problem) as caught:
        open_source("data", SourceConfig(paths=("plain", path), format=kind), "cache")  # type: ignore[arg-type]
    assert "leave it out by data.exclude" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_suffixes_are_read_in_any_case_and_compressed_ones_as_jsonl_when_told() -> None:
    write("A.JSONL", content=b'{"text": "a"}')
    write("b.Jsonl.GZ", "c.json.gz", content=gzip.compress(b'{"text": "a"}'))
    write("d.json", "e.tar.txt", "gz", "zip")
    kinds = [file.kind for file in find_files(SourceConfig(paths=("A*", "b*", "d*", "e*", "gz", "zip")))]
    assert kinds == ["jsonl", "jsonl.gz", "text", "text", "text", "text"]
    assert find_files(SourceConfig(paths=("c.json.gz",), format="jsonl"))[0].kind == "jsonl.gz"


def test_every_character_of_a_file_name_is_taken_and_shown_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(1, 256):
        if i != ord("/"):
            Path(os.fsdecode(b"x%cy.jsonl" % i)).write_bytes(b'{"text": "good"}\nbad\n')
    source = open_source("data", SourceConfig(paths=("x*.jsonl",)), "cache")
    assert source.numbering is not None
    assert len(source.files) == 254
    json.dumps(source.manifest())
    for document in range(1, 508, 2):
        with pytest.raises(RecordError) as caught:
            source.read(document)
        message = str(caught.value)
        assert message.isprintable()
        message.encode()  # any terminal or log file takes it
    for file in source.files:
        os.truncate(file.path, 1)
    with pytest.raises(SourceError) as changed:
        list(source.records(9))
    assert str(changed.value).isprintable()
    assert shown("a b/é") == "a b/é"


def test_read_only_folder_of_data_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    write("d/a.txt")
    write("d/b.jsonl", content=b'{"text": "b"}')
    write("d/c.jsonl.gz", content=gzip.compress(b'{"text": "c"}'))
    opened = os.open

    def read_only(path: str, flags: int, *args: int, **kwargs: int) -> int:
        assert not (os.fspath(path).startswith("d") and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        return opened(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)  # chmod would not stop root
    source = open_source("data", SourceConfig(paths=("d/*",)), "cache")
    assert [text for f in range(3) for text in source.records(f)] == ["content", "b", "c"]
    assert sorted(os.listdir("d")) == ["a.txt", "b.jsonl", "c.jsonl.gz"]


def test_items_done_in_threads_keep_their_order_and_the_first_error() -> None:
    for number in (0, 1, 15, 16, 17, 1000):
        assert in_threads(lambda x: x * x, range(number)) == [x * x for x in range(number)]

    def fail(x: int) -> int:
        if x in (300, 700):
            raise ValueError(f"at {x}")
        return x

    with pytest.raises(ValueError, match="at 300"):
        in_threads(fail, range(1000))
