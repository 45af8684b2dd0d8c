"""The index of a jsonl file: right for any bytes, built once by many, rebuilt when damaged, never half there."""

import fcntl
import logging
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.gloo import ranks
from titanlite.data import index
from titanlite.data.files import content_digest
from titanlite.data.index import WritingStopped, load_index


def digest(path: Path, size: int) -> str:
    with path.open("rb") as file:
        return content_digest(lambda number, offset: os.pread(file.fileno(), number, offset), size)


def load(path: Path, cache: Path) -> np.ndarray:
    size = path.stat().st_size
    return load_index(str(path), size, digest(path, size), str(cache)).bounds()


def naive_bounds(content: bytes) -> list[int]:
    pieces = content.split(b"\n")
    if not pieces[-1]:
        pieces.pop()  # what follows the last newline is no record
    bounds = [0]
    for piece in pieces:
        bounds.append(min(bounds[-1] + len(piece) + 1, len(content)))
    return bounds


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="titanlite")
    return caplog


@given(content=st.lists(st.sampled_from([b"\n", b"a", b"\r\n", b"\0", b"xyz", b"\n\n"]), max_size=60).map(b"".join))
def test_bounds_equal_a_naive_split(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("index")
    (folder / "a.jsonl").write_bytes(content)
    bounds = load(folder / "a.jsonl", folder)
    assert bounds.tolist() == naive_bounds(content)
    assert bounds.dtype == np.int64


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_records_may_cross_the_blocks_of_the_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(index, "_SCAN_BYTES", block)
    content = b'{"text": "one"}\n\n\n{"text": "two"}\r\n' + b"x" * 100 + b"\nlast without newline"
    (tmp_path / "a.jsonl").write_bytes(content)
    assert load(tmp_path / "a.jsonl", tmp_path).tolist() == naive_bounds(content)


def test_scan_needs_the_memory_of_a_block_whatever_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 40_000_000 + b"\n")
    tracemalloc.start()
    try:
        assert load(path, tmp_path).tolist() == [0, 40_000_001]
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_index_is_kept_by_content_and_serves_copies(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    path, copy, cache = tmp_path / "a.jsonl", tmp_path / "copy.jsonl", tmp_path / "cache"
    path.write_bytes(b"1\n22\n")
    load(path, cache)
    os.utime(path, (1, 1))
    copy.write_bytes(b"1\n22\n")
    assert load(path, cache).tolist() == load(copy, cache).tolist() == [0, 2, 5]
    assert len(log.messages) == 1
    copy.write_bytes(b"11\n2\n")  # same size, other content
    assert load(copy, cache).tolist() == [0, 3, 5]
    assert len(log.messages) == 2


def test_default_folder_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(b"1\n")
    load_index(str(tmp_path / "a.jsonl"), 2, "content", "")
    assert len(list((tmp_path / "titanlite").glob("*.index"))) == 1


@pytest.mark.parametrize(
    "damage", ["empty", "cut", "cut in a number", "longer", "flip in header", "flip in offsets", "other file"]
)
def test_damaged_index_is_seen_and_built_again(tmp_path: Path, log: pytest.LogCaptureFixture, damage: str) -> None:
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_bytes(b"1\n22\n333\n")
    load(path, cache)
    (stored,) = cache.glob("*.index")
    good = stored.read_bytes()
    flip = {"flip in header": 40, "flip in offsets": 70}.get(damage, 0)
    stored.write_bytes(
        {
            "empty": b"",
            "cut": good[:-8],
            "cut in a number": good[:-3],
            "longer": good + bytes(8),
            "other file": good.replace(good[16:32], bytes(16)),
        }.get(damage, good[:flip] + bytes([good[flip] ^ 4]) + good[flip + 1 :])
    )
    assert load(path, cache).tolist() == [0, 2, 5, 9]
    assert stored.read_bytes() == good
    assert [line for line in log.messages if "damaged" in line]


def test_folder_that_cannot_be_written_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"1\n")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data\.cache_dir = '.*/file/cache': cannot write the index of .*a\.jsonl"):
        load(tmp_path / "a.jsonl", tmp_path / "file" / "cache")


def test_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a.jsonl").write_bytes(b"1\n")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"data\.cache_dir.*No space left on device"):
        load(tmp_path / "a.jsonl", tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_read_only_folder_with_the_index_in_it_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"1\n")
    load(tmp_path / "a.jsonl", tmp_path / "cache")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "makedirs", refuse)  # nothing may be attempted; chmod would not stop root
    assert load(tmp_path / "a.jsonl", tmp_path / "cache").tolist() == [0, 2]


