"""Distributed checkpoints that are complete or do not count. `Checkpointer` alone needs a process group."""

from titanlite.checkpoint.audit import Audit, audit_checkpoint
from titanlite.checkpoint.checkpointer import Checkpointer
from titanlite.checkpoint.folder import CheckpointError, DamagedCheckpoint, LostFolder, list_steps, read_manifest
from titanlite.checkpoint.single import CheckpointReader, write_checkpoint
from titanlite.checkpoint.start import decide_start, weights_prefix

__all__ = [
    "Audit",
    "CheckpointError",
    "CheckpointReader",
    "Checkpointer",
    "DamagedCheckpoint",
    "LostFolder",
    "audit_checkpoint",
    "decide_start",
    "list_steps",
    "read_manifest",
    "weights_prefix",
    "write_checkpoint",
]
