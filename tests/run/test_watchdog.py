"""What the watchdog and the meeting of ranks do by themselves: no clock is trusted, nobody is awaited in silence."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.gloo import free_port
from tests.support.lives import forked, until
from titanlite.run.joining import init_process_group
from titanlite.run.watchdog import Watchdog

PACKAGE = Path(__file__).parents[2] / "titanlite"


def test_no_wall_clock_decides_anything() -> None:
    """time.time is asked for names of event files only; dates are written and never read."""
    uses = {
        (path.relative_to(PACKAGE).as_posix(), use)
        for path in PACKAGE.rglob("*.py")
        for use in re.findall(r"time\.time\(|time_ns\(|datetime\.now", path.read_text())
    }
    assert uses == {("run/metrics.py", "time.time(")}


def join(rank: int, port: int, log: str, timeout_seconds: int) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from titanlite.log import init_logging

    init_logging(rank)
    try:
        init_process_group("cpu", timeout_seconds, tell_seconds=0.3)
    except OSError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    print("joined", file=sys.stderr, flush=True)
    until(Path(log).with_name("all joined").exists, "the other ranks")  # rank 0 serves the store
    os._exit(0)


@pytest.mark.parametrize("late", [0, 2])
def test_a_late_rank_is_named_while_the_others_wait_and_does_no_harm(late: int, tmp_path: Path) -> None:
    port = free_port()
    logs = [tmp_path / f"{rank}.log" for rank in range(3)]
    started = {rank: forked(join, rank, port, str(logs[rank]), 300) for rank in range(3) if rank != late}
    awaited = "waiting for rank 2 (" if late else f"waiting for rank 0, or its launcher, at 127.0.0.1:{port} ("
    for rank in started:
        until(lambda rank=rank: logs[rank].exists() and logs[rank].read_text().count(awaited) >= 2, awaited)
    started[late] = forked(join, late, port, str(logs[late]), 300)
    until(lambda: all(log.exists() and "joined" in log.read_text() for log in logs), "three ranks")
    (tmp_path / "all joined").touch()
    for process in started.values():
        process.join(60)
        assert process.exitcode == 0


def test_a_rank_that_never_comes_is_named_when_the_time_is_up(tmp_path: Path) -> None:
    port = free_port()
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    started = [forked(join, rank, port, str(logs[rank]), 4) for rank in range(2)]
    for process in started:
        process.join(60)
        assert process.exitcode == 1
    waited = "waited 4 s (comm.init_timeout_seconds) for rank 2: look for its log and its host"
    # Rank 0, which serves the store where no launcher does, may end first.
    closed = f"the store at 127.0.0.1:{port} was closed while this rank waited for rank 2"
    for log in logs:
        said = log.read_text()
        assert "Traceback" not in said
        assert waited in said or (closed in said and log is logs[1])


def join_an_agent(rank: int, port: int, log: str) -> None:
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    join(rank, port, log, 600)


def test_a_rank_whose_launcher_died_before_it_could_look_ends_in_seconds(tmp_path: Path) -> None:
    log, port = tmp_path / "log", free_port()
    process = forked(join_an_agent, 0, port, str(log))
    process.join(60)
    assert process.exitcode == 1
    assert f"the launcher's store at 127.0.0.1:{port} is gone, and so the launcher" in log.read_text()


WATCHED = """
import os, signal, time
from titanlite.run.watchdog import Watchdog
dog = Watchdog()
dog.set_timeout({timeout}, "comm.train_timeout_seconds")
dog.mark("working", 7)
time.sleep(1)  # some ticks of the watchdog
print("marked", flush=True)
{rest}
"""


def watched(rest: str, timeout: int = 6) -> "subprocess.Popen[str]":
    """A job of one rank, without torch."""
    code = WATCHED.format(rest=rest, timeout=timeout)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_job_of_one_rank_that_stands_still_ends_in_time_and_shows_where() -> None:
    began = time.monotonic()
    process = watched("def stuck(): time.sleep(1000)\nstuck()")
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert time.monotonic() - began > 6
    assert f"pid {process.pid}) in step 7, working: it stands still" in told
    assert "in stuck" in told


def test_a_suspended_process_is_not_taken_for_one_that_hangs() -> None:
    """Ctrl-Z for longer than the timeout, then fg. It stops itself, at once: this process may be kept waiting."""
    rest = "os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(1)\ndog.mark('done')\ndog.close()\nprint('done')"
    process = watched(rest, timeout=8)
    stat = Path(f"/proc/{process.pid}/stat")
    until(lambda: stat.read_text().rpartition(") ")[2].startswith("T"), "the process to stop")
    time.sleep(9)  # the time itself is what is tested
    process.send_signal(signal.SIGCONT)
    out, told = process.communicate(timeout=60)
    assert (process.returncode, out, told) == (0, "marked\ndone\n", "")


def test_a_mark_costs_nothing_that_a_step_would_notice() -> None:
    """Some ten marks a step, and the fastest step of the smallest model takes milliseconds."""
    dog = Watchdog()
    try:
        began = time.thread_time()
        for number in range(20_000):
            dog.mark("forward", number)
        microseconds = (time.thread_time() - began) / 20_000 * 1e6
    finally:
        dog.close()
    assert microseconds < 50
