"""Rows with documents, for tests: the definition of the document rule, tokens of given lengths, and random q, k, v."""

import torch
from torch import Tensor

EOS = 0


def may_see(tokens: list[int], query: int, key: int) -> bool:
    """The definition: not later, and no eos between the two that ends the key's document."""
    return key <= query and EOS not in tokens[key:query]


def tokens_of(rows: list[list[int]], seq_len: int) -> Tensor:
    """Rows of documents of the given lengths, each ended by eos; the last document of a row may be cut."""
    tokens = torch.full((len(rows), seq_len), EOS)
    for row, lengths in zip(tokens, rows, strict=True):
        flat = [token for length in lengths for token in [7] * (length - 1) + [EOS]]
        row[: len(flat[:seq_len])] = torch.tensor(flat[:seq_len], dtype=torch.int64)
    return tokens


def qkv(batch: int, seq_len: int, heads: int, kv_heads: int, dtype: torch.dtype, head_dim: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, seq_len, h, head_dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]
