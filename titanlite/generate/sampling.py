"""From logits to the next token: greedy, or drawn from a distribution that temperature, top_k and top_p shape.

Each prompt has a random generator of its own, keyed by seed and prompt, so that no draw depends on the batch. Draws
invert the cumulative distribution of float64 probabilities with one uniform number a token, on every device alike.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0
    """Divides the logits; 0: the most probable token (of equal ones the lowest id)."""
    top_k: int | None = None
    """Keep only so many of the most probable tokens; None: all."""
    top_p: float = 1.0
    """Of those, keep the fewest that have at least this probability together (Holtzman et al. 2019,
    arXiv:1904.09751)."""
    seed: int = 0


def distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """What a token is drawn from: probabilities, float64 [B, K], most probable first, and their ids [B, K].

    logits [B, V]; the temperature is above 0. Of tokens with equal logits those with lower ids come first.
    """
    logits, ids = logits.double().sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        logits, ids = logits[:, : sampling.top_k], ids[:, : sampling.top_k]
    probabilities = ((logits - logits[:, :1]) / sampling.temperature).softmax(-1)  # no overflow at low temperatures
    if sampling.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return probabilities / probabilities.sum(-1, keepdim=True), ids


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The index [B] at which the cumulative sum of probabilities [B, K], descending, passes uniform [B], in [0, 1)."""
    cumulative = probabilities.cumsum(-1)
    index = torch.searchsorted(cumulative, uniform.unsqueeze(-1) * cumulative[:, -1:], right=True).squeeze(-1)
    return index.minimum((probabilities > 0).sum(-1) - 1)  # a product may round up to the whole sum


def generators(prompts: Sequence[Sequence[int]], seed: int) -> list[random.Random]:
    """A generator for each prompt, keyed by seed, its tokens, and how many equal ones come before it."""
    seen: Counter[str] = Counter()
    made = []
    for prompt in prompts:
        digest = hashlib.blake2b(repr(list(map(int, prompt))).encode(), digest_size=16).hexdigest()
        made.append(random.Random(f"{seed}/{digest}/{seen[digest]}"))
        seen[digest] += 1
    return made


class Sampler:
    """Chooses the next token of each prompt of a batch, of those that the vocabulary has."""

    def __init__(
        self, sampling: Sampling, generators: Sequence[random.Random], vocab_size: int, unused_ids: Sequence[int] = ()
    ) -> None:
        self._sampling, self._generators = sampling, generators
        self._vocab_size, self._unused_ids = vocab_size, list(unused_ids)

    def __call__(self, logits: Tensor) -> list[int]:
        """Ids for logits [B, V]. Raises ValueError where one is NaN: no choice would mean anything."""
        logits = logits[:, : self._vocab_size].to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        if logits.isnan().any():
            raise ValueError("the model's logits are not numbers: its weights are damaged, or too large for --dtype")
        logits[:, self._unused_ids] = -torch.inf
        if self._sampling.temperature == 0:
            chosen: list[int] = logits.argmax(-1).tolist()
            return chosen
        probabilities, ids = distribution(logits, self._sampling)
        uniform = [generator.random() for generator in self._generators]
        index = draw(probabilities, torch.tensor(uniform, dtype=torch.float64, device=logits.device))
        drawn: list[int] = ids.gather(-1, index.unsqueeze(-1)).squeeze(-1).tolist()
        return drawn
