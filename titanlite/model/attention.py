"""Attention within documents: what a batch's document starts mean for positions and masks, and who attends to whom.

Owns the choice between the realisations (`sdpa`, `flex`, and the dense mask here). All take their facts from the
starts; tests compare each with the definition.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from titanlite.model.documents import document_starts
from titanlite.model.ops.flex import BLOCK, document_block_mask, flex_document_attention
from titanlite.model.ops.sdpa import document_attention


class LayerCache:
    """Keys and values of one layer. Head counts, type and device follow from the first keys: a rank may hold some of
    the heads."""

    def __init__(self, max_len: int) -> None:
        self.max_len, self.length = max_len, 0
        self.keys = self.values = torch.empty(0)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take k and v [B, KV, S, D] of the next S columns; those of all columns so far, [B, KV, length, D]."""
        if self.length == 0:
            shape = (*k.shape[:2], self.max_len, k.shape[3])
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


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
    caches: tuple[LayerCache, ...] = ()
    """Where these are columns of rows that go on: keys and values of each layer, which holds those of the columns
    before. Else empty."""
    cache: LayerCache | None = None
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


def realise_next(starts: Tensor, begin: int, caches: tuple[LayerCache, ...]) -> Documents:
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
