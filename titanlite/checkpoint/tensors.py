"""Tensors in and out of one checkpoint folder through DCP (torch.distributed.checkpoint).

Owns what DCP leaves open: checksums of the bytes as they are written, an allow-list for the pickled `.metadata`, and
the comparison of a checkpoint with the tensors that shall receive it. Refuses entries that are not tensors, so that
nothing is ever unpickled freely: shards are read with weights_only=True, everything else must be JSON.
"""

import io
import math
import os
import pickle
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import EnumMeta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from titanlite.checkpoint.folder import CheckpointError, DamagedCheckpoint, check_file

_DCP = "torch.distributed.checkpoint."
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (_DCP + "filesystem", "_StorageInfo"),
    (_DCP + "metadata", "BytesStorageMetadata"),  # readable, so that the refusal can name the entry
    (_DCP + "metadata", "ChunkStorageMetadata"),
    (_DCP + "metadata", "Metadata"),
    (_DCP + "metadata", "MetadataIndex"),
    (_DCP + "metadata", "StorageMeta"),
    (_DCP + "metadata", "TensorProperties"),
    (_DCP + "metadata", "TensorStorageMetadata"),
    (_DCP + "metadata", "_MEM_FORMAT_ENCODING"),
}


@dataclass(frozen=True)
class Written:
    """What one rank wrote: name -> {"size", "crc32"} of its files; seconds until writing began and for writing."""

    files: dict[str, dict[str, Any]]
    plan_seconds: float
    write_seconds: float


class _ChecksumFile(io.FileIO):
    """A new file that keeps size and crc32 of its bytes and the first error that it gave, and fsyncs when closed."""

    def __init__(self, path: str) -> None:
        super().__init__(path, "xb")
        self.size = self.crc32 = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            count = super().write(data)
        except OSError as error:  # torch.save hides it behind "PytorchStreamWriter failed"
            self.error = self.error or OSError(error.errno, error.strerror, self.name)
            raise self.error from None
        self.crc32 = zlib.crc32(memoryview(data)[:count], self.crc32)
        self.size += count
        return count

    def close(self) -> None:
        try:
            if not self.closed:
                os.fsync(self.fileno())
        except OSError as error:
            self.error = self.error or OSError(error.errno, error.strerror, self.name)
            raise
        finally:
            super().close()


class _ChecksumFileSystem(FileSystem):
    """DCP's file system, which remembers the files that it wrote, by name."""

    def __init__(self, written: dict[str, _ChecksumFile]) -> None:
        self.written = written

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        assert mode == "wb", mode
        file = self.written[os.path.basename(path)] = _ChecksumFile(os.fspath(path))
        with io.BufferedWriter(file) as stream:
            yield stream

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.written[os.path.basename(new_path)] = self.written.pop(os.path.basename(path))


class _Writer(dcp.FileSystemWriter):
    def __init__(self, path: str, staged: bool, single_file_per_rank: bool = True) -> None:
        # Copy-ahead overlaps device copies with writing; of staged tensors it would only synchronise training's stream.
        # DCP's own fsync comes before the buffer's last bytes are written, and those are often all of .metadata.
        super().__init__(
            path,
            single_file_per_rank=single_file_per_rank,
            sync_files=False,
            overwrite=False,
            per_thread_copy_ahead=0 if staged else 10_000_000,
        )
        self.written: dict[str, _ChecksumFile] = {}
        self.fs = _ChecksumFileSystem(self.written)
        self.began = time.perf_counter()
        self.plan_seconds = self.write_seconds = 0.0

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)  # without the path: it is about to change

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        planned = time.perf_counter()
        result = super().write_data(plan, planner)
        self.plan_seconds, self.write_seconds = planned - self.began, time.perf_counter() - planned
        return result


