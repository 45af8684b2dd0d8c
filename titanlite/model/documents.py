"""The document rule: where each document of a row begins. Mask, positions and ignored targets follow from it.

Owns the vector of document starts, int64 [B, S]: for each token the index at which its document begins in its row.
Token i attends to token j iff starts[i] <= j <= i. Nothing else in titanlite may guess a boundary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

E = TypeVar("E", bound="Examples")

IGNORE_INDEX = -100
"""Label of a target that is not trained: the first token of a document, which nothing in it predicts."""


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


@dataclass(frozen=True, eq=False)
class Examples:
    """What a forward and a backward pass take: int64 [B, S] each."""

    tokens: Tensor
    labels: Tensor
    """The target of each token, or IGNORE_INDEX."""
    starts: Tensor
    """The index at which each token's document begins in its row."""

    @classmethod
    def by_eos(cls, rows: Tensor, eos_id: int) -> "Examples":
        """Of rows [B, S + 1] in which eos ends a document, as in pretraining."""
        return Examples(rows[:, :-1].contiguous(), labels(rows, eos_id), document_starts(rows[:, :-1], eos_id))

    def split(self, num_rows: int) -> "list[Examples]":
        """So many rows each, fewer in the last one."""
        tensors = (self.tokens, self.labels, self.starts)
        return [Examples(*parts) for parts in zip(*(t.split(num_rows) for t in tensors), strict=True)]

    def to(self, device: torch.device) -> "Examples":
        """On a device; the host does not wait where this is pinned."""
        return Examples(*(t.to(device, non_blocking=True) for t in (self.tokens, self.labels, self.starts)))

    def pin_memory(self: E) -> E:
        tensors = {name: getattr(self, name).pin_memory() for name in ("tokens", "labels", "starts")}
        return replace(self, **tensors)
