"""`parity` finds agreement where there is, and names the step and the tensor where a bug was planted on a rank: in
training, validation or generation."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.support.gloo import ranks
from tests.support.tiny_run import descendants, text, write_config
from titanlite import trainer as trainer_module
from titanlite import validation
from titanlite.config import CompileConfig, Config
from titanlite.model import decode
from titanlite.model import transformer as llama
from titanlite.model.attention import Documents, build_documents, realise
from titanlite.model.documents import Examples, labels
from titanlite.model.transformer import Llama
from titanlite.parallel.mesh import Mesh
from titanlite.parity import ending, recording
from titanlite.parity.__main__ import main
from titanlite.parity.comparison import Difference, Records, compare, listed, relative_difference
from titanlite.parity.ending import NUM_GENERATED, NUM_PROMPTS, EndRecord, note_end
from titanlite.parity.launch import RanksFailed, run_ranks
from titanlite.parity.layouts import Layout, read_layouts
from titanlite.parity.recording import RankRecord, StepRecord, record
from titanlite.parity.sketches import random_tensor, sketch
from titanlite.train import run as train_run
from titanlite.train.run import Run
from titanlite.trainer import StepResult, Trainer

STEPS, BOUND = 2, 1e-9
Plant = Callable[[pytest.MonkeyPatch, int], None]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of documents so short that nearly every row holds several."""
    folder = tmp_path_factory.mktemp("parity")
    (folder / "documents").mkdir()
    for number in range(60):
        (folder / f"documents/{number:02}.txt").write_text(text(number)[:100])
    return write_config(folder, paths=str(folder / "documents/*.txt"), training__local_batch_size=4)


def layout_of(name: str, config_file: Path) -> Layout:
    arguments = ["--job.config_file", str(config_file)]
    return read_layouts(f"1x1,{name}", arguments, config_file.parent / "runs", float64=True)[1]


