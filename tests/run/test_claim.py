"""One job per run folder, with locks and without, whatever the clocks say; and a dead one is in nobody's way.

Storage without locks is had by an flock that refuses, as NFS and Lustre do: there is none here to mount.
"""

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.support.lives import forked, until
from titanlite.log import logger
from titanlite.run import folder as claim_module
from titanlite.run.folder import Claim, InUse

BEAT, SILENT = 0.1, 1.5


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def hold(folder: Path, locks: bool, pipe: Connection) -> None:
    """A job that claims the folder and lives until it is told to end; it says what it got, and what it lost."""
    claim_module._SETTLE_SECONDS = 0.5
    if not locks:
        fcntl.flock = no_locks
    try:
        claim = Claim(folder, pipe.send, BEAT, SILENT)
    except InUse as error:
        pipe.send(str(error))
        return
    pipe.send("held")
    pipe.recv()
    claim.release()


class Holder:
    def __init__(self, folder: Path, locks: bool) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = forked(hold, folder, locks, theirs)
        theirs.close()

    @property
    def name(self) -> str:
        return f"{socket.gethostname()} pid {self.process.pid}"

    def said(self) -> str:
        assert self.pipe.poll(60)
        return str(self.pipe.recv())


@pytest.fixture
def held(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Holder]:
    """A live job on tmp_path; this process sees locks as the job does."""
    if not request.param:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(claim_module, "_SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(claim_module, "_DYING_SECONDS", 0.3)
    holder = Holder(tmp_path, request.param)
    assert holder.said() == "held"
    yield holder
    holder.process.kill()
    holder.process.join()


both = pytest.mark.parametrize("held", [True, False], indirect=True, ids=["locks", "no locks"])
without_locks = pytest.mark.parametrize("held", [False], indirect=True, ids=["no locks"])


def claims(folder: Path, silent_seconds: float = 60) -> float:
    """The seconds until it is had; it is given back. A live owner is seen as soon as it beats."""
    began = time.monotonic()
    Claim(folder, beat_seconds=BEAT, silent_seconds=silent_seconds).release()
    return time.monotonic() - began


@both
def test_a_second_job_is_refused_in_words_that_name_the_first(held: Holder, tmp_path: Path) -> None:
    with pytest.raises(InUse) as refused:
        claims(tmp_path)
    assert str(refused.value) == f"in use by another job ({held.name})"


@both
def test_the_claim_of_a_killed_job_lapses_at_once_on_its_own_machine(
    held: Holder, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    held.process.kill()
    held.process.join()
    claims(tmp_path)
    assert "watching" not in caplog.text


@both
def test_a_job_that_ends_lets_the_next_one_in(
    held: Holder, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    held.pipe.send("end")
    held.process.join()
    assert (tmp_path / ".claim").read_text() == ""
    claims(tmp_path)
    assert "watching" not in caplog.text


def test_an_owner_on_another_host_that_is_silent_loses_its_claim_after_a_while(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the lock is free: on Lustre it may be of one host only."""
    monkeypatch.setattr(logger, "propagate", True)
    Claim(tmp_path).release()
    path = tmp_path / ".claim"
    path.write_text(f"node9 pid 17 machine another token {'0' * 16} beat {5:010d}\n")
    with caplog.at_level(logging.WARNING):
        assert claims(tmp_path, SILENT) >= SILENT
    assert f"{path} is held by node9 pid 17: watching for 1.5 s whether it lives" in caplog.text
    assert "node9 pid 17 gave no sign of life: its claim has lapsed" in caplog.text


@pytest.mark.parametrize("years", [-20, 20])
@without_locks
def test_only_the_change_of_a_heartbeat_counts_and_no_clock(years: int, held: Holder, tmp_path: Path) -> None:
    """A live owner whose host, and a file server, have other times; its pid means nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claim_module, "_is_of_this_machine", lambda owner: False)
        patch.setattr(time, "time", lambda: years * 365 * 86400.0)
        os.utime(tmp_path / ".claim", (years * 10_000_000, years * 10_000_000) if years > 0 else (0, 0))
        with pytest.raises(InUse, match="in use by another job"):
            claims(tmp_path)


@without_locks
def test_of_jobs_that_start_at_one_moment_one_gets_the_folder(held: Holder, tmp_path: Path) -> None:
    held.pipe.send("end")
    held.process.join()
    jobs = [Holder(tmp_path, locks=False) for _ in range(4)]
    try:
        said = [job.said() for job in jobs]
        assert all(text == "held" or "another job (" in text for text in said)
        # On a busy machine the last to write may come after others have looked: they hear of it at their next beat.
        holding = [job for job, text in zip(jobs, said, strict=True) if text == "held"]
        while len(holding) > 1:
            holding = [job for job in holding if not job.pipe.poll(1)]
        assert len(holding) == 1
    finally:
        for job in jobs:
            job.process.kill()
            job.process.join()


def test_without_locks_a_job_looks_twice_before_it_takes_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one has found it free at the same moment, and writes later."""
    other = f"node9 pid 17 machine another token {'0' * 16} beat {1:010d}\n"
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(time, "sleep", lambda seconds: (tmp_path / ".claim").write_text(other))
    with pytest.raises(InUse, match="taken over by another job .node9 pid 17."):
        Claim(tmp_path)


@both
def test_an_owner_that_was_taken_over_hears_of_it_and_leaves_the_file_alone(held: Holder, tmp_path: Path) -> None:
    """It was suspended for longer than a claim lasts."""
    path = tmp_path / ".claim"
    os.kill(held.process.pid or 0, signal.SIGSTOP)
    path.write_text(new := f"node9 pid 17 machine another token {'0' * 16} beat {5:010d}\n")
    os.kill(held.process.pid or 0, signal.SIGCONT)
    assert held.said() == "taken over by another job (node9 pid 17)"
    held.pipe.send("end")
    held.process.join()
    assert path.read_text() == new


def test_a_claim_file_that_was_removed_is_nobodys(tmp_path: Path) -> None:
    claim = Claim(tmp_path)
    assert claim.taken_over() is None
    os.unlink(tmp_path / ".claim")
    assert claim.taken_over() == "claimed by nobody: .claim was removed"
    claim.release()
    assert not (tmp_path / ".claim").exists()


def test_a_folder_of_a_run_under_way_says_who_runs_it(tmp_path: Path) -> None:
    claim = Claim(tmp_path, beat_seconds=BEAT)
    seen = {(tmp_path / ".claim").read_text()}
    until(lambda: len(seen.union([(tmp_path / ".claim").read_text()])) > 1, "another beat")
    claim.release()
    assert json.dumps(seen.pop()).startswith(f'"{socket.gethostname()} pid {os.getpid()} machine ')
