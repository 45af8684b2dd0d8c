"""Parallelise a LLaMA from outside, by module name, in one order.

The order: tensor parallelism, activation checkpointing, compile, FSDP2. The model stays a plain module, and its
parameter names do not change.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titanlite.config import ActivationCheckpointConfig, CompileConfig, ParallelismConfig
from titanlite.model.transformer import Llama
from titanlite.parallel.mesh import Mesh


def parallelize(
    model: Llama,
    mesh: Mesh,
    parallelism: ParallelismConfig,
    activation_checkpoint: ActivationCheckpointConfig,
    compile: CompileConfig,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
) -> None:
    """Make `model`, built on the meta device, a sharded one, in place.

    param_dtype is the type of parameters and activations in forward and backward, reduce_dtype that of gradient
    reduction. FSDP2 is applied at every degree, also 1, so that mixed precision is the same everywhere.
    """
    if mesh.tp.size() > 1:
        apply_tp(model, mesh)
    if activation_checkpoint.mode != "none":
        apply_activation_checkpoint(model, activation_checkpoint.mode)
    if compile.enable:
        apply_compile(model, compile.backend)
    apply_fsdp(model, mesh, parallelism, param_dtype, reduce_dtype)


def apply_tp(model: Llama, mesh: Mesh, *, split_sequence: bool = True) -> None:
    """Tensor parallelism; the logits are over the vocabulary.

    split_sequence: between blocks each rank has a part of the sequence (sequence parallelism), whose length must be
    a multiple of the degree. Else it has all of it, as generation wants, which takes one token at a time.
    """
    between: Placement = Shard(1) if split_sequence else Replicate()
    plan: dict[str, ParallelStyle] = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
    }
    block_plan: dict[str, ParallelStyle] = {
        "attention": PrepareModuleInput(
            input_layouts=(between, None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=between),
        "feed_forward": PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),)),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=between),
        "feed_forward.w3": ColwiseParallel(),
    }
    if split_sequence:
        plan["norm"] = block_plan["attention_norm"] = block_plan["ffn_norm"] = SequenceParallel()
    parallelize_module(model, mesh.tp, plan)
    for block in model.layers.values():
        parallelize_module(block, mesh.tp, block_plan)
    # Not ColwiseParallel, which would drop the labels.
    model.output.weight = nn.Parameter(distribute_tensor(model.output.weight, mesh.tp, [Shard(0)]))
    model.output.register_forward_pre_hook(partial(_gather_sequence, mesh.tp, between))
    if model.config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    # The embedding's output is an AsyncCollectiveTensor, which loses its autograd history at the border of a compiled
    # block: the embedding would get a gradient of zero, in silence. Any differentiable op keeps it. Uncompiled, FSDP2
    # would warn of a view.
    model.tok_embeddings.register_forward_hook(lambda module, inputs, output: output + 0.0)


def _gather_sequence(mesh: DeviceMesh, between: Placement, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    hidden, *labels = inputs
    if not isinstance(hidden, DTensor):
        hidden = DTensor.from_local(hidden, mesh, [between])
    return hidden.redistribute(placements=[Replicate()]), *labels


def apply_activation_checkpoint(model: Llama, mode: str) -> None:
    """Recompute each block in the backward pass, wholly ("full") or but for its expensive results ("selective")."""
    options: dict[str, Any] = {"context_fn": _selective_contexts} if mode == "selective" else {}
    for block in model.layers.values():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)


def _selective_contexts() -> Any:
    """Save attention, communication and every second matrix product of a block; recompute what is cheap."""
    saved_ops = {
        torch.ops.titanlite.document_attention.default,
        torch.ops.higher_order.flex_attention,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops._c10d_functional.reduce_scatter_tensor.default,
    }
    num_matmuls = {False: 0, True: 0}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        save = op in saved_ops
        if op in (torch.ops.aten.mm.default, torch.ops.titanlite.linear.default):
            num_matmuls[context.is_recompute] += 1
            save = num_matmuls[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def apply_compile(model: Llama, backend: str) -> None:
    """Compile each block as one graph; blocks of one shape share the compiled code."""
    for block in model.layers.values():
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True)


def apply_fsdp(
    model: Llama, mesh: Mesh, parallelism: ParallelismConfig, param_dtype: torch.dtype, reduce_dtype: torch.dtype
) -> None:
    """One FSDP2 unit for the embedding, for each block and for the output head; the root keeps the rest.

    Tied matrices must be gathered and reduced as one, so they stay in the root unit, which is gathered all step long.
    """
    shard: Callable[..., Any] = partial(
        fully_shard,
        mesh=mesh.fsdp,
        # The model casts what it must: the rotary tables stay in float32.
        mp_policy=MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy() if parallelism.enable_cpu_offload else OffloadPolicy(),
    )
    reshard = parallelism.fsdp_reshard_after_forward == "always"
    for block in model.layers.values():
        shard(block, reshard_after_forward=reshard)
    if not model.config.tie_embeddings:
        shard(model.tok_embeddings, reshard_after_forward=reshard)
        # Its backward begins right after its forward.
        shard(model.output, reshard_after_forward=False)
    shard(model, reshard_after_forward=False)
