"""The document rule and its realisations, each against the definition written out in loops."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.support.calls import Calls
from tests.support.documents import EOS, may_see, qkv, tokens_of
from titanlite.model.attention import attend, build_documents, realise, resolve_backend
from titanlite.model.documents import IGNORE_INDEX, document_starts, document_starts_from_lengths, labels
from titanlite.model.ops import sdpa

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 4e-2}


def reference(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
    """Softmax attention in float64 on [B, S, H, D], with a mask from a triple loop."""
    _, seq_len, heads, head_dim = q.shape
    mask = torch.tensor(
        [[[may_see(row, i, j) for j in range(seq_len)] for i in range(seq_len)] for row in tokens.tolist()]
    )
    q, k, v = q.double(), k.double(), v.double()
    k, v = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(head_dim)
    scores = scores.masked_fill(~mask.unsqueeze(1), -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def with_gradients(call: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of all inputs for a fixed, uneven gradient of the output."""
    out = call(*inputs)
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight)]


# The rule


@given(st.lists(st.lists(st.integers(0, 2), min_size=9, max_size=9), min_size=1, max_size=3))
def test_starts_positions_and_labels_follow_from_eos(rows: list[list[int]]) -> None:
    tokens = torch.tensor(rows)
    documents = build_documents(tokens[:, :-1], EOS, "sdpa")
    targets = labels(tokens, EOS)
    for b, row in enumerate(rows):
        for i in range(8):
            start = next(j for j in range(i + 1) if may_see(row, i, j))
            assert documents.starts[b, i] == start
            assert documents.positions[b, i] == i - start
            assert targets[b, i] == (IGNORE_INDEX if row[i] == EOS else row[i + 1])
    assert documents.starts.dtype == documents.positions.dtype == targets.dtype == torch.int64


def test_starts_from_lengths_take_eos_as_content_and_pads_as_documents() -> None:
    starts = document_starts_from_lengths([[3, 1, 2], [4], []], 6)
    assert starts.tolist() == [[0, 0, 0, 3, 4, 4], [0, 0, 0, 0, 4, 5], [0, 1, 2, 3, 4, 5]]
    tokens = tokens_of([[3, 1, 2], [4, 1, 1]], 6)
    assert torch.equal(document_starts(tokens, EOS), starts[:2])
    for lengths in ([4, 3], [0, 6], [-1, 2]):
        with pytest.raises(ValueError, match="do not fit a row of 6 tokens"):
            document_starts_from_lengths([lengths], 6)


# The realisations


