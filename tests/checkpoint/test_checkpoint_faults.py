"""Checkpoints that were cut off, damaged or made by an enemy: never taken, always named, and nothing of theirs runs."""

import enum
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp

from tests.checkpoint.test_checkpoint import error_of, log_lines, make, save, state, verify
from tests.support.cases import some_quick
from tests.support.gloo import ranks
from titanlite.checkpoint import CheckpointError, DamagedCheckpoint, read_manifest
from titanlite.checkpoint import tensors as checkpoint_files
from titanlite.checkpoint.folder import list_steps

NEWEST = "step-00000002"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of steps 1 and 2, written by two ranks. Copy it."""
    folder = tmp_path_factory.mktemp("good")
    ranks(2).run(save, str(folder), "fsdp2", (1, 2))
    return folder


def newest(folder: str) -> tuple[str | None, list[str]]:
    with log_lines() as lines:
        return make(folder).newest(), lines


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def link(file: Path) -> None:
    file.rename(file.parent.parent / f"moved-{file.name}")
    file.symlink_to(file.parent.parent / f"moved-{file.name}")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut off": (cut, "has .* bytes"),
    "emptied": (empty, "has 0 bytes"),
    "flipped": (flip, "checksum"),
    "a link": (link, "not a plain file"),
    "removed": (os.unlink, "missing"),
}
FILES = ("__0_0.distcp", "__1_0.distcp", ".metadata", "manifest.json")
DAMAGED = [f"{name}, {how}" for name in FILES for how in DAMAGES]
QUICK = (
    "__0_0.distcp, cut off",
    "__1_0.distcp, removed",
    ".metadata, flipped",
    ".metadata, a link",
    "manifest.json, emptied",
)


@pytest.mark.parametrize("case", some_quick(DAMAGED, *QUICK))
def test_a_damaged_file_is_named_and_the_older_checkpoint_taken(tmp_path: Path, good: Path, case: str) -> None:
    name, _, how = case.partition(", ")
    damage, reason = DAMAGES[how]
    folder = tmp_path / "checkpoint"
    shutil.copytree(good, folder)
    damage(folder / NEWEST / name)
    if name == "manifest.json" and damage in (cut, empty):
        reason = "checksum"
    with pytest.raises(DamagedCheckpoint, match=f"{NEWEST}/{name}: .*{reason}"):
        verify(str(folder / NEWEST))
    assert name in ranks(2).run(_load, str(tmp_path), str(folder / NEWEST))[1]
    for path, _ in ranks(2).run(newest, str(folder)):
        assert path == str(folder / "step-00000001")
    assert len(list(folder.glob(f".bad-{NEWEST}-*"))) == 1
    assert ranks(2).run(newest, str(folder))[0][1] == []


def test_every_damaged_checkpoint_is_named_in_a_warning_and_none_is_left(tmp_path: Path, good: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(good, folder)
    for step in ("step-00000001", NEWEST):
        flip(folder / step / "__1_0.distcp")
    (path, lines), (other, _) = ranks(2).run(newest, str(folder))
    assert path is None
    assert other is None
    for step, line in zip((NEWEST, "step-00000001"), lines, strict=True):
        assert f"checkpoint {folder / step} is set aside as .bad-{step}-" in line
        assert f"{step}/__1_0.distcp: has checksum" in line


def _named(folder: str) -> str:
    return error_of(make(folder).newest, 2)


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error_and_stays(tmp_path: Path, good: Path) -> None:
    shutil.copytree(good, tmp_path / "checkpoint")
    flip(tmp_path / "checkpoint" / NEWEST / "__0_0.distcp")
    errors = ranks(2).run(_named, str(tmp_path / "checkpoint"))
    assert errors[0] == errors[1]
    assert "__0_0.distcp: has checksum" in errors[0]
    assert sorted(os.listdir(tmp_path / "checkpoint")) == ["step-00000001", NEWEST]


def test_no_flipped_bit_passes(tmp_path: Path, good: Path) -> None:
    shutil.copytree(good / NEWEST, tmp_path / NEWEST)
    chance = random.Random(0)
    for file in sorted((tmp_path / NEWEST).iterdir()):
        content = file.read_bytes()
        for _ in range(50):
            bit = chance.randrange(8 * len(content))
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=file.name):
                verify(str(tmp_path / NEWEST))
        file.write_bytes(content)
    verify(str(tmp_path / NEWEST))


def seal(path: Path, **changes: Any) -> None:
    """Write a manifest that fits the files of `path`, as an enemy can."""
    files = {
        file.name: {"size": file.stat().st_size, "crc32": f"{zlib.crc32(file.read_bytes()):08x}"}
        for file in path.iterdir()
        if file.name != "manifest.json"
    }
    manifest = {"format_version": 1, "step": 2, "files": files, "meta": {}, **changes}
    body = json.dumps(manifest, indent=1).removeprefix("{\n").encode()
    (path / "manifest.json").write_bytes(b'{"crc32": "%08x",\n' % zlib.crc32(body) + body)


class Planted:
    """Unpickling this creates a file."""

    def __init__(self, proof: str) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.proof,)


def _load(folder: str, path: str) -> str:
    tensors = state("fsdp2", filled=False)
    return error_of(make(folder).load, path, tensors)


def refused(path: Path) -> str:
    """The error of loading `path` on two ranks."""
    errors = ranks(2).run(_load, str(path.parent), str(path))
    assert errors[0] == errors[1]
    return str(errors[0])


@pytest.mark.parametrize("place", ["whole", "attribute", "state"])
def test_code_planted_in_the_metadata_does_not_run(tmp_path: Path, good: Path, place: str) -> None:
    path = tmp_path / NEWEST
    shutil.copytree(good / NEWEST, path)
    planted: Any = Planted(str(tmp_path / "proof"))
    if place != "whole":
        metadata = dcp.FileSystemReader(path).read_metadata()
        setattr(metadata, "planner_data" if place == "attribute" else "state_dict_metadata", {"k": planted})
        planted = metadata
    (path / ".metadata").write_bytes(pickle.dumps(planted))
    seal(path)
    with pytest.raises(DamagedCheckpoint, match=r"\.metadata: refers to (posix|nt)\.mkdir"):
        verify(str(path))
    assert "refers to posix.mkdir" in refused(path)
    assert not (tmp_path / "proof").exists()
    pickle.loads((path / ".metadata").read_bytes())  # the trap was armed
    assert (tmp_path / "proof").exists()


def _load_without_pickle(folder: str, path: str) -> str:
    with mock.patch("pickle.load", side_effect=AssertionError("raw pickle")):
        return _load(folder, path)


def test_dcp_does_not_unpickle_the_metadata_itself(good: Path) -> None:
    assert ranks(2).run(_load_without_pickle, str(good), str(good / NEWEST)) == ["no error"] * 2


def test_code_planted_in_a_shard_does_not_run(tmp_path: Path, good: Path) -> None:
    path = tmp_path / NEWEST
    shutil.copytree(good / NEWEST, path)
    torch.save(Planted(str(tmp_path / "proof")), path / "__1_0.distcp")
    metadata = dcp.FileSystemReader(path).read_metadata()
    for place in metadata.storage_data.values():
        if place.relative_path == "__1_0.distcp":
            place.offset, place.length = 0, (path / "__1_0.distcp").stat().st_size
    metadata.storage_meta = None
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(path)
    with pytest.raises(DamagedCheckpoint, match="__1_0.distcp: .* cannot be read: Weights only load failed"):
        verify(str(path))
    assert "Weights only load failed" in refused(path)
    assert not (tmp_path / "proof").exists()
    torch.load(path / "__1_0.distcp", weights_only=False)
    assert (tmp_path / "proof").exists()


class Reached:
    """Pickled as getattr(kind, name), as Python 3.11.0 to 3.11.3 pickle members of enums."""

    def __init__(self, kind: Any, name: str) -> None:
        self.kind, self.name = kind, name

    def __reduce__(self) -> Any:
        return getattr, (self.kind, self.name)


def test_getattr_in_the_metadata_reaches_members_of_enums_and_nothing_else(tmp_path: Path, good: Path) -> None:
    path = tmp_path / NEWEST
    shutil.copytree(good / NEWEST, path)
    metadata = dcp.FileSystemReader(path).read_metadata()
    tensors = [entry for entry in metadata.state_dict_metadata.values() if hasattr(entry, "properties")]
    places = tensors[0].properties.__getstate__()
    (member,) = (place for place in places if isinstance(place, enum.Enum))
    for kind, name in ((type(member), member.name), (type(member), "mro"), (type(metadata), "__init__")):
        changed = [Reached(kind, name) if place is member else place for place in places]
        with mock.patch.object(
            type(tensors[0].properties), "__getstate__", lambda self, changed=changed: tuple(changed)
        ):
            (path / ".metadata").write_bytes(pickle.dumps(metadata))
        seal(path)
        if name == member.name:
            verify(str(path))
        else:
            with pytest.raises(DamagedCheckpoint, match=r"asks for getattr\(.*, '\w+'\), which no checkpoint"):
                verify(str(path))


def test_an_entry_that_is_not_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / NEWEST
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.ones(2), "epoch": Planted(str(tmp_path / "proof"))}, checkpoint_id=path, no_dist=True)
    metadata = dcp.FileSystemReader(path).read_metadata()
    metadata.storage_meta = None
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(path)
    assert "entry 'epoch' is not a tensor: refused" in refused(path)
    assert not (tmp_path / "proof").exists()


def test_no_path_leaves_the_folder(tmp_path: Path, good: Path) -> None:
    path = tmp_path / NEWEST
    shutil.copytree(good / NEWEST, path)
    shutil.copy(path / "__1_0.distcp", tmp_path / "outside")
    metadata = dcp.FileSystemReader(path).read_metadata()
    for place in metadata.storage_data.values():
        place.relative_path = place.relative_path.replace("__1_0.distcp", "../outside")
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(path)
    assert "lies outside the manifest's files, in '../outside': refused" in refused(path)
    record = {"size": (tmp_path / "outside").stat().st_size, "crc32": "0"}
    for name in ("../outside", str(tmp_path / "outside"), "..", ""):
        seal(
            path,
            files={name: record, ".metadata": json.loads((path / "manifest.json").read_text())["files"][".metadata"]},
        )
        with pytest.raises(DamagedCheckpoint, match=r"manifest\.json: names '.*', which is not a file of this folder"):
            verify(str(path))


def test_missing_chunks_are_seen(tmp_path: Path, good: Path) -> None:
    path = tmp_path / NEWEST
    shutil.copytree(good / NEWEST, path)
    metadata = dcp.FileSystemReader(path).read_metadata()
    metadata.state_dict_metadata["model.up.weight"].chunks.pop()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(path)
    with pytest.raises(DamagedCheckpoint, match=r"chunks of 'model.up.weight' do not fill its shape \[16, 8\]"):
        verify(str(path))


def test_another_format_is_refused_but_not_set_aside(tmp_path: Path, good: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(good, folder)
    seal(folder / NEWEST, format_version=2)
    errors = ranks(2).run(_newest_error, str(folder))
    assert "format_version is 2, this titanlite reads 1" in errors[0]
    assert errors[0] == errors[1]
    assert sorted(os.listdir(folder)) == ["step-00000001", NEWEST]


def _newest_error(folder: str) -> str:
    return error_of(make(folder).newest)


# Kills. A driver process that has loaded torch but started no threads forks the processes that save and are killed.


def _train(folder: str, rank: int, num_ranks: int, store: str, async_save: bool, last: int, report: int) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, num_ranks), rank=rank, world_size=num_ranks)
    checkpointer = make(folder, keep=2, async_save=async_save)
    tensors = {"w": torch.zeros(64), "v": torch.zeros(3, 3)}
    path, step = checkpointer.newest(), 0
    if path is not None:
        checkpointer.load(path, tensors)
        step = read_manifest(path)["meta"]["step"]
        assert all(bool((tensor == step).all()) for tensor in tensors.values()), "a mixture was loaded"
    while step < last:
        step += 1
        for tensor in tensors.values():
            tensor.fill_(step)
        checkpointer.save(step, tensors, {"step": step})
        if not async_save and rank == 0:
            os.write(report, step.to_bytes(4, "little"))
    checkpointer.wait()


def _fork(function: Callable[..., None], *args: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.close(2)
        function(*args)
        code = 0
    finally:
        os._exit(code)


def _die_at(event: int, folder: str, synced: int) -> None:
    """SIGKILL this process at its `event`-th file operation below `folder`, or in the middle of it if it writes a
    shard. What is fsynced before is told to the file `synced`: inode and size."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(name: str, args: tuple) -> None:
        path = args[0] if args and (name == "open" or name.startswith("os.")) else None
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(folder):
            tick()

    sys.addaudithook(hook)
    fsync, write = os.fsync, checkpoint_files._ChecksumFile.write

    def traced_fsync(descriptor: int) -> None:
        tick()
        fsync(descriptor)
        info = os.fstat(descriptor)
        os.write(synced, f"{info.st_ino} {info.st_size}\n".encode())
        tick()

    def torn_write(self: checkpoint_files._ChecksumFile, data: Any) -> int:
        if count + 1 == event:
            io.FileIO.write(self, memoryview(data)[: len(data) // 2])
        tick()
        return write(self, data)

    os.fsync = traced_fsync
    checkpoint_files._ChecksumFile.write = torn_write  # type: ignore[method-assign]


def _lose_power(folder: str, synced: dict[int, int]) -> None:
    """What a disk may look like after that: of files, only what was fsynced; of folders that were not, no entry."""
    for parent, _, names in os.walk(folder):
        for name in names:
            file = os.path.join(parent, name)
            info = os.stat(file)
            if os.stat(parent).st_ino not in synced:
                os.unlink(file)
            elif info.st_size > synced.get(info.st_ino, 0):
                os.truncate(file, synced.get(info.st_ino, info.st_size // 2))


def _inodes(folder: str) -> dict[int, int]:
    paths = [os.path.join(parent, name) for parent, *names in os.walk(folder) for name in ["", *names[0], *names[1]]]
    return {os.stat(path).st_ino: os.stat(path).st_size for path in paths}


def _train_and_die(event: int, folder: str, store: str, async_save: bool, report: int, synced: int) -> None:
    _die_at(event, folder, synced)
    _train(folder, 0, 1, store, async_save, 3, report)


def _kill_everywhere(tmp: str, async_save: bool, stride: int, power: bool, results: Any) -> None:
    """Steps 1 and 2 are there, step 3 is saved and step 1 pruned: killed at every file operation of that. The power
    goes then too, if `power`: what was written, but not fsynced, is cut or gone."""
    torch.set_num_threads(1)
    _, write = os.pipe()
    base = os.path.join(tmp, "base")
    assert os.waitpid(_fork(_train, base, 0, 1, os.path.join(tmp, "store"), False, 2, write), 0)[1] == 0
    survived, event = [], 1
    while True:
        folder = os.path.join(tmp, f"kill{event}")
        shutil.copytree(base, folder)
        synced = _inodes(folder)
        told = os.open(folder + "-synced", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        status = os.waitpid(_fork(_train_and_die, event, folder, folder + "-store", async_save, write, told), 0)[1]
        if power:
            lines = os.pread(told, 1 << 20, 0).decode().splitlines()
            _lose_power(folder, synced | {int(inode): int(size) for inode, size in map(str.split, lines)})
        os.close(told)
        found = {step: _is_valid(path) for step, path in list_steps(folder).items()}
        again = os.waitpid(_fork(_train, folder, 0, 1, folder + "-again", async_save, 4, write), 0)[1]
        survived.append((event, status, found, again, sorted(os.listdir(folder))))
        if status == 0:
            break
        event += stride
    results.put(survived)


def _is_valid(path: str) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def _in_driver(function: Callable[..., None], *args: Any) -> Any:
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    driver = context.Process(target=function, args=(*args, results))
    driver.start()
    driver.join()
    assert driver.exitcode == 0
    return results.get()


@pytest.mark.parametrize(
    ("async_save", "stride", "power"),
    [
        (False, 5, True),
        pytest.param(False, 5, False, marks=pytest.mark.slow),
        *(pytest.param(a, 1, p, marks=pytest.mark.slow) for a in (False, True) for p in (False, True)),
    ],
)
def test_a_kill_at_any_file_operation_costs_at_most_the_save_at_hand(
    tmp_path: Path, async_save: bool, stride: int, power: bool
) -> None:
    survived = _in_driver(_kill_everywhere, str(tmp_path), async_save, stride, power)
    assert len(survived) > 30 // stride
    assert survived[-1][1] == 0
    for event, status, found, again, names in survived:
        assert status in (0, signal.SIGKILL), event
        assert all(found.values()), (event, found)  # what has the name of a checkpoint is one
        assert 2 in found or 3 in found, (event, found)
        assert again == 0, event
        assert names == ["step-00000003", "step-00000004"], (event, names)


def _kill_at_random(tmp: str, num_rounds: int, seed: int, results: Any) -> None:
    torch.set_num_threads(1)
    folder, chance = os.path.join(tmp, "checkpoint"), random.Random(seed)
    told, rounds = 0, []
    for number in range(num_rounds):
        read, write = os.pipe()
        async_save = bool(number % 2)
        store = os.path.join(tmp, f"store{number}")
        pids = [_fork(_train, folder, rank, 2, store, async_save, 10**6, write) for rank in range(2)]
        os.close(write)
        os.set_blocking(read, not async_save)
        first = os.read(read, 4) if not async_save else time.sleep(0.4)
        time.sleep(chance.random() * 0.3)
        victims = chance.choice([pids, pids, pids[:1], pids[1:]])
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        ends = [os.waitpid(pid, 0)[1] for pid in pids]  # the survivor ends by itself
        os.set_blocking(read, True)
        steps = (first or b"") + b"".join(iter(lambda: os.read(read, 4096), b""))  # noqa: B023
        os.close(read)
        told = max([told, *(int.from_bytes(steps[i : i + 4], "little") for i in range(0, len(steps), 4))])
        found = {step: _is_valid(path) for step, path in list_steps(folder).items()}
        rounds.append((ends, told, found))
    results.put(rounds)


@pytest.mark.parametrize("num_rounds", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_random_kills_of_one_or_all_ranks_never_cost_a_committed_checkpoint(tmp_path: Path, num_rounds: int) -> None:
    seed = random.randrange(10**6)
    for number, (ends, told, found) in enumerate(_in_driver(_kill_at_random, str(tmp_path), num_rounds, seed)):
        assert signal.SIGKILL in ends, (seed, number, ends)
        assert all(found.values()), (seed, number, found)
        assert max(found, default=0) >= told, (seed, number, told, found)
    assert told > num_rounds
