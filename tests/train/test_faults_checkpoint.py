"""Faults of checkpoints as a user meets them: whole runs of the real verb, real files, real limits of the kernel.

Kills at any file operation of a save are in test_checkpoint_faults.py, what ranks agree on is in test_checkpoint.py.
"""

import ctypes
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.checkpoint.test_checkpoint import disk_full_on, error_of, log_lines, make, state
from tests.checkpoint.test_checkpoint_faults import cut, empty, flip, seal
from tests.support.gloo import ranks
from tests.support.lives import lives
from tests.support.tiny_run import fingerprints, metrics, state_of, write_config
from titanlite.checkpoint import Checkpointer, LostFolder, audit_checkpoint
from titanlite.train.__main__ import main
from titanlite.train.run import Run, Step
from titanlite.trainer import StepResult
from titanlite.verify import __main__ as verify

FILES = (".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json")
OLDER, NEWEST = "step-00000004", "step-00000008"
CONSTANT = {"lr_scheduler__decay_ratio": 0.0}  # so that more steps change none that were made


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks and 8 steps, saved at steps 4 and 8. Copy it."""
    folder = tmp_path_factory.mktemp("finished")
    assert ranks(2).run(main, ["--job.config_file", str(write_config(folder, **CONSTANT))]) == [0, 0]
    return folder


def copy_of(finished: Path, folder: Path, **overrides: Any) -> tuple[Path, list[str]]:
    """The checkpoints of a copied run, and the command line that takes the run on to step 10, on one rank."""
    shutil.copytree(finished / "run", folder / "run", symlinks=True)
    overrides = {"training__steps": 10, **CONSTANT, **overrides}
    config = write_config(folder, paths=str(finished / "corpus/*.txt"), **overrides)
    return folder / "run/checkpoint", ["--job.config_file", str(config)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def status(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run/status.json").read_text())
    return found


def of_another_step(file: Path) -> None:
    """A whole checkpoint under a wrong name."""
    shutil.rmtree(file.parent)
    shutil.copytree(file.parent.with_name(OLDER), file.parent)


def naming_a_file_outside(file: Path) -> None:
    shutil.copy(file.with_name("__1_0.distcp"), file.parent.parent / "outside")
    files = json.loads(file.read_bytes())["files"]
    seal(file.parent, step=8, files={**files, "../outside": files["__1_0.distcp"]})


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("__1_0.distcp", cut, "has .* bytes, the manifest says"),
    ("__0_0.distcp", flip, "has checksum"),
    ("__1_0.distcp", os.unlink, "missing"),
    (".metadata", flip, "has checksum"),
    ("manifest.json", os.unlink, "missing"),
    ("manifest.json", empty, "does not fit its own checksum"),
    ("manifest.json", lambda file: seal(file.parent, step=8, files={"x": 1}), "the record of 'x' is no size"),
    ("manifest.json", naming_a_file_outside, "names '../outside', which is not a file of this folder"),
    ("", of_another_step, "its manifest says that this is step 4"),
]
QUICK = (0, 4)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [pytest.param(*case, marks=[] if i in QUICK else pytest.mark.slow) for i, case in enumerate(DAMAGES)],
)
def test_a_run_goes_on_from_the_valid_one_before_and_says_so(
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    folder, argv = copy_of(finished, tmp_path)
    damage(folder / NEWEST / (name or "manifest.json"))
    kept = contents(folder)
    assert main([*argv, "--checkpoint.load_step=8", "--checkpoint.resume=must"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert len([line for line in told if line.startswith("titanlite: ")]) == 1
    assert told[-1].startswith(f"titanlite: {folder / NEWEST}{'/' * bool(name)}{name}: ")
    assert contents(folder) == kept  # what was asked for by name is refused and stays

    assert main(argv) == 0
    told = capsys.readouterr().err.splitlines()
    (aside,) = [line for line in told if "is set aside as" in line]
    (bad,) = [path.name for path in folder.iterdir() if path.name.startswith(f".bad-{NEWEST}-")]
    assert f"checkpoint {folder / NEWEST} is set aside as {bad}: {folder / NEWEST}{'/' * bool(name)}{name}: " in aside
    assert re.search(reason, aside)
    assert any(f"resuming from {folder / OLDER}" in line for line in told)
    again, before = metrics(tmp_path / "run"), metrics(finished / "run")
    assert [row["step"] for row in again] == list(range(1, 11))
    for left, right in zip(again, before, strict=False):
        assert left["batch_fingerprint"] == right["batch_fingerprint"]
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)  # of two ranks, and of one
    assert verify.main(["checkpoint", str(folder)]) == 0


def test_a_run_whose_every_checkpoint_is_damaged_does_not_begin_anew(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, argv = copy_of(finished, tmp_path)
    for path in folder.glob("step-*"):
        (path / "__0_0.distcp").unlink()
    before = (tmp_path / "run/metrics.jsonl").read_text()
    for _ in range(2):  # nor the next time, when they are called otherwise
        assert main(argv) == 1
        assert f"titanlite: {folder}: no valid checkpoint, and damaged ones that were set aside (.bad-step-" in (
            capsys.readouterr().err
        )
    assert (tmp_path / "run/metrics.jsonl").read_text() == before
    for path in folder.glob(".bad-*"):
        shutil.rmtree(path)
    assert main(argv) == 0


@pytest.mark.parametrize("num_flips", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found_and_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], num_flips: int
) -> None:
    """Single bits, half of them sampled over all bytes, half over the files: named by `verify checkpoint`, and
    refused by a resume, which takes the checkpoint before."""
    folder, argv = copy_of(finished, tmp_path)
    sizes = {name: (folder / NEWEST / name).stat().st_size for name in FILES}
    chance = random.Random(num_flips)
    sampled = chance.choices(FILES, list(sizes.values()), k=num_flips // 2)
    sampled += list(FILES) * (num_flips // 2 // len(FILES))
    sampled += chance.choices(FILES, k=num_flips - len(sampled))
    flips = [(name, chance.randrange(8 * sizes[name])) for name in sampled]

    told = ranks(1).run(_resume_with_each, str(folder), flips)[0]
    assert len(told) == num_flips
    for (name, bit), (problems, path, lines) in zip(flips, told, strict=True):
        assert len(problems) == 1, (name, bit)
        assert problems[0].startswith(f"{folder / NEWEST / name}: "), (name, bit)
        assert path == str(folder / OLDER), (name, bit)
        assert len(lines) == 1, (name, bit)
        assert f"{folder / NEWEST} is set aside as .bad-" in lines[0], (name, bit)
        assert problems[0] in lines[0], (name, bit)
    assert audit_checkpoint(str(folder / NEWEST)).problems == []

    flip_bit(folder / NEWEST / flips[0][0], flips[0][1])
    command = [sys.executable, "-m", "titanlite.verify", "checkpoint", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"  WRONG    {folder / NEWEST / flips[0][0]}: " in result.stdout
    assert result.stdout.count("WRONG") == 1
    assert main(argv) == 0
    assert f"resuming from {folder / OLDER}" in capsys.readouterr().err


def flip_bit(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def _resume_with_each(folder: str, flips: list[tuple[str, int]]) -> list[tuple[list[str], str | None, list[str]]]:
    """For each flip: the audit's problems, the checkpoint that a resume takes, what it logs. All is put back."""
    checkpointer, found = make(folder), []
    newest = Path(folder) / NEWEST
    for name, bit in flips:
        flip_bit(newest / name, bit)
        problems = audit_checkpoint(str(newest)).problems
        with log_lines() as lines:
            path = checkpointer.newest()
        found.append((problems, path, lines))
        for aside in Path(folder).glob(f".bad-{NEWEST}-*"):
            aside.rename(newest)
        flip_bit(newest / name, bit)
    return found


