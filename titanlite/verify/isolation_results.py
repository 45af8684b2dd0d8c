"""What training and generation compute of some documents, what of it must stay when all else is noise, and comparison.

Bits are compared and there is no tolerance. That is sound: under deterministic algorithms no kernel here lets values
decide the order of its work, lengths are kept, and what a mask leaves out counts as an exact zero. The one exception is
the gradient of the embedding's weight: see `_observed`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from titanlite.model.attention import build_documents
from titanlite.model.decode import KVCache
from titanlite.model.documents import IGNORE_INDEX, labels
from titanlite.model.rope import rope_rotations
from titanlite.model.transformer import Llama
from titanlite.verify.isolation_paths import NUM_DECODED, Kept

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
