"""The document rule: where each document of a row begins. Mask, positions and ignored targets follow from it.

Owns the vector of document starts, int64 [B, S]: for each token the index at which its document begins in its row.
Token i attends to token j iff starts[i] <= j <= i. Nothing else in titanlite may guess a boundary. The realisations
(`sdpa`, `flex`, and the dense mask here) take their facts from the starts; tests compare each with the definition.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from titanlite.model.ops.cross_entropy import IGNORE_INDEX
from titanlite.model.ops.flex import BLOCK, document_block_mask, flex_document_attention
from titanlite.model.ops.sdpa import document_attention

if TYPE_CHECKING:
    from titanlite.model.kv_cache import LayerCache


def document_starts(tokens: Tensor, eos_id: int) -> Tensor:
    """Starts of tokens [B, S]: a document begins with each row and after each eos, which ends its own document."""
    index = torch.arange(tokens.shape[1], device=tokens.device)
    begins = F.pad(tokens[:, :-1] == eos_id, (1, 0))
    return torch.where(begins, index, 0).cummax(1).values


def document_starts_from_lengths(lengths: Sequence[Sequence[int]], seq_len: int, *, pad_left: bool = False) -> Tensor:
    """Starts of rows with documents of the given lengths in tokens; what they leave of a row, behind or before them, is
    padding, and each pad a document of its own. For text in which eos is content. Raises ValueError when a row's
    lengths do not fit."""
    starts = torch.arange(seq_len).repeat(len(lengths), 1)
    for row, row_lengths in zip(starts, lengths, strict=True):
        if min(row_lengths, default=1) < 1 or sum(row_lengths) > seq_len:
            raise ValueError(f"document lengths {list(row_lengths)} do not fit a row of {seq_len} tokens")
        begin = seq_len - sum(row_lengths) if pad_left else 0
        for length in row_lengths:
            row[begin : begin + length] = begin
            begin += length
    return starts


def labels(rows: Tensor, eos_id: int) -> Tensor:
    """Targets of rows [B, S + 1]: [B, S], the next token of each, or IGNORE_INDEX where that begins a document."""
    begins = document_starts(rows, eos_id) == torch.arange(rows.shape[1], device=rows.device)
    return rows[:, 1:].masked_fill(begins[:, 1:], IGNORE_INDEX)


@dataclass(frozen=True)
class Documents:
    """What the model needs to know of a batch's documents, made once per batch.

    Only tensors of fixed shape change from batch to batch, so a compiled block is not compiled again.
    """

    starts: Tensor
    """int64 [B, S]."""
    positions: Tensor
    """int64 [B, S]: index of each token in its own document."""
    backend: str
    """flex, sdpa or dense."""
    mask: BlockMask | Tensor | None
    """flex: the block mask. dense: bool [B, 1, S, S], true where a query may see a key ([B, 1, S, all columns so far]
    with a cache). sdpa: none."""
    caches: "tuple[LayerCache, ...]" = ()
    """Where these are columns of rows that go on: keys and values of each layer, which holds those of the columns
    before. Else empty."""
    cache: "LayerCache | None" = None
    """That of the layer which got this."""

    def of_layer(self, number: int) -> "Documents":
        """What the layer with this number, from 0, gets."""
        return replace(self, cache=self.caches[number]) if self.caches else self


def realise(starts: Tensor, backend: str) -> Documents:
    """Documents of the given starts for a backend that `resolve_backend` named."""
    index = torch.arange(starts.shape[1], device=starts.device)
    mask: BlockMask | Tensor | None = None
    if backend == "flex":
        mask = document_block_mask(starts)
    elif backend == "dense":
        mask = _dense_mask(starts, index, index)
    return Documents(starts, index - starts, backend, mask)


def realise_next(starts: Tensor, begin: int, caches: "tuple[LayerCache, ...]") -> Documents:
    """Documents of the columns from `begin` on, of rows with these starts whose earlier columns are in the caches.

    Positions go on from theirs. The backend is dense: one query has nothing to gain from blocks.
    """
    keys = torch.arange(starts.shape[1], device=starts.device)
    starts, index = starts[:, begin:], keys[begin:]
    return Documents(starts, index - starts, "dense", _dense_mask(starts, index, keys), caches)


def _dense_mask(starts: Tensor, index: Tensor, keys: Tensor) -> Tensor:
    """bool [B, 1, queries, keys], for the queries' starts [B, queries] and the indices of queries and keys."""
    return ((starts[:, :, None] <= keys) & (keys <= index[:, None])).unsqueeze(1)


def build_documents(tokens: Tensor, eos_id: int, backend: str) -> Documents:
    """Documents of tokens [B, S] in which eos ends a document, as in training."""
    return realise(document_starts(tokens, eos_id), backend)


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention within documents: q [B, S, H, D], k and v [B, S, KV, D] -> [B, S, H, D]; KV divides H.

    With a cache, k and v go into it, and q attends to all that it holds.
    """
    if documents.backend == "sdpa":
        return document_attention(q, k, v, documents.starts)[0]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if documents.cache is not None:
        k, v = documents.cache.append(k, v)
    if isinstance(documents.mask, BlockMask):
        out = flex_document_attention(q, k, v, documents.mask)
    elif q.shape[2] == 1:  # the query heads of a group as queries: repeating its keys would cost more than attending
        out = F.scaled_dot_product_attention(q.unflatten(1, (k.shape[1], -1)).squeeze(3), k, v, documents.mask)
        out = out.flatten(1, 2).unsqueeze(2)
    else:
        out = F.scaled_dot_product_attention(q, k, v, documents.mask, enable_gqa=True)
    return out.transpose(1, 2)


def resolve_backend(name: str, *, device_type: str, seq_len: int, head_dim: int, dtype: torch.dtype) -> str:
    """The backend that model.attention means on a device; `dtype` is that of the model's forward pass.

    "auto" is flex on CUDA and sdpa on the CPU. Raises ValueError when that, or an explicit name, cannot run there.
    """
    backend = {"cuda": "flex", "cpu": "sdpa"}[device_type] if name == "auto" else name
    said = f"model.attention = {name!r}" + (f" ({backend} on {device_type})" if name == "auto" else "")
    if backend == "sdpa" and device_type != "cpu":
        raise ValueError(f"{said}: sdpa loops over documents on the CPU only; use flex or dense on {device_type}")
    if backend != "flex":
        return backend
    if device_type == "cpu":
        raise ValueError(f"{said}: FlexAttention has no backward on the CPU; use sdpa or dense")
    if seq_len % BLOCK:
        raise ValueError(
            f"training.seq_len = {seq_len} with {said}: flex takes multiples of {BLOCK}; use "
            f"{(seq_len // BLOCK + 1) * BLOCK}, or model.attention = 'dense'"
        )
    if dtype is torch.float64 or head_dim < 16:
        raise ValueError(f"{said}: flex takes no float64 and no head_dim below 16 (here {head_dim}); use dense")
    return backend
