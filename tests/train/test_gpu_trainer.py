"""Whole runs on one GPU: flex, compiled and checkpointed, against dense float32 attention; exact resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.support.tiny_run import fingerprints, metrics, write_config
from titanlite.train.__main__ import main

pytestmark = pytest.mark.gpu
SIZES = {"model__dim": 128, "model__n_layers": 4, "model__ffn_dim": 256, "training__seq_len": 256}


def run(folder: Path, **overrides: Any) -> Path:
    assert main(["--job.config_file", str(write_config(folder, **{**SIZES, **overrides}))]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    return run(folder, model__attention="dense", training__mixed_precision_param="float32")


@pytest.mark.parametrize(
    "overrides",
    [
        {"activation_checkpoint__mode": "none"},
        {"activation_checkpoint__mode": "selective"},
        {"activation_checkpoint__mode": "full"},
        {"activation_checkpoint__mode": "none", "compile__enable": True},
        {"activation_checkpoint__mode": "selective", "compile__enable": True},
        {"activation_checkpoint__mode": "full", "compile__enable": True},
        {"parallelism__enable_cpu_offload": True},
        {"checkpoint__async_mode": "async"},
    ],
    ids=lambda overrides: "-".join(str(value) for value in overrides.values()),
)
@pytest.mark.filterwarnings("default")
def test_bfloat16_flex_learns_as_float32_dense_attention_does(
    overrides: dict[str, Any], reference: Path, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    folder = run(tmp_path, **overrides)
    assert fingerprints(folder) == fingerprints(reference)
    for ours, theirs in zip(metrics(folder), metrics(reference), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
    assert metrics(folder)[0]["peak_memory_gib"] > 0


@pytest.mark.parametrize("overrides", [{}, {"optimizer__name": "muon", "training__ema_decay": 0.9}], ids=str)
@pytest.mark.filterwarnings("default")
def test_resume_is_exact_with_deterministic_algorithms(overrides: dict[str, Any], tmp_path: Path) -> None:
    settings = {"training__deterministic": True, "lr_scheduler__decay_ratio": 0.0, "compile__enable": True, **overrides}
    whole = run(tmp_path / "whole", **settings)
    run(tmp_path / "parts", **settings, training__steps=4)
    parts = run(tmp_path / "parts", **settings)
    states = []
    for folder in (whole, parts):
        dcp_to_torch_save(folder / "checkpoint/step-00000008", tmp_path / "state.pt")
        states.append(torch.load(tmp_path / "state.pt"))
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
