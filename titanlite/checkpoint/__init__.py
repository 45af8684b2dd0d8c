"""Distributed checkpoints that are complete or do not count. `verify` and `read_manifest` need no process group."""

from titanlite.checkpoint.checkpointer import Checkpointer
from titanlite.checkpoint.folder import CheckpointError, DamagedCheckpoint, check_file, read_manifest
from titanlite.checkpoint.start import decide_start
from titanlite.checkpoint.tensors import read_metadata

__all__ = ["CheckpointError", "Checkpointer", "DamagedCheckpoint", "decide_start", "read_manifest", "verify"]


def verify(path: str) -> dict:
    """Read every byte of checkpoint `path` and return its manifest; raises CheckpointError that names the bad file."""
    manifest = read_manifest(path)
    for name, record in manifest["files"].items():
        check_file(path, name, record)
    read_metadata(path, manifest["files"])
    return manifest
