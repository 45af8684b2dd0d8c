"""Optimisers, the learning rate as a pure function of the step, the gradient's norm and guard, the weights' average."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from titanlite.config import LrSchedulerConfig, OptimizerConfig
from titanlite.muon import Muon


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, in_blocks: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The optimiser with its state allocated, so that a checkpoint can be loaded in place.

    Fused AdamW; with name = "muon" only for what is no matrix among `in_blocks`, those of the parameters that
    transformer blocks hold. Matrices are decayed; norms and biases, which have one dimension, are not. `set_lr` sets
    the rate of each step.
    """
    matrices = [p for p in in_blocks if p.ndim == 2] if config.name == "muon" else []
    taken = set(matrices)
    parameters = [p for p in parameters if p not in taken]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    for p in parameters:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    if matrices:
        return Muon(matrices, optimizer, momentum=config.muon_momentum, ns_steps=config.muon_ns_steps)
    return optimizer


def learning_rate(step: int, steps: int, peak: float, config: LrSchedulerConfig) -> float:
    """Rate of optimiser step `step` (1-based) of `steps`: linear warm-up, stable part, decay to peak * lr_min.

    The first step of the decay has the peak, and the minimum is reached after the last one: a step whose rate were 0
    would read a batch for nothing. Warmup-stable-decay (arXiv:2404.06395) is decay_ratio < 1.
    """
    if step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    decay_steps = min(round(config.decay_ratio * steps), steps - config.warmup_steps)
    progress = max(0.0, (step - 1 - (steps - decay_steps)) / decay_steps) if decay_steps else 0.0
    progress = min(progress, 1.0)
    if config.decay_type == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.decay_type == "linear":
        share = 1 - progress
    else:
        share = 1 - math.sqrt(progress)
    return peak * (config.lr_min + (1 - config.lr_min) * share)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def local_square_sum(gradients: Iterable[Tensor]) -> Tensor:
    """This rank's share of the squared 2-norm of all gradients: summed over all ranks it is the squared norm.

    A gradient that several ranks hold alike (HSDP replicas, norms under tensor parallelism) counts once: each holder
    gives its square divided by their number. Returns a scalar in the gradients' dtype; no communication.
    """
    world_size = dist.get_world_size()
    by_holders: dict[int, list[Tensor]] = {}
    for gradient in gradients:
        holders = world_size
        if isinstance(gradient, DTensor):
            shards = 1
            for placement, size in zip(gradient.placements, gradient.device_mesh.shape, strict=True):
                assert not placement.is_partial(), f"unreduced gradient: {placement}"
                shards *= 1 if placement.is_replicate() else size  # is_shard() is false for strided shards
            holders = world_size // shards
            gradient = gradient.to_local()
        by_holders.setdefault(holders, []).append(gradient)
    parts = [get_total_norm(group).square() / holders for holders, group in by_holders.items()]
    return torch.stack(parts).sum()


class NonFiniteGuard:
    """Keeps non-finite gradients out of the weights without waiting for the device.

    `found_inf` is what fused AdamW reads: 1 makes it leave weights and moments alone. Sticky: it stays 1 from the first
    bad step on; else each bad step is skipped by itself. `read` waits for the device: call it at logged steps and
    before every save.
    """

    def __init__(self, device: torch.device, sticky: bool) -> None:
        self.sticky = sticky
        self.found_inf = torch.zeros((), device=device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # first bad step (0: none), number of them

    def observe(self, step: int, finite: Tensor) -> None:
        """Take note of step `step`'s verdict, a boolean scalar on the device that is the same on every rank."""
        first, num_bad = self._counts.unbind()
        first = torch.where((first == 0) & ~finite, step, first)
        self._counts = torch.stack([first, num_bad + (~finite).long()])
        self.found_inf = ((first > 0) if self.sticky else ~finite).float()

    def read(self) -> tuple[int, int]:
        """The first bad step (0 where there was none) and the number of bad steps."""
        first, num_bad = self._counts.tolist()
        return first, num_bad


class WeightAverage:
    """An exponential moving average of the weights, with their names, types and shards.

    Begins at the weights as they are. After each update it is decay * average + (1 - decay) * weight.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self._weights, self._decay = dict(parameters), decay
        self.tensors = {name: p.detach().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def begin(self) -> None:
        """Anew, at the weights as they are now."""
        for average, weight in self._pairs():
            average.copy_(weight)

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """Follow the weights, but not where `found_inf` is 1, which left them alone. Does not wait for the device."""
        for average, weight in self._pairs():
            average.lerp_(weight, (1 - found_inf).to(weight.dtype) * (1 - self._decay))

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """The model computes with the average meanwhile. Takes the memory of one more shard, not of the model."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, weight in self._pairs():
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of each average and of its weight."""
        for name, weight in self._weights.items():
            average = self.tensors[name]
            if isinstance(weight, DTensor):
                assert isinstance(average, DTensor)
                yield average.to_local(), weight.to_local()
            else:
                yield average, weight
