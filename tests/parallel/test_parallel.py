"""Training does not depend on the layout: every layout agrees with a plain one-process loop, in every gradient.

The reference is written here: the unparallelised model, torch.nn.functional, torch.optim and nothing else of ours but
the initial weights, which it takes from the same keyed draw, whole.
"""

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.support.cases import some_quick
from tests.support.gloo import ranks
from titanlite.config import (
    ActivationCheckpointConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from titanlite.model.attention import build_documents
from titanlite.model.documents import Examples
from titanlite.model.transformer import Llama, initial_mean_std
from titanlite.parallel.init import init_weights
from titanlite.parallel.mesh import build_mesh
from titanlite.trainer import Trainer

Results = tuple[list[float], list[float], dict[str, Tensor], dict[str, Tensor]]
EOS, ROWS, SEQ_LEN, STEPS = 3, 8, 32, 3
MODEL = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=64)
CONFIG = Config(
    model=MODEL,
    training=TrainingConfig(
        steps=STEPS, seq_len=SEQ_LEN, global_batch_size=ROWS, local_batch_size=1, dtype="float64", seed=7, max_norm=0.5
    ),
    optimizer=OptimizerConfig(lr=1e-2),
    activation_checkpoint=ActivationCheckpointConfig(mode="none"),
)


def batch(step: int) -> Tensor:
    """Rows [ROWS, SEQ_LEN + 1]: documents of uneven length, so that ranks have different numbers of targets."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(4, MODEL.vocab_size, (ROWS, SEQ_LEN + 1), generator=generator)
    share = torch.linspace(0.0, 0.5, ROWS)[:, None]
    return rows.masked_fill(torch.rand(rows.shape, generator=generator) < share, EOS)


def num_targets(rows: Tensor) -> int:
    return int((rows[:, :-1] != EOS).sum())


class MuonByHand:
    """Muon in float64, which torch's does not have: each singular value goes through the polynomial by itself."""

    def __init__(self, matrices: list[nn.Parameter]) -> None:
        self.momentum = {p: torch.zeros_like(p) for p in matrices}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for p, momentum in self.momentum.items():
            assert p.grad is not None
            momentum.copy_(0.95 * momentum + 0.05 * p.grad)
            u, values, v = torch.linalg.svd(0.95 * momentum + 0.05 * p.grad, full_matrices=False)
            values /= values.norm()
            for _ in range(5):
                values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
            p.copy_(p * (1 - lr * 0.1) - 0.2 * max(p.shape) ** 0.5 * lr * (u * values @ v))
            p.grad = None


