"""A rank hangs, dies, or is asked to stop, at every stage of a run: real processes, real signals, real files.

Each case shows what the user sees, the exit codes, and that the next start goes on exactly.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lives import Lives, lives, num_steps, until
from tests.tiny_run import fingerprints, write_config
from titanlite import opening
from titanlite.checkpoint import tensors as checkpoint_files
from titanlite.config import DataConfig
from titanlite.data.loader import Batch, Loader, build_loader
from titanlite.trainer import Trainer

RUN = {"training__steps": 40, "metrics__enable_tensorboard": False, "training__local_batch_size": 8}


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Lives]:
    with lives(tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The fingerprints of an uninterrupted run of 40 steps."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with lives(folder) as job:
        assert job.start(1, write_config(folder, **RUN, checkpoint__interval=40)).wait() == [0]
    return fingerprints(folder / "run")


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run/status.json").read_text())


def goes_on(job: Lives, config: Path, expected: dict[int, str], *overrides: str) -> None:
    """The next start needs no help and ends with the batches of a run that nothing happened to."""
    assert job.start(2, config, *overrides).wait() == [0, 0]
    assert fingerprints(job.folder / "run") == expected


# A rank hangs


def stall_the_loader(rank: int) -> None:
    right = Loader.__next__

    def stalled_read(self: Loader) -> Batch:
        batch = right(self)
        if rank == 1 and batch.cursor["row"] == 6 * 8:
            time.sleep(1000)
        return batch

    Loader.__next__ = stalled_read  # type: ignore[method-assign]


def stall_the_forward_pass(rank: int) -> None:
    right = Trainer.__init__

    def build(self: Trainer, *arguments: Any) -> None:
        right(self, *arguments)

        def stuck_kernel(*_: Any) -> None:
            if rank == 1 and self.step == 6:
                time.sleep(1000)

        self.model.layers["1"].register_forward_pre_hook(stuck_kernel)

    Trainer.__init__ = build  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("fault", "phase", "why", "place"),
    [
        (stall_the_loader, "waiting for its data", "the others have passed this and wait", "stalled_read"),
        (stall_the_forward_pass, "forward, backward, update", "the others wait for it", "stuck_kernel"),
    ],
)
def test_a_rank_that_hangs_is_named_and_ends_the_job(job: Lives, fault: Any, phase: str, why: str, place: str) -> None:
    config = write_config(job.folder, **RUN, comm__train_timeout_seconds=4)
    life = job.start(2, config, fault=fault)
    assert life.wait() == [1, 1]
    pid = life.processes[1].pid
    said = (
        f"no progress for 4 s (comm.train_timeout_seconds = 4): rank 1 ({os.uname().nodename}, pid {pid}) in step 6,"
        f" {phase}: {why}"
    )
    for rank in range(2):
        assert life.log(rank).count("no progress") == 1
        assert said in life.log(rank)
        assert "Traceback" not in life.log(rank)
    assert place in life.log(1), "where it stands"
    assert place not in life.log(0)
    assert (status(job.folder)["state"], status(job.folder)["reason"]) == ("failed", said)


def test_a_stopped_process_is_named_and_the_next_start_goes_on(job: Lives, expected: dict[int, str]) -> None:
    """Rank 0, which writes the status else. It is killed at last, as a launcher does, and its claim lapses with it."""
    config = write_config(job.folder, **RUN, comm__train_timeout_seconds=6, checkpoint__interval=4)
    life = job.start(2, config)
    until(lambda: num_steps(job.folder / "run") >= 5, "five steps")
    life.send(0, signal.SIGSTOP)
    assert life.wait(1) == [1]
    life.send(0, signal.SIGKILL)
    assert life.wait(0) == [-signal.SIGKILL]
    said = f"rank 0 ({os.uname().nodename}, pid {life.processes[0].pid}) in step "
    assert said in status(job.folder)["reason"]
    assert "no sign of life from the process" in status(job.folder)["reason"]
    assert status(job.folder)["reason"] in life.log(1)
    assert "Traceback" not in life.log(1)
    goes_on(job, config, expected)


# A rank dies


def kill_in_step(rank: int) -> None:
    """Rank 1 is killed in the third step of each life, as from outside."""
    right = Trainer.train_step

    def train_step(self: Trainer, *arguments: Any) -> Any:
        self.lived = getattr(self, "lived", 0) + 1  # type: ignore[attr-defined]
        if rank == 1 and self.lived == 3:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGKILL)
        return right(self, *arguments)

    Trainer.train_step = train_step  # type: ignore[method-assign]


def test_a_job_that_is_restarted_goes_on_by_itself_as_often_as_a_rank_dies(
    job: Lives, expected: dict[int, str]
) -> None:
    """As torchrun --max-restarts does it, with one store for all attempts; the slow test below uses torchrun."""
    config = write_config(job.folder, **RUN, checkpoint__interval=2)
    for _ in range(3):
        life = job.start(2, config, fault=kill_in_step)
        assert life.wait() == [1, -signal.SIGKILL]
        assert f"rank 1 ({os.uname().nodename}, pid {life.processes[1].pid}) in step " in life.log(0)
        assert "gives no sign of life any more; the next start goes on from the last checkpoint" in life.log(0)
        assert "Traceback" not in life.log(0)
        assert status(job.folder)["state"] == "failed"
    goes_on(job, config, expected)


# A stop is asked for


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_grace_shorter_than_a_save_keeps_the_last_commit(
    number: signal.Signals, job: Lives, expected: dict[int, str]
) -> None:
    config = write_config(job.folder, **RUN, checkpoint__interval=4, comm__grace_seconds=2)
    life = job.start(2, config, fault=slow_second_save)
    until((job.folder / "saving").exists, "the save of step 8")
    life.send(1, number)
    assert life.wait() == [0, 0]
    found = status(job.folder)
    assert (found["state"], found["step"]) == ("preempted", 4)
    assert f"{number.name} to rank 1 (" in found["reason"]
    assert "comm.grace_seconds = 2 were over in step 8, saving; the last checkpoint stands" in found["reason"]
    assert "Traceback" not in life.log(0) + life.log(1)
    left = os.listdir(job.folder / "run/checkpoint")
    assert "step-00000004" in left
    assert "step-00000008" not in left
    goes_on(job, config, expected)
    assert not [name for name in os.listdir(job.folder / "run/checkpoint") if name.startswith(".")]


def slow_second_save(rank: int) -> None:
    right = checkpoint_files.write

    def write(path: str, *arguments: Any) -> Any:
        written = right(path, *arguments)
        if rank == 0 and "step-00000008" in path:
            (Path(path).parent.parent.parent / "saving").touch()
            time.sleep(1000)
        return written

    checkpoint_files.write = write


def slow_reading(rank: int) -> None:
    """Rank 0 needs long to open its data, as for an index or a token cache; the other waits for it."""

    def build(data: DataConfig, *arguments: Any, **named: Any) -> Loader:
        Path(data.cache_dir).with_name("opening").touch()
        time.sleep(1000 if rank == 0 else 0)
        return build_loader(data, *arguments, **named)

    opening.build_loader = build  # type: ignore[attr-defined]


def test_a_stop_before_the_first_step_is_heeded_in_seconds(job: Lives, expected: dict[int, str]) -> None:
    config = write_config(job.folder, **RUN)
    life = job.start(2, config, "--comm.grace_seconds=2", fault=slow_reading)
    until((job.folder / "opening").exists, "the opening of the data")
    life.send(1, signal.SIGUSR1)
    assert life.wait() == [0, 0]
    assert (status(job.folder)["state"], status(job.folder)["step"]) == ("preempted", 0)
    assert "SIGUSR1 to rank 1" in status(job.folder)["reason"]
    assert "preparing data" in status(job.folder)["reason"]
    goes_on(job, config, expected)