@contextmanager
def no_room_at(steps: tuple[int, ...]) -> Iterator[None]:
    """On the last rank, files may not grow while these steps are saved. An async save keeps its limit to its end."""
    finish_step, finish = Run.finish_step, Run.finish
    limited = ExitStack()

    def lift(run: Run) -> None:
        if run.checkpointer._pending is not None:
            run.checkpointer._pending.exception()
        limited.close()

    def limit(self: Run, step: Step, result: StepResult) -> None:
        lift(self)
        if self.trainer.step in steps:
            limited.enter_context(disk_full_on(torch.distributed.get_world_size() - 1, 4096))
        finish_step(self, step, result)

    def limit_at_the_end(self: Run) -> None:
        if 0 in steps:
            limited.enter_context(disk_full_on(torch.distributed.get_world_size() - 1, 4096))
        else:
            lift(self)
        finish(self)

    with mock.patch.object(Run, "finish_step", limit), mock.patch.object(Run, "finish", limit_at_the_end), limited:
        yield


def _train_without_room(argv: list[str], steps: tuple[int, ...]) -> tuple[int, list[str]]:
    with redirect_stderr(io.StringIO()) as told, no_room_at(steps):
        return main(argv), told.getvalue().splitlines()


def saved(lines: list[str], words: str) -> list[str]:
    """Steps of the lines about checkpoints that hold these words."""
    found = [re.search(r"checkpoint step (\d+)", line) for line in lines if words in line]
    return [match[1] for match in found if match]


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_save_that_fails_on_one_rank_stops_all_of_them(tmp_path: Path, mode: str) -> None:
    config = write_config(tmp_path, checkpoint__interval=2, checkpoint__async_mode=mode)
    ends = ranks(2).run(_train_without_room, ["--job.config_file", str(config)], (4,))
    assert [code for code, _ in ends] == [1, 1]
    assert status(tmp_path)["state"] == "failed"
    assert "checkpoint step 4 not saved: rank 1: [Errno 27] File too large: " in status(tmp_path)["reason"]
    assert status(tmp_path)["step"] == (4 if mode == "disabled" else 6)  # async: told before the next save
    assert saved(ends[0][1], "committed") == ["2"]
    assert saved(ends[1][1], "committed") == []
    assert names(tmp_path / "run/checkpoint") == ["step-00000002"]
    assert verify.main(["checkpoint", str(tmp_path / "run")]) == 0
    assert ranks(2).run(main, ["--job.config_file", str(config)]) == [0, 0]
    assert list(fingerprints(tmp_path / "run")) == list(range(1, 9))