@functools.cache
def reference(model_config: ModelConfig = MODEL, name: str = "adamw") -> Results:
    """Losses, gradient norms, the clipped gradients of step 1 and the final weights of a plain loop."""
    model = Llama(model_config).double()
    init_weights(model, lambda name: initial_mean_std(name, model_config), CONFIG.training.seed)
    muon = MuonByHand([p for p in model.layers.parameters() if p.ndim > 1 and name == "muon"])
    decayed = [p for p in model.parameters() if p.ndim > 1 and p not in muon.momentum]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8
    )
    losses, norms, gradients = [], [], {}
    for step in range(1, STEPS + 1):
        rows = batch(step)
        hidden = model(rows[:, :-1], build_documents(rows[:, :-1], EOS, "dense"))
        logits = F.linear(hidden, model.output.weight, model.output.bias)
        terms = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        loss = terms[rows[:, :-1].flatten() != EOS].mean()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.training.max_norm).item())
        losses.append(loss.item())
        if step == 1:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        lr = 1e-2 * (1 + math.cos(math.pi * (step - 1) / STEPS)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr
        muon.step(lr)
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, gradients, {name: p.detach() for name, p in model.named_parameters()}


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(config: Config, degrees: tuple[int, int, int]) -> Results:
    """What `reference` returns, from the real trainer on this rank of a (replicate, shard, tp) layout."""
    torch._dynamo.reset()
    mesh = build_mesh("cpu", *degrees)
    trainer = Trainer(config, mesh)
    losses, norms, gradients = [], [], {}
    for step in range(1, STEPS + 1):
        rows = batch(step)
        mine = rows.chunk(mesh.dp_degree)[mesh.dp_rank]
        result = trainer.train_step(Examples.by_eos(mine, EOS), num_targets(rows))
        losses.append(result.loss.item())
        norms.append(result.grad_norm.item())
        if step == 1:  # Adam's first moment is then 0.1 of the gradient, and Muon's momentum 0.05
            for name, p in trainer.model.named_parameters():
                state = trainer.optimizer.state[p]
                gradients[name] = (
                    10 * full(state["exp_avg"]) if "exp_avg" in state else 20 * full(state["momentum_buffer"])
                )
    weights = {name: full(p) for name, p in trainer.model.named_parameters()}
    return losses, norms, gradients, weights


def assert_equal_to_reference(
    results: list[Any], model: ModelConfig = MODEL, name: str = "adamw", bound: float = 1e-12
) -> None:
    losses, norms, gradients, weights = reference(model, name)
    for rank, (rank_losses, rank_norms, rank_gradients, rank_weights) in enumerate(results):
        for name, expected, actual in (
            *((f"gradient of {name}", gradients[name], rank_gradients[name]) for name in gradients),
            *((f"weight {name}", weights[name], rank_weights[name]) for name in weights),
            ("loss", torch.tensor(losses, dtype=torch.float64), torch.tensor(rank_losses, dtype=torch.float64)),
            ("gradient norm", torch.tensor(norms, dtype=torch.float64), torch.tensor(rank_norms, dtype=torch.float64)),
        ):
            error = ((actual - expected).norm() / expected.norm()).item()
            assert error < bound, f"rank {rank}: {name} differs by {error:.1e}"


def with_(config: Config, **sections: dict[str, Any]) -> Config:
    return replace(config, **{name: replace(getattr(config, name), **changes) for name, changes in sections.items()})


LAYOUTS = [(1, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2), (2, 2, 1), (1, 4, 1), (2, 1, 2)]


@pytest.mark.parametrize("degrees", LAYOUTS, ids=lambda d: f"replicate{d[0]}-shard{d[1]}-tp{d[2]}")
def test_layout_agrees_with_one_process(degrees: tuple[int, int, int]) -> None:
    world_size = degrees[0] * degrees[1] * degrees[2]
    assert_equal_to_reference(ranks(world_size).run(train, CONFIG, degrees))


@pytest.mark.parametrize("name", some_quick(map(str, LAYOUTS), "(1, 1, 1)", "(2, 2, 1)", "(1, 2, 2)"))
def test_muon_agrees_with_one_process(name: str) -> None:
    degrees = {str(degrees): degrees for degrees in LAYOUTS}[name]
    model = replace(MODEL, tie_embeddings=True, attention_bias=True)
    config = with_(replace(CONFIG, model=model), optimizer={"name": "muon"})
    assert_equal_to_reference(ranks(math.prod(degrees)).run(train, config, degrees), model, "muon", bound=1e-11)


@pytest.mark.parametrize("degrees", [(1, 1, 1), (2, 1, 2), (1, 2, 2)])
def test_tied_embeddings_and_biases(degrees: tuple[int, int, int]) -> None:
    """One matrix with two uses gets the sum of both gradients; a bias behind a split sum is added once."""
    model = replace(MODEL, tie_embeddings=True, attention_bias=True, mlp_bias=True)
    config = replace(CONFIG, model=model)
    assert_equal_to_reference(ranks(degrees[0] * degrees[1] * degrees[2]).run(train, config, degrees), model)


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"local_batch_size": 2}},
        {"training": {"local_batch_size": 4}, "parallelism": {"fsdp_reshard_after_forward": "never"}},
        {"activation_checkpoint": {"mode": "selective"}},
        pytest.param({"activation_checkpoint": {"mode": "full"}}, marks=pytest.mark.slow),
        pytest.param({"model": {"attention": "dense"}}, marks=pytest.mark.slow),
    ],
    ids=lambda sections: "-".join(f"{k}={v}" for keys in sections.values() for k, v in keys.items()),
)
def test_settings_that_must_not_change_the_result(sections: dict[str, dict[str, Any]]) -> None:
    assert_equal_to_reference(ranks(4).run(train, with_(CONFIG, **sections), (1, 2, 2)))


