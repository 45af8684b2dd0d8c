"""What a job does at its edges: a stop before the first step, a failure during a save, steps between logged ones."""

import contextlib
import errno
import fcntl
import io
import json
import os
import resource
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.support.gloo import ranks
from tests.support.tiny_run import fingerprints, metrics, write_config
from titanlite.checkpoint import tensors as checkpoint_files
from titanlite.data.loader import Loader, build_loader
from titanlite.model.ops.cross_entropy import OutputHead
from titanlite.run.agreement import RunFailed, agreed
from titanlite.run.folder import claim_run_folder
from titanlite.train import run as train_run
from titanlite.train.__main__ import main
from titanlite.train.run import Run
from titanlite.trainer import Trainer


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run/status.json").read_text())


def started(config: Path, *overrides: str) -> int:
    return main(["--job.config_file", str(config), *overrides])


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the loss of these steps NaN, and so its gradients. One micro-batch a step is assumed."""
    exact, calls = OutputHead.forward, iter(range(1, 1000))

    def spoilt(self: OutputHead, hidden: Tensor, labels: Tensor) -> Tensor:
        return exact(self, hidden, labels) * (float("nan") if next(calls) in steps else 1.0)

    monkeypatch.setattr(OutputHead, "forward", spoilt)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_stop_before_the_first_step_can_be_resumed(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, decide_start = write_config(tmp_path, training__steps=2), train_run.decide_start

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        return decide_start(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_run, "decide_start", signalled)
        assert started(config) == 0
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("preempted", 0)
    assert started(config) == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]


def test_a_failed_run_leaves_the_save_that_was_pending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint_files.write

    def slow(*arguments: Any) -> Any:
        time.sleep(2)
        return write(*arguments)

    monkeypatch.setattr(checkpoint_files, "write", slow)
    spoil(monkeypatch, 5)
    config = write_config(tmp_path, checkpoint__async_mode="async", training__local_batch_size=8)
    assert started(config) == 1
    assert [path.name for path in (tmp_path / "run/checkpoint").iterdir()] == ["step-00000004"]
    assert status(tmp_path)["state"] == "failed"
    assert "step 5" in status(tmp_path)["reason"]


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def final_weights(folder: Path, config: Path, *overrides: str) -> dict[str, Tensor]:
    """Those in memory when the loop ends or fails."""
    states: list[dict[str, Tensor]] = []
    close = Run.__exit__

    def keep(self: Run, *error: Any) -> None:
        states.append({name: full(tensor) for name, tensor in self.trainer.state().items()})
        close(self, *error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "__exit__", keep)
        started(config, *overrides)
    return states[0]


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_no_bad_update_reaches_the_weights(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 3 and 5 of 8 are bad. stop: nothing is updated after step 2, though steps 4 and 6 to 8 are made before the
    flag is read; skip: the updates are those of a run in which both steps have no gradient and AdamW does not run."""
    config = write_config(
        tmp_path, training__local_batch_size=8, lr_scheduler__decay_ratio=0.0, checkpoint__enable=False
    )
    overrides = [f"--training.on_nonfinite={mode}", "--metrics.log_freq=100"]
    with monkeypatch.context() as patch:
        spoil(patch, 3, 5)
        bad = final_weights(tmp_path, config, *overrides, f"--job.dump_folder={tmp_path / 'bad'}")
    update = Trainer._update

    def left_out(self: Trainer, loss: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        if self.step in (3, 5) or (mode == "stop" and self.step > 2):
            self.optimizer.zero_grad()
            return loss, loss
        return update(self, loss, lr)

    monkeypatch.setattr(Trainer, "_update", left_out)
    expected = final_weights(tmp_path, config, f"--job.dump_folder={tmp_path / 'good'}")
    for name, tensor in expected.items():
        assert torch.equal(bad[name], tensor), name


def test_skipped_updates_are_counted_over_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two in the first life (told once, named by step and batch), one in the second: more than two in all."""
    config = write_config(
        tmp_path, training__local_batch_size=8, training__on_nonfinite="skip", training__max_skipped_steps=2
    )
    with monkeypatch.context() as patch:
        spoil(patch, 2, 3)
        assert started(config, "--metrics.log_freq=4") == 0
    told = capsys.readouterr().err
    name = (
        fingerprints(tmp_path / "run").get(2)
        or json.loads((tmp_path / "run/cursor.jsonl").read_text().splitlines()[1])["batch_fingerprint"]
    )
    assert told.count("updates left out so far") == 1
    assert f"step 2 (batch {name}) is not finite; updates left out so far: 2" in told
    manifest = json.loads((tmp_path / "run/checkpoint/step-00000008/manifest.json").read_text())
    assert manifest["meta"]["skipped_steps"] == 2
    spoil(monkeypatch, 1)
    assert started(config, "--training.steps=12") == 1
    assert "3 updates were left out, more than training.max_skipped_steps = 2" in capsys.readouterr().err


def test_no_checkpoint_after_a_bad_step_between_logged_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 4)
    config = write_config(tmp_path, training__local_batch_size=8, checkpoint__interval=5, metrics__log_freq=100)
    assert started(config) == 1
    assert not (tmp_path / "run/checkpoint").exists()


def test_logged_steps_and_the_end_between_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first, every log_freq-th and the last step are logged; one without a logged step says what it did too."""
    config = write_config(tmp_path)
    assert started(config, "--metrics.log_freq=3") == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 3, 6, 8]
    events = EventAccumulator(str(tmp_path / "run/tb")).Reload()
    assert [event.step for event in events.Scalars("checkpoint_seconds")] == [4, 8]
    assert all(0.1 < event.value < 40 for event in events.Scalars("documents_per_row"))
    assert events.Scalars("source/data/epoch")[0].value < 1
    capsys.readouterr()

    def stop_at_ten(self: Run, *arguments: Any) -> None:
        finish_step(self, *arguments)
        if self.trainer.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    finish_step = Run.finish_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "finish_step", stop_at_ten)
        assert started(config, "--metrics.log_freq=100", "--training.steps=20") == 0
    told = capsys.readouterr().err
    assert "no step was made" not in told
    assert "10 (resumed after step 8)" in told


