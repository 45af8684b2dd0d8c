"""The output head and the loss, chunk by chunk of tokens: the logits of a whole batch never exist.

The gradients of a chunk are computed together with its loss, while its logits are at hand, so that nothing of the size
of the vocabulary is kept for the backward pass and nothing is computed twice (as in Wijmans et al. 2024,
arXiv:2411.09009, and Hsu et al. 2024, arXiv:2410.10989, without their kernels).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from titanlite.model.documents import IGNORE_INDEX
from titanlite.model.ops.matmul import matmul

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**27}
"""Logits of a chunk: on the CPU what stays near its caches, on a GPU what keeps its matrix units busy."""


class OutputHead(nn.Linear):
    """The last projection: logits of hidden states or, given labels as well, their loss.

    Both in one module, because FSDP2 gathers a weight around a module's forward. Split over the vocabulary by tensor
    parallelism, hidden and weight are DTensors.
    """

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__(dim, vocab_size, bias=False)

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """hidden [B, S, dim] -> logits [B, S, V]; with labels [B, S] -> `linear_cross_entropy`'s sum."""
        if labels is None:
            return super().forward(hidden)
        weight: Tensor = self.weight
        if not isinstance(weight, DTensor):
            return linear_cross_entropy(hidden, weight, labels)
        assert isinstance(hidden, DTensor)
        # Each rank has the gradient that comes through its own part of the vocabulary: they are to be added up.
        hidden = hidden.to_local(grad_placements=[Partial()])
        group = weight.device_mesh.get_group()
        first = dist.get_rank(group) * -(-weight.shape[0] // dist.get_world_size(group))
        return linear_cross_entropy(hidden, weight.to_local(), labels, first, group)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, first: int = 0, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Sum over valid targets of -log p(target), in nats; a scalar in float32 or wider.

    hidden is [..., dim], weight [V, dim], labels [...] int64 with IGNORE_INDEX where there is no target. With a group,
    the weight of each of its ranks is a part of the vocabulary that begins with id `first`; the sum is of the whole
    and equal on all ranks, and the gradient of hidden is a rank's part of it. The caller divides by the number of valid
    targets of the whole global batch, once.
    """
    return _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten(), first, group)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, first: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = []
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        # In bfloat16 a sum over chunks would lose what each adds.
        grad_weight = torch.zeros_like(weight, dtype=wide) if for_weight else None
        num_tokens = max(1, CHUNK_LOGITS[hidden.device.type] // weight.shape[0])
        # One for all chunks: fresh memory costs a CPU more than the arithmetic on it.
        wide_logits = None
        if hidden.dtype != wide:
            wide_logits = hidden.new_empty(min(num_tokens, len(labels)), weight.shape[0], dtype=wide)
        for begin in range(0, len(labels), num_tokens):
            part = slice(begin, begin + num_tokens)
            chunk = hidden[part]
            logits = matmul(chunk, weight.t())
            exact = logits if wide_logits is None else wide_logits[: len(chunk)].copy_(logits)
            losses.append(_cross_entropy(exact, labels[part], first, group))
            grad_logits = logits if wide_logits is None else logits.copy_(exact)
            if grad_hidden is not None:
                grad_hidden[part] = matmul(grad_logits, weight)
            if grad_weight is not None:
                grad_weight += matmul(grad_logits.t(), chunk)
            del logits, exact, grad_logits  # before the next chunk's
        ctx.grads, ctx.dtype = (grad_hidden, grad_weight), weight.dtype
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden, grad_weight), ctx.grads = ctx.grads, None  # scaled in place: a second pass must fail
        if grad_hidden is not None:
            grad_hidden *= grad_loss
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss).to(ctx.dtype)
        return grad_hidden, grad_weight, None, None, None


def _cross_entropy(logits: Tensor, labels: Tensor, first: int, group: dist.ProcessGroup | None) -> Tensor:
    """Summed loss of logits [N, V], which become its gradient with respect to them."""
    valid = labels != IGNORE_INDEX
    index = labels - first
    here = valid & (index >= 0) & (index < logits.shape[1])
    index = index.masked_fill(~here, 0).unsqueeze(1)
    target = logits.gather(1, index).squeeze(1).masked_fill(~here, 0.0)
    peak = logits.amax(1)
    if group is not None:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    exp = logits.sub_(peak.unsqueeze(1)).exp_()
    sums = torch.stack([exp.sum(1), target])
    if group is not None:
        dist.all_reduce(sums, group=group)
    loss = (sums[0].log() + peak - sums[1]).masked_fill(~valid, 0.0).sum()
    # softmax - one-hot, and zero where there is no target
    exp.mul_((valid / sums[0]).unsqueeze(1))
    exp.scatter_add_(1, index, -here.unsqueeze(1).to(exp))
    return loss
