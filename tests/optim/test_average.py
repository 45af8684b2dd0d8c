"""The average of the weights: by hand, on every layout, over a resume, and for those who use it."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.parallel.test_parallel import CONFIG, EOS, batch, full, num_targets, with_
from tests.support.gloo import ranks
from tests.support.tiny_run import state_of, write_config
from titanlite.convert import __main__ as convert
from titanlite.generate import __main__ as generate
from titanlite.loading import load_model
from titanlite.model.documents import Examples
from titanlite.optim import WeightAverage
from titanlite.parallel.mesh import build_mesh
from titanlite.train.__main__ import main
from titanlite.trainer import Trainer

DECAY = 0.6
LAST = "run/checkpoint/step-00000008"


def averaged(degrees: tuple[int, int, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The average as the trainer has it after three steps, and by hand from the weights before and after each."""
    config = with_(CONFIG, training={"ema_decay": DECAY})
    mesh = build_mesh("cpu", *degrees)
    trainer = Trainer(config, mesh)
    by_hand = {name: full(p) for name, p in trainer.model.named_parameters()}
    for step in (1, 2, 3):
        rows = batch(step)
        mine = rows.chunk(mesh.dp_degree)[mesh.dp_rank]
        trainer.train_step(Examples.by_eos(mine, EOS), num_targets(rows))
        for name, p in trainer.model.named_parameters():
            by_hand[name] = DECAY * by_hand[name] + (1 - DECAY) * full(p)
    state = trainer.state()
    return {name: full(state[f"ema.{name}"]) for name in by_hand}, by_hand


@pytest.mark.parametrize("degrees", [(1, 1, 1), (1, 2, 2), pytest.param((2, 2, 1), marks=pytest.mark.slow)], ids=str)
def test_it_is_the_one_by_hand_on_every_layout(degrees: tuple[int, int, int]) -> None:
    expected = ranks(1).run(averaged, (1, 1, 1))[0][1]
    for ours, by_hand in ranks(math.prod(degrees)).run(averaged, degrees):
        for name, average in ours.items():
            torch.testing.assert_close(average, by_hand[name], rtol=1e-14, atol=1e-16)
            torch.testing.assert_close(average, expected[name], rtol=1e-9, atol=1e-12)


def test_a_skipped_update_leaves_it_alone_and_it_changes_places_with_the_weights() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    average = WeightAverage([("w", weight)], 0.75)
    with torch.no_grad():
        weight.copy_(torch.tensor([5.0, -2.0]))
    average.update(torch.tensor(1.0))
    assert average.tensors["w"].tolist() == [1.0, 2.0]
    average.update(torch.tensor(0.0))
    assert average.tensors["w"].tolist() == [2.0, 1.0]
    with suppress(KeyError), average.in_place_of_weights():
        assert (weight.tolist(), average.tensors["w"].tolist()) == ([2.0, 1.0], [5.0, -2.0])
        raise KeyError
    assert (weight.tolist(), average.tensors["w"].tolist()) == ([5.0, -2.0], [2.0, 1.0])
    average.begin()
    assert average.tensors["w"].tolist() == [5.0, -2.0]