def planted(config: Config, steps: int, plant: Plant | None) -> RankRecord:
    """What a rank records with a bug in it."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        if plant:
            plant(patch, dist.get_rank())
        return record(config, steps)


@functools.cache
def run(layout: str, config_file: Path, plant: Plant | None = None) -> Records:
    parsed = layout_of(layout, config_file)
    return ranks(parsed.world_size).run(planted, parsed.config, STEPS, plant)


def first_difference(layout: str, config_file: Path, plant: Plant | None) -> Difference | None:
    differences = compare(run("1x1", config_file), run(layout, config_file, plant), BOUND)
    return next((d for d in differences if d.size > BOUND), None)


@pytest.mark.parametrize(
    "layout",
    [
        "1x1",
        "2x1+accumulate=4+workers=0",
        "1x2+ac=selective",
        "hsdp2x1x2+ac=full+accumulate=2+workers=3+data.prefetch=0",
        pytest.param("2x2+parallelism.fsdp_reshard_after_forward=never", marks=pytest.mark.slow),
        pytest.param("hsdp2x2+ac=selective", marks=pytest.mark.slow),
        pytest.param("1x2+compile=aot_eager", marks=pytest.mark.slow),
        pytest.param("2x2+compile=aot_eager+ac=full", marks=pytest.mark.slow),
    ],
)
def test_layouts_agree(layout: str, config_file: Path) -> None:
    differences = list(compare(run("1x1", config_file), run(layout, config_file), 1e-12))
    assert [str(d) for d in differences if d.size > 1e-12] == []
    quantities = [d.what for d in differences if d.step == 1]
    num_parameters = 2 * 9 + 3
    assert sum(name.startswith("gradient of") for name in quantities) == num_parameters
    assert sum(name.startswith("weight ") for name in quantities) == num_parameters
    in_blocks = 2 * (1 if "compile" in layout else 5)
    assert sum(name.startswith("activation ") for name in quantities) == 4 + in_blocks + 2
    behind = [(d.step, d.what) for d in differences[-2 - NUM_GENERATED :]]
    tokens = [("generation", f"logits of new token {n}") for n in range(1, NUM_GENERATED + 1)]
    assert behind == [("validation", "set"), ("validation", "loss"), *tokens]


def test_the_average_of_the_weights_is_compared(config_file: Path) -> None:
    """Two runs whose weights are the same, and whose averages are not."""
    one, other = (run(f"{layout}+training.ema_decay=0.{n}", config_file) for layout, n in (("1x1", 9), ("2x1", 8)))
    beyond = [d for d in compare(one, other, BOUND) if d.size > BOUND]
    assert [d.what.startswith("weight ema.") for d in beyond] == 2 * 21 * [True]


@pytest.mark.slow
def test_muon_and_an_average_on_five_layouts(config_file: Path) -> None:
    keys = ("--optimizer.name=muon", "--training.ema_decay=0.9", "--model.attention_bias=true")
    layouts = ("--layouts", "1x1,2x1,1x2+compile=aot_eager,2x2+ac=full+accumulate=2,hsdp2x2", "--steps", "3")
    done = verb(config_file, config_file.parent, *keys, *layouts)
    assert done.returncode == 0, done.stdout + done.stderr


def naively(config: Config) -> tuple[EndRecord, float, np.ndarray]:
    """What is recorded of the last weights, and the same row by row through the trained model, without a cache."""
    naive: list[Any] = []
    losses = ending.sum_of_losses

    @torch.no_grad()
    def sum_of_losses(model: Llama, rows: Tensor, mesh: Mesh, eos_id: int, *rest: Any) -> float | None:
        total = 0.0
        assert rows.shape[0] * rows.shape[1] == 8  # a step's, of more
        for row in rows.flatten(0, 1).long().split(1):
            logits = model.output(model(row[:, :-1], build_documents(row[:, :-1], eos_id, "dense")))
            total += F.cross_entropy(logits[0], labels(row, eos_id)[0], reduction="sum").item()
        naive.append(total)
        return losses(model, rows, mesh, eos_id, *rest)

    def note(run: Run, config: Config, rows: Tensor) -> EndRecord:
        found, model = note_end(run, config, rows), run.trainer.model
        sketches = np.empty_like(found.logits)
        for place, length in enumerate(found.lengths):
            tokens = torch.cat([rows[:1, length:], rows[:1]], 1)[:, : length + NUM_GENERATED]
            logits = model.output(model(tokens, realise(torch.zeros_like(tokens), "dense")))[0, length - 1 : -1]
            sketches[:, place] = sketch(logits.unsqueeze(1), random_tensor(1, "rows", logits.device)).numpy()
        naive.append(sketches)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ending, "sum_of_losses", sum_of_losses)
        patch.setattr(recording, "note_end", torch.no_grad()(note))
        end = record(config, STEPS).end
    return end, naive[0], naive[1]


def test_the_end_is_what_the_trained_weights_make(config_file: Path) -> None:
    ((end, loss, logits),) = ranks(1).run(naively, layout_of("1x1", config_file).config)
    assert end.num_rows == 8
    assert end.lengths == [32, 16, 8, 4]
    assert end.loss == pytest.approx(loss, rel=1e-13)
    assert end.logits.shape[:2] == (NUM_GENERATED, NUM_PROMPTS)
    assert relative_difference(end.logits, logits).max() < 1e-13


def test_the_configs_own_validation_set_is_taken(config_file: Path) -> None:
    options = "+validation.enable=true+data.held_out_fraction=0.5+validation.max_documents=30"
    reference, run_of_two = run(f"1x1{options}", config_file), run(f"2x1{options}", config_file)
    assert [str(d) for d in compare(reference, run_of_two, 1e-12) if d.size > 1e-12] == []
    assert reference[0].end.validation_set.startswith("30 documents, ")
    assert run("1x1", config_file)[0].end.validation_set.startswith("60 documents, ")


def skip_all_reduce(patch: pytest.MonkeyPatch, rank: int) -> None:
    """Replicas keep their own gradients: what FSDP2 sends over a group of ranks stays as it is."""
    exact = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, group: dist.ProcessGroup | None = None, **kwargs: Any) -> Any:
        return exact(tensor, *args, **kwargs) if group is None else None

    patch.setattr(dist, "all_reduce", all_reduce)


def wrong_divisor(patch: pytest.MonkeyPatch, rank: int) -> None:
    """One rank counts a target less, at step 2."""
    exact = Trainer.train_step

    def step(self: Trainer, rows: Tensor, num_targets: int) -> StepResult:
        return exact(self, rows, num_targets - (rank == 1 and self.step == 1))

    patch.setattr(Trainer, "train_step", step)


def blind_mask(patch: pytest.MonkeyPatch, rank: int) -> None:
    """One rank attends across documents."""
    exact = llama.attend

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        return exact(q, k, v, replace(documents, starts=torch.zeros_like(documents.starts)))

    if rank == 1:
        patch.setattr(llama, "attend", attend)


def shifted_rope(patch: pytest.MonkeyPatch, rank: int) -> None:
    """One rank turns queries and keys by the angles of the tokens before. Within a document that changes nothing."""
    exact = llama.apply_rope
    if rank == 1:
        patch.setattr(llama, "apply_rope", lambda x, rotations: exact(x, rotations.roll(1, 1)))


def shifted_positions(patch: pytest.MonkeyPatch, rank: int) -> None:
    """One rank counts every position from 1: in exact arithmetic that changes nothing at all."""
    exact = llama.rope_rotations
    if rank == 1:
        patch.setattr(llama, "rope_rotations", lambda positions, *rest: exact(positions + 1, *rest))


def other_initial_weights(patch: pytest.MonkeyPatch, rank: int) -> None:
    exact = trainer_module.init_weights
    patch.setattr(trainer_module, "init_weights", lambda model, law, seed: exact(model, law, seed + (rank == 1)))


def other_loader(patch: pytest.MonkeyPatch, rank: int) -> None:
    """Rank 1 reads the rows of rank 0."""
    exact = train_run.build_loader
    patch.setattr(train_run, "build_loader", lambda *a, dp_rank, **k: exact(*a, dp_rank=0, **k))


def other_rows(patch: pytest.MonkeyPatch, rank: int) -> None:
    """One rank trains on its rows in another order, at step 2; its loader never knew."""
    exact = Trainer.train_step

    def step(self: Trainer, examples: Examples, num_targets: int) -> StepResult:
        if rank == 1 and self.step == 1:
            examples = Examples(*(t.flip(0) for t in (examples.tokens, examples.labels, examples.starts)))
        return exact(self, examples, num_targets)

    patch.setattr(Trainer, "train_step", step)


def other_update(patch: pytest.MonkeyPatch, rank: int) -> None:
    """One replica's learning rate is off by a millionth."""
    exact = trainer_module.set_lr
    patch.setattr(trainer_module, "set_lr", lambda optimizer, lr: exact(optimizer, lr * (1 + 1e-6 * (rank == 1))))


