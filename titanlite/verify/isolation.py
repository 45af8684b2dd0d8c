"""Document isolation on a user's own rows: noise in all other documents changes no bit of those that are kept.

Runs training's and generation's own parts (loader, document rule, KV cache, model, loss) with the weights and types of
step 1, on one device and without a process group: what FSDP2 and tensor parallelism add is not looked at here.

Bits are compared and there is no tolerance. That is sound: under deterministic algorithms no kernel here lets values
decide the order of its work, lengths are kept, and what a mask leaves out counts as an exact zero. The one exception is
the gradient of the embedding's weight: see `_observed`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from titanlite.config import Config
from titanlite.loading import load_tokenizer
from titanlite.model.attention import build_documents, resolve_backend
from titanlite.model.decode import KVCache
from titanlite.model.documents import IGNORE_INDEX, labels
from titanlite.model.rope import rope_rotations
from titanlite.model.transformer import Llama, initial_mean_std
from titanlite.parallel.apply import apply_activation_checkpoint, apply_compile
from titanlite.parallel.init import init_weights
from titanlite.trainer import param_dtype
from titanlite.verify.isolation_paths import NUM_DECODED, Kept, MicroBatch, noisy, prepare

Results = dict[str, dict[str, Tensor]]
"""Tensors by kind (positions, logits, loss, gradients) and name."""


def measure(
    model: Llama, kept: Kept, eos_id: int, backend: str, divisor: int, forward_only: bool, rows: Tensor
) -> Results:
    """What training computes of the kept documents: the rotary angles that each block gets, their logits, the sum of
    their loss terms over `divisor`, and the gradients of that sum: of the embedded tokens of all rows, and of every
    parameter."""
    tokens = rows[:, :-1]
    mask = kept.mask(tokens)
    with torch.set_grad_enabled(not forward_only), _observed(model) as (embedded, angles):
        hidden = model(tokens, build_documents(tokens, eos_id, backend))
        own_targets = labels(rows, eos_id).masked_fill(~mask, IGNORE_INDEX)
        loss = model.output(hidden, own_targets) / divisor
        named = {"": embedded[0], **dict(model.named_parameters())}
        found = () if forward_only else torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    results = _forward_results(model, hidden, angles, mask)
    results["loss"] = {"sum of the loss terms": loss.detach()}
    if not forward_only:
        gradients = dict(zip(named, found, strict=True))
        of_tokens = gradients.pop("")
        assert of_tokens is not None
        results["gradients"] = {_OTHERS: of_tokens[~mask], "gradient of its embedded tokens": of_tokens[mask]}
        results["gradients"] |= {f"gradient of {name}": g for name, g in gradients.items() if g is not None}
    return results


def measure_generation(model: Llama, kept: Kept, starts: Tensor, tokens: Tensor) -> Results:
    """What generation computes of the kept prompts: all but their last columns at once, those one by one, cached."""
    cache, parts = KVCache(starts, len(model.layers)), []
    num_decoded = min(NUM_DECODED, tokens.shape[1] - 1)
    with torch.no_grad():
        for columns in tokens.split([tokens.shape[1] - num_decoded, *[1] * num_decoded], dim=1):
            with _observed(model) as (_, angles):
                parts.append((model(columns, cache.next(columns.shape[1])), angles))
    hidden = torch.cat([part for part, _ in parts], 1)
    all_angles = {name: torch.cat([angles[name] for _, angles in parts], 1) for name in parts[0][1]}
    return _forward_results(model, hidden, all_angles, kept.mask(tokens))


@torch.no_grad()
def _forward_results(model: Llama, hidden: Tensor, angles: dict[str, Tensor], mask: Tensor) -> Results:
    logits = [model.output(row)[its_mask] for row, its_mask in zip(hidden, mask, strict=True)]
    return {
        "positions": {f"rotary angles in {name}": angle[mask] for name, angle in angles.items()},
        "logits": {"logits": torch.cat(logits)},
    }


_OTHERS = "gradient of the embedded tokens of other documents"


def demanded(results: Results, kept: Kept, model: Llama, seq_len: int) -> Results:
    """What must come out with noise: the same results, with the angles of documents that stand alone, and with no
    trace of their loss in the gradients of other documents."""
    weight, angles = model.output.weight, results["positions"]
    positions = kept.positions(seq_len).to(weight.device).unsqueeze(0)
    alone = rope_rotations(positions, model.config, torch.promote_types(weight.dtype, torch.float32))[0]
    wanted = {**results, "positions": dict.fromkeys(angles, alone)}
    if "gradients" in results:
        wanted["gradients"] = {**results["gradients"], _OTHERS: torch.zeros_like(results["gradients"][_OTHERS])}
    return wanted


def differences(expected: Results, actual: Results) -> dict[str, str]:
    """By kind the first tensor that differs in a bit or is not finite, or nothing."""
    found = {}
    for kind, tensors in expected.items():
        assert tensors.keys() == actual[kind].keys()
        found[kind] = ""
        for name, tensor in tensors.items():
            other = actual[kind][name]
            if not torch.equal(_bits(tensor), _bits(other)):
                size = (tensor.double() - other.double()).abs().max().item()
                found[kind] = f"{name} differs by up to {size:.3g}"
            elif not tensor.isfinite().all():
                found[kind] = f"{name} is not finite"
            if found[kind]:
                break
    return found


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@contextmanager
def _observed(model: Llama) -> Iterator[tuple[list[Tensor], dict[str, Tensor]]]:
    """Catch the embedded tokens, made a leaf with a gradient of its own, and what rotates each block's heads.

    The gradient of the embedding's weight is the sum of its tokens' gradients, and a CUDA kernel groups the terms by
    how often an id occurs in the whole batch: other documents change its rounding, rightly. So its terms are compared
    instead, and of a tied matrix what it gets as the head.
    """
    embedded: list[Tensor] = []
    angles: dict[str, Tensor] = {}

    def keep_embedded(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_(torch.is_grad_enabled()))
        return embedded[0]

    def keep_angles(name: str) -> Callable[[nn.Module, tuple], None]:
        def keep(module: nn.Module, inputs: tuple) -> None:
            angles[name] = inputs[1]  # rotations: cosines and sines

        return keep

    hooks = [model.tok_embeddings.register_forward_hook(keep_embedded)]
    hooks += [layer.register_forward_pre_hook(keep_angles(f"layers.{name}")) for name, layer in model.layers.items()]
    try:
        yield embedded, angles
    finally:
        for hook in hooks:
            hook.remove()


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
    dtype, head_dim = param_dtype(config, device.type), config.model.head_size
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
