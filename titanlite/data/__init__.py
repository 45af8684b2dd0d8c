"""The token stream: source (documents) -> stream (order, cursor) -> packing (rows) -> loader (batches)."""

from titanlite.data.loader import Batch, Loader, build_loader
from titanlite.data.source import RecordError, SourceError, manifest_changes
from titanlite.data.stream import Cursor

__all__ = ["Batch", "Cursor", "Loader", "RecordError", "SourceError", "build_loader", "manifest_changes"]
