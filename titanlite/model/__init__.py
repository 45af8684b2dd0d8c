"""The model room: the document rule with its realisations, rotary positions, and LLaMA as plain modules."""

from titanlite.model.attention import (
    IGNORE_INDEX,
    Documents,
    build_documents,
    document_starts,
    document_starts_from_lengths,
    labels,
    realise,
    resolve_backend,
)
from titanlite.model.kv_cache import KVCache
from titanlite.model.selfcheck import check_backend, check_rule
from titanlite.model.transformer import Llama, flops_per_token, initial_mean_std, num_parameters

__all__ = [
    "IGNORE_INDEX",
    "Documents",
    "KVCache",
    "Llama",
    "build_documents",
    "check_backend",
    "check_rule",
    "document_starts",
    "document_starts_from_lengths",
    "flops_per_token",
    "initial_mean_std",
    "labels",
    "num_parameters",
    "realise",
    "resolve_backend",
]
