"""FlexAttention on a GPU, compiled, forward and backward, against dense float64 attention on the same device."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titanlite.config import ModelConfig
from titanlite.model.attention import attend, build_documents, realise
from titanlite.model.documents import document_starts_from_lengths, labels
from titanlite.model.transformer import Llama, initial_mean_std

DEVICE, BACKEND, EOS = "cuda", "flex", 0
# Compilers and kernels warn of what they please on some cards; these tests judge results.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

ROWS = (
    ([100, 28, 1, 383], [512]),
    ([128, 128, 256], [1] * 512),
    ([127, 2, 383], [1, 510, 1]),
    ([300], [5, 5, 502]),
)
ERROR = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # relative, in the 2-norm


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def starts_of(lengths: tuple[list[int], ...], seq_len: int = 512) -> Tensor:
    return document_starts_from_lengths(lengths, seq_len).to(DEVICE)


def qkv(seq_len: int, dtype: torch.dtype, heads: int = 8, kv_heads: int = 2, rows: int = 2) -> list[Tensor]:
    shapes = [(rows, seq_len, h, 64) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for shape in shapes]


def with_gradients(inputs: list[Tensor], weight: Tensor, starts: Tensor, backend: str = BACKEND) -> list[Tensor]:
    q, k, v = inputs
    out = attend(q, k, v, realise(starts, backend))
    return [out.detach(), *torch.autograd.grad(out, inputs, weight.to(out))]


def relative_error(mine: Tensor, exact: Tensor) -> float:
    return ((mine.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_flex_equals_dense_and_is_compiled_once_for_all_boundaries(dtype: torch.dtype, kv_heads: int) -> None:
    inputs = qkv(512, dtype, kv_heads=kv_heads)
    weight = torch.randn_like(inputs[0])
    exact = [t.detach().double().requires_grad_() for t in inputs]
    for i, lengths in enumerate(ROWS):
        starts = starts_of(lengths)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = with_gradients(inputs, weight, starts)
        for mine, theirs in zip(got, with_gradients(exact, weight, starts, "dense"), strict=True):
            assert mine.dtype == dtype
            assert relative_error(mine, theirs) < ERROR[dtype]


@pytest.mark.parametrize("dtype", ERROR)
def test_another_document_leaves_no_trace_in_any_bit(dtype: torch.dtype) -> None:
    inputs = qkv(512, dtype)
    weight, starts = torch.randn_like(inputs[0]), starts_of(([100, 250, 162], [350, 162]))
    mine = torch.zeros(2, 512, dtype=torch.bool, device=DEVICE)
    mine[0, 100:350] = True
    changed = [torch.where(mine[:, :, None, None], t, 3 - 2 * t).detach().requires_grad_() for t in inputs]
    for before, after in zip(
        with_gradients(inputs, weight, starts), with_gradients(changed, weight, starts), strict=True
    ):
        assert torch.equal(before[mine], after[mine])
        assert not torch.equal(before[~mine], after[~mine])


def test_documents_are_built_without_waiting_for_the_device() -> None:
    tokens = torch.randint(0, 300, (2, 8192), device=DEVICE)
    build_documents(tokens, EOS, BACKEND)  # lazy initialisation may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        build_documents(tokens, EOS, BACKEND)
        labels(tokens, EOS)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def recompute_all(forward: Any) -> Any:
    """Selective checkpointing of `forward`, in which a policy sees every operation."""

    def policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        saved = op is torch.ops.higher_order.flex_attention
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    context = functools.partial(create_selective_checkpoint_contexts, policy)
    return functools.partial(checkpoint, forward, use_reentrant=False, context_fn=context)


def test_flex_stays_compiled_where_only_it_is_compiled_and_blocks_are_checkpointed_selectively() -> None:
    """Eager FlexAttention would materialise the scores, 4 heads x 16384 x 16384 in float32 = 4 GiB, without a word."""
    inputs = qkv(16384, torch.bfloat16, heads=4, kv_heads=4, rows=1)
    documents = realise(starts_of(([16384],), 16384), BACKEND)
    torch.cuda.reset_peak_memory_stats()
    recompute_all(functools.partial(attend, documents=documents))(*inputs).float().sum().backward()
    assert torch.cuda.max_memory_allocated() < 2**30


def build(config: ModelConfig, dtype: torch.dtype) -> Llama:
    model = Llama(config)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, initial_mean_std(name, config)[0], 0.05, generator=generator)
    return model.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("mode", ["eager", "compile", "compile + recompute"])
def test_model_with_flex_equals_dense_float64(mode: str, dtype: torch.dtype) -> None:
    config = ModelConfig(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=512, vocab_size=300)
    model, exact = build(config, dtype), build(config, torch.float64)
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        q.data.copy_(p.data)  # also what bfloat16 has rounded
    for block in model.layers.values():
        forward = recompute_all(block.forward) if mode == "compile + recompute" else block.forward
        block.forward = forward if mode == "eager" else torch.compile(forward, fullgraph=True)  # type: ignore[method-assign]
    for i in range(3):
        tokens = torch.randint(0, 300, (2, 512), device=DEVICE)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            hidden = model(tokens, build_documents(tokens, EOS, BACKEND))
            hidden.double().square().mean().backward()
        wanted = exact(tokens, build_documents(tokens, EOS, "dense"))
        wanted.square().mean().backward()
        bound = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
        assert relative_error(hidden, wanted) < bound
        for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
            if q.grad is not None:
                assert p.grad is not None, name
                assert relative_error(p.grad, q.grad) < bound, name
        model.zero_grad()
        exact.zero_grad()
