"""Distributed checkpoints that are complete or do not count. `Checkpointer` alone needs a process group."""

from titanlite.checkpoint.audit import Audit, audit_checkpoint
from titanlite.checkpoint.checkpointer import Checkpointer
from titanlite.checkpoint.folder import CheckpointError, DamagedCheckpoint, LostFolder, list_steps, read_manifest
from titanlite.checkpoint.meta import Meta
from titanlite.checkpoint.single import CheckpointReader, write_checkpoint

__all__ = [
    "Audit",
    "CheckpointError",
    "CheckpointReader",
    "Checkpointer",
    "DamagedCheckpoint",
    "LostFolder",
    "Meta",
    "audit_checkpoint",
    "list_steps",
    "read_manifest",
    "write_checkpoint",
]
