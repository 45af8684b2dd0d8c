"""The document rule on FlexAttention: a block mask assembled from document starts, and the compiled call.

Owns the BlockMask. Refuses row lengths that are not whole blocks, and any way of building the mask that evaluates the
S x S predicate: `create_block_mask` needs 0.3 to 0.7 s for 4k to 8k tokens on a CPU, and S x S memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Tokens of a query and of a key block; rows must be whole blocks."""


def document_mask_mod(starts: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's predicate of the document rule: no later token, and none before the document's start."""

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & (kv >= starts[b, q])

    return mask_mod


def document_block_mask(starts: Tensor) -> BlockMask:
    """The block mask of document starts [B, S], identical to what `create_block_mask` finds, in (S / 128)^2 work.

    Starts never decrease along a row. So the keys that any query of a block may see reach back to the start of the
    document of the block's first token, and those that every query may see to that of its last token.
    """
    starts = starts.to(torch.int32)
    seq_len = starts.shape[1]
    assert seq_len % BLOCK == 0, f"rows of {seq_len} tokens are not whole blocks of {BLOCK}"
    begin = torch.arange(0, seq_len, BLOCK, device=starts.device)
    earlier = begin[:, None] > begin  # [query block, key block]
    any_query = starts[:, ::BLOCK, None] < begin + BLOCK
    every_query = starts[:, BLOCK - 1 :: BLOCK, None] <= begin
    partial = earlier & any_query & ~every_query | (begin[:, None] == begin)
    kv_num_blocks, kv_indices = _counts_and_indices(partial)
    full_kv_num_blocks, full_kv_indices = _counts_and_indices(earlier & every_query)
    return BlockMask.from_kv_blocks(
        kv_num_blocks,
        kv_indices,
        full_kv_num_blocks,
        full_kv_indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=document_mask_mod(starts),
        seq_lengths=(seq_len, seq_len),
    )


def _counts_and_indices(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, Q, KV] -> how many key blocks each query block has [B, 1, Q], and which, those first [B, 1, Q, KV]."""
    blocks = blocks.unsqueeze(1).to(torch.int32)
    order = torch.argsort(blocks, dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    # fullgraph: past the recompile limit dynamo raises instead of running the dense eager form without a word.
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def flex_document_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Attention of q [B, H, S, D] over k and v [B, KV, S, D] under a block mask: [B, H, S, D].

    Uncompiled FlexAttention materialises the scores, so it is compiled here unless the caller is being compiled.
    """
    call: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    return call(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
