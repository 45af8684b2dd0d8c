"""Writing the token cache: by many processes and jobs at once, killed at any moment, on full disks, from bad data."""

import errno
import fcntl
import gzip
import json
import logging
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.make_tokenizers import SHIPPED
from tests.support.token_caches import (
    NUM_DOCUMENTS,
    NUM_SHARDS,
    Broken,
    Watched,
    cached,
    everything,
    leftovers,
    notes_of,
    shard_files,
    small_shards,
    source_of,
    whole,
    write,
    write_corpus,
    write_jsonl,
)
from titanlite.data.cache import processes, shards, writer
from titanlite.data.cache.shards import ShardPlan, plan_shards
from titanlite.data.cache.writer import write_cache
from titanlite.data.index import WritingStopped
from titanlite.data.source import SourceError
from titanlite.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path)
    return tmp_path


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="titanlite")
    return caplog


def wait_until(condition, seconds: float = 60.0) -> bool:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_processes_without_torch_share_the_shards_and_write_the_same_bytes(corpus: Path) -> None:
    write(corpus, ByteTokenizer(), 0)
    alone = {path.name: path.read_bytes() for path in shard_files(corpus)}
    shutil.rmtree(corpus / "cache")
    write(corpus, Watched(corpus / "notes", 0.004), 3)
    assert {path.name: path.read_bytes() for path in shard_files(corpus)} == alone
    assert len(alone) == NUM_SHARDS
    assert leftovers(corpus) == []
    own = [note for note in notes_of(corpus / "notes") if note[0] != str(os.getpid())]
    assert len(own) == NUM_DOCUMENTS  # none was tokenised twice
    assert len({pid for pid, _, _ in own}) > 1
    assert {has_torch for _, has_torch, _ in own} == {"False"}
    assert whole(corpus)


