"""Checkpoints between ranks: every layout to every other, sync and async, failures that all ranks see alike.

The reference for what a checkpoint holds is `full`, drawn from the tensor's name alone, and DCP's own reader.
"""

import io
import json
import logging
import os
import resource
import signal
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.support.cases import some_quick
from tests.support.gloo import ranks
from titanlite.checkpoint import Checkpointer, CheckpointError, DamagedCheckpoint, audit_checkpoint, read_manifest
from titanlite.checkpoint.folder import check_free_space
from titanlite.log import logger

# 7 rows do not divide by any number of ranks, and 2 leave ranks of four without a row.
SHAPES = {"up": (16, 8), "down": (8, 16), "norm": (7,), "two": (2, 3)}
LAYOUTS = {
    "plain": ((1,), ("dp_shard",)),
    "fsdp1": ((1,), ("dp_shard",)),
    "fsdp2": ((2,), ("dp_shard",)),
    "tp2": ((1, 2), ("dp_shard", "tp")),
    "fsdp4": ((4,), ("dp_shard",)),
    "2x2": ((2, 2), ("dp_shard", "tp")),
    "hsdp2x2": ((2, 2), ("dp_replicate", "dp_shard")),
    "hsdp2x1x2": ((2, 1, 2), ("dp_replicate", "dp_shard", "tp")),
}


def verify(path: str) -> dict[str, Any]:
    """The manifest of checkpoint `path`; raises its first problem."""
    audit = audit_checkpoint(path)
    if audit.problems:
        raise DamagedCheckpoint(audit.problems[0])
    return audit.manifest


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            setattr(
                self, name, nn.Linear(*reversed(shape), bias=False) if len(shape) == 2 else nn.LayerNorm(7, bias=False)
            )


def full(key: str) -> torch.Tensor:
    """The whole tensor that belongs to `key`, the same on every layout."""
    if key.endswith(".step"):
        return torch.tensor(float(zlib.crc32(key.encode()) % 1000))
    shape = SHAPES[key.split(".")[1]]
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))


def state(layout: str, filled: bool = True) -> dict[str, torch.Tensor]:
    """Parameters, one moment and the plain step tensors of an optimiser, laid out as training would; else zeros."""
    model = Tiny()
    sizes, axes = LAYOUTS[layout]
    if layout != "plain":
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=axes)
        if "tp" in axes:
            parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        data_axes = tuple(axis for axis in axes if axis != "tp")
        fully_shard(model, mesh=mesh[data_axes] if len(data_axes) > 1 else mesh[data_axes[0]])
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter
        tensors[f"optimizer.{name}.exp_avg"] = torch.zeros_like(parameter)
        tensors[f"optimizer.{name}.step"] = torch.zeros(())
    if filled:
        fill(tensors)
    else:
        for tensor in tensors.values():
            tensor.detach().zero_()
    return tensors


