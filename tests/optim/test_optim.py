"""Learning rate, decay groups and the guard, against hand-computed numbers and plain torch.optim."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from titanlite.config import LrSchedulerConfig, OptimizerConfig
from titanlite.optim import NonFiniteGuard, build_optimizer, learning_rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (LrSchedulerConfig(warmup_steps=4), {1: 0.25, 4: 1.0, 5: 1.0, 8: 0.5, 11: 0.0}),  # cosine: half way at step 8
        (LrSchedulerConfig(warmup_steps=4, lr_min=0.1), {4: 1.0, 8: 0.55, 11: 0.1}),
        (LrSchedulerConfig(warmup_steps=5, decay_type="linear"), {2: 0.4, 5: 1.0, 6: 1.0, 7: 0.8, 10: 0.2}),
        (LrSchedulerConfig(warmup_steps=2, decay_type="linear", decay_ratio=0.4), {2: 1.0, 7: 1.0, 8: 0.75, 10: 0.25}),
        (LrSchedulerConfig(decay_type="sqrt", decay_ratio=0.4), {1: 1.0, 7: 1.0, 8: 0.5, 11: 0.0}),
        (LrSchedulerConfig(warmup_steps=2, decay_ratio=0.0), {1: 0.5, 2: 1.0, 10: 1.0}),
        (LrSchedulerConfig(warmup_steps=10, decay_type="linear"), {5: 0.5, 10: 1.0}),  # no steps are left to decay
    ],
)
def test_learning_rate_by_hand(schedule: LrSchedulerConfig, expected: dict[int, float]) -> None:
    for step, share in expected.items():
        assert math.isclose(learning_rate(step, 10, 0.02, schedule), 0.02 * share, abs_tol=1e-15), step


@pytest.mark.parametrize("decay_type", ["cosine", "linear", "sqrt"])
def test_no_step_has_the_rate_zero(decay_type: Any) -> None:
    """Not even the last one, or the only one: its batch would have been read for nothing."""
    schedule = LrSchedulerConfig(decay_type=decay_type)
    assert learning_rate(1, 1, 0.02, schedule) == 0.02
    assert 0 < learning_rate(10, 10, 0.02, schedule) < learning_rate(9, 10, 0.02, schedule)


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    """With no gradient to speak of, a step with rate 0.1 and decay 0.5 leaves 0.95 of a matrix and all of a vector."""
    model = nn.Linear(3, 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model.parameters(), OptimizerConfig(lr=0.1, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.weight, before["weight"] * 0.95)
    assert torch.equal(model.bias, before["bias"])


@pytest.mark.parametrize("sticky", [True, False])
def test_guard_keeps_bad_gradients_out(sticky: bool) -> None:
    """Steps 1 to 4, of which step 2 is bad: the weights equal those of plain AdamW over the steps that may count."""
    good_steps = [1] if sticky else [1, 3, 4]
    start = torch.randn(4, 4)
    weight, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    config = OptimizerConfig(lr=0.1)
    optimizer, reference = build_optimizer([weight], config), build_optimizer([plain], config)
    guard = NonFiniteGuard(torch.device("cpu"), sticky=sticky)
    gradients = {step: torch.randn(4, 4) for step in range(1, 5)}
    for step, gradient in gradients.items():
        weight.grad = gradient * (math.nan if step == 2 else 1)
        guard.observe(step, torch.isfinite(weight.grad).all())
        optimizer.found_inf = guard.found_inf  # type: ignore[attr-defined]
        optimizer.step()
    for step in good_steps:
        plain.grad = gradients[step]
        reference.step()
    assert torch.equal(weight, plain)
    assert optimizer.state[weight]["step"].item() == len(good_steps)
    assert guard.read() == (2, 1)