def realisation(backend: str, tokens: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return functools.partial(attend, documents=build_documents(tokens, EOS, backend))


lengths_of_rows = st.lists(st.lists(st.integers(1, 12), max_size=24), min_size=1, max_size=3)
settings_of_cases = settings(max_examples=20)


@pytest.mark.parametrize("backend", ["sdpa", "dense"])
@given(
    rows=lengths_of_rows,
    seq_len=st.integers(1, 24),
    dtype=st.sampled_from(list(TOLERANCE)),
    kv=st.sampled_from([1, 2, 4]),
)
@example(rows=[[24]], seq_len=24, dtype=torch.float64, kv=4)  # one document, as long as the row
@example(rows=[[30]], seq_len=24, dtype=torch.float64, kv=2)  # cut by the row
@example(rows=[[1] * 24], seq_len=24, dtype=torch.float64, kv=2)  # nothing but eos
@example(rows=[[1, 22, 1], [5, 19]], seq_len=24, dtype=torch.bfloat16, kv=2)  # eos first and last
@settings_of_cases
def test_backend_equals_the_definition(backend: str, rows: list, seq_len: int, dtype: torch.dtype, kv: int) -> None:
    tokens = tokens_of(rows, seq_len)
    inputs = qkv(len(rows), seq_len, 4, kv, dtype)
    got = with_gradients(realisation(backend, tokens), inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = with_gradients(lambda q, k, v: reference(q, k, v, tokens), exact)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("length", [sdpa._BFLOAT16_BACKWARD_FROM - 1, sdpa._BFLOAT16_BACKWARD_FROM])
def test_both_bfloat16_backwards_agree_with_float64(length: int) -> None:
    documents = realise(document_starts_from_lengths([[length]], length), "sdpa")
    inputs = qkv(1, length, 2, 1, torch.bfloat16)
    got = with_gradients(functools.partial(attend, documents=documents), inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = with_gradients(functools.partial(attend, documents=documents), exact)
    for mine, theirs in zip(got, wanted, strict=True):
        assert (mine.double() - theirs).norm() < 1e-2 * theirs.norm()


def test_the_operation_takes_any_strides() -> None:
    tokens = tokens_of([[5, 1, 6], [12]], 12)
    whole = torch.randn(2, 12, 8, 3, 8, dtype=torch.float64)
    inputs = [whole[..., i, :].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for i in range(3)]
    inputs[1], inputs[2] = (t.detach()[:, :, ::4].requires_grad_() for t in inputs[1:])
    wanted = with_gradients(lambda q, k, v: reference(q, k, v, tokens), inputs)
    for mine, theirs in zip(with_gradients(realisation("sdpa", tokens), inputs), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", ["sdpa", "dense"])
def test_another_document_leaves_no_trace_in_any_bit(backend: str, dtype: torch.dtype) -> None:
    tokens = tokens_of([[5, 9, 2], [1, 5, 9]], 16)
    before = with_gradients(realisation(backend, tokens), qkv(2, 16, 4, 2, dtype))
    changed = [t.detach().clone() for t in qkv(2, 16, 4, 2, dtype)]
    others = torch.ones(2, 16, dtype=torch.bool)
    others[0, 5:14] = False
    for t in changed:
        t[others] = math.nan if backend == "sdpa" else 3 - t[others]  # a dense mask multiplies by zero: NaN passes it
    after = with_gradients(realisation(backend, tokens), [t.requires_grad_() for t in changed])
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[0, 5:14], new[0, 5:14])
        assert not torch.equal(old[0, :5], new[0, :5])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_packed_document_gets_the_bits_it_gets_alone(dtype: torch.dtype) -> None:
    inputs = qkv(1, 300, 4, 2, dtype)
    packed = with_gradients(realisation("sdpa", tokens_of([[7, 290, 3]], 300)), inputs)
    alone = [t.detach()[:, 7:297].requires_grad_() for t in inputs]
    out = realisation("sdpa", tokens_of([[290]], 290))(*alone)
    weight = torch.linspace(-1, 2, packed[0].numel(), dtype=dtype).view_as(packed[0])[:, 7:297]
    for whole, part in zip(packed, [out, *torch.autograd.grad(out, alone, weight)], strict=True):
        assert torch.equal(whole[:, 7:297], part)


# The custom operation


def test_the_private_flash_operations_have_the_signatures_that_sdpa_relies_on() -> None:
    message = "torch changed a private CPU operation: adapt titanlite/model/ops/sdpa.py, then this test"
    assert str(sdpa._flash._schema) == (
        "aten::_scaled_dot_product_flash_attention_for_cpu(Tensor query, Tensor key, Tensor value, float dropout_p=0.,"
        " bool is_causal=False, *, Tensor? attn_mask=None, float? scale=None) -> (Tensor output, Tensor logsumexp)"
    ), message
    assert str(sdpa._flash_backward._schema) == (
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward(Tensor grad_out, Tensor query, Tensor key, "
        "Tensor value, Tensor out, Tensor logsumexp, float dropout_p, bool is_causal, *, Tensor? attn_mask=None, "
        "float? scale=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
    ), message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operation_keeps_its_promises_to_torch(dtype: torch.dtype) -> None:
    starts = document_starts(tokens_of([[5, 9, 2], [1, 5, 9]], 16), EOS)
    torch.library.opcheck(sdpa.document_attention, (*qkv(2, 16, 4, 2, dtype), starts))
    out, lse = sdpa.document_attention(*qkv(2, 16, 4, 2, dtype), starts)
    assert (out.requires_grad, lse.requires_grad) == (True, False)
    with torch.no_grad():
        q, k, v = qkv(2, 16, 4, 2, dtype)
        saved = sdpa.document_attention(q, k, v, starts)
        torch.library.opcheck(sdpa.document_attention_backward, (torch.randn_like(q), q, k, v, *saved, starts))


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_selective_checkpointing_sees_the_operation_by_name(policy: CheckpointPolicy) -> None:
    calls = 0

    def choose(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        nonlocal calls
        calls += op is torch.ops.titanlite.document_attention.default
        return policy

    call = realisation("sdpa", tokens_of([[5, 9, 2]], 16))
    inputs = qkv(1, 16, 4, 2, torch.float64)
    context = functools.partial(create_selective_checkpoint_contexts, choose)
    with Calls(torch.ops.titanlite.document_attention.default) as runs:
        got = with_gradients(lambda *t: checkpoint(call, *t, use_reentrant=False, context_fn=context), inputs)
    assert calls >= 1
    assert runs.count == (1 if policy is CheckpointPolicy.MUST_SAVE else 2)
    for mine, theirs in zip(got, with_gradients(call, inputs), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_gradients_of_the_heads_of_a_group_add_up_with_one_rounding(heads: int) -> None:
    parts = torch.randn(2, heads, 50, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(sdpa._sum_of_group(parts).bfloat16(), parts.double().sum(1).bfloat16())


# Choosing


def test_auto_is_flex_on_cuda_and_sdpa_on_the_cpu_and_explicit_names_stay() -> None:
    choose = functools.partial(resolve_backend, seq_len=2048, head_dim=64, dtype=torch.bfloat16)
    assert choose("auto", device_type="cuda") == "flex"
    assert choose("auto", device_type="cpu") == "sdpa"
    for name, device_type in (("flex", "cuda"), ("dense", "cuda"), ("sdpa", "cpu"), ("dense", "cpu")):
        assert choose(name, device_type=device_type) == name


@pytest.mark.parametrize(
    ("name", "device_type", "change", "message"),
    [
        ("flex", "cpu", {}, "'flex': FlexAttention has no backward on the CPU; use sdpa or dense"),
        ("sdpa", "cuda", {}, "'sdpa': sdpa loops over documents on the CPU only; use flex or dense on cuda"),
        ("flex", "cuda", {"seq_len": 1000}, "training.seq_len = 1000 .* multiples of 128; use 1024"),
        ("auto", "cuda", {"seq_len": 1000}, r"'auto' \(flex on cuda\): flex takes multiples of 128"),
        ("auto", "cuda", {"dtype": torch.float64}, "no float64"),
        ("flex", "cuda", {"head_dim": 8}, r"head_dim below 16 \(here 8\)"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(name: str, device_type: str, change: dict, message: str) -> None:
    facts = {"seq_len": 2048, "head_dim": 64, "dtype": torch.bfloat16, **change}
    with pytest.raises(ValueError, match=message):
        resolve_backend(name, device_type=device_type, **facts)
