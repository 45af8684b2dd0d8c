"""The document rule on the CPU: one attention call per document, inside one custom operation.

Owns `torch.ops.titanlite.document_attention`, which compilers, activation checkpointing and fake tensors see as a
single operation with a backward of its own. Tokens of other documents are never read, so isolation holds bit by bit,
NaN included, and the work is the sum of squared document lengths. Refuses other devices than the CPU.

Autograd does not look inside a custom operation, so both directions call the ATen flash attention operations and
hand the log-sum-exp from one to the other. Those two are private: tests/model/test_attention.py holds their signatures.
"""

import functools
from typing import Any

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# bfloat16 documents shorter than this go through the backward in float32: ATen's bfloat16 backward was 2 to 10 times
# slower there (head_dim 32 to 128), and 1.3 to 1.7 times faster from 1024 tokens on.
_BFLOAT16_BACKWARD_FROM = 256


@torch.library.custom_op("titanlite::document_attention", mutates_args=(), device_types="cpu")
def document_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention within each document, scaled by head_dim ** -0.5.

    q [B, S, H, D], k and v [B, S, KV, D] where KV divides H, starts [B, S] as from `document_starts`. Returns the
    output [B, S, H, D] and the log-sum-exp of the scores [B, S, H] (zero where a document is a single token), which
    only the backward needs.
    """
    kv_heads = k.shape[2]
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), _empty_lse(q).zero_()
    documents, alone = _documents(starts)
    # A document of one token returns its value. There can be many (padding), and the loop leaves them out.
    out.flatten(0, 1)[alone] = v.flatten(0, 1)[alone].repeat_interleave(q.shape[2] // kv_heads, 1)
    qs, ks, vs, outs = _by_group(q, kv_heads), _by_group(k, kv_heads), _by_group(v, kv_heads), _by_group(out, kv_heads)
    ks, vs = ks.expand_as(qs), vs.expand_as(qs)
    lses = _by_group(lse.unsqueeze(3), kv_heads).squeeze(3)
    for document in documents:
        outs[:, :, document], lses[:, :, document] = _flash(
            qs[:, :, document], ks[:, :, document], vs[:, :, document], 0.0, True
        )
    return out, lse


@document_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), _empty_lse(q)


@torch.library.custom_op("titanlite::document_attention_backward", mutates_args=(), device_types="cpu")
def document_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given the gradient of the output; shapes as in `document_attention`."""
    kv_heads = k.shape[2]
    documents, alone = _documents(starts)
    grad_q, grad_k, grad_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    # In a document of one token only the value has a gradient.
    grad_q.flatten(0, 1)[alone], grad_k.flatten(0, 1)[alone] = 0.0, 0.0
    grad_v.flatten(0, 1)[alone] = grad.flatten(0, 1)[alone].unflatten(1, (kv_heads, -1)).sum(2)
    saved = [_by_group(t, kv_heads) for t in (grad, q, k, v, out)]
    saved[2:4] = [t.expand_as(saved[1]) for t in saved[2:4]]
    lses = _by_group(lse.unsqueeze(3), kv_heads).squeeze(3)
    grad_qs, grad_ks, grad_vs = (_by_group(t, kv_heads) for t in (grad_q, grad_k, grad_v))
    for document in documents:
        parts = [t[:, :, document] for t in saved]
        if q.dtype is torch.bfloat16 and document.stop - document.start < _BFLOAT16_BACKWARD_FROM:
            parts = [t.float() for t in parts]
        gq, gk, gv = _flash_backward(*parts, lses[:, :, document], 0.0, True)
        grad_qs[:, :, document] = gq
        grad_ks[:, 0, document] = _sum_of_group(gk)
        grad_vs[:, 0, document] = _sum_of_group(gv)
    return grad_q, grad_k, grad_v


@document_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    return grad_q, grad_k, grad_v


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, starts)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    q, k, v, out, lse, starts = ctx.saved_tensors
    return *document_attention_backward(grad, q, k, v, out, lse, starts), None


document_attention.register_autograd(_backward, setup_context=_save)


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _by_group(x: Tensor, kv_heads: int) -> Tensor:
    """[B, S, H, D] -> view [KV, H / KV, B * S, D]: ATen takes equal head counts only, but any stride.

    With the kv heads as the batch, k and v of a group are one expanded view instead of copies.
    """
    return x.flatten(0, 1).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _sum_of_group(x: Tensor) -> Tensor:
    """[KV, H / KV, S, D] -> [KV, S, D]. torch.sum takes five times as long over so few."""
    first, *others = x.unbind(1)
    if len(others) > 1:  # bfloat16 is rounded once
        first = first.to(torch.promote_types(x.dtype, torch.float32))
    return functools.reduce(torch.add, others, first)


def _documents(starts: Tensor) -> tuple[list[slice], Tensor]:
    """In the flattened [B * S]: spans of the documents of two tokens or more, and the indices of those of one.

    Every row begins a document.
    """
    begins = (starts == torch.arange(starts.shape[1])).flatten().nonzero().flatten()
    ends = torch.cat((begins[1:], begins.new_tensor([starts.numel()])))
    alone = ends - begins == 1
    spans = zip(begins[~alone].tolist(), ends[~alone].tolist(), strict=True)
    return [slice(*span) for span in spans], begins[alone]
