"""Document isolation through the whole model, the wrappers of training, rotary positions, and numbers from shapes."""

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.support.documents import EOS
from tests.support.gloo import ranks
from tests.support.llamas import SCALED, TINY, VARIANTS, build, logits_of, tokens_with_documents, variants
from titanlite.config import ModelConfig
from titanlite.model.attention import build_documents
from titanlite.model.ops.norm import RMSNorm
from titanlite.model.rope import apply_rope, inverse_frequencies, rope_rotations
from titanlite.model.transformer import Llama, flops_per_token, initial_mean_std, num_parameters

# Documents


@pytest.mark.parametrize("backend", ["sdpa", "dense"])
def test_a_packed_document_gets_the_logits_it_gets_alone(backend: str) -> None:
    model = build(replace(TINY, **SCALED))
    packed = tokens_with_documents(70, 1, 50, 9)
    logits = logits_of(model, packed, backend)
    for begin, end in ((0, 70), (70, 71), (71, 121), (121, 130)):
        alone = logits_of(model, packed[:, begin:end], backend)
        torch.testing.assert_close(logits[:, begin:end], alone, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ["sdpa", "dense"])
def test_other_documents_leave_logits_and_gradients_of_a_document_alone_in_every_bit(
    backend: str, dtype: torch.dtype
) -> None:
    model = build(TINY, dtype)
    tokens = tokens_with_documents(20, 31, 13, high=30)
    changed = torch.where(tokens == EOS, EOS, TINY.vocab_size - tokens)  # ids 31 to 60, which the document never uses
    changed[:, 20:51] = tokens[:, 20:51]
    results = []
    for variant in (tokens, changed):
        model.zero_grad()
        logits = logits_of(model, variant, backend)[:, 20:51]
        F.cross_entropy(logits[0, :-1].float(), variant[0, 21:51]).backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


# Under the wrappers of training


def blocks_wrapped(model: Llama, wrap: Any) -> Llama:
    for block in model.layers.values():
        block.forward = wrap(block.forward)  # type: ignore[method-assign]
    return model


@pytest.mark.filterwarnings("default")  # compilers warn of their own parts; results are judged here
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("backend", ["sdpa", "dense"])
def test_compiled_blocks_equal_eager_ones_and_are_compiled_once_for_all_boundaries(
    backend: str, recompute: bool, compiler: str
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)

    def wrap(forward: Any) -> Any:
        inner = functools.partial(checkpoint, forward, use_reentrant=False) if recompute else forward
        return torch.compile(inner, backend=counter, fullgraph=True)

    eager, compiled = build(TINY), blocks_wrapped(build(TINY), wrap)
    for lengths in ((64,), (1, 62, 1), (10, 20, 34), (1,) * 64):
        tokens = tokens_with_documents(*lengths)
        for model in (eager, compiled):
            model.zero_grad()
            logits_of(model, tokens, backend).square().mean().backward()
        for mine, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-12, rtol=1e-12)
    assert counter.frame_count == 1, "a batch with other boundaries, or another layer, was compiled again"


def _sharded_gradients(backend: str) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    model = blocks_wrapped(build(TINY), lambda forward: functools.partial(checkpoint, forward, use_reentrant=False))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float64, cast_forward_inputs=False)
    for block in model.layers.values():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    seen = []
    model.layers["0"].attention.register_forward_pre_hook(lambda module, args: seen.extend(args))
    tokens = tokens_with_documents(10, 20, 34)
    documents = build_documents(tokens, EOS, backend)
    model(tokens, documents).float().square().mean().backward()
    x, rotations, received = seen[:3]
    assert (x.dtype, rotations.dtype) == (torch.bfloat16, torch.float32)
    assert received is documents
    return {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", ["sdpa", "dense"])
def test_documents_pass_the_hooks_of_fsdp_and_checkpointing_untouched(backend: str) -> None:
    model = build(TINY).to(torch.bfloat16)
    tokens = tokens_with_documents(10, 20, 34)
    model(tokens, build_documents(tokens, EOS, backend)).float().square().mean().backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for gradients in ranks(2).run(_sharded_gradients, backend):
        assert gradients.keys() == wanted.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[name].double(), atol=0, rtol=0)


