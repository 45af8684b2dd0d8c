"""What is wrong with a checkpoint folder, found by one process: no process group, no model, nothing unpickled freely.

Reads every byte and every tensor and goes on after a problem, so that one call names them all. Refuses to judge what
the numbers are worth.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from titanlite.checkpoint.folder import MANIFEST, CheckpointError, check_file, read_manifest, step_name
from titanlite.checkpoint.tensors import read_chunk, read_metadata


@dataclass(frozen=True)
class Audit:
    """What `audit_checkpoint` found."""

    manifest: dict[str, Any]
    """Empty where there is none that can be trusted."""
    num_tensors: int
    num_bytes: int
    """Of the files that the manifest lists."""
    problems: list[str]
    """A line each, beginning with the file that it is about. Empty: the folder holds what was saved, and only that."""


def audit_checkpoint(path: str, advance: Callable[[int], object] = lambda num_bytes: None) -> Audit:
    """Check checkpoint folder `path`: its manifest, every file's size and checksum, every tensor's bytes, shape and
    dtype, files that do not belong, and its name.

    `advance` hears of every block of bytes: once for its checksum and, where it holds a tensor, once more for that.
    """
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return Audit({}, 0, 0, [str(error)])
    records = manifest["files"]
    damaged: dict[str, str] = {}
    for name, record in records.items():
        try:
            check_file(path, name, record, advance)
        except CheckpointError as error:
            damaged[name] = str(error)
    problems = list(damaged.values())
    for name in sorted(set(os.listdir(path)) - {MANIFEST, *records}):
        problems.append(f"{os.path.join(path, name)}: not in {MANIFEST}: no file of this checkpoint")
    name = os.path.basename(os.path.abspath(path))
    if name.startswith("step-") and name != step_name(manifest["step"]):
        problems.append(f"{path}: {MANIFEST} says that this is step {manifest['step']}: was it renamed?")
    num_tensors = 0
    if ".metadata" not in damaged:
        try:
            metadata = read_metadata(path, records)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            num_tensors = len(metadata.state_dict_metadata)
            problems += _unreadable_tensors(path, metadata, set(damaged), advance)
    return Audit(manifest, num_tensors, sum(record["size"] for record in records.values()), problems)


def _unreadable_tensors(
    path: str, metadata: Metadata, damaged: set[str], advance: Callable[[int], object]
) -> list[str]:
    """Read every chunk of every tensor, one at a time, in files that are not known to be damaged."""
    problems = []
    for key, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)  # read_metadata refuses all else
        for chunk in entry.chunks:
            place = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            if place.relative_path in damaged:
                continue
            file = os.path.join(path, place.relative_path)
            expected = list(chunk.sizes), entry.properties.dtype
            try:
                tensor = read_chunk(file, place.offset, place.length)
                found = list(tensor.shape), tensor.dtype
            except Exception as error:  # torch.load raises whatever it likes
                first_line = str(error).partition("\n")[0]
                problems.append(f"{file}: {key} at byte {place.offset} cannot be read: {first_line}")
            else:
                if found != expected:
                    problems.append(f"{file}: {key} at byte {place.offset} is {found}, .metadata says {expected}")
            advance(place.length)
    return problems