def trained(folder: Path, *overrides: str, **config: Any) -> Path:
    """The folder of a run in this process."""
    settings = {"optimizer__name": "muon", "training__ema_decay": 0.9, "training__dtype": "float64", **config}
    assert main(["--job.config_file", str(write_config(folder, **settings)), *overrides]) == 0
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with Muon and an average, which others must reproduce."""
    return trained(tmp_path_factory.mktemp("uninterrupted"))


def again(uninterrupted: Path, folder: Path, *overrides: str, **config: Any) -> Path:
    return trained(folder, *overrides, data__paths=[str(uninterrupted / "corpus/*.txt")], **config)


def test_a_resumed_run_has_the_same_bits(uninterrupted: Path, tmp_path: Path) -> None:
    again(uninterrupted, tmp_path, "--training.steps=3", "--lr_scheduler.total_steps=8")
    again(uninterrupted, tmp_path)
    expected, actual = (state_of(folder / LAST, tmp_path) for folder in (uninterrupted, tmp_path))
    assert sum(name.startswith("ema.") for name in actual) == 21
    assert sum(name.startswith("optimizer.momentum_buffer.layers.") for name in actual) == 14
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name
    assert any(not torch.equal(tensor, actual[f"model{name[3:]}"]) for name, tensor in actual.items() if "ema." in name)


@pytest.mark.parametrize(
    "layouts", [("2x2", "1x1"), pytest.param(("1x1", "2x2"), marks=pytest.mark.slow)], ids=" to ".join
)
def test_a_run_goes_on_on_another_layout(uninterrupted: Path, tmp_path: Path, layouts: tuple[str, str]) -> None:
    paths = {"data__paths": [str(uninterrupted / "corpus/*.txt")], "training__dtype": "float64"}
    config = write_config(tmp_path, optimizer__name="muon", training__ema_decay=0.9, **paths)
    for layout, steps in zip(layouts, (3, 8), strict=True):
        tp = int(layout[-1])
        argv = [
            f"--training.steps={steps}",
            "--lr_scheduler.total_steps=8",
            f"--parallelism.tensor_parallel_degree={tp}",
        ]
        assert {*ranks(tp * tp).run(main, ["--job.config_file", str(config), *argv])} == {0}
    expected, actual = (state_of(folder / LAST, tmp_path) for folder in (uninterrupted, tmp_path))
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        (0.9, 0.0, ["training.ema_decay = 0.9", "an average", "this run has 0.0", "set it to 0.9"]),
        (0.0, 0.9, ["training.ema_decay = 0.0", "no average", "this run has 0.9", "set it to 0.0"]),
    ],
)
def test_a_resume_neither_loses_nor_makes_up_an_average(
    before: float, now: float, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(tmp_path, training__steps=1))
    assert main(["--job.config_file", config, f"--training.ema_decay={before}"]) == 0
    capsys.readouterr()
    assert main(["--job.config_file", config, f"--training.ema_decay={now}", "--training.steps=2"]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[rank0]")]
    assert len(told) == 1
    for word in [*words, "step-00000001 was saved", "checkpoint.init_from"]:
        assert word in told[0]


def test_from_given_weights_it_begins_at_them(uninterrupted: Path, tmp_path: Path) -> None:
    source = uninterrupted / LAST
    again(uninterrupted, tmp_path, f"--checkpoint.init_from={source}", "--optimizer.lr=1e-30", "--training.steps=1")
    given, result = state_of(source, tmp_path), state_of(tmp_path / "run/checkpoint/step-00000001", tmp_path)
    for name, tensor in given.items():
        if name.startswith("model."):
            assert torch.equal(tensor, result[f"ema{name[5:]}"]), name


def test_it_generates_and_converts_in_place_of_the_weights(uninterrupted: Path, tmp_path: Path) -> None:
    expected = {name: t for name, t in state_of(uninterrupted / LAST, tmp_path).items() if name.startswith("ema.")}
    for name, weight in ranks(1).run(generating, str(uninterrupted / "run"))[0].items():
        assert torch.equal(weight, expected[f"ema.{name}"]), name
    assert convert.main(["to-hf", str(uninterrupted / "run"), str(tmp_path / "hf"), "--ema", "--check=streamed"]) == 0
    written = load_file(tmp_path / "hf/model.safetensors")
    for theirs, ours in (
        ("model.embed_tokens", "tok_embeddings"),
        ("model.layers.1.mlp.up_proj", "layers.1.feed_forward.w3"),
    ):
        assert torch.equal(written[f"{theirs}.weight"], expected[f"ema.{ours}.weight"].float())


def generating(run: str) -> dict[str, Tensor]:
    model = load_model(run, build_mesh("cpu", 1, 1, 1), torch.float64, use_ema=True).model
    return {name: p.detach() for name, p in model.named_parameters()}


def test_who_asks_for_an_average_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write_config(tmp_path, training__steps=1, data__held_out_fraction=0.2))
    assert main(["--job.config_file", config]) == 0
    run, out = str(tmp_path / "run"), str(tmp_path / "hf")
    only = ["--job.config_file", config, "--validation.only", "--validation.use_ema=true", "--training.ema_decay=0.9"]
    for verb, arguments in (
        (generate.main, ["--checkpoint", run, "--prompt", "a", "--ema"]),
        (convert.main, ["to-hf", run, out, "--ema"]),
        (main, only),
    ):
        capsys.readouterr()
        assert verb(arguments) == 1
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("titanlite: ")]
        assert len(told) == 1
        assert "step-00000001 has no average of the weights, because training.ema_decay was 0" in told[0]