class _Reader(dcp.FileSystemReader):
    """Reads with metadata that was checked before; the base class would unpickle the file itself."""

    def __init__(self, path: str, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _TensorsOnly(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn}: not a tensor, so it would have to be unpickled: refused")


def _enum_member(kind: object, name: str) -> object:
    """What stands for getattr: Python 3.11.0 to 3.11.3 pickle a member of an enum as getattr(the enum, its name)."""
    if isinstance(kind, EnumMeta) and isinstance(name, str) and name in kind.__members__:
        return kind[name]
    raise DamagedCheckpoint(f"asks for getattr({kind!r}, {name!r}), which no checkpoint of tensors needs: refused")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise DamagedCheckpoint(f"refers to {module}.{name}, which no checkpoint of tensors needs: refused")


@contextmanager
def _no_second_checksum() -> Generator[None, None, None]:
    """torch.save without the checksums that torch.load does not look at: ours are of the same bytes and cost as much.

    The option is the process's. What else is saved meanwhile has no checksums either, and loads all the same.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def caching_planner() -> Callable[[], SavePlanner]:
    """A maker of save planners that share cached plans with each other and with no other maker's.

    DCP keeps one cache per process under the planner's class name and compares neither dtypes nor group, so every
    state, group and failed save needs a name of its own.
    """
    planner = type(f"SavePlanner_{uuid.uuid4().hex}", (dcp.DefaultSavePlanner,), {})
    return lambda: planner(flatten_state_dict=False, flatten_sharded_tensors=False, enable_plan_caching=True)


def write(
    path: str, tensors: dict[str, torch.Tensor], planner: SavePlanner, group: dist.ProcessGroup, staged: bool
) -> Written | None:
    """Write `tensors` into folder `path`, on every rank of `group`.

    A rank whose own part fails raises its own error; the others then return None.
    """
    writer = _Writer(path, staged)
    try:
        with _no_second_checksum():
            dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group)
    except dcp.CheckpointException as failure:
        for file in writer.written.values():
            if file.error:
                raise file.error from failure
        if own := failure.failures.get(dist.get_rank(group)):
            raise own[0] from failure
        return None
    files = {name: {"size": f.size, "crc32": f"{f.crc32:08x}"} for name, f in writer.written.items()}
    return Written(files, writer.plan_seconds, writer.write_seconds)


class _OneByOne(dcp.DefaultSavePlanner):
    """Plans from shapes, and asks for a tensor when its turn to be written comes."""

    def __init__(self, load: Callable[[str], torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._load = load

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._load(index.fqn)


def write_one_by_one(
    path: str, shapes: dict[str, torch.Tensor], load: Callable[[str], torch.Tensor]
) -> dict[str, dict[str, Any]]:
    """Write the tensors that `load` gives into folder `path`, from one process and without a group; their files.

    shapes: tensors on meta, which say what `load` will give. Two are in memory at a time: DCP holds those of a file
    until the next one, and each has a file of its own. Raises the OSError of a failed write.
    """
    writer = _Writer(path, staged=True, single_file_per_rank=False)
    try:
        with _no_second_checksum(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which no_dist asks for
            dcp.save(shapes, storage_writer=writer, planner=_OneByOne(load), no_dist=True)
    except dcp.CheckpointException as failure:
        for file in writer.written.values():
            if file.error:
                raise file.error from failure
        raise failure.failures[0][0] from failure
    return {name: {"size": f.size, "crc32": f"{f.crc32:08x}"} for name, f in writer.written.items()}


def read(path: str, metadata: Metadata, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup) -> None:
    """Fill `tensors` in place from folder `path`, each rank its own shards. A rank raises only its own error."""
    planner: LoadPlanner = _TensorsOnly(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(tensors, storage_reader=_Reader(path, metadata), planner=planner, process_group=group)
    except dcp.CheckpointException as failure:
        if own := failure.failures.get(dist.get_rank(group)):
            raise own[0] from failure


def read_metadata(path: str, files: dict[str, dict[str, Any]]) -> Metadata:
    """DCP's `.metadata` in folder `path`, read without running anything and found to fit `files`, the manifest's.

    Raises DamagedCheckpoint if it names a class beyond the allow-list, an entry that is not a tensor, a place outside
    the files of the manifest, or chunks that do not fill their tensor.
    """
    file = os.path.join(path, ".metadata")
    check_file(path, ".metadata", files.get(".metadata", {"size": 0, "crc32": "missing in the manifest"}))
    try:
        with open(file, "rb") as stream:
            metadata = _Unpickler(stream).load()
        _check(metadata, files)
    except Exception as error:  # a garbled pickle raises whatever it likes
        raise DamagedCheckpoint(f"{file}: {error}") from error
    assert isinstance(metadata, Metadata)
    return metadata


def read_chunk(file: str, offset: int, length: int) -> torch.Tensor:
    """The tensor in these bytes of a file; nothing else is unpickled. Raises what torch.load raises."""
    with open(file, "rb") as stream:
        stream.seek(offset)
        tensor = torch.load(io.BytesIO(stream.read(length)), map_location="cpu", weights_only=True)
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"it is no tensor but a {type(tensor).__name__}")
    return tensor


def _check(metadata: Metadata, files: dict[str, dict[str, Any]]) -> None:
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise DamagedCheckpoint(f"entry {key!r} is not a tensor: refused")
        for chunk in entry.chunks:
            place = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            name = place.relative_path
            if name not in files or place.offset + place.length > files[name]["size"] or place.transform_descriptors:
                raise DamagedCheckpoint(f"entry {key!r} lies outside the manifest's files, in {name!r}: refused")
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise DamagedCheckpoint(f"the chunks of {key!r} do not fill its shape {list(entry.size)}")


def differences(metadata: Metadata, tensors: Mapping[str, torch.Tensor], prefix: str) -> list[str]:
    """What keeps `tensors` from being filled: missing, unexpected (below `prefix`), other shape, other dtype."""
    saved = metadata.state_dict_metadata
    found = [f"{key} is missing" for key in tensors if key not in saved]
    found += [f"{key} is not expected" for key in saved if key.startswith(prefix) and key not in tensors]
    for key in tensors.keys() & saved.keys():
        entry, tensor = saved[key], tensors[key]
        assert isinstance(entry, TensorStorageMetadata)
        if entry.size != tensor.shape:
            found.append(f"{key} has shape {list(entry.size)} instead of {list(tensor.shape)}")
        if entry.properties.dtype != tensor.dtype:
            found.append(f"{key} has dtype {entry.properties.dtype} instead of {tensor.dtype}")
    return sorted(found)
