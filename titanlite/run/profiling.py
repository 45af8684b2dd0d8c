"""Profiler traces and CUDA memory snapshots of chosen steps, into the run folder.

Owns what is written under profile/ and memory/; refuses to decide when a step ends: the loop calls `step`. On every
rank, each with its own files. A traced step is slower than the others, and its throughput is measured as it is.
"""

from pathlib import Path

import torch

from titanlite.config import ProfilingConfig
from titanlite.log import logger

ACTIVE_STEPS = 3  # steps in a trace
WARMUP_STEPS = 1  # steps before them that are traced and thrown away: the tracer's own start-up would distort them
SNAPSHOT_EVENTS = 100_000  # newest allocations and frees in a memory snapshot


class Profiling:
    """Context around the training loop; call `step()` at the end of each step.

    Every profile_freq steps of this process: profile/step-00000100-rank0.json, a Chrome trace of the last 3 steps
    (chrome://tracing or ui.perfetto.dev), and memory/step-00000100-rank0.pickle (pytorch.org/memory_viz), which is
    also written, as ...-oom, when CUDA memory runs out inside the context. ValueError: snapshots without CUDA.
    """

    def __init__(
        self, config: ProfilingConfig, *, folder: str | Path, rank: int, device: torch.device, start_step: int
    ) -> None:
        if config.enable_memory_snapshot and device.type != "cuda":
            raise ValueError(
                f"profiling.enable_memory_snapshot = true: needs a CUDA device, this run is on {device.type}; use false"
            )
        # The config's own check, before any rank starts, tells the user.
        assert config.profile_freq >= WARMUP_STEPS + ACTIVE_STEPS or not config.enable_profiling
        self._config, self._folder, self._rank, self._device = config, Path(folder), rank, device
        self._start_step = self._step = start_step
        self._profiler: torch.profiler.profile | None = None

    def __enter__(self) -> "Profiling":
        if self._config.enable_memory_snapshot:
            # Underscored in torch, but the only interface there is and the one that its documentation tells to use.
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS)
        self._start_trace_if_due()
        return self

    def step(self) -> None:
        """The step is done."""
        self._step += 1
        window_ends = (self._step - self._start_step) % self._config.profile_freq == 0
        if self._profiler is not None:
            self._profiler.step()
            if window_ends:
                self._stop_trace().export_chrome_trace(self._path("profile", ".json"))
        if self._config.enable_memory_snapshot and window_ends:
            torch.cuda.memory._dump_snapshot(self._path("memory", ".pickle"))
        self._start_trace_if_due()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if self._config.enable_memory_snapshot:
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.memory._dump_snapshot(self._path("memory", "-oom.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        if self._profiler is not None:
            self._stop_trace()

    def _start_trace_if_due(self) -> None:
        """A profiler per trace: one that runs for the whole of training, on a repeating schedule, crashes the process
        at exit (torch 2.13) when writing one of its traces fails."""
        steps_left = self._config.profile_freq - (self._step - self._start_step) % self._config.profile_freq
        if not self._config.enable_profiling or steps_left != WARMUP_STEPS + ACTIVE_STEPS:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        schedule = torch.profiler.schedule(wait=0, warmup=WARMUP_STEPS, active=ACTIVE_STEPS, repeat=1)
        self._profiler = torch.profiler.profile(activities=activities, schedule=schedule, record_shapes=True)
        self._profiler.start()

    def _stop_trace(self) -> torch.profiler.profile:
        assert self._profiler is not None
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        return profiler

    def _path(self, kind: str, ending: str) -> str:
        path = self._folder / kind / f"step-{self._step:08d}-rank{self._rank}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        logger.info("writing %s", path)
        return str(path)
