"""What stands between a fault and a long run of wrong numbers: each guard is seen to be at its post in a whole run."""

import errno
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchdata.nodes.loader import LoaderIterator

from tests.support.tiny_run import metrics, write_config
from titanlite.checkpoint import Checkpointer
from titanlite.data.loader import Batch
from titanlite.files import read_json, write_json
from titanlite.model import selfcheck
from titanlite.model.ops.cross_entropy import OutputHead
from titanlite.train.__main__ import main
from titanlite.train.run import Run


def started(config: Path, *overrides: str) -> int:
    return main(["--job.config_file", str(config), *overrides])


def test_the_first_batch_is_held_against_the_packer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = LoaderIterator.next

    def moved(self: LoaderIterator[Batch]) -> Batch:
        batch = right(self)
        return replace(batch, begins=[*batch.begins[:-1], np.array([0, 63])])

    monkeypatch.setattr(LoaderIterator, "next", moved)
    assert started(write_config(tmp_path)) == 1
    assert "row 7 of the first batch: a document begins at position" in capsys.readouterr().err
    assert metrics(tmp_path / "run") == []


def test_a_backend_that_is_wrong_here_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = selfcheck.realise
    monkeypatch.setattr(selfcheck, "realise", lambda starts, backend: right(torch.zeros_like(starts), backend))
    assert started(write_config(tmp_path)) == 1
    assert "model.attention = 'sdpa' is wrong on this machine" in capsys.readouterr().err
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_loss_that_is_infinite_stops_the_run_also_where_its_gradient_is_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact, calls = OutputHead.forward, iter(range(1, 1000))

    def spoilt(self: OutputHead, hidden: Tensor, labels: Tensor) -> Tensor:
        return exact(self, hidden, labels) + (float("inf") if next(calls) == 3 else 0.0)

    monkeypatch.setattr(OutputHead, "forward", spoilt)
    assert started(write_config(tmp_path, training__local_batch_size=8)) == 1
    assert "step 3" in capsys.readouterr().err
    bad = metrics(tmp_path / "run")[-1]
    assert (bad["step"], bad["loss"]) == (3, None)
    assert bad["grad_norm"] is not None
    assert not (tmp_path / "run/checkpoint").exists()


def test_a_resumed_run_draws_the_numbers_that_the_old_one_would_have_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def next_numbers() -> Tensor:
        state = torch.get_rng_state()
        numbers = torch.randn(8)
        torch.set_rng_state(state)
        return numbers

    drawn: list[Tensor] = []
    save, next_step = Checkpointer.save, Run.next_step

    def at_save(self: Checkpointer, *arguments: Any) -> None:
        drawn.append(next_numbers())
        save(self, *arguments)

    def at_step(self: Run) -> Any:
        drawn.append(next_numbers())
        return next_step(self)

    config = write_config(tmp_path)
    torch.manual_seed(1234)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", at_save)
        assert started(config, "--training.steps=4") == 0
    torch.manual_seed(5678)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "next_step", at_step)
        assert started(config, "--training.steps=5") == 0
    assert len(drawn) == 2
    assert torch.equal(drawn[0], drawn[1])


def test_timeouts_reach_every_group_and_change_after_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[timedelta]] = []
    next_step = Run.next_step

    def watched(self: Run) -> Any:
        groups = [dist.group.WORLD, *self.mesh.device_mesh.get_all_groups()]
        seen.append({group._get_backend(torch.device("cpu")).options._timeout for group in groups})
        return next_step(self)

    monkeypatch.setattr(Run, "next_step", watched)
    config = write_config(tmp_path, comm__init_timeout_seconds=501, comm__train_timeout_seconds=77, training__steps=3)
    assert started(config) == 0
    # Ten more than the watchdog allows, which knows who hangs.
    assert [{timeout.total_seconds() for timeout in timeouts} for timeouts in seen] == [{511}, {87}, {87}]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_json(path, {"state": "running"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            write_json(path, {"state": 5000 * "x"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_json(path) == {"state": "running"}


def test_at_no_moment_is_half_a_file_there(tmp_path: Path) -> None:
    """So that a kill leaves the old one or the new one: a thread reads all the while."""
    path = tmp_path / "status.json"
    contents = [{"state": 200_000 * letter} for letter in "ab"]
    write_json(path, contents[0])
    done = threading.Event()

    def read_all_the_while() -> list[bool]:
        found = []
        while not done.is_set():
            found.append(read_json(path) in contents)
        return found

    with ThreadPoolExecutor(1) as executor:
        reading = executor.submit(read_all_the_while)
        for number in range(300):
            write_json(path, contents[number % 2])
        done.set()
    assert len(reading.result()) > 10
    assert all(reading.result())
