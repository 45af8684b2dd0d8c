"""One step of the real training code under a memory meter, on fake tensors or on real ones.

Owns the moments of a step, between which two of its parts a peak lies, and what a deep model's step holds, from those
of shallow ones: every block is like every other, so what a step holds at one place, counted from the first block or
from the last one, is linear in the number of blocks. A peak over several places is not: each is extended by itself.
Refuses formulas: what the step does is what is counted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Partial

from titanlite.config import Config
from titanlite.model.attention import resolve_backend
from titanlite.model.documents import Examples
from titanlite.model.ops.cross_entropy import CHUNK_LOGITS
from titanlite.parallel.mesh import Mesh, build_mesh
from titanlite.plan.meter import MemoryMeter
from titanlite.trainer import Trainer, build_model, param_dtype

SHALLOW = (2, 3)
"""Numbers of blocks that are traced: a first and a last one, and one in between."""
MICRO_BATCHES = 2
"""More of them need no more memory: from the second one on there are gradients to add to."""


@dataclass(frozen=True)
class Moment:
    """A part of a step."""

    phase: str
    """init, forward, loss, backward or optimizer."""
    part: str | int = ""
    """The module whose forward or backward it is: a block by its number, embedding, norm or head."""
    micro_batch: int = 0


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank, and of a checkpoint."""

    parameters: int
    gradients: int
    optimizer: int
    average: int
    """Of the weights; 0 where none is kept."""
    checkpoint: int
    """Tensors of a checkpoint, of all ranks together."""
    activations: int
    """Kept by the forward pass of one micro-batch for its backward pass."""
    peaks: dict[Moment, int]


@contextmanager
def fake_ranks(replicate: int, shard: int, tp: int) -> Iterator[Mesh]:
    """The first rank's mesh of a process group that is not there: its collectives return at once, and move nothing."""
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=replicate * shard * tp)
    try:
        yield build_mesh("cpu", replicate, shard, tp)
    finally:
        dist.destroy_process_group()


def stand_in(config: Config, target: str) -> Config:
    """The config with which a fake step on the CPU does what a step on devices of the type `target` does.

    Types are those of the target. sdpa keeps for its backward pass what flex keeps: q, k, v, the output and the
    log-sum-exp. Raises ValueError for what cannot run there, or cannot be planned.
    """
    if config.parallelism.enable_cpu_offload:
        raise ValueError(
            "parallelism.enable_cpu_offload = true: plan does not count the memory of host and device apart; add"
            " --parallelism.enable_cpu_offload false, and take its parameters, gradients and optimiser state as the"
            " host's"
        )
    model, dtype = config.model, param_dtype(config, target)
    backend = resolve_backend(
        model.attention,
        device_type=target,
        seq_len=config.training.seq_len,
        head_dim=model.head_size,
        dtype=dtype,
    )
    type_name: Any = str(dtype).removeprefix("torch.")
    return replace(
        config,
        model=replace(model, attention="dense" if backend == "dense" else "sdpa"),
        training=replace(config.training, mixed_precision_param=type_name),
        compile=replace(config.compile, enable=False),
    )


def fake_step(config: Config, mesh: Mesh, target: str) -> Footprint:
    """The footprint on this rank of a mesh of CPU ranks that stand for devices of the type `target`.

    No tensor has memory; the mesh's process group may be a fake one.
    """
    config = stand_in(config, target)
    # Outside of the fake mode: within, tensor parallelism raises DynamicOutputShapeException.
    model = build_model(config, mesh)
    if target == "cuda":
        for module in model.modules():
            if isinstance(module, nn.RMSNorm):
                module.forward = partial(_fused_rms_norm, module)  # type: ignore[method-assign]
    # On meta tensors, as the model is before to_empty, and on mesh ranks, which are real ones.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    meter = MemoryMeter(mesh.device.type, fake)
    # The loss chooses its chunks by the device type of its tensors, which is not that of the devices to come.
    with patch.dict(CHUNK_LOGITS, {mesh.device.type: CHUNK_LOGITS[target]}), fake, meter:
        meter.enter(Moment("init"))
        model.to_empty(device=mesh.device)
        return measured_step(Trainer(config, mesh, model=model), meter)


def measured_step(trainer: Trainer, meter: MemoryMeter) -> Footprint:
    """Make a step under an active meter that has seen the trainer's tensors come into being."""
    config, mesh = trainer.config, trainer.mesh
    training = config.training
    num_rows = training.global_batch_size // mesh.dp_degree
    num_rows = min(num_rows, MICRO_BATCHES * training.local_batch_size)
    ones = torch.ones(num_rows, training.seq_len, dtype=torch.int64, device=mesh.device)
    examples = Examples(ones, ones, torch.zeros_like(ones))
    gradients: list[int] = []

    def count_gradients() -> None:
        meter.enter(Moment("optimizer"))
        gradients.append(sum(local_bytes(p.grad) for p in trainer.model.parameters() if p.grad is not None))

    trainer.on_gradients = count_gradients
    activations = _watch(trainer, meter)
    trainer.train_step(examples, num_rows * training.seq_len)
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return Footprint(
        parameters=sum(map(local_bytes, trainer.model.parameters())),
        gradients=gradients[0],
        optimizer=sum(map(local_bytes, states)),
        average=sum(map(local_bytes, trainer.average.tensors.values())) if trainer.average else 0,
        checkpoint=sum(tensor.numel() * tensor.element_size() for tensor in trainer.state().values()),
        activations=activations[0],
        peaks=dict(meter.peaks),
    )


