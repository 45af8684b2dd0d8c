"""The loss of a micro-batch, from hidden states, output head and labels: full logits exist nowhere else."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cross_entropy_sum(hidden: Tensor, output_head: nn.Module, labels: Tensor) -> Tensor:
    """Sum over valid targets of -log p(target), in nats; a scalar in float32 or wider.

    hidden is [B, S, dim] (or this tensor-parallel rank's share of S: the head gathers it), labels is [B, S] int64 with
    -100, torch's default ignore_index, where there is no target. Under tensor parallelism the head returns logits as
    a DTensor split over the vocabulary, and forward and backward must run inside
    `torch.distributed.tensor.parallel.loss_parallel()`.
    The caller divides by the number of valid targets of the whole global batch, once.
    """
    logits = output_head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
