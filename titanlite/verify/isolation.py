"""Document isolation on a user's own rows: noise in all other documents changes no bit of those that are kept.

Runs training's and generation's own parts (loader, document rule, KV cache, model, loss) with the weights and types of
step 1, on one device and without a process group: what FSDP2 and tensor parallelism add is not looked at here.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from titanlite.config import Config
from titanlite.loading import load_tokenizer
from titanlite.model.attention import resolve_backend
from titanlite.model.documents import IGNORE_INDEX, labels
from titanlite.model.transformer import Llama, initial_mean_std
from titanlite.parallel.apply import apply_activation_checkpoint, apply_compile
from titanlite.parallel.init import init_weights
from titanlite.trainer import param_dtype
from titanlite.verify.isolation_paths import MicroBatch, noisy, prepare
from titanlite.verify.isolation_results import demanded, differences, measure, measure_generation


@dataclass
class Comparison:
    """What was compared on one path with one backend, and how it ended."""

    path: str
    backend: str
    compiled: bool
    dtype: torch.dtype
    num_documents: int = 0
    num_tokens: int = 0
    """Kept, and compared; as all counts, in all comparisons together."""
    num_replaced: int = 0
    """Tokens of other documents that noise replaced."""
    identical: dict[str, bool] = field(default_factory=dict)
    """By kind of result; one that could not be computed is missing."""
    difference: str = ""
    """The first one: document, tensor, size."""
    not_run: str = ""
    """Why nothing was compared."""


def build_model(config: Config, device: torch.device, compiled: bool) -> Llama:
    """The model with its initial weights, in the type of forward and backward, checkpointed as configured."""
    with device:
        model = Llama(config.model).to(getattr(torch, config.training.dtype))
    init_weights(model, lambda name: initial_mean_std(name, config.model), config.training.seed)
    model.to(param_dtype(config, device.type))
    if config.activation_checkpoint.mode != "none":
        apply_activation_checkpoint(model, config.activation_checkpoint.mode)
    if compiled:
        apply_compile(model, config.compile.backend)
    return model


def compare(config: Config, device: torch.device) -> Iterator[tuple[MicroBatch, Comparison]]:
    """Compare on every path with every backend that can run on the device, and compiled too where the run is."""
    tokenizer = load_tokenizer(config)
    dtype, head_dim = param_dtype(config, device.type), config.model.dim // config.model.n_heads
    for path, batch in prepare(config, tokenizer):
        for compiled in (False, True) if config.compile.enable and batch.starts is None else (False,):
            model = build_model(config, device, compiled)
            for backend in ("sdpa", "flex", "dense") if batch.starts is None else ("dense",):
                comparison = Comparison(path, backend, compiled, dtype)
                # On the CPU FlexAttention has a forward pass only; what it takes is the same as on CUDA.
                forward_only = backend == "flex" and device.type == "cpu"
                try:
                    resolve_backend(
                        backend,
                        device_type="cuda" if forward_only else device.type,
                        seq_len=config.training.seq_len,
                        head_dim=head_dim,
                        dtype=dtype,
                    )
                except ValueError as error:
                    comparison.not_run = str(error).partition(": ")[2]
                    yield batch, comparison
                    continue
                try:
                    with deterministic_algorithms():
                        _compare(model, batch, comparison, tokenizer.eos_id, forward_only)
                except RuntimeError as error:
                    if not forward_only:  # which no run needs: it takes a C++ compiler
                        raise
                    comparison.not_run = str(error).partition("\n")[0]
                yield batch, comparison


def _compare(model: Llama, batch: MicroBatch, comparison: Comparison, eos_id: int, forward_only: bool) -> None:
    device, by_eos = model.output.weight.device, batch.starts is None
    forward_only = forward_only or not batch.trains
    rows = batch.rows.to(device)
    num_targets = int((labels(rows, eos_id) != IGNORE_INDEX).sum())
    for kept in batch.comparisons:
        if batch.starts is None:
            run = partial(measure, model, kept, eos_id, comparison.backend, num_targets, forward_only)
        else:
            run = partial(measure_generation, model, kept, batch.starts.to(device))
        noise = noisy(batch.rows, kept, eos_id if by_eos else -1, model.config.vocab_size)
        exact = run(rows)
        wanted = demanded(exact, kept, model, rows.shape[1] - by_eos)
        for kind, difference in differences(wanted, run(noise.to(device))).items():
            comparison.identical[kind] = comparison.identical.get(kind, True) and not difference
            if difference and not comparison.difference:
                if any(differences(exact, run(rows)).values()):
                    difference += "; so do the same rows twice: a kernel is not deterministic here"
                comparison.difference = f"{kept.name}: {difference}"
        comparison.num_documents += len(kept.pieces)
        comparison.num_tokens += kept.num_tokens
        comparison.num_replaced += int((noise != batch.rows).sum())


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Only algorithms that give the same bits for the same input, as training.deterministic sees to."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
