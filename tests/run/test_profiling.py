"""Real traces and snapshots, read back as the viewers read them."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from titanlite.config import ProfilingConfig
from titanlite.run.profiling import Profiling

CPU = torch.device("cpu")


def train(config: ProfilingConfig, folder: Path, steps: int, *, start_step: int = 0, rank: int = 0) -> None:
    """Step n multiplies an n x n matrix, so that a trace tells which steps it saw."""
    with Profiling(config, folder=folder, rank=rank, device=CPU, start_step=start_step) as profiling:
        for step in range(start_step + 1, start_step + steps + 1):
            torch.mm(torch.ones(step, step), torch.ones(step, step))
            profiling.step()


def traced_steps(path: Path) -> list[int]:
    events = json.loads(path.read_text())["traceEvents"]
    return [e["args"]["Input Dims"][0][0] for e in events if e.get("name") == "aten::mm"]


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_trace_covers_the_last_three_steps_of_each_window(tmp_path: Path) -> None:
    train(ProfilingConfig(enable_profiling=True, profile_freq=6), tmp_path, 13, rank=1)
    assert names(tmp_path) == ["profile/step-00000006-rank1.json", "profile/step-00000012-rank1.json"]
    assert traced_steps(tmp_path / "profile/step-00000006-rank1.json") == [4, 5, 6]
    assert traced_steps(tmp_path / "profile/step-00000012-rank1.json") == [10, 11, 12]


def test_windows_count_from_the_resumed_step_and_can_be_as_short_as_a_trace(tmp_path: Path) -> None:
    train(ProfilingConfig(enable_profiling=True, profile_freq=4), tmp_path, 4, start_step=101)
    assert names(tmp_path) == ["profile/step-00000105-rank0.json"]
    assert traced_steps(tmp_path / "profile/step-00000105-rank0.json") == [103, 104, 105]


@pytest.mark.parametrize("steps", [2, 3, 4, 5])
def test_a_run_that_ends_before_or_within_a_trace_writes_none(tmp_path: Path, steps: int) -> None:
    train(ProfilingConfig(enable_profiling=True, profile_freq=6), tmp_path, steps)
    assert names(tmp_path) == []


def test_a_trace_that_cannot_be_written_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file where a folder is needed")
    with pytest.raises(FileExistsError):
        train(ProfilingConfig(enable_profiling=True, profile_freq=6), tmp_path, 13)


def test_off_writes_nothing(tmp_path: Path) -> None:
    train(ProfilingConfig(), tmp_path, 3)
    assert names(tmp_path) == []


def test_memory_snapshots_without_cuda_are_refused_before_training(tmp_path: Path) -> None:
    config = ProfilingConfig(enable_memory_snapshot=True)
    with pytest.raises(ValueError) as error:
        Profiling(config, folder=tmp_path, rank=0, device=CPU, start_step=0)
    assert str(error.value) == (
        "profiling.enable_memory_snapshot = true: needs a CUDA device, this run is on cpu; use false"
    )


@pytest.mark.gpu
def test_memory_snapshots_at_the_window_and_when_memory_runs_out(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    config = ProfilingConfig(enable_memory_snapshot=True, profile_freq=2)

    def run_out_of_memory() -> None:
        with Profiling(config, folder=tmp_path, rank=0, device=device, start_step=0) as profiling:
            held = []
            for _ in range(3):
                held.append(torch.ones(2**20, device=device))
                profiling.step()
            torch.empty(2**50, device=device)

    with pytest.raises(torch.OutOfMemoryError):
        run_out_of_memory()
    assert names(tmp_path) == ["memory/step-00000002-rank0.pickle", "memory/step-00000003-rank0-oom.pickle"]
    for name in names(tmp_path):
        assert pickle.loads((tmp_path / name).read_bytes())["device_traces"][0]