def test_a_trace_is_written(tmp_path: Path) -> None:
    config = write_config(tmp_path, profiling__enable_profiling=True, profiling__profile_freq=4, training__steps=5)
    assert started(config) == 0
    assert [path.name for path in (tmp_path / "run/profile").iterdir()] == ["step-00000004-rank0.json"]


def test_without_saving_a_run_leaves_checkpoints_and_their_logs_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    assert started(config) == 0
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert started(config, "--checkpoint.enable=false", "--training.steps=12") == 1
    assert "checkpoint.enable = false, and" in capsys.readouterr().err
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def claim(folder: Path) -> str:
    try:
        with claim_run_folder(folder / str(dist.get_rank()) if folder.name == "apart" else folder):
            return "held"
    except RunFailed as error:
        return str(error)


def test_folder_must_be_shared(tmp_path: Path) -> None:
    assert ranks(2).run(claim, tmp_path / "shared") == ["held"] * 2
    for told in ranks(2).run(claim, tmp_path / "apart"):
        assert "is not the same folder on rank 1" in told


def test_folder_is_held_by_one_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run/.claim", "w") as other:
        other.write("elsewhere pid 1")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        assert started(config) == 1
    assert "is in use by another job (elsewhere pid 1)" in capsys.readouterr().err
    assert not (tmp_path / "run/status.json").exists()


def test_storage_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert started(write_config(tmp_path, training__steps=1)) == 0
    assert "no locks on this storage" in capsys.readouterr().err


def test_an_error_without_words_is_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with agreed():
            raise ValueError

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RunFailed, match="ValueError"):
            fail()
    finally:
        dist.destroy_process_group()


def main_with_own_paths(config: Path, *overrides: str) -> tuple[int, str]:
    """`main` with overrides in which {rank} stands for the rank."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        code = main(["--job.config_file", str(config), *(o.replace("{rank}", str(dist.get_rank())) for o in overrides)])
    return code, printed.getvalue()


@pytest.mark.parametrize("other", ["corpus", "tokenizer", ""])
def test_ranks_that_read_other_files_train_nothing(tmp_path: Path, other: str) -> None:
    config = write_config(tmp_path, training__steps=1)
    for name in ("corpus", "tokenizer"):
        for rank in "01":
            shutil.copytree(tmp_path / name, tmp_path / (name + rank))
    if other == "corpus":
        (tmp_path / "corpus1/00.txt").write_text("as it was written by now")
    elif other:
        end = tmp_path / "tokenizer1/tokenizer_config.json"
        end.write_text(end.read_text().replace("<|end|>", "<|fin|>"))
    own = [f'--data.paths=["{tmp_path}/corpus{{rank}}/*.txt"]', f"--tokenizer.path={tmp_path}/tokenizer{{rank}}"]
    ended = ranks(2).run(main_with_own_paths, config, *own)
    if not other:
        assert [code for code, _ in ended] == [0, 0]
        return
    assert [code for code, _ in ended] == [1, 1]
    assert f"the {other} in " in ended[0][1]
    assert "is not the same on every rank" in ended[0][1]
    assert not (tmp_path / "run/metrics.jsonl").exists()


def main_with_a_slow_rank(config: Path) -> int:
    """`main` where rank 1 prepares its data for longer than collectives wait."""

    def hurry(*arguments: Any) -> Any:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
        return decide_start(*arguments)

    def build(*args: Any, **kwargs: Any) -> Loader:
        time.sleep(4 * dist.get_rank())
        return build_loader(*args, **kwargs)

    decide_start = train_run.decide_start
    with patch.object(train_run, "decide_start", hurry), patch.object(train_run, "build_loader", build):
        return main(["--job.config_file", str(config)])


def test_ranks_wait_for_one_that_writes_a_cache(tmp_path: Path) -> None:
    assert ranks(2).run(main_with_a_slow_rank, write_config(tmp_path, training__steps=1)) == [0, 0]


def main_with_small_files(config: Path, kib: int) -> tuple[int, str]:
    """`main` on ranks of which the first may write files of so many KiB only; its exit code and what it printed."""
    printed = io.StringIO()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 1024, limits[1]))
    try:
        with contextlib.redirect_stderr(printed):
            return main(["--job.config_file", str(config)]), printed.getvalue()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_logs_that_cannot_be_written_end_the_run_on_every_rank(tmp_path: Path) -> None:
    config = write_config(
        tmp_path, training__steps=400, checkpoint__enable=False, metrics__enable_tensorboard=False, metrics__log_freq=7
    )
    (code, told), (other_code, _) = ranks(2).run(main_with_small_files, config, 24)
    assert (code, other_code) == (1, 1)
    assert "the logs of step" in told
    assert "File too large" in told