def frozen_embedding(patch: pytest.MonkeyPatch, rank: int) -> None:
    """Compiled blocks take the embedding's output as it comes, and with it no gradient (see apply.py)."""
    from titanlite.parallel import apply

    exact = apply.apply_tp

    def without_the_last_hook(model: Llama, mesh: Mesh) -> None:
        exact(model, mesh)
        model.tok_embeddings._forward_hooks.popitem()

    patch.setattr(apply, "apply_tp", without_the_last_hook)


def smaller_set(patch: pytest.MonkeyPatch, rank: int) -> None:
    patch.setattr(ending, "NUM_DOCUMENTS", 20)


def validation_over_ranks(patch: pytest.MonkeyPatch, rank: int) -> None:
    exact = ending.sum_of_losses
    patch.setattr(ending, "sum_of_losses", lambda *arguments: exact(*arguments) / dist.get_world_size())


def blind_validation(patch: pytest.MonkeyPatch, rank: int) -> None:
    """One rank validates across documents."""
    exact = validation.build_documents
    if rank == 1:
        patch.setattr(validation, "build_documents", lambda tokens, eos_id, backend: exact(tokens, -1, backend))


def shifted_under_the_cache(patch: pytest.MonkeyPatch, rank: int) -> None:
    """One rank counts the positions of new tokens, and not those of prompts, from 1."""
    exact = decode.realise_next

    def realise_next(starts: Tensor, begin: int, *caches: Any) -> Documents:
        documents = exact(starts, begin, *caches)
        return replace(documents, positions=documents.positions + (begin > 0))

    if rank == 1:
        patch.setattr(decode, "realise_next", realise_next)


