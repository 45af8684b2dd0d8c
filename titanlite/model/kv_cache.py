"""Keys and values of the tokens that a batch has had, so that the next ones cost one forward pass over themselves.

Owns their memory, taken once for the longest row that may come, and how far it is filled. A cache is filled with the
columns of a batch from the left, as many at a time as one likes; which of them a token sees, and its position, is the
document rule's business, told once for whole rows. Refuses to be rewound, and gradients.
"""

import torch
from torch import Tensor

from titanlite.model.attention import Documents, realise_next


class LayerCache:
    """Of one layer. Head counts, type and device follow from the first keys: a rank may hold some of the heads."""

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


class KVCache:
    """Of all layers, for rows whose documents begin at `starts` [B, max_len], also those that are not yet written."""

    def __init__(self, starts: Tensor, num_layers: int) -> None:
        self.starts, self.length = starts, 0
        self.layers = tuple(LayerCache(starts.shape[1]) for _ in range(num_layers))

    def next(self, num_columns: int) -> Documents:
        """Documents of the next columns of the rows; the model must be called with their tokens, once."""
        begin, self.length = self.length, self.length + num_columns
        assert self.length <= self.starts.shape[1], f"a cache for {self.starts.shape[1]} columns, not {self.length}"
        return realise_next(self.starts[:, : self.length], begin, self.layers)
