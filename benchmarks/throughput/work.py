"""The work that every contender does: the model, the rows, and what identifies a case."""

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from titanlite.config import ModelConfig

MODEL = ModelConfig(dim=256, n_layers=6, n_heads=8, n_kv_heads=4, ffn_dim=768, vocab_size=8192)
EOS = 0
LR, MAX_NORM, BETAS, WEIGHT_DECAY = 3e-4, 1.0, (0.9, 0.95), 0.1
SIGMA = 1.0
"""Of the logarithm of document lengths."""


NumberFormat = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Case:
    """Rows of a kind, on ranks of a kind, in a number format."""

    seq_len: int
    mean: int | None
    """Mean length of the documents, in tokens; None: one document per row."""
    dtype: NumberFormat = "float32"
    """Of matrix products; weights and optimiser state are float32 always."""
    processes: int = 1
    """Ranks. The two threads are divided among them."""
    compiled: bool = False
    model: ModelConfig = MODEL
    threads: int = 2
    device: str = "cpu"
    activation_checkpoint: Literal["none", "selective", "full"] = "none"
    """Of titanlite; the peers keep all activations."""

    @property
    def rows(self) -> int:
        """Rows of a step of a rank: 4,096 tokens a step or more, all ranks together."""
        return max(1, 4096 // (self.seq_len * self.processes))

    @property
    def tokens(self) -> int:
        return self.rows * self.processes * self.seq_len

    @property
    def name(self) -> str:
        documents = "one document a row" if self.mean is None else f"documents of mean {self.mean}"
        ranks = f"{self.processes} x {self.threads // self.processes} threads"
        return f"rows of {self.seq_len}, {documents}, {self.dtype}, {ranks}{', compiled' if self.compiled else ''}"

    @property
    def autocast(self) -> Any:
        """What the loops that are written by hand compute under."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16")


class Contender(Protocol):
    """Something that trains. Made on every rank of a case, with the process group joined."""

    def step(self, rows: Tensor) -> Tensor | None:
        """One optimiser step over this rank's rows [B, S + 1]; its mean loss, or None from a floor."""


def rows_of(case: Case, steps: int, rank: int) -> Tensor:
    """Rows of all steps of a rank, int64 [steps, B, S + 1]: random tokens in documents of log-normal length."""
    generator = torch.Generator().manual_seed(1000 * rank + 1)
    shape = (steps, case.rows, case.seq_len + 1)
    rows = torch.randint(1, case.model.vocab_size, shape, generator=generator)
    if case.mean is not None:
        flat = rows.view(-1)
        count = 4 * flat.numel() // case.mean + 16  # more than fit
        normal = torch.randn(count, generator=generator, dtype=torch.float64)
        lengths = (normal * SIGMA + math.log(case.mean) - SIGMA**2 / 2).exp().round().long().clamp_(min=2)
        ends = lengths.cumsum(0) - 1
        flat[ends[ends < flat.numel()]] = EOS
    return rows


def document_lengths(rows: Tensor) -> list[int]:
    """Lengths in tokens of the documents in the inputs of rows [B, S + 1]; a row's end cuts a document."""
    lengths = []
    for row in rows[:, :-1].tolist():
        begin = 0
        for index, token in enumerate(row):
            if token == EOS or index == len(row) - 1:
                lengths.append(index + 1 - begin)
                begin = index + 1
    return lengths
