"""One process with a checkpoint folder, tensor by tensor: for who converts a model that need not fit into memory.

Needs no process group. Refuses what training's own reader refuses: a file with another checksum, and all that would
have to be unpickled.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from titanlite.checkpoint import folder as folders
from titanlite.checkpoint import tensors as files
from titanlite.checkpoint.folder import CheckpointError, DamagedCheckpoint


class CheckpointReader:
    """The tensors of checkpoint folder `path`. A file is checked against its checksum before it is first read from.

    `advance` hears of every block of bytes that this reads.
    """

    def __init__(self, path: str, advance: Callable[[int], object] = lambda num_bytes: None) -> None:
        self._path, self._advance = path, advance
        self._records = folders.read_manifest(path)["files"]
        self._metadata = files.read_metadata(path, self._records)
        self._checked: set[str] = set()

    def compare(self, shapes: Mapping[str, torch.Tensor], prefix: str) -> None:
        """Raise CheckpointError with all that differs between these tensors (on meta) and those below `prefix`."""
        if found := files.differences(self._metadata, shapes, prefix):
            raise CheckpointError(f"{self._path} does not fit its own config: {'; '.join(found)}")

    def read(self, key: str) -> torch.Tensor:
        """A whole tensor, put together from the parts that ranks wrote."""
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        whole: torch.Tensor | None = None
        for chunk in entry.chunks:
            place = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            file = os.path.join(self._path, place.relative_path)
            self._check(place.relative_path)
            try:
                part = files.read_chunk(file, place.offset, place.length)
            except Exception as error:  # torch.load raises whatever it likes
                raise DamagedCheckpoint(f"{file}: {key} cannot be read: {error}".partition("\n")[0]) from error
            if part.shape != chunk.sizes or part.dtype != entry.properties.dtype:
                raise DamagedCheckpoint(f"{file}: {key} is {list(part.shape)}, {part.dtype}: not as .metadata says")
            if part.shape == entry.size:
                return part
            whole = torch.empty(entry.size, dtype=part.dtype) if whole is None else whole
            begin_size = zip(chunk.offsets, chunk.sizes, strict=True)
            whole[tuple(slice(begin, begin + size) for begin, size in begin_size)] = part
        assert whole is not None  # chunks fill their tensor: read_metadata has seen to it
        return whole

    def _check(self, name: str) -> None:
        if name not in self._checked:
            folders.check_file(self._path, name, self._records[name], self._advance)
            self._checked.add(name)


def write_checkpoint(
    folder: str,
    step: int,
    shapes: dict[str, torch.Tensor],
    load: Callable[[str], torch.Tensor],
    meta: dict[str, Any],
    versions: dict[str, str],
) -> str:
    """Commit a checkpoint of `step` in `folder` with the tensors that `load` gives, in order of need; its path.

    shapes: by key, on meta. Raises CheckpointError or OSError.
    """
    needed = sum(tensor.numel() * tensor.element_size() + 4096 for tensor in shapes.values())
    path = folders.begin(folder, step, needed)
    records = files.write_one_by_one(path, shapes, load)
    return folders.commit(path, step, records, meta, versions, lambda: None)