def seen_padding(patch: pytest.MonkeyPatch, rank: int) -> None:
    """One rank takes what stands before a prompt for a part of it."""
    exact = decode.right_align
    if rank == 1:
        patch.setattr(decode, "right_align", lambda *a: (exact(*a)[0], torch.zeros_like(exact(*a)[1])))


def other_generating_weights(patch: pytest.MonkeyPatch, rank: int) -> None:
    """One rank generates with a weight that is off by a millionth."""
    exact = ending.whole_tensor
    patch.setattr(ending, "whole_tensor", lambda tensor: exact(tensor) * (1 + 1e-6 * (rank == 1)))


@pytest.mark.parametrize(
    ("plant", "layout", "step", "what", "where"),
    [
        (skip_all_reduce, "hsdp2x1", 1, "gradient of output.weight", "ranks 0-1"),
        (wrong_divisor, "2x1", 2, "loss", "ranks 0-1"),
        (blind_mask, "2x1", 1, "activation layers.0.attention", "rows 4, 6 of the batch (rank 1)"),
        (shifted_rope, "2x1", 1, "activation layers.0.attention", "rows 4-7 of the batch (rank 1)"),
        (shifted_positions, "2x1", 1, "activation rotary cosines", "rows 4-7 of the batch (rank 1)"),
        (shifted_positions, "1x2", 1, "activation rotary cosines", "rows 0-7 of the batch (ranks 0-1)"),
        (other_initial_weights, "hsdp2x1", 0, "initial weight tok_embeddings.weight", "rank 1"),
        (other_initial_weights, "2x1", 0, "initial weight tok_embeddings.weight", "ranks 0-1"),
        (other_loader, "2x1", 1, "batch", "rows 4-7 of the batch (rank 1)"),
        (other_rows, "2x1", 2, "activation document starts", "rows 4-7 of the batch (rank 1)"),
        (other_rows, "1x2", 2, "activation document starts", "rows 0-1, 3-4, 6-7 of the batch (ranks 0-1)"),
        (other_update, "hsdp2x1", 1, "weight tok_embeddings.weight", "rank 1"),
        (smaller_set, "2x1", "validation", "set", "ranks 0-1"),
        (validation_over_ranks, "2x1", "validation", "loss", "ranks 0-1"),
        (blind_validation, "2x1", "validation", "loss", "ranks 0-1"),
        (shifted_under_the_cache, "1x2", "generation", "logits of new token 2", "prompts 1-4 (ranks 0-1)"),
        (seen_padding, "1x2", "generation", "logits of new token 1", "prompts 2-4 (ranks 0-1)"),
        (other_generating_weights, "2x1", "generation", "logits of new token 1", "prompts 1-4 (rank 1)"),
        pytest.param(
            frozen_embedding,
            "1x2+compile=aot_eager",
            1,
            "gradient of tok_embeddings.weight",
            "ranks 0-1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_planted_bug_is_named(
    plant: Plant, layout: str, step: int | str, what: str, where: str, config_file: Path
) -> None:
    found = first_difference(layout, config_file, plant)
    assert found is not None
    assert (found.step, found.what, found.where) == (step, what, where), str(found)


@pytest.mark.parametrize("plant", [other_initial_weights, other_update])
def test_replicas_of_the_reference_are_compared_with_each_other(plant: Plant, config_file: Path) -> None:
    reference = run("hsdp2x1", config_file, plant)
    found = next(d for d in compare(reference, reference, BOUND) if d.size > BOUND)
    assert found.where == "rank 1"


def test_nothing_that_was_recorded_is_left_uncompared(config_file: Path) -> None:
    """Every number of a record, spoilt by itself, is noticed, at its step and under its name."""
    reference = run("1x1", config_file)
    assert all(d.size == 0 for d in compare(reference, reference, BOUND))
    good = reference[0].steps[1]
    spoilt: list[tuple[str, StepRecord]] = [
        ("batch", replace(good, fingerprint="0" * 16)),
        ("batch", replace(good, row_digests=good.row_digests + np.uint64(1))),
        ("loss", replace(good, loss=good.loss * (1 + 1e-8))),
        ("loss", replace(good, loss=float("nan"))),
        ("gradient norm", replace(good, grad_norm=good.grad_norm * (1 - 1e-8))),
    ]
    for kind in ("inputs", "activations", "gradients", "weights"):
        for name, noted in getattr(good, kind).items():
            prefix = {"gradients": "gradient of", "weights": "weight"}.get(kind, "activation")
            changed = noted.copy()
            changed[..., :-1] += 1e-6 * np.sqrt(noted[..., -1:])
            spoilt.append((f"{prefix} {name}", replace(good, **{kind: getattr(good, kind) | {name: changed}})))
    assert len(spoilt) == 5 + 4 + 12 + 21 + 21
    for what, step in spoilt:
        run_of_one = [replace(reference[0], steps=[reference[0].steps[0], step])]
        beyond = [d for d in compare(reference, run_of_one, BOUND) if d.size > BOUND]
        assert [(d.step, d.what) for d in beyond] == [(2, what)]
    end = reference[0].end
    ends: list[tuple[tuple[int | str, str], EndRecord]] = [
        (("validation", "set"), replace(end, validation_set=end.validation_set + "0")),
        (("validation", "set"), replace(end, num_rows=7)),
        (("validation", "loss"), replace(end, loss=end.loss * (1 + 1e-8))),
    ]
    for token, prompt in np.ndindex(end.logits.shape[:2]):
        logits = end.logits.copy()
        logits[token, prompt, :-1] += 1e-6 * np.sqrt(logits[token, prompt, -1])
        ends.append((("generation", f"logits of new token {token + 1}"), replace(end, logits=logits)))
    for named, changed_end in ends:
        beyond = [d for d in compare(reference, [replace(reference[0], end=changed_end)], BOUND) if d.size > BOUND]
        assert [(d.step, d.what) for d in beyond] == [named]


def test_a_run_that_ends_earlier_is_no_equal(config_file: Path) -> None:
    reference = run("1x1", config_file)
    shorter = [replace(reference[0], steps=reference[0].steps[:1])]
    for a, b in ((reference, shorter), (shorter, reference)):
        (found,) = [d for d in compare(a, b, BOUND) if d.size > BOUND]
        assert (found.step, found.what) == (2, "end of the data")


def change(kind: str, x: Tensor) -> Tensor:
    """The tensor with a small change of some kind."""
    y = x.clone()
    if kind == "one element":
        y[3, 5] += 1e-3
    elif kind == "two rows swapped":
        y[[2, 7]] = y[[7, 2]]
    elif kind == "a sign":
        y[:, 4] *= -1
    elif kind == "scale":
        y *= 1 + 1e-7
    elif kind == "noise":
        y += 1e-5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    elif kind == "rows shifted":
        y = y.roll(1, 0)
    return y


@pytest.mark.parametrize("kind", ["one element", "two rows swapped", "a sign", "scale", "noise", "rows shifted"])
@pytest.mark.parametrize("shape", [(16, 24), (300, 8)], ids=str)
def test_sketches_tell_how_far_tensors_are_apart(kind: str, shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = change(kind, x)
    true = ((x - y).norm() / x.norm()).item()
    sketches = [sketch(t, random_tensor(shape[0], "rows", t.device)).numpy() for t in (y, x)]
    assert true / 4 < relative_difference(*sketches).item() < 4 * true


def test_sketches_of_parts_of_a_sequence_add_up() -> None:
    x = torch.randn(3, 16, 5, dtype=torch.float64)
    rows = random_tensor(16, "rows", x.device)
    parts = [sketch(x[:, i : i + 4], rows[i : i + 4]) for i in range(0, 16, 4)]
    assert torch.allclose(torch.stack(parts).sum(0), sketch(x, rows), rtol=1e-13, atol=0)


def test_zeros_and_what_is_not_a_number() -> None:
    zero, one, bad = (np.full(9, value) for value in (0.0, 1.0, np.nan))
    assert relative_difference(zero, zero) == 0
    assert relative_difference(zero, one) >= 1
    assert relative_difference(one, zero) >= 1
    assert relative_difference(bad, bad) == relative_difference(bad, one) == np.inf


def test_numbers_are_listed_as_spans() -> None:
    assert listed("rank", [0]) == "rank 0"
    assert listed("row", [0, 1, 2, 5, 7, 8]) == "rows 0-2, 5, 7-8"


@pytest.mark.parametrize(
    ("layouts", "overrides", "message"),
    [
        ("1x1", [], "--layouts 1x1: name two or more"),
        ("1x1,2by2", [], "layout 2by2: write DxT or hsdpRxS"),
        ("1x1,3x1", [], "layout 3x1: training.global_batch_size = 8 rows cannot be dealt to 3"),
        ("1x1,1x3", [], "layout 1x3: parallelism.tensor_parallel_degree = 3 does not divide"),
        ("1x1,2x1+accumulate=3", [], "layout 2x1+accumulate=3: accumulate=3 does not divide the 4 rows"),
        ("1x1,2x1+accumulate=0", [], "layout 2x1+accumulate=0: +accumulate=0 is no option"),
        ("1x1,2x1+ac=some", [], "layout 2x1+ac=some: command line: --activation_checkpoint.mode"),
        ("1x1,2x1+jit", [], "layout 2x1+jit: +jit is no option"),
        ("1x1,2x1", ["--training.sed", "3"], "unknown key --training.sed: did you mean --training.seed"),
        ("1x1,2x1", ["--steps", "0"], "--steps 0: must be 1 or more"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    layouts: str, overrides: list[str], message: str, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--job.config_file", str(config_file), "--layouts", layouts, *overrides]) == 1
    assert message in capsys.readouterr().err


def test_a_layout_is_the_users_config_and_its_own_degrees(config_file: Path) -> None:
    arguments = ["--job.config_file", str(config_file), "--training.seed", "5", "--training.deterministic", "false"]
    text = "2x1+accumulate=2,hsdp3x2x2+workers=3+ac=full+compile=eager+training.global_batch_size=12"
    first, second = read_layouts(text, arguments, Path("/nowhere"), float64=True)
    assert (first.world_size, second.world_size) == (2, 12)
    assert (first.config.training.local_batch_size, second.config.training.local_batch_size) == (2, 4)
    p = second.config.parallelism
    degrees = p.data_parallel_replicate_degree, p.data_parallel_shard_degree, p.tensor_parallel_degree
    assert degrees == (3, 2, 2)
    assert second.config.compile == CompileConfig(enable=True, backend="eager")
    assert (second.config.data.num_workers, second.config.activation_checkpoint.mode) == (3, "full")
    for config in (first.config, second.config):
        assert (config.training.seed, config.training.deterministic, config.model.dim) == (5, False, 32)
        assert config.training.dtype == config.training.mixed_precision_param == "float64"
        assert config.job.dump_folder.startswith("/nowhere/")
    held = ["--data.held_out_fraction=0.5", "--validation.enable=true", "--validation.sample_prompts=the model"]
    samples = read_layouts("1x1,1x2", [*arguments, *held], Path("/nowhere"), float64=True)[1].config.validation
    assert (samples.enable, samples.sample_prompts) == (True, ())
    own = read_layouts("1x1,1x1", [*arguments, "--training.dtype", "float32"], Path("/nowhere"), float64=False)
    assert own[0].config.training.mixed_precision_param == "auto"


def fails(kind: str, report: Callable[[int], None]) -> int:
    """Rank 1 does not come back; rank 0 waits for it in a collective."""
    dist.init_process_group("gloo", init_method="env://")
    report(7)
    if dist.get_rank() == 1:
        if kind == "raises":
            raise ValueError("this is\nrank 1's mistake")
        if kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    dist.barrier()
    return dist.get_rank()


@pytest.mark.parametrize(
    ("kind", "seconds", "message"),
    [
        pytest.param("raises", 600, "rank 1: this is rank 1's mistake", marks=pytest.mark.slow),
        pytest.param("dies", 600, "rank 1 died with exit code -9", marks=pytest.mark.slow),
        pytest.param("hangs", 30, "hangs: no rank has come further for 30 s", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_does_not_come_back_ends_all_in_one_line(kind: str, seconds: float, message: str) -> None:
    heard: list[int] = []
    before = multiprocessing.active_children()
    with pytest.raises(RanksFailed) as error:
        run_ranks(2, fails, kind, environment={}, timeout_seconds=seconds, progress=heard.append)
    assert str(error.value) == message
    assert heard == [7]
    assert multiprocessing.active_children() == before


def verb(config: Path, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run it with folder/tmp for its temporary files."""
    command = [sys.executable, "-m", "titanlite.parity", "--job.config_file", str(config), *arguments]
    environment = os.environ | {"TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    (folder / "tmp").mkdir(exist_ok=True)
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_verb_prints_a_table_and_leaves_nothing_behind(config_file: Path) -> None:
    """The second "layout" clips at another norm: same loss and gradients at first, other weights."""
    reference = run("1x1", config_file)[0]
    before = set(config_file.parent.rglob("*"))
    layouts = ("--layouts", "2x1,1x1+training.max_norm=0.5")
    done = verb(config_file, config_file.parent, *layouts, "--steps", "2", "--job.dump_folder", "runs/x")
    assert done.returncode == 1, done.stderr
    lines = done.stderr.splitlines()
    assert lines[-1].startswith(
        "titanlite: layout 1x1+training.max_norm=0.5 differs from 2x1, first at step 1, weight "
    )
    table = done.stdout.splitlines()
    for number, expected in enumerate(reference.steps, 1):
        row = next(line.split() for line in table if line.startswith(f"{number:4}  "))
        assert row[1] == expected.fingerprint
        assert float(row[2]) == pytest.approx(expected.loss, rel=1e-12)
        assert float(row[4]) < 1e-12
        assert float(row[5]) > 1e-6
    for start in ("validation: loss ", "generation: "):
        row = next(line.split() for line in table if line.startswith(start))
        assert float(row[-2]) < 1e-12
        assert float(row[-1]) > 1e-9
    left = {path.name for path in set(config_file.parent.rglob("*")) - before} - {"tmp"}  # given by `verb`
    assert [name for name in left if not name.startswith("torchinductor")] == []  # torch's own cache


@pytest.mark.slow
def test_a_layout_that_cannot_run_is_named(config_file: Path) -> None:
    done = verb(config_file, config_file.parent, "--layouts", "1x1,2x1", "--data.paths", "/nowhere/*.txt")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("titanlite: layout 1x1: ")
    assert "/nowhere/*.txt" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing_behind(number: signal.Signals, code: int, config_file: Path) -> None:
    folder = config_file.parent / f"tmp-{code}"
    folder.mkdir()
    command = [sys.executable, "-m", "titanlite.parity", "--job.config_file", str(config_file)]
    job = subprocess.Popen(
        [*command, "--layouts", "2x1,1x1", "--steps", "9999"],
        env=os.environ | {"TMPDIR": str(folder)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(folder.glob("titanlite-parity-*/0/cursor.jsonl")):
        assert job.poll() is None
        time.sleep(0.1)
    family = descendants(job.pid)
    assert len(family) >= 3
    job.send_signal(number)
    assert job.wait(timeout=60) == code
    assert not list(folder.glob("titanlite-parity-*"))
    time.sleep(1)
    states = [path.read_text().split()[2] for pid in family if (path := Path(f"/proc/{pid}/stat")).exists()]
    assert [state for state in states if state != "Z"] == []  # an orphan waits for init


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_shipped_config_on_eight_layouts(tmp_path: Path) -> None:
    layouts = [
        "1x1",
        "2x1+accumulate=4+workers=0",
        "1x2+ac=selective",
        "2x2+ac=full+workers=3",
        "4x1",
        "hsdp2x1+accumulate=2",
        "hsdp2x1x2+ac=selective",
        "1x2+compile=aot_eager",
        "2x1+compile",
    ]
    config = Path(__file__).parents[2] / "train_configs/debug.toml"
    done = verb(config, tmp_path, "--layouts", ",".join(layouts))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all 9 layouts agree within 1e-09 in all 20 steps, validation and generation"