def test_file_that_grows_meanwhile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"1\n2\n")
    with pytest.raises(ValueError, match=r"a\.jsonl changed from 2 to 4 bytes"):
        load_index(str(tmp_path / "a.jsonl"), 2, "content", str(tmp_path))


@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_an_index_of_two_states_of_a_file_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Its name is made of samples of the content: where these do not differ, the wrong index would pass for good."""
    path, scan = tmp_path / "a.jsonl", index._read_blocks
    path.write_bytes(b"x" * 200_000)
    before = digest(path, 200_000)

    def changing(*args):  # type: ignore[no-untyped-def]
        yield from scan(*args)
        if change == "in place":
            with path.open("r+b") as file:
                file.seek(6000)  # between two samples
                file.write(b"\n")
        else:
            (tmp_path / "new").write_bytes(path.read_bytes())
            (tmp_path / "new").replace(path)

    with monkeypatch.context() as patch:
        patch.setattr(index, "_read_blocks", changing)
        with pytest.raises(ValueError, match=r"a\.jsonl changed while it was indexed; start again"):
            load(path, tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]
    assert digest(path, 200_000) == before
    assert load(path, tmp_path / "cache").tolist() == naive_bounds(path.read_bytes())


@pytest.mark.parametrize("length", [0, 64, 4096])
def test_an_index_that_is_cut_off_during_the_run_is_an_error_and_no_signal(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n" * 10_000)
    kept = load_index(str(path), 20_000, digest(path, 20_000), str(tmp_path))
    (stored,) = tmp_path.glob("*.index")
    os.truncate(stored, length)
    with pytest.raises(OSError, match=r"its index .*\.index was changed during the run; start again"):
        kept.bounds()
    assert load(path, tmp_path).tolist() == naive_bounds(path.read_bytes())


def build_on_a_rank(path: str, cache: str, without_locks: bool) -> tuple[list[int], int]:
    """Bounds, and how many indices this process built; slow, so that the processes overlap."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    index.logger.addHandler(handler)
    index.logger.setLevel(logging.INFO)
    scan, flock = index._read_blocks, fcntl.flock

    def slow_scan(*args):  # type: ignore[no-untyped-def]
        for count in scan(*args):
            time.sleep(0.2)
            yield count

    def no_lock(*args: object) -> None:
        raise OSError(37, "No locks available")

    index._read_blocks = slow_scan
    if without_locks:
        fcntl.flock = no_lock  # type: ignore[assignment]
    try:
        return load(Path(path), Path(cache)).tolist(), sum("indexed" in line for line in lines)
    finally:
        index._read_blocks, fcntl.flock = scan, flock
        index.logger.removeHandler(handler)


@pytest.mark.parametrize("without_locks", [False, True])
def test_processes_that_start_at_once_build_once_and_agree(tmp_path: Path, without_locks: bool) -> None:
    content = b"".join(b"%d\n" % (i**3) for i in range(1000))
    (tmp_path / "a.jsonl").write_bytes(content)
    results = ranks(4).run(build_on_a_rank, str(tmp_path / "a.jsonl"), str(tmp_path / "cache"), without_locks)
    assert all(bounds == naive_bounds(content) for bounds, _ in results)
    assert sum(number for _, number in results) == 1 or without_locks
    assert not list((tmp_path / "cache").glob("*.tmp"))


BUILD = """
import logging, sys, time
from titanlite.data import index
from titanlite.data.files import content_digest

path, cache, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
scan = index._read_blocks

def slow(*args):
    for count in scan(*args):
        yield count
        print(".", flush=True)
        time.sleep(seconds)

index._read_blocks = slow
with open(path, "rb") as file:
    content = file.read()
digest = content_digest(lambda number, at: content[at : at + number], len(content))
index.load_index(path, len(content), digest, cache)
print("built", flush=True)
"""


def start_a_build(folder: Path, seconds: float) -> "subprocess.Popen[bytes]":
    """A process that builds the index of a.jsonl, with a pause after each of its blocks."""
    command = [sys.executable, "-c", BUILD, str(folder / "a.jsonl"), str(folder / "cache"), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])


def write_three_blocks(folder: Path) -> bytes:
    content = b"".join(b"%d\n" % (i**3) for i in range(200_000))
    assert 2 << 20 < len(content) < 4 << 20
    (folder / "a.jsonl").write_bytes(content)
    return content


