"""Assembles the rooms into a trainer and makes one step. The loop, logging and process life are the verbs' business."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import clip_grads_with_norm_

from titanlite.config import Config
from titanlite.model.attention import realise, resolve_backend
from titanlite.model.documents import Examples
from titanlite.model.selfcheck import check_backend
from titanlite.model.transformer import Llama, initial_mean_std
from titanlite.optim import NonFiniteGuard, WeightAverage, build_optimizer, learning_rate, local_square_sum, set_lr
from titanlite.parallel.apply import parallelize
from titanlite.parallel.init import init_weights
from titanlite.parallel.mesh import Mesh


@dataclass(frozen=True)
class StepResult:
    """Scalars of one optimiser step, on the device: reading one waits for the device."""

    loss: Tensor
    """Mean cross-entropy over the valid targets of the global batch, in nats."""
    grad_norm: Tensor
    """Global 2-norm of the gradient before clipping."""
    lr: float


def param_dtype(config: Config, device_type: str) -> torch.dtype:
    """Type of parameters and activations in forward and backward."""
    name = config.training.mixed_precision_param
    if name == "auto":
        name = "bfloat16" if device_type == "cuda" else config.training.dtype
    return getattr(torch, name)


def build_model(config: Config, mesh: Mesh) -> Llama:
    """The model of this rank: built on meta, parallelised, and without memory yet (`to_empty` gives it that)."""
    training = config.training
    reduce = training.dtype if training.mixed_precision_reduce == "auto" else training.mixed_precision_reduce
    with torch.device("meta"):
        model = Llama(config.model).to(getattr(torch, training.dtype))
    parallelize(
        model,
        mesh,
        config.parallelism,
        config.activation_checkpoint,
        config.compile,
        param_dtype=param_dtype(config, mesh.device.type),
        reduce_dtype=getattr(torch, reduce),
    )
    return model


class Trainer:
    """Model, optimiser and counters of this rank."""

    def __init__(self, config: Config, mesh: Mesh, model: Llama | None = None) -> None:
        """model: one that `build_model` made and that has memory; else it is made here, with its initial weights."""
        self.config, self.mesh = config, mesh
        self.step = 0
        self.trained_targets = 0
        head_dim, dtype = config.model.head_size, param_dtype(config, mesh.device.type)
        if config.parallelism.enable_cpu_offload and mesh.device.type == "cpu":
            raise ValueError("parallelism.enable_cpu_offload = true: parameters are in CPU memory already; use false")
        self.backend = resolve_backend(
            config.model.attention,
            device_type=mesh.device.type,
            seq_len=config.training.seq_len,
            head_dim=head_dim,
            dtype=dtype,
        )
        if model is None:
            check_backend(self.backend, mesh.device, dtype, head_dim)
            model = build_model(config, mesh)
            model.to_empty(device="cpu" if config.parallelism.enable_cpu_offload else mesh.device)
            init_weights(model, lambda name: initial_mean_std(name, config.model), config.training.seed)
        self.model = model
        self.optimizer = build_optimizer(model.parameters(), config.optimizer, model.layers.parameters())
        decay = config.training.ema_decay
        self.average = WeightAverage(model.named_parameters(), decay) if decay else None
        self.parameter_device = next(self.model.parameters()).device
        self.guard = NonFiniteGuard(mesh.device, sticky=config.training.on_nonfinite == "stop")
        self.on_micro_batch: Callable[[], None] = lambda: None
        """Called before each forward pass of a step."""
        self.on_gradients: Callable[[], None] = lambda: None
        """Called in each step when its gradients are whole and not yet clipped, for those who watch them."""

    def train_step(self, examples: Examples, num_targets: int) -> StepResult:
        """One optimiser step over the global batch. Collective; no device sync.

        examples are this dp rank's, num_targets the valid targets of all ranks' rows together.
        """
        training, self.step = self.config.training, self.step + 1
        micro_batches = examples.split(training.local_batch_size)
        # FSDP2 averages gradients over dp ranks; times dp_degree is their sum, so each target weighs 1 / num_targets.
        weight = self.mesh.dp_degree / max(num_targets, 1)
        losses = []
        for i, micro_batch in enumerate(micro_batches):
            self.on_micro_batch()
            cast(FSDPModule, self.model).set_requires_all_reduce(i == len(micro_batches) - 1)
            losses.append(self._forward_backward(micro_batch, weight))
        schedule = self.config.lr_scheduler
        lr = learning_rate(self.step, schedule.total_steps or training.steps, self.config.optimizer.lr, schedule)
        loss, norm = self._update(torch.stack(losses).sum(), lr)
        self.trained_targets += num_targets
        return StepResult(loss, norm, lr)

    def _forward_backward(self, examples: Examples, weight: float) -> Tensor:
        examples = examples.to(self.mesh.device)
        documents = realise(examples.starts, self.backend)
        loss = self.model.output(self.model(examples.tokens, documents), examples.labels) * weight
        loss.backward()
        return loss.detach()

    def _update(self, loss: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """Clip and update, unless the loss or the gradient is not finite. Returns the global loss and gradient norm."""
        self.on_gradients()
        square_sum = local_square_sum(p.grad for p in self.model.parameters() if p.grad is not None)
        # Every rank weighed its targets by dp_degree, and tp peers hold the same loss.
        totals = torch.stack([square_sum.to(loss), loss / dist.get_world_size()])
        dist.all_reduce(totals)
        norm, loss = totals[0].sqrt(), totals[1]
        self.guard.observe(self.step, torch.isfinite(totals).all())
        if self.config.training.max_norm > 0:
            clip_grads_with_norm_(self.model.parameters(), self.config.training.max_norm, norm)
        set_lr(self.optimizer, lr)
        # Moved here, where the host waits for it: fused AdamW's own copy to offloaded parameters may be read too early.
        found_inf = self.guard.found_inf.to(self.parameter_device)
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.average:
            self.average.update(found_inf)
        self.optimizer.zero_grad()
        return loss, norm

    def begin_average(self) -> None:
        """At the weights as they are now, where an average of them is kept."""
        if self.average:
            self.average.begin()

    def state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint by name: `model.<parameter>`, `optimizer.<moment>.<parameter>` and, where there
        is an average of the weights, `ema.<parameter>`."""
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            for key, value in self.optimizer.state[p].items():
                tensors[f"optimizer.{key}.{name}"] = value
        if self.average:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.average.tensors.items()}
        return tensors