def local_bytes(tensor: Tensor) -> int:
    """Of this rank's part, padding of its storage left out."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def _fused_rms_norm(module: nn.RMSNorm, x: Tensor) -> Tensor:
    """On CUDA the norm is one operation, which keeps its input; on the CPU several, which keep copies in float32."""
    if not isinstance(x, DTensor):
        return _FusedRMSNorm.apply(x, module.weight)
    assert isinstance(module.weight, DTensor)
    y = _FusedRMSNorm.apply(x.to_local(), module.weight.to_local(grad_placements=[Partial()]))
    return DTensor.from_local(y, x.device_mesh, x.placements)


class _FusedRMSNorm(torch.autograd.Function):
    """The memory of CUDA's norm, without its values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=wide))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _watch(trainer: Trainer, meter: MemoryMeter) -> list[int]:
    """Let the meter know at which moment the next steps are; the list gets each micro-batch's activations."""
    model, activations = trainer.model, []
    sharded = {id(storage_of(p)) for p in model.parameters()}
    micro_batch, before = -1, 0

    def at(phase: str, part: str | int) -> None:
        meter.enter(Moment(phase, part, micro_batch))

    def begin() -> None:
        nonlocal micro_batch, before
        micro_batch, before = micro_batch + 1, meter.live - meter.buffers
        at("forward", "embedding")

    def watch(module: nn.Module, phase: str, part: str | int) -> None:
        def before_forward(*_: Any) -> None:
            # FSDP2's own hook came before: the parameters are the gathered ones.
            meter.mark_buffers(s for s in map(storage_of, module.parameters()) if id(s) not in sharded)
            at(phase, part)

        def after_forward(module: nn.Module, inputs: Any, output: Tensor) -> None:
            output.register_hook(lambda _: at("backward", part))

        module.register_forward_pre_hook(before_forward)
        module.register_forward_hook(after_forward)

    trainer.on_micro_batch = begin
    watch(model.tok_embeddings, "forward", "embedding")
    for number, block in enumerate(model.layers.values()):
        watch(block, "forward", number)
    watch(model.norm, "forward", "norm")
    model.norm.register_forward_hook(lambda *_: activations.append(meter.live - meter.buffers - before))
    watch(model.output, "loss", "head")
    return activations


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """Of this rank's part."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


def footprint(config: Config, trace: Callable[[Config], Footprint], exact: bool = False) -> Footprint:
    """The footprint of all blocks, by tracing models of 2 and 3 blocks; `exact` traces all of them."""
    num_layers = config.model.n_layers
    if exact or num_layers <= SHALLOW[-1]:
        return trace(config)
    two, three = (trace(replace(config, model=replace(config.model, n_layers=n))) for n in SHALLOW)
    return extend(two, three, num_layers)


def extend(two: Footprint, three: Footprint, num_layers: int) -> Footprint:
    """The footprint of `num_layers` blocks, 4 or more, from those of 2 and 3.

    Of the blocks its peaks have the first two and the last two: between them they are linear in the block's number.
    """

    def line(at_two: int, at_three: int) -> int:
        return at_three + (num_layers - 3) * (at_three - at_two)

    peaks: dict[Moment, int] = {}
    for moment, peak in three.peaks.items():
        if not isinstance(moment.part, int):
            peaks[moment] = line(two.peaks[moment], peak)
    for phase, micro_batch in {(m.phase, m.micro_batch) for m in three.peaks if isinstance(m.part, int)}:
        shallow, deep = (
            [traced.peaks[Moment(phase, block, micro_batch)] for block in range(n)]
            for traced, n in zip((two, three), SHALLOW, strict=True)
        )
        # Seen from the first block, more blocks add what one behind it holds; seen from the last, what one before it.
        behind, before = (num_layers - 3) * (deep[0] - shallow[0]), (num_layers - 3) * (deep[2] - shallow[1])
        places = {0: deep[0] + behind, 1: deep[1] + behind, -2: deep[1] + before, -1: deep[2] + before}
        peaks |= {Moment(phase, block % num_layers, micro_batch): peak for block, peak in places.items()}
    names = ("parameters", "gradients", "optimizer", "average", "checkpoint", "activations")
    return Footprint(**{name: line(getattr(two, name), getattr(three, name)) for name in names}, peaks=peaks)