def _mount(*arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(*arguments, None):
        raise OSError(ctypes.get_errno(), "mount")


def _read_only(folder: Path) -> None:
    """For this process alone, which is in a mount namespace of its own."""
    path, bind, remount, locked = bytes(folder), 4096, 32, 2 + 4 + 8  # nosuid, nodev, noexec are not ours to lift
    _mount(path, path, None, bind)
    _mount(None, path, None, bind | remount | os.ST_RDONLY | os.statvfs(folder).f_flag & locked)


def _small_files(_: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))  # a shard has more, a log less


def _cannot_write_from_step_4(rank: int, end: Callable[[Path], None]) -> None:
    if rank == 0:
        return
    if end is _read_only:
        new_user, new_mounts = 0x10000000, 0x20000
        assert ctypes.CDLL(None).unshare(new_user | new_mounts) == 0
    right = Run.finish_step

    def finish_step(self: Run, step: Step, result: StepResult) -> None:
        if self.trainer.step == 4:
            end(self.folder / "checkpoint")
        right(self, step, result)

    Run.finish_step = finish_step  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("end", "told"),
    [(_read_only, "[Errno 30] Read-only file system: "), (_small_files, "[Errno 27] File too large")],
    ids=["permission", "quota"],
)
def test_a_rank_that_may_not_write_any_more_fails_the_async_save_on_all(
    finished: Path, tmp_path: Path, end: Callable[[Path], None], told: str
) -> None:
    """In processes of their own, as torchrun starts them. Permission: the folder of checkpoints becomes read-only for
    rank 1, by a mount, since no mode keeps root out. Quota: the kernel's limit of a file's size stands for one of a
    user, as few machines let a test set; the same calls fail, with EFBIG instead of EDQUOT."""
    if end is _read_only and not _private_tmpfs():
        pytest.skip("a folder is mounted in a user namespace (unshare -rm), which this machine does not allow")
    config = write_config(
        tmp_path,
        paths=str(finished / "corpus/*.txt"),
        checkpoint__interval=2,
        checkpoint__async_mode="async",
        checkpoint__keep_latest_k=0,
        **CONSTANT,
    )
    with lives(tmp_path) as job:
        life = job.start(2, config, fault=partial(_cannot_write_from_step_4, end=end))
        assert life.wait() == [1, 1]
        said = f"checkpoint step 4 not saved: rank 1: {told}"
        logs = [life.log(rank).splitlines() for rank in range(2)]
        for lines in logs:
            assert [line for line in lines if said in line]
            assert "Traceback" not in "\n".join(lines)
            assert saved(lines, "committed") == ["2"]
        assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("failed", 6)  # told before the next save
        assert said in status(tmp_path)["reason"]
        assert names(tmp_path / "run/checkpoint") == ["step-00000002"]
        assert job.start(2, config).wait() == [0, 0]
    assert fingerprints(tmp_path / "run") == fingerprints(finished / "run")
    (tmp_path / "left").mkdir()
    expected = state_of(finished / "run/checkpoint" / NEWEST, tmp_path / "left")
    for name, tensor in state_of(tmp_path / "run/checkpoint" / NEWEST, tmp_path).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("mode", [pytest.param("disabled", marks=pytest.mark.slow), "async"])