# Rotary positions


def test_frequency_scaling_is_metas() -> None:
    """The three cases of llama-models' apply_scaling, written out."""
    config = ModelConfig(dim=128, n_heads=1, n_kv_heads=1, rope_scaling_factor=8.0)
    plain = inverse_frequencies(replace(config, rope_scaling_factor=1.0))
    cases = set()
    for got, frequency in zip(inverse_frequencies(config).tolist(), plain.tolist(), strict=True):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            wanted, case = frequency, "short"
        elif wavelength > 8192 / 1:
            wanted, case = frequency / 8, "long"
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            wanted, case = (1 - smooth) * frequency / 8 + smooth * frequency, "between"
        assert got == pytest.approx(wanted, rel=1e-12)
        cases.add(case)
    assert cases == {"short", "between", "long"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rotation_is_a_complex_product_in_the_wider_type(dtype: torch.dtype) -> None:
    config = ModelConfig(dim=32, n_heads=2, n_kv_heads=1)
    positions = torch.tensor([[0, 1, 120_000]])
    wide = torch.promote_types(dtype, torch.float32)
    rotations = rope_rotations(positions, config, wide)
    assert rotations.dtype == wide
    x = torch.randn(1, 3, 2, 16, dtype=dtype)
    got = apply_rope(x, rotations)
    for s, position in enumerate((0, 1, 120_000)):
        for pair in range(8):
            angle = position * 500000.0 ** (-2 * pair / 16)
            a, b = x[0, s, 0, 2 * pair : 2 * pair + 2].double().tolist()
            wanted = complex(a, b) * complex(math.cos(angle), math.sin(angle))
            assert complex(*got[0, s, 0, 2 * pair : 2 * pair + 2].double().tolist()) == pytest.approx(
                wanted, abs=4 * torch.finfo(dtype).eps * max(1, abs(wanted))
            )


def test_rotations_that_were_cast_to_bfloat16_are_taken() -> None:
    """As by FSDP2 where it casts what a block gets."""
    rotations = rope_rotations(
        torch.arange(5).unsqueeze(0), ModelConfig(dim=32, n_heads=2, n_kv_heads=1), torch.float32
    )
    x = torch.randn(1, 5, 2, 16).bfloat16()
    got = apply_rope(x, rotations.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, apply_rope(x, rotations.bfloat16().float()), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_compilers_rotate_alike_without_complex_numbers(dtype: torch.dtype) -> None:
    config = ModelConfig(dim=32, n_heads=2, n_kv_heads=1)
    rotations = rope_rotations(torch.randint(9000, (2, 5)), config, torch.promote_types(dtype, torch.float32))
    x, grad = torch.randn(2, 2, 5, 2, 16, dtype=dtype)
    x.requires_grad_()
    graphs = []

    def keep_graph(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    eager, compiled = apply_rope(x, rotations), torch.compile(apply_rope, backend=keep_graph)(x, rotations)
    assert len(graphs) == 1
    assert "complex" not in graphs[0]
    assert compiled.dtype == eager.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(compiled, eager, atol=tolerance, rtol=tolerance)
    gradients = [torch.autograd.grad(out, x, grad)[0] for out in (eager, compiled)]
    torch.testing.assert_close(*gradients, atol=4 * tolerance, rtol=tolerance)


# The norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_norm_and_its_gradients_are_as_exact_as_torchs(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    norm, torchs, exact = RMSNorm(48, 1e-5), torch.nn.RMSNorm(48, 1e-5), torch.nn.RMSNorm(48, 1e-5).double()
    x, grad = torch.randn(2, 3, 70, 48, dtype=torch.float64).to(dtype)
    x = x * scale
    weight = torch.randn(48, dtype=torch.float64).to(dtype)
    results = []
    for module in (norm, torchs, exact):
        module.weight.data = weight.to(torch.float64 if module is exact else dtype)
        inputs = [x.to(module.weight).clone().requires_grad_(), module.weight]
        out = module(inputs[0])
        results.append([out, *torch.autograd.grad(out, inputs, grad.to(module.weight))])
    eps = torch.finfo(dtype).eps
    for found, usual, true in zip(*results, strict=True):
        assert found.dtype == dtype
        assert found.shape == true.shape
        errors = [float((t.detach().double() - true.detach()).norm() / true.detach().norm()) for t in (found, usual)]
        assert errors[0] <= max(2 * errors[1], 4 * eps)


def test_the_norm_of_zeros_is_zero_and_its_gradient_finite() -> None:
    norm = RMSNorm(8, 1e-5)
    x = torch.zeros(2, 8, requires_grad=True)
    out = norm(x)
    (grad,) = torch.autograd.grad(out, x, torch.ones(2, 8))
    assert torch.equal(out, torch.zeros(2, 8))
    torch.testing.assert_close(grad, torch.full((2, 8), 1e-5**-0.5))


# Shapes, types and numbers


@variants
def test_it_builds_on_meta_with_the_stated_parameters_and_no_buffers(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Llama(config)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config)
    assert all(p.is_meta for p in model.parameters())
    assert not list(model.buffers())
    assert (model.output.weight is model.tok_embeddings.weight) == config.tie_embeddings


def test_state_dict_names_are_torchtitans() -> None:
    block = (
        *(f"attention.w{x}.weight" for x in "qkvo"),
        *(f"feed_forward.w{x}.weight" for x in "123"),
        "attention_norm.weight",
        "ffn_norm.weight",
    )
    wanted = {"tok_embeddings.weight", "norm.weight", "output.weight"}
    wanted |= {f"layers.{i}.{name}" for i in range(2) for name in block}
    assert set(Llama(TINY).state_dict()) == wanted


@variants
def test_every_parameter_has_a_stated_distribution(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Llama(config)
    for name, p in model.named_parameters():
        wanted = (0.0, 0.02)
        if name.endswith("bias"):
            wanted = (0.0, 0.0)
        elif p.ndim == 1:
            wanted = (1.0, 0.0)
        elif name.endswith(("wo.weight", "w2.weight")):
            wanted = (0.0, 0.01)  # 0.02 / sqrt(2 * 2 layers)
        assert initial_mean_std(name, config) == wanted, name


@pytest.mark.parametrize("name", ["plain", "no-grouping", "tied", "wide-heads"])
def test_flops_per_token_are_the_counted_ones_and_six_per_norm_weight(name: str) -> None:
    config, seq_len = VARIANTS[name], 24
    model, tokens = build(config), tokens_with_documents(seq_len)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits_of(model, tokens, "dense").sum().backward()
    norms = (2 * config.n_layers + 1) * config.dim
    assert flops_per_token(config, seq_len) * seq_len == counter.get_total_flops() + 6 * norms * seq_len


def test_parameters_and_flops_of_llama_3_8b() -> None:
    config = ModelConfig(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_dim=14336, vocab_size=128256)
    assert num_parameters(config) == 8_030_261_248  # as on Meta's model card
    assert flops_per_token(config, 8192) == 6 * (8_030_261_248 - 128256 * 4096) + 12 * 32 * 32 * 128 * 8192
    tied = replace(config, tie_embeddings=True)
    assert flops_per_token(tied, 8192) == flops_per_token(config, 8192)


def test_float64_stays_float64_to_the_last_digit() -> None:
    model = build(TINY)
    tokens = tokens_with_documents(30)
    rotations: list[Tensor] = []
    model.layers["0"].register_forward_pre_hook(lambda module, args: rotations.append(args[1]))
    logits = logits_of(model, tokens)
    assert {logits.dtype, *(t.dtype for t in rotations)} == {torch.float64}
    nudged = build(TINY)
    with torch.no_grad():
        for block in nudged.layers.values():
            block.attention.wo.weight *= 1 + 1e-13
    change = (logits_of(nudged, tokens) - logits).abs().max()
    assert 1e-15 < change < 1e-10