def test_a_job_that_waits_says_so_and_takes_over_from_the_dead(corpus: Path, log: pytest.LogCaptureFixture) -> None:
    with small_shards(1400):
        source = source_of(corpus, "a.jsonl")
        name = plan_shards(source, ByteTokenizer().fingerprint)[3].name
        with (corpus / "cache" / f"{name}.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            job = threading.Thread(target=write_cache, args=(source, ByteTokenizer(), str(corpus / "cache"), 0, True))
            job.start()
            assert wait_until(lambda: "waiting for another process" in log.text)
            assert len(shard_files(corpus)) == NUM_SHARDS - 1  # all but that one
        job.join(30)
    assert [line for line in log.messages if line.startswith("waiting") and f"{name}.lock" in line]
    assert whole(corpus)
    assert leftovers(corpus) == []


def test_a_shard_that_is_there_once_the_lock_is_had_is_not_written_again(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(corpus, ByteTokenizer(), 0)
    shutil.copytree(corpus / "cache", corpus / "of another job")

    @contextmanager
    def late(folder: str, portion: ShardPlan) -> Iterator[bool]:
        shutil.copy(corpus / "of another job" / portion.name, folder)
        yield True

    for path in shard_files(corpus):
        path.unlink()
    monkeypatch.setattr(processes, "shard_lock", late)
    monkeypatch.setattr(writer, "_estimate", lambda *_: 0.0)
    write(corpus, Watched(corpus / "notes"), 0)
    assert notes_of(corpus / "notes") == []
    assert whole(corpus)


def test_without_locks_work_may_be_done_twice_but_is_right(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lock(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    with small_shards(1400):
        arguments = source_of(corpus, "a.jsonl"), ByteTokenizer(), str(corpus / "cache"), 0, True
        jobs = [threading.Thread(target=write_cache, args=arguments) for _ in range(3)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(60)
    assert whole(corpus)
    assert leftovers(corpus) == []


START_A_JOB = """
import sys
from pathlib import Path
from tests.support.token_caches import Watched, write
if __name__ == "__main__":
    write(Path(sys.argv[1]), Watched(Path(sys.argv[1]) / "notes", float(sys.argv[2])), 2)
"""


def start_a_job(folder: Path, seconds: float) -> "subprocess.Popen[bytes]":
    script = folder / "job.py"
    script.write_text(START_A_JOB)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, str(script), str(folder), str(seconds)], cwd=ROOT, env=environment)


def workers_of(pid: int) -> list[int]:
    """Processes of multiprocessing that this one started, but its resource tracker."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            found.append(int(child))
    return found


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_jobs_that_start_at_once_share_the_work(corpus: Path) -> None:
    jobs = [start_a_job(corpus, 0.15) for _ in range(3)]
    assert [job.wait(60) for job in jobs] == [0, 0, 0]
    assert whole(corpus)
    assert leftovers(corpus) == []
    calls = [(pid, text) for pid, _, text in notes_of(corpus / "notes") if int(pid) not in [job.pid for job in jobs]]
    assert len(calls) == NUM_DOCUMENTS  # none was tokenised twice
    assert len({pid for pid, _ in calls}) > 2


def test_workers_end_with_their_parent_and_the_next_job_goes_on(corpus: Path) -> None:
    job = start_a_job(corpus, 0.1)  # a shard takes it 1.7 s
    try:
        assert wait_until(lambda: len({note[0] for note in notes_of(corpus / "notes")}) == 3 and shard_files(corpus))
        workers = workers_of(job.pid)
        assert len(workers) == 2
        before = shard_files(corpus)
    finally:
        job.kill()
        job.wait()
    assert wait_until(lambda: all(map(ended, workers)), 15)
    assert len(shard_files(corpus)) <= len(before) + 1  # they did not finish what they were at, but perhaps for one
    assert not [name for name in leftovers(corpus) if name.endswith(".tmp")]  # they cleaned up
    finished = {path: path.stat().st_mtime_ns for path in shard_files(corpus)}
    assert 0 < len(finished) < NUM_SHARDS
    write(corpus, ByteTokenizer(), 0)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert whole(corpus)
    assert not [name for name in leftovers(corpus) if name.endswith(".tmp")]


def test_a_killed_worker_is_replaced_by_the_others(corpus: Path) -> None:
    job = start_a_job(corpus, 0.02)
    try:
        assert wait_until(lambda: len({note[0] for note in notes_of(corpus / "notes")}) == 3)
        os.kill(workers_of(job.pid)[0], signal.SIGKILL)
        assert job.wait(60) == 0
    finally:
        job.kill()
        job.wait()
    assert whole(corpus)
    assert leftovers(corpus) == []


def test_a_job_without_workers_left_says_so(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_work", kill_yourself)
    with pytest.raises(ValueError, match="ended before it was done") as error:
        write(corpus, ByteTokenizer(), 2)
    assert "\n" not in str(error.value)


def kill_yourself(*args: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_the_cache_is_finished_and_right(corpus: Path, seed: int) -> None:
    draw = random.Random(seed)
    kills, jobs = 0, []
    try:
        while kills < 12:
            jobs.append(start_a_job(corpus, 0.01))
            time.sleep(draw.uniform(0.2, 2.5))
            job = draw.choice(jobs[-2:])  # also while another one goes on
            with suppress(ProcessLookupError, FileNotFoundError):  # it ended just now
                victims = [*workers_of(job.pid), job.pid]
                for victim in draw.sample(victims, draw.randint(1, len(victims))):
                    os.kill(victim, signal.SIGKILL)
                    kills += 1
            if whole(corpus):
                shutil.rmtree(corpus / "cache", ignore_errors=True)  # begin again
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    write(corpus, ByteTokenizer(), 2)
    assert whole(corpus)
    assert wait_until(lambda: not [name for name in leftovers(corpus) if name.endswith(".tmp")])


AS_A_USER = """
import os, sys
from pathlib import Path
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.token_caches import Watched, write
folder, user, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
os.setgid(user)
os.setuid(user)
write(folder, Watched(folder / f"notes{user}", seconds), 0)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become two other users")
def test_users_share_a_folder_and_what_was_killed_there() -> None:
    """Files and locks belong to who made them; in a folder like /tmp nobody else can write or remove them."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are the user's alone
        folder = Path(name)
        folder.chmod(0o755)
        write_corpus(folder)
        for path in (folder, folder / "cache"):
            path.mkdir(exist_ok=True)
            path.chmod(0o1777)
        command = [sys.executable, "-c", AS_A_USER, name]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        first = subprocess.Popen([*command, "60001", "0.02"], env=environment, cwd=ROOT)
        try:
            assert wait_until(lambda: len(shard_files(folder)) >= 2 and ".tmp" in str(leftovers(folder)))
        finally:
            first.kill()
            first.wait()
        left = leftovers(folder)
        assert [name for name in left if name.endswith(".lock")]
        second = subprocess.run([*command, "60002", "0"], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert second.returncode == 0, second.stderr
        assert whole(folder)
        owners = {path.stat().st_uid for path in shard_files(folder)}
        assert owners == {60001, 60002}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become two other users")
def test_the_lock_of_another_user_is_heeded() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder)
        with small_shards(1400):
            source = source_of(folder, "a.jsonl")
            portion = plan_shards(source, ByteTokenizer().fingerprint)[3]
        for path in (folder, folder / "cache"):
            path.chmod(0o1777)
        with (folder / "cache" / f"{portion.name}.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            command = [sys.executable, "-c", AS_A_USER, name, "60001", "0"]
            job = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT)
            try:
                assert wait_until(lambda: len(shard_files(folder)) == NUM_SHARDS - 1)
                assert job.poll() is None
            finally:
                lock.close()
                assert job.wait(60) == 0
        assert whole(folder)


def test_leftovers_of_killed_processes_are_removed(corpus: Path) -> None:
    with small_shards(1400):
        source = source_of(corpus, "a.jsonl")
        name = plan_shards(source, ByteTokenizer().fingerprint)[0].name
    prefix = corpus / "cache" / f"{name}.{os.uname().nodename}."
    Path(f"{prefix}dead.tmp").touch()
    Path(corpus / "cache" / f"{name}.another-host.busy.tmp").touch()
    write(corpus, ByteTokenizer(), 0)
    assert leftovers(corpus) == [f"{name}.another-host.busy.tmp"]


@pytest.mark.parametrize("num_processes", [0, 2])
def test_a_full_disk_is_named_and_leaves_only_whole_shards(corpus: Path, num_processes: int) -> None:
    write(corpus, ByteTokenizer(), 0)
    sizes = sorted(path.stat().st_size for path in shard_files(corpus))
    shutil.rmtree(corpus / "cache")
    source_of(corpus, "a.jsonl")  # its index is written without a limit
    script = corpus / "job.py"
    script.write_text(
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from tests.support.byte_tokenizer import ByteTokenizer\n"
        "from tests.support.token_caches import write\n"
        "if __name__ == '__main__':\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))\n"
        "    try:\n"
        "        write(Path(sys.argv[1]), ByteTokenizer(), int(sys.argv[3]))\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, str(script), str(corpus), str(sizes[4]), str(num_processes)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert re.fullmatch(
        r"data\.cache_dir = '.*': cannot write the token cache to .* \(File too large\); .*\n", result.stdout
    )
    assert not [name for name in leftovers(corpus) if name.endswith(".tmp")]
    write(corpus, ByteTokenizer(), 0)
    assert whole(corpus)


def test_a_disk_that_fills_at_the_last_moment_leaves_nothing(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source_of(corpus, "a.jsonl")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"data\.cache_dir.*No space left on device"):
        write(corpus, ByteTokenizer(), 0)
    assert [Path(name).suffix for name in leftovers(corpus)] == [".lock"]
    assert shard_files(corpus) == []


def test_room_is_estimated_before_anything_is_written(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(corpus, ByteTokenizer(), 0)
    total = sum(path.stat().st_size for path in shard_files(corpus))
    shutil.rmtree(corpus / "cache")
    with small_shards(1400):
        source = source_of(corpus, "a.jsonl")
        portions = plan_shards(source, ByteTokenizer().fingerprint)
        assert 0.7 < writer._estimate(source, ByteTokenizer(), portions) / total < 1.5
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - total // 2, total // 2))
    with pytest.raises(ValueError, match=r"data\.cache_dir = .*takes about .* GB more.*; name a folder that has room"):
        write(corpus, ByteTokenizer(), 0)
    assert shard_files(corpus) == []


@pytest.mark.parametrize("num_processes", [0, 2])
def test_a_bad_record_stops_with_its_line_and_finished_shards_stay(corpus: Path, num_processes: int) -> None:
    lines = (corpus / "a.jsonl").read_text().splitlines()
    lines[100] = "{"
    (corpus / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        ValueError, match=r'^\S*a\.jsonl:101: bad JSON.*; data\.on_bad_record = "skip" would leave it out'
    ):
        write(corpus, ByteTokenizer(), num_processes)
    assert not [name for name in leftovers(corpus) if name.endswith(".tmp")]
    before = shard_files(corpus)
    if num_processes == 0:
        assert before
    write(corpus, ByteTokenizer(), num_processes, stop=False)
    assert set(before) < set(shard_files(corpus))
    with small_shards(1400):
        (bad,) = everything(cached(source_of(corpus, "a.jsonl"), corpus)).bad
    assert bad[0] == 100
    assert str(bad[1]).startswith(f"{corpus}/a.jsonl:101: bad JSON")


@pytest.mark.parametrize("num_processes", [0, 2])
def test_too_many_bad_records_stop_it_with_one_of_them_however_often_it_starts(
    corpus: Path, num_processes: int
) -> None:
    lines = (corpus / "a.jsonl").read_text().splitlines()
    for number in (3, 50, 80, 110):  # in four of the shards
        lines[number] = "{"
    (corpus / "a.jsonl").write_text("\n".join(lines))
    cache = str(corpus / "cache")
    with small_shards(1400):
        source = source_of(corpus, "a.jsonl")
        for _ in range(3):  # those in finished shards count too
            with pytest.raises(
                ValueError, match=r"a\.jsonl:(4|51|81|111): bad JSON.*more bad records than data\.max_bad"
            ):
                write_cache(source, ByteTokenizer(), cache, num_processes, False, max_bad_records=3)
        write_cache(source, ByteTokenizer(), cache, num_processes, False, max_bad_records=4)
        assert len(everything(cached(source, corpus)).bad) == 4


def test_a_compressed_file_of_bad_records_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    lines = [b'{"text": "good"}', *[b"{"] * 10, os.urandom(600_000).hex().encode()]
    path.write_bytes(gzip.compress(b"\n".join(lines))[:-20])  # to read its end would be another error
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz:7: bad JSON.*data\.max_bad_records = 5: look at the data"):
        write_cache(source_of(tmp_path, path.name), ByteTokenizer(), str(tmp_path / "cache"), 0, False, 5)


@pytest.mark.parametrize("num_processes", [0, 2])
def test_a_stop_is_heeded_at_once_and_the_next_start_goes_on(corpus: Path, num_processes: int) -> None:
    children = set(workers_of(os.getpid()))
    slow = Watched(corpus / "notes", 0.05)  # 6 s in all
    with small_shards(1400):
        source = source_of(corpus, "a.jsonl")
        with pytest.raises(WritingStopped):
            write_cache(source, slow, str(corpus / "cache"), num_processes, True, 0, lambda: bool(shard_files(corpus)))
    assert set(workers_of(os.getpid())) == children
    before = {path: path.stat().st_mtime_ns for path in shard_files(corpus)}
    assert 0 < len(before) < NUM_SHARDS
    assert not [name for name in leftovers(corpus) if name.endswith(".tmp")]
    write(corpus, ByteTokenizer(), 0)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert whole(corpus)


def test_a_stop_is_heeded_while_nothing_happens(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that takes ten minutes over a document: no event comes, and the processes have to be ended."""
    monkeypatch.setattr(writer, "_estimate", lambda *_: 0.0)
    asked = iter(range(1000))
    with small_shards(1400):
        arguments = source_of(corpus, "a.jsonl"), Watched(corpus / "notes", 600), str(corpus / "cache"), 2, True, 0
        with pytest.raises(WritingStopped):
            write_cache(*arguments, lambda: next(asked) > 5)
    assert shard_files(corpus) == []
    assert not [name for name in leftovers(corpus) if name.endswith(".tmp")]


@pytest.mark.parametrize("num_processes", [0, 2])
def test_a_file_that_changes_meanwhile_is_no_bad_record(
    corpus: Path, num_processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_estimate", lambda *_: 0.0)
    with small_shards(1400):
        source = source_of(corpus, "a.jsonl")
        content = (corpus / "a.jsonl").read_bytes()
        (corpus / "a.jsonl").write_bytes(content[:3000])
        with pytest.raises((SourceError, ValueError), match=r"a\.jsonl.*changed") as error:
            write_cache(source, ByteTokenizer(), str(corpus / "cache"), num_processes, False)
    assert isinstance(error.value, SourceError) or num_processes  # a process notices when it opens the file


class Changing(ByteTokenizer):
    """Changes a file where no sample lies, while it tokenises the document 5."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def encode_document(self, text: str) -> np.ndarray:
        if text.startswith("document-005"):
            with self.path.open("r+b") as file:
                file.seek(6000)
                file.write(b"z")
        return super().encode_document(text)


def test_a_shard_of_two_states_of_a_file_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [f"document-{i:03d} " + "x" * 2000 for i in range(100)])
    digest = source_of(tmp_path, "a.jsonl").files[0].digest
    with small_shards(50_000):
        source = source_of(tmp_path, "a.jsonl")
        with pytest.raises(SourceError, match=r"a\.jsonl changed while it was tokenised; start again"):
            write_cache(source, Changing(path), str(tmp_path / "cache"), 0, True)
        assert source_of(tmp_path, "a.jsonl").files[0].digest == digest  # another start would have taken the shard
        assert shard_files(tmp_path) == []
        tokens = everything(cached(source, tmp_path)).ids
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert np.array_equal(tokens, np.concatenate([ByteTokenizer().encode_document(text) for text in texts]))


def test_a_folder_that_cannot_be_written_is_named_with_its_key(corpus: Path) -> None:
    (corpus / "file").touch()
    source = source_of(corpus, "a.jsonl")
    with pytest.raises(ValueError, match=r"data\.cache_dir = '.*/file/x': cannot write the token cache to .*Not a dir"):
        write_cache(source, ByteTokenizer(), str(corpus / "file" / "x"), 0, True)


@pytest.mark.parametrize("num_processes", [0, 2])
def test_a_bug_is_told_with_its_place(corpus: Path, num_processes: int) -> None:
    with pytest.raises(RuntimeError, match=r"a\.jsonl:118: cannot tokenise: KeyError: 'a bug'"):
        write(corpus, Broken(), num_processes, stop=False)


def test_log_lines_show_progress_and_time_left(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processes, "_LOG_SECONDS", 0.0)
    monkeypatch.setattr(shards, "_REPORT_BYTES", 200)
    write(corpus, ByteTokenizer(), 0)
    lines = [line for line in log.messages if line.startswith("tokenising data: ")]
    shares = [float(line.split()[2].rstrip("%")) for line in lines]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == 100
    assert len({share for share in shares if 0 < share < 14}) > 2  # also within the first of seven shards
    assert all(re.search(r"MB/s, (\d+\.\d minutes left|time left not known yet)$", line) for line in lines)


def test_the_tokenizer_can_be_sent_to_another_process() -> None:
    tokenizer = Tokenizer.load(str(SHIPPED))
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    text = "def f(x):\n    return x\n\u00e9 <|end_of_text|>"
    assert copy.encode_document(text).tolist() == tokenizer.encode_document(text).tolist()