def test_training_goes_on_after_a_failed_save_where_that_is_configured(
    finished: Path, tmp_path: Path, mode: str
) -> None:
    config = write_config(
        tmp_path,
        paths=str(finished / "corpus/*.txt"),
        checkpoint__interval=2,
        checkpoint__async_mode=mode,
        checkpoint__on_save_error="continue",
        checkpoint__keep_latest_k=0,
        **CONSTANT,
    )
    ends = ranks(2).run(_train_without_room, ["--job.config_file", str(config)], (4, 6))
    assert [code for code, _ in ends] == [0, 0]
    assert saved(ends[0][1], "committed") == ["2", "8"]
    for _, lines in ends:  # a warning, so that it is told on every rank
        goes_on = [line for line in lines if "training goes on" in line]
        assert saved(goes_on, "not saved: rank 1: [Errno 27] File too large: ") == ["4", "6"]
        assert goes_on[1].endswith('(checkpoint.on_save_error = "continue"); failed so far: 2')
    assert (status(tmp_path)["state"], status(tmp_path)["failed_saves"]) == ("finished", 2)
    assert names(tmp_path / "run/checkpoint") == ["step-00000002", NEWEST]
    (tmp_path / "left").mkdir()
    expected = state_of(finished / "run/checkpoint" / NEWEST, tmp_path / "left")
    for name, tensor in state_of(tmp_path / "run/checkpoint" / NEWEST, tmp_path).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("mode", [pytest.param("disabled", marks=pytest.mark.slow), "async"])
def test_the_last_save_must_succeed_whatever_is_configured(tmp_path: Path, mode: str) -> None:
    config = write_config(tmp_path, checkpoint__async_mode=mode, checkpoint__on_save_error="continue")
    ends = ranks(2).run(_train_without_room, ["--job.config_file", str(config)], (8, 0))
    assert [code for code, _ in ends] == [1, 1]
    assert status(tmp_path)["state"] == "failed"
    assert "checkpoint step 8 not saved: rank 1: " in status(tmp_path)["reason"]
    assert names(tmp_path / "run/checkpoint") == [OLDER]