@torch.no_grad()
def fill(tensors: dict[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        value = full(key)
        if isinstance(tensor, DTensor):
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(value)


def is_filled(tensors: dict[str, torch.Tensor]) -> bool:
    return all(
        torch.equal(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor, full(key))
        for key, tensor in tensors.items()
    )


def make(folder: Path | str, keep: int = 0, async_save: bool = False) -> Checkpointer:
    return Checkpointer(str(folder), keep_latest_k=keep, async_save=async_save)


def save(folder: str, layout: str, steps: tuple[int, ...] = (1,), keep: int = 0, async_save: bool = False) -> None:
    checkpointer = make(folder, keep, async_save)
    tensors = state(layout)
    assert is_filled(tensors)
    for step in steps:
        checkpointer.save(step, tensors, {"step": step})
    checkpointer.wait()


def load(folder: str, layout: str) -> bool:
    checkpointer, tensors = make(folder), state(layout, filled=False)
    path = checkpointer.newest()
    assert path is not None
    before = addresses(tensors)
    checkpointer.load(path, tensors)
    return is_filled(tensors) and addresses(tensors) == before and read_manifest(path)["meta"] == {"step": 1}


def addresses(tensors: dict[str, torch.Tensor]) -> list[int]:
    return [(tensor.to_local() if isinstance(tensor, DTensor) else tensor).data_ptr() for tensor in tensors.values()]


@contextmanager
def log_lines() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def disk_full_on(rank: int, limit: int) -> Iterator[None]:
    """Files beyond `limit` bytes fail on `rank`, with a real error from the kernel."""
    if dist.get_rank() == rank:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        if dist.get_rank() == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, old)


def error_of(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except CheckpointError as error:
        return str(error)
    return "no error"


def read_by_dcp(path: str) -> dict[str, torch.Tensor]:
    found = state("plain", filled=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.load(found, checkpoint_id=path, no_dist=True)
    return found


SAVED = [f"{layout}, {mode}" for layout in ("2x2", "hsdp2x2", "hsdp2x1x2") for mode in ("sync", "async")]


@pytest.mark.parametrize("case", some_quick(SAVED, "2x2, sync", "hsdp2x1x2, async"))
def test_every_layout_loads_every_other(tmp_path: Path, case: str) -> None:
    saved, mode = case.split(", ")
    ranks(4).run(save, str(tmp_path), saved, async_save=mode == "async")
    path = str(tmp_path / "step-00000001")
    manifest = verify(path)
    assert sorted(os.listdir(path)) == sorted([*manifest["files"], "manifest.json"])
    assert (manifest["step"], manifest["meta"], manifest["torch"]) == (1, {"step": 1}, torch.__version__)
    # DCP's own reader agrees, and nothing was stored twice.
    assert is_filled(read_by_dcp(path))
    metadata = dcp.FileSystemReader(path).read_metadata()
    assert all(
        sum(torch.Size(chunk.sizes).numel() for chunk in entry.chunks) == entry.size.numel()
        for entry in metadata.state_dict_metadata.values()
    )
    for num_ranks, layouts in {4: ["fsdp4", "2x2", "hsdp2x2"], 2: ["fsdp2", "tp2"], 1: ["fsdp1", "plain"]}.items():
        for layout in layouts:
            assert all(ranks(num_ranks).run(load, str(tmp_path), layout)), layout


def _save_and_change(folder: str) -> list[str]:
    checkpointer, tensors, meta = make(folder, async_save=True), state("2x2"), {"cursor": [1]}
    with log_lines() as lines:
        for step in (1, 2):  # the second save reuses the first one's staging memory
            fill(tensors)
            checkpointer.save(step, tensors, meta)
            for tensor in tensors.values():
                tensor.detach().fill_(-1.0)
            meta["cursor"].append(2)
            for _ in range(20):  # training's own collectives meanwhile
                dist.all_reduce(torch.ones(100))
        checkpointer.wait()
    return lines


def test_an_async_save_keeps_the_state_of_its_moment(tmp_path: Path) -> None:
    lines = ranks(4).run(_save_and_change, str(tmp_path))[0]
    for step in (1, 2):
        path = str(tmp_path / f"step-0000000{step}")
        assert is_filled(read_by_dcp(path))
        assert read_manifest(path)["meta"] == {"cursor": [1] + [2] * (step - 1)}
    events = [(words[2], words[3]) for words in map(str.split, lines) if words[0] == "checkpoint"]
    assert events == [("1", "requested:"), ("1", "committed"), ("2", "requested:"), ("2", "committed")]


def _fsyncs_and_renames(folder: str) -> list[tuple[str, ...]]:
    calls: list[tuple[str, ...]] = []
    fsync, rename = os.fsync, os.rename

    def traced_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def traced_rename(old: str, new: str) -> None:
        calls.append(("rename", str(old), str(new)))
        rename(old, new)

    with mock.patch("os.fsync", traced_fsync), mock.patch("os.rename", traced_rename):
        make(folder).save(1, state("plain"), {})
    return calls


def test_all_bytes_are_on_disk_before_the_name_and_the_name_before_success(tmp_path: Path) -> None:
    calls = ranks(1).run(_fsyncs_and_renames, str(tmp_path / "run" / "checkpoint"))[0]
    folder = str(tmp_path / "run" / "checkpoint")
    (where,) = [index for index, call in enumerate(calls) if call[0] == "rename" and ".metadata" not in call[1]]
    _, temporary, final = calls[where]
    assert final == f"{folder}/step-00000001"
    before = [call[1].replace(".metadata.tmp", ".metadata") for call in calls[:where]]
    assert set(before) >= {f"{temporary}/{name}" for name in os.listdir(final)}
    assert before[-2:] == [f"{temporary}/manifest.json", temporary]
    assert calls[where + 1 :] == [("fsync", folder)]


def _save_and_ask_torch(folder: str) -> tuple[bool, bool]:
    checkpointer, tensors = make(folder), state("plain")
    checkpointer.save(1, tensors, {})
    with disk_full_on(0, 64):
        assert error_of(checkpointer.save, 2, tensors, {}) != "no error"
    place = next(iter(dcp.FileSystemReader(f"{folder}/step-00000001").read_metadata().storage_data.values()))
    shard = Path(folder, "step-00000001", place.relative_path).read_bytes()[place.offset :][: place.length]
    with zipfile.ZipFile(io.BytesIO(shard)) as records:
        return torch.serialization.get_crc32_options(), records.testzip() is None


def test_bytes_are_summed_once(tmp_path: Path) -> None:
    """By us: torch.save's own checksums, which no reader looks at, are off during a save, and only then."""
    assert ranks(1).run(_save_and_ask_torch, str(tmp_path)) == [(True, False)]


def _fail_on_rank_1(folder: str, async_save: bool, limit: int) -> tuple[str, list[str], list[str]]:
    checkpointer, tensors = make(folder, async_save=async_save), state("fsdp2")
    large = {**tensors, "large": distribute_tensor(torch.zeros(10**5), init_device_mesh("cpu", (2,)), [Shard(0)])}
    checkpointer.save(1, tensors, {})
    checkpointer.wait()
    with log_lines() as lines, disk_full_on(1, limit):
        if async_save:
            checkpointer.save(2, large, {})
            error = error_of(checkpointer.wait) if limit == 64 else error_of(checkpointer.save, 3, tensors, {})
        else:
            error = error_of(checkpointer.save, 2, large, {})
    dist.barrier()
    left = sorted(os.listdir(folder))
    checkpointer.save(3, tensors, {})
    checkpointer.wait()
    return error, lines, left


@pytest.mark.parametrize("limit", [64, 1 << 16], ids=["small", "large"])  # in DCP's buffer; within torch.save
@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_full_disk_on_one_rank_is_one_error_on_all(tmp_path: Path, async_save: bool, limit: int) -> None:
    (error, lines, left), *others = ranks(2).run(_fail_on_rank_1, str(tmp_path), async_save, limit)
    assert all(other[0] == error for other in others)
    assert error.startswith("checkpoint step 2 not saved: rank 1: [Errno 27] File too large: ")
    assert "__1_0.distcp" in error
    assert "\n" not in error
    assert not any("committed" in line for line in lines)
    assert left == ["step-00000001"]
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000003"]
    assert verify(str(tmp_path / "step-00000001"))
    assert all(ranks(2).run(_load_step, str(tmp_path), 3, "tp2"))


def _load_step(folder: str, step: int, layout: str) -> bool:
    checkpointer, tensors = make(folder), state(layout, filled=False)
    path = checkpointer.newest(step)
    assert path is not None
    checkpointer.load(path, tensors)
    return is_filled(tensors)


def _wrong_saves(folder: str) -> list[str]:
    huge = {"w": torch.empty(10**15, device="meta")}
    blocked = os.path.join(folder, "file")
    Path(blocked).touch()
    return [
        error_of(make(folder).save, 1, huge, {}),
        error_of(make(blocked + "/checkpoint").save, 1, state("plain"), {}),
        error_of(make(folder).save, 1, {"epoch": 3}, {}),
        error_of(make(folder).save, 1, state("plain"), {"rng": b"bytes"}),
        error_of(make(folder).newest, 7),
    ]


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    errors = ranks(2).run(_wrong_saves, str(tmp_path))
    assert errors[0] == errors[1]
    space, blocked, not_tensor, not_json, absent = errors[0]
    assert "a checkpoint needs 4,000,000,00" in space
    assert "Not a directory" in blocked
    assert "epoch is a int" in not_tensor
    assert "not JSON serializable" in not_json
    assert absent.endswith("no checkpoint of step 7 (there are: none)")
    assert os.listdir(tmp_path) == ["file"]


def test_free_space_is_what_this_user_may_fill(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    check_free_space(str(tmp_path), disk.f_bavail * disk.f_frsize // 2)
    with pytest.raises(CheckpointError, match="make room"):
        check_free_space(str(tmp_path), disk.f_bavail * disk.f_frsize * 2)


def _as_nobody(folder: str) -> str:
    checkpointer = make(folder)
    if dist.get_rank() == 0 and os.geteuid() == 0:
        os.seteuid(65534)
    try:
        return error_of(checkpointer.save, 1, state("plain"), {})
    finally:
        if dist.get_rank() == 0 and os.getuid() == 0:
            os.seteuid(0)


def test_a_folder_without_permission_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        errors = ranks(2).run(_as_nobody, str(tmp_path))
    finally:
        tmp_path.chmod(0o700)
    assert errors[0] == errors[1]
    assert errors[0].startswith("checkpoint step 1 not saved: rank 0: [Errno 13] Permission denied")


def test_the_last_k_are_kept_and_nothing_foreign_is_touched(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").touch()
    folder = tmp_path / "checkpoint"
    (folder / ".tmp-step-00000009-dead").mkdir(parents=True)
    (folder / ".tmp-step-00000009-dead" / "__0_0.distcp").touch()
    (folder / ".trash-step-00000008-dead").mkdir()
    foreign = ["notes.txt", ".tmp-mine", "step-best"]
    for name in foreign:
        (folder / name).mkdir()
    (folder / "step-00000000").symlink_to(tmp_path / "outside")
    ranks(2).run(save, str(folder), "fsdp2", (1, 2), keep=2)
    (folder / "step-00000001" / "evaluation.json").touch()
    ranks(2).run(save, str(folder), "fsdp2", (3, 4), keep=2)
    (trash,) = folder.glob(".trash-step-00000001-*")
    assert os.listdir(trash) == ["evaluation.json"]
    assert sorted(os.listdir(folder)) == sorted(
        [*foreign, "step-00000000", "step-00000003", "step-00000004", trash.name]
    )
    assert os.listdir(tmp_path / "outside") == ["kept"]


def _mismatch(folder: str) -> tuple[str, str]:
    checkpointer, tensors = make(folder), state("fsdp2", filled=False)
    mesh = init_device_mesh("cpu", (2,))
    tensors["model.extra.weight"] = torch.zeros(3)
    del tensors["optimizer.up.weight.step"]
    tensors["model.down.weight"] = distribute_tensor(torch.zeros(8, 17), mesh, [Shard(0)])
    tensors["model.norm.weight"] = tensors["model.norm.weight"].detach().to(torch.bfloat16)
    path = checkpointer.newest()
    assert path is not None
    before = tensors["model.up.weight"].detach().to_local().clone()
    error = error_of(checkpointer.load, path, tensors)
    assert torch.equal(tensors["model.up.weight"].detach().to_local(), before)
    model = {key: tensor for key, tensor in state("fsdp2", filled=False).items() if key.startswith("model.")}
    assert error_of(checkpointer.load, path, model).count("is not expected") == 8
    checkpointer.load(path, model, prefix="model.")
    del model["model.two.weight"]
    assert is_filled(model)
    return error, error_of(lambda: checkpointer.load(path, model, prefix="model."))


def test_what_does_not_fit_is_refused_with_the_whole_list(tmp_path: Path) -> None:
    ranks(2).run(save, str(tmp_path), "fsdp2")
    errors = ranks(2).run(_mismatch, str(tmp_path))
    assert errors[0] == errors[1]
    assert errors[0][0] == (
        f"{tmp_path}/step-00000001 does not fit this run: model.down.weight has shape [8, 16] instead of [8, 17]; "
        "model.extra.weight is missing; model.norm.weight has dtype torch.float32 instead of torch.bfloat16; "
        "optimizer.up.weight.step is not expected"
    )
    assert errors[0][1].endswith("does not fit this run: model.two.weight is not expected")


def _go_back(folder: str) -> tuple[str | None, list[str]]:
    checkpointer, tensors = make(folder, keep=1), state("fsdp2")
    path = checkpointer.newest(1)
    assert path is not None
    checkpointer.load(path, tensors)
    with log_lines() as lines:
        checkpointer.save(1, tensors, {"again": True})
        checkpointer.save(2, tensors, {"history": "new"})
        checkpointer.save(2, tensors, {"again": True})
    return checkpointer.newest(), lines


def test_after_going_back_the_abandoned_steps_no_longer_count(tmp_path: Path) -> None:
    ranks(2).run(save, str(tmp_path), "fsdp2", (1, 2, 3))
    path, lines = ranks(2).run(_go_back, str(tmp_path))[0]
    assert path == str(tmp_path / "step-00000002")
    assert lines[0] == "checkpoint step 1: already on disk"
    assert lines[-1] == "checkpoint step 2: already on disk"
    assert sum("the run now continues from step 2" in line for line in lines) == 2
    assert read_manifest(path)["meta"] == {"history": "new"}
    aside = sorted(name for name in os.listdir(tmp_path) if name.startswith(".old-"))
    assert [name[:18] for name in aside] == [".old-step-00000002", ".old-step-00000003"]
    assert all(verify(str(tmp_path / name)) for name in aside)


def _change_dtype(folder: str) -> bool:
    checkpointer = make(folder)
    checkpointer.save(1, {"w": torch.ones(4), "v": torch.ones(2)}, {})
    checkpointer.save(2, {"w": torch.ones(4, dtype=torch.bfloat16), "v": torch.ones(2)}, {})
    tensors = {"w": torch.zeros(4, dtype=torch.bfloat16), "v": torch.zeros(2)}
    checkpointer.load(str(checkpointer.newest()), tensors)
    return bool(tensors["w"].sum() == 4 and tensors["v"].sum() == 2)


def test_cached_plans_do_not_outlive_a_change_of_the_state(tmp_path: Path) -> None:
    assert all(ranks(2).run(_change_dtype, str(tmp_path)))


def test_meta_keeps_its_values(tmp_path: Path) -> None:
    meta = {"step": 3, "lr": 0.1 + 0.2, "text": "ü\u2028\ud800", "none": None, "big": 2**63, "rows": {"a": [1, 2.5]}}
    ranks(1).run(_save_meta, str(tmp_path), meta)
    path = tmp_path / "step-00000003"
    assert verify(str(path))["meta"] == meta
    assert json.loads((path / "manifest.json").read_text())["meta"] == meta


def _save_meta(folder: str, meta: dict[str, Any]) -> None:
    make(folder).save(3, {"w": torch.ones(2)}, meta)


def _cuda(folder: str, async_save: bool) -> bool:
    checkpointer = make(folder, async_save=async_save)
    tensors = {key: tensor.cuda() for key, tensor in state("plain").items()}
    for step in (1, 2):
        checkpointer.save(step, tensors, {})
        if async_save and step == 2:
            for tensor in tensors.values():
                tensor.zero_()
    found = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    path = checkpointer.newest()
    assert path is not None
    checkpointer.load(path, found)
    return is_filled({key: tensor.cpu() for key, tensor in found.items()})


@pytest.mark.gpu
@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_tensors_on_a_gpu(tmp_path: Path, async_save: bool) -> None:
    assert ranks(1).run(_cuda, str(tmp_path), async_save) == [True]
