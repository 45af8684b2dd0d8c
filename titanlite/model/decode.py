"""Continues a batch of prompts token by token with a cache of keys and values.

Prompts of different length are right-aligned: each stands behind padding, and its document begins where its length
says. So the document rule gives masks and positions, whatever ids pads have and whether a prompt holds an eos. Owns
this layout of a batch, and the cache: its memory is taken once for the longest row that may come, and it is filled with
the columns of a batch from the left. Refuses to choose tokens (its caller does), to be rewound, and gradients.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titanlite.model.attention import Documents, LayerCache, realise_next
from titanlite.model.documents import document_starts_from_lengths
from titanlite.model.transformer import Llama

PREFILL_COLUMNS = 512
"""Columns of the prompts that go through the model at once, so that masks and activations stay small."""


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


def right_align(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """Prompts as the columns [B, S] of a batch, S the longest, and the starts [B, S + max_new_tokens] of its rows."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = [[len(prompt) + max_new_tokens] for prompt in prompts]
    return tokens, document_starts_from_lengths(lengths, longest + max_new_tokens, pad_left=True)


@torch.no_grad()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    choose: Callable[[Tensor], list[int]],
    device: torch.device,
) -> Iterator[list[int | None]]:
    """The next token of each prompt, step by step, its eos too; None for a prompt that has ended. Ends with the last.

    prompts: ids, at least one each. choose: from logits [B, V] to an id for each; under tensor parallelism (all ranks
    call this) rank 0's choice is taken.
    """
    tokens, starts = right_align(prompts, max_new_tokens)
    cache = KVCache(starts.to(device), len(model.layers))
    for columns in tokens.to(device).split(PREFILL_COLUMNS, dim=1):
        hidden = model(columns, cache.next(columns.shape[1]))
    running = [True] * len(prompts)
    for step in range(max_new_tokens):
        chosen = _agree(choose(_last_logits(model, hidden)))
        yield [token if runs else None for token, runs in zip(chosen, running, strict=True)]
        running = [runs and token != eos_id for token, runs in zip(chosen, running, strict=True)]
        if step == max_new_tokens - 1 or not any(running):
            return
        hidden = model(torch.tensor(chosen, device=device).unsqueeze(1), cache.next(1))


def _last_logits(model: Llama, hidden: Tensor) -> Tensor:
    logits = model.output(hidden[:, -1:])
    return (logits.full_tensor() if isinstance(logits, DTensor) else logits)[:, 0]


def _agree(chosen: list[int]) -> list[int]:
    """Rank 0's, where there are others: a difference in the last bit of a logit must not part them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return chosen
    ids = torch.tensor(chosen)
    dist.broadcast(ids, src=0)
    agreed: list[int] = ids.tolist()
    return agreed