@pytest.mark.parametrize("mode", [pytest.param("disabled", marks=pytest.mark.slow), "async"])
def test_a_last_save_that_failed_at_its_interval_is_tried_again_at_the_end(tmp_path: Path, mode: str) -> None:
    config = write_config(tmp_path, checkpoint__async_mode=mode, checkpoint__on_save_error="continue")
    ends = ranks(2).run(_train_without_room, ["--job.config_file", str(config)], (8,))
    assert [code for code, _ in ends] == [0, 0]
    assert (status(tmp_path)["state"], status(tmp_path)["failed_saves"]) == ("finished", 1)
    assert names(tmp_path / "run/checkpoint") == [OLDER, NEWEST]


def _private_tmpfs() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_disk_too_small_is_seen_before_writing(tmp_path: Path) -> None:
    """On a real file system of 3 MB, which only the run sees."""
    if not _private_tmpfs():
        pytest.skip("a disk of 3 MB is mounted in a user namespace (unshare -rm), which this machine does not allow")
    config = write_config(tmp_path, training__steps=40, checkpoint__interval=2, checkpoint__keep_latest_k=0)
    disk, after = tmp_path / "run", tmp_path / "after"
    disk.mkdir()
    script = f"""
        mount -t tmpfs -o size=3m none {disk}
        mkdir {disk}/checkpoint {disk}/checkpoint/.tmp-mine && echo mine > {disk}/checkpoint/notes.txt
        {sys.executable} -m titanlite.train --job.config_file {config}
        code=$?
        cp -a {disk} {after}
        exit $code"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("titanlite: ")]
    assert f"not saved: {disk}/checkpoint: a checkpoint needs " in line
    assert " MB left: make room, lower checkpoint.keep_latest_k or choose another job.dump_folder" in line
    left = names(after / "checkpoint")
    assert left[:2] == [".tmp-mine", "notes.txt"]
    failed = int(line.split()[3])
    assert left[2:] == [f"step-{step:08d}" for step in range(2, failed, 2)]
    assert len(left) > 3
    assert verify.main(["checkpoint", str(after)]) == 0


def test_a_run_whose_folders_are_links_is_a_run(finished: Path, tmp_path: Path) -> None:
    """To a bigger disk, say: links that the user made on the way to the checkpoints are followed."""
    for name in ("disk", "store", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "run").rename(tmp_path / "disk/run")
    (tmp_path / "run").symlink_to(tmp_path / "disk/run")
    (tmp_path / "disk/run/checkpoint").symlink_to(tmp_path / "store")
    config = write_config(tmp_path, paths=str(finished / "corpus/*.txt"))
    argv = ["--job.config_file", str(config)]
    assert main([*argv, "--training.steps=4"]) == 0
    assert main(argv) == 0
    assert names(tmp_path / "store") == [OLDER, NEWEST]
    assert fingerprints(tmp_path / "run") == fingerprints(finished / "run")


def test_nothing_is_written_or_deleted_through_links_in_the_folder_of_checkpoints(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished / "run/checkpoint", other)
    folder = tmp_path / "run/checkpoint"
    folder.mkdir(parents=True)
    (folder / OLDER).symlink_to(other / OLDER)
    (folder / ".tmp-step-00000009-dead").symlink_to(other / NEWEST)
    (folder / ".trash-step-00000009-dead").symlink_to(other / NEWEST)
    before = contents(other)
    config = write_config(tmp_path, paths=str(finished / "corpus/*.txt"), checkpoint__keep_latest_k=1)
    argv = ["--job.config_file", str(config)]
    assert main([*argv, "--checkpoint.interval=3"]) == 0
    assert f"{folder / OLDER} is a link and does not count as a checkpoint: move the folder" in capsys.readouterr().err
    assert contents(other) == before
    assert names(folder) == [".tmp-step-00000009-dead", ".trash-step-00000009-dead", OLDER, NEWEST]
    shutil.rmtree(folder / NEWEST)
    (folder / NEWEST).touch()
    assert main([*argv, "--training.steps=9", "--checkpoint.interval=4"]) == 1
    assert f"step 4 not saved: {folder / OLDER}: in the way, and no folder" in capsys.readouterr().err
    assert contents(other) == before


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_folder_of_checkpoints_that_is_none_is_seen_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    config = write_config(tmp_path)
    folder = tmp_path / "run/checkpoint"
    folder.parent.mkdir()
    folder.touch() if kind == "file" else folder.symlink_to(tmp_path / "nowhere")
    assert main(["--job.config_file", str(config)]) == 1
    assert f"titanlite: {folder}: neither a folder nor a link to one: move it away" in capsys.readouterr().err
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        ("checkpoint", "init_from", "\0", 'checkpoint.init_from = "\\u0000": no path may have the character NUL'),
        ("job", "dump_folder", "a\0b", 'job.dump_folder = "a\\u0000b": no path may have the character NUL'),
        ("checkpoint", "init_from", "/", "/manifest.json: missing, so / is not"),
        ("checkpoint", "init_from", "/etc/passwd", "/etc/passwd/manifest.json: missing"),
        ("checkpoint", "init_from", "a" * 5000, "cannot be read: File name too long"),
        ("job", "dump_folder", "/dev/null/run", "cannot be written (Not a directory)"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], section: str, key: str, value: str, told: str
) -> None:
    config = write_config(tmp_path, **{f"{section}__{key}": value})
    assert main(["--job.config_file", str(config)]) == 1
    assert len([line for line in capsys.readouterr().err.splitlines() if told in line]) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: ["--training.dtype=float64"], "has dtype torch.float32 instead of torch.float64"),
        (lambda folder: seal(folder / NEWEST, step=8, format_version=2), "format_version is 2, this titanlite reads 1"),
    ],
    ids=["dtype", "format"],
)
def test_a_checkpoint_of_another_dtype_or_format_is_refused_with_the_difference(
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], list[str] | None],
    told: str,
) -> None:
    folder, argv = copy_of(finished, tmp_path)
    options = change(folder) or []
    kept = contents(folder)
    assert main([*argv, *options]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("titanlite: ")]
    assert told in line
    assert contents(folder) == kept


def _save_after_a_takeover(folder: str, async_save: bool, free_calls: int) -> tuple[str, str, list[str]]:
    """Step 1 is saved; the fence then lets `free_calls` of its calls pass while step 2 is saved."""
    calls = iter([None] * (2 + free_calls))
    checkpointer = Checkpointer(
        folder, keep_latest_k=1, async_save=async_save, fence=lambda: next(calls, "the run folder belongs to job B")
    )
    checkpointer.save(1, state("fsdp2"), {})
    checkpointer.wait()
    kind = ""
    with log_lines() as lines:
        try:
            checkpointer.save(2, state("fsdp2"), {})
            checkpointer.wait()
        except LostFolder as error:
            kind = str(error)
    return kind, error_of(checkpointer.save, 3, state("fsdp2"), {}), lines


@pytest.mark.parametrize("free_calls", [0, 1], ids=["before writing", "before the rename"])
@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_run_that_lost_its_folder_commits_nothing(tmp_path: Path, async_save: bool, free_calls: int) -> None:
    its_own = tmp_path / ".tmp-step-00000002-ofjobb00"
    its_own.mkdir()
    ends = ranks(2).run(_save_after_a_takeover, str(tmp_path), async_save, free_calls)
    for lost, again, lines in ends:
        assert lost == "checkpoint step 2 not saved: rank 0: the run folder belongs to job B"
        assert again == lost.replace("step 2", "step 3")
        assert not any("committed" in line for line in lines)
    assert names(tmp_path) == ["step-00000001"]


def test_a_run_that_lost_its_folder_ends_whatever_is_configured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, checkpoint__on_save_error="continue", checkpoint__interval=2)
    with mock.patch.object(Checkpointer, "_check_owner", side_effect=LostFolder("it belongs to job B")):
        assert main(["--job.config_file", str(config)]) == 1
    assert "titanlite: checkpoint step 2 not saved: it belongs to job B" in capsys.readouterr().err
    assert list(fingerprints(tmp_path / "run")) == [1, 2]