def test_a_build_that_waits_takes_over_from_the_killed_one(tmp_path: Path) -> None:
    content = write_three_blocks(tmp_path)
    first = start_a_build(tmp_path, 600)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == b".\n"
        second = start_a_build(tmp_path, 0)
        assert second.stdout is not None
        assert second.stdout.readline().startswith(b"waiting for another process that builds an index")
    finally:
        first.kill()
        first.communicate()
    assert second.communicate(timeout=30)[0].endswith(b"built\n")
    assert [p.suffix for p in sorted((tmp_path / "cache").iterdir())] == [".index", ".lock"]
    assert load(tmp_path / "a.jsonl", tmp_path / "cache").tolist() == naive_bounds(content)


def test_a_stop_is_heeded_within_a_block_and_leaves_nothing(tmp_path: Path) -> None:
    content = write_three_blocks(tmp_path)
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    asked = iter(range(1000))
    with pytest.raises(WritingStopped, match=r"stopped while .*/a\.jsonl was indexed"):
        load_index(str(path), len(content), digest(path, len(content)), str(cache), lambda: next(asked) == 2)
    assert next(asked) == 3
    assert [p.suffix for p in cache.iterdir()] == [".lock"]
    assert load(path, cache).tolist() == naive_bounds(content)


def test_a_stop_is_heeded_while_another_process_builds(tmp_path: Path) -> None:
    content = write_three_blocks(tmp_path)
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    other, asked = start_a_build(tmp_path, 600), iter(range(1000))
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b".\n"
        with pytest.raises(WritingStopped):
            load_index(str(path), len(content), digest(path, len(content)), str(cache), lambda: next(asked) == 3)
    finally:
        other.kill()
        other.communicate()
    assert load(path, cache).tolist() == naive_bounds(content)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_builds_killed_at_random_moments_leave_nothing_in_the_way(tmp_path: Path, seed: int) -> None:
    content, draw = write_three_blocks(tmp_path), random.Random(seed)
    (tmp_path / "cache").mkdir()
    for _ in range(10):
        builds = [start_a_build(tmp_path, 0.05) for _ in range(3)]
        time.sleep(draw.uniform(0.1, 0.8))  # also before numpy is there, and after the end
        for build in draw.sample(builds, draw.randint(1, 3)):
            build.kill()
        outputs = [build.communicate(timeout=60)[0] for build in builds]
        killed = [build.returncode != 0 for build in builds]
        assert all(out.endswith(b"built\n") for out, dead in zip(outputs, killed, strict=True) if not dead)
        last = start_a_build(tmp_path, 0)
        assert last.communicate(timeout=30)[0].endswith(b"built\n")
        names = sorted((tmp_path / "cache").iterdir())
        assert [p.suffix for p in names] == [".index", ".lock"]
        assert load(tmp_path / "a.jsonl", tmp_path / "cache").tolist() == naive_bounds(content)
        for name in names:
            name.unlink()


def test_killed_build_leaves_no_index_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    content = write_three_blocks(tmp_path)
    process = start_a_build(tmp_path, 600)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b".\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert [p.suffix for p in sorted((tmp_path / "cache").iterdir())] == [".lock", ".tmp"]
    start = time.monotonic()
    assert load(tmp_path / "a.jsonl", tmp_path / "cache").tolist() == naive_bounds(content)
    assert time.monotonic() - start < 5  # nobody waits for the dead
    assert [p.suffix for p in sorted((tmp_path / "cache").iterdir())] == [".index", ".lock"]


def test_log_lines_show_progress_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(index, "_LOG_SECONDS", 0.0)
    monkeypatch.setattr(index, "_SCAN_BYTES", 2)
    (tmp_path / "a.jsonl").write_bytes(b"1\n2\n")
    load(tmp_path / "a.jsonl", tmp_path)
    assert [line for line in log.messages if "50% of 4 bytes" in line]


def test_digest_samples_a_big_file_at_both_ends_and_between(tmp_path: Path) -> None:
    path, size = tmp_path / "big", 1_000_000
    path.write_bytes(bytes(size))
    before = digest(path, size)
    changed = set()
    for position in (0, size // 2, size - 1, *range(1000, size, 50_000)):
        content = bytearray(size)
        content[position] = 1
        path.write_bytes(content)
        if digest(path, size) != before:
            changed.add(position)
    assert {0, size - 1} <= changed  # the ends always; what lies between samples is not seen
    assert digest(path, size - 1) != before