@pytest.mark.parametrize(
    ("degrees", "backend", "mode"),
    [
        ((1, 1, 2), "aot_eager", "none"),
        pytest.param((1, 2, 1), "aot_eager", "selective", marks=pytest.mark.slow),
        pytest.param((2, 1, 2), "aot_eager", "selective", marks=pytest.mark.slow),
        pytest.param((1, 2, 2), "aot_eager", "full", marks=pytest.mark.slow),
        pytest.param((2, 2, 1), "aot_eager", "none", marks=pytest.mark.slow),
        pytest.param((1, 1, 1), "inductor", "selective", marks=pytest.mark.slow),
        pytest.param((1, 1, 2), "inductor", "none", marks=pytest.mark.slow),
        pytest.param((1, 1, 2), "inductor", "selective", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks(degrees: tuple[int, int, int], backend: str, mode: str) -> None:
    """Compile x tensor parallelism once trained a frozen embedding, with a correct loss: every gradient counts."""
    config = with_(CONFIG, compile={"enable": True, "backend": backend}, activation_checkpoint={"mode": mode})
    assert_equal_to_reference(ranks(degrees[0] * degrees[1] * degrees[2]).run(train, config, degrees))


def logits_of_other_documents(config: Config, degrees: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [S, V] of one row, those after one of its documents was replaced, and where the others are."""
    mesh = build_mesh("cpu", *degrees)
    trainer = Trainer(config, mesh)
    row, other = torch.randint(4, MODEL.vocab_size, (2, 1, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    row[0, [4, 13, 20]] = EOS
    replaced = slice(5, 13)  # the second document, but for its eos
    other = torch.cat([row[:, : replaced.start], other[:, replaced], row[:, replaced.stop :]], dim=1)
    logits = []
    for tokens in (row, other):
        documents = build_documents(tokens, EOS, trainer.backend)
        with torch.no_grad():
            logits.append(full(trainer.model.output(trainer.model(tokens, documents)))[0])
    elsewhere = torch.ones(SEQ_LEN, dtype=torch.bool)
    elsewhere[5:14] = False
    return *logits, elsewhere


@pytest.mark.parametrize("backend", ["sdpa", pytest.param("dense", marks=pytest.mark.slow)])
@pytest.mark.parametrize("degrees", [(1, 2, 1), (1, 2, 2), (2, 1, 2)], ids=str)
def test_other_documents_do_not_change_a_bit(degrees: tuple[int, int, int], backend: str) -> None:
    config = with_(CONFIG, model={"attention": backend}, training={"dtype": "float32"})
    world_size = degrees[0] * degrees[1] * degrees[2]
    for before, after, elsewhere in ranks(world_size).run(logits_of_other_documents, config, degrees):
        assert torch.equal(before[elsewhere], after[elsewhere])
        assert not torch.equal(before[~elsewhere], after[~elsewhere])


def test_a_batch_without_a_target_changes_nothing_but_decay() -> None:
    """Rows of eos only, as padding would be: no division by zero, no gradient."""
    assert ranks(1).run(update_without_a_target) == [True]


def update_without_a_target() -> bool:
    config = with_(CONFIG, optimizer={"weight_decay": 0.0})
    trainer = Trainer(config, build_mesh("cpu", 1, 1, 1))
    before = {name: full(p) for name, p in trainer.model.named_parameters()}
    result = trainer.train_step(Examples.by_eos(torch.full((ROWS, SEQ_LEN + 1), EOS), EOS), 0)
    unchanged = all(torch.equal(full(p), before[name]) for name, p in trainer.model.named_parameters())
    return unchanged and result.loss.item() == result.grad_norm.item() == trainer.guard.read()[0] == 0


def test_clipping_is_off_at_zero_and_has_no_effect_above_the_norm() -> None:
    off, high, low = (
        ranks(1).run(train, with_(CONFIG, training={"max_norm": norm}), (1, 1, 1))[0][3] for norm in (0.0, 1e9, 0.01)
    )
    for name, weight in off.items():
        assert torch.equal(weight, high[name])
    # Adam forgets the gradient's scale but for its epsilon: clipped hard, the weights differ a little.
    assert any(not torch.equal(weight, low[name]) for name, weight in off.items())
