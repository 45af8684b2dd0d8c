"""A fake step needs what a real one does: bytes of real ranks, peaks of real tensors, formulas written by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.support.cases import some_quick
from tests.support.gloo import ranks
from tests.support.tiny_run import write_config
from titanlite.config import Config, load_config, resolve_degrees
from titanlite.model.documents import Examples
from titanlite.parallel.mesh import build_mesh
from titanlite.plan import step
from titanlite.plan.meter import BLOCK_BYTES, MemoryMeter
from titanlite.plan.step import Footprint, Moment, fake_ranks, fake_step, footprint, measured_step
from titanlite.trainer import Trainer, build_model

# 262 rows of the embedding go to 4 ranks as 66, 66, 66 and 64.
UNEVEN = {"model__vocab_size": 262, "model__n_layers": 3, "training__global_batch_size": 16}
FLEX = {"model__dim": 64, "training__seq_len": 128}  # the least that flex takes
LAYOUTS = {"1": (1, 1, 1), "dp 2": (1, 2, 1), "tp 2": (1, 1, 2), "dp 2 x tp 2": (1, 2, 2), "hsdp 2 x 2": (2, 2, 1)}
OPTIMIZED = {f"{name}, {optimizer}": (LAYOUTS[name], optimizer) for name in LAYOUTS for optimizer in ("adamw", "muon")}
DEEP = {
    f"{name}, {mode}": (layout, mode)
    for name, layout in {**LAYOUTS, "dp 3": (1, 3, 1)}.items()
    for mode in ("none", "selective", "full")
    if name in ("dp 2 x tp 2", "hsdp 2 x 2", "dp 3")
}


def tiny(folder: Path, layout: tuple[int, int, int] = (1, 1, 1), **overrides: Any) -> Config:
    replicate, shard, tp = layout
    degrees = {
        "parallelism__data_parallel_replicate_degree": replicate,
        "parallelism__data_parallel_shard_degree": shard,
        "parallelism__tensor_parallel_degree": tp,
    }
    return load_config(["--job.config_file", str(write_config(folder, **degrees, **overrides))])


def faked(config: Config, layout: tuple[int, int, int], target: str = "cpu") -> Footprint:
    with fake_ranks(*layout) as mesh:
        return fake_step(config, mesh, target)


def real_step(path: str) -> tuple[Footprint, list[int]]:
    """A real step on this rank: its tensors under the meter, and bytes of its state counted without it."""
    config = load_config(["--job.config_file", path])
    mesh = build_mesh("cpu", *resolve_degrees(config.parallelism, dist.get_world_size()))
    model = build_model(config, mesh)
    with MemoryMeter("cpu") as meter:
        meter.enter(Moment("init"))
        model.to_empty(device=mesh.device)
        for parameter in model.parameters():
            local(parameter.detach()).fill_(0.01)
        trainer = Trainer(config, mesh, model=model)
        measured = measured_step(trainer, meter)
    gradients: list[Any] = []
    trainer.on_gradients = lambda: gradients.extend(p.grad for p in trainer.model.parameters())
    rows = torch.ones(2, config.training.seq_len + 1, dtype=torch.int64)
    trainer.train_step(Examples.by_eos(rows, 0), 100)
    state = [value for values in trainer.optimizer.state.values() for value in values.values()]
    counted = []
    for tensors in (list(trainer.model.parameters()), gradients, state):
        counted.append(sum(len(local(t.detach()).contiguous().flatten().view(torch.uint8)) for t in tensors))
    return measured, counted


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("name", some_quick(OPTIMIZED, "1, adamw", "dp 2 x tp 2, adamw", "dp 2 x tp 2, muon"))
def test_bytes_and_peaks_are_those_of_real_ranks(name: str, tmp_path: Path) -> None:
    layout, optimizer = OPTIMIZED[name]
    mode = {(1, 2, 2): "selective", (1, 1, 2): "full"}.get(layout, "none")
    config = tiny(tmp_path, layout, activation_checkpoint__mode=mode, optimizer__name=optimizer, **UNEVEN)
    replicate, shard, tp = layout
    planned = faked(config, layout)
    # Alone but for a scalar or two; the threads of gloo hold what they send longer than ranks that send nothing.
    bound = {"abs": 3 * BLOCK_BYTES} if layout == (1, 1, 1) else {"rel": 0.05}
    expected = pytest.approx(planned.peaks, **bound)
    for _ in range(3):  # the longer the busier the machine is: what a step needs is the least that it was seen to take
        measured, counted = ranks(replicate * shard * tp).run(real_step, str(tmp_path / "config.toml"))[0]
        assert [planned.parameters, planned.gradients, planned.optimizer] == counted
        assert replace(planned, peaks={}) == replace(measured, peaks={})
        if measured.peaks == expected:
            break
    assert measured.peaks == expected


def by_hand(config: Config, mode: str) -> int:
    """Activations of a micro-batch in bytes as written down by hand (compare Korthikanti et al. 2022,
    arXiv:2205.05198, section 4, for GELU and dropout): bfloat16 but where it says float32."""
    model, tokens = config.model, config.training.local_batch_size * config.training.seq_len
    kv_dim = model.dim // model.n_heads * model.n_kv_heads
    norm_input = 2 * tokens * model.dim
    inverse_root = 4 * tokens  # float32, of a norm's mean square
    attention = norm_input + inverse_root + 2 * tokens * model.dim  # the input of wq, wk and wv
    attention += 2 * tokens * (2 * model.dim + 2 * kv_dim) + 4 * tokens * model.n_heads  # q, out, k, v; log-sum-exp
    feed_forward = norm_input + inverse_root + 2 * tokens * model.dim  # the input of w1 and w3
    feed_forward += 4 * 2 * tokens * model.ffn_dim  # outputs of w1 and w3, silu, product
    block = {"none": attention + feed_forward, "full": norm_input}[mode]
    cos_sin = 2 * 4 * tokens * (model.dim // model.n_heads // 2)
    positions = 8 * tokens  # the starts are the batch's
    final_norm = norm_input + inverse_root + 2 * tokens * model.dim
    return model.n_layers * block + cos_sin + positions + final_norm


@pytest.mark.parametrize("mode", ["none", "full"])
def test_activations_are_those_of_the_formula(mode: str, tmp_path: Path) -> None:
    sizes = {"model__dim": 256, "model__n_heads": 4, "model__ffn_dim": 768, "training__seq_len": 512}
    config = tiny(tmp_path, model__n_layers=5, activation_checkpoint__mode=mode, **sizes)
    assert faked(config, (1, 1, 1), "cuda").activations == by_hand(config, mode)


def test_selective_checkpointing_keeps_less_than_none_and_more_than_full(tmp_path: Path) -> None:
    none, selective, full = (
        faked(tiny(tmp_path, activation_checkpoint__mode=mode, **FLEX), (1, 1, 1), "cuda")
        for mode in ("none", "selective", "full")
    )
    assert full.activations < selective.activations < none.activations
    assert none.parameters == selective.parameters == full.parameters


@pytest.mark.parametrize("name", some_quick(DEEP, "dp 2 x tp 2, none", "hsdp 2 x 2, full"))
def test_two_and_three_layers_tell_what_seven_need(name: str, tmp_path: Path) -> None:
    layout, mode = DEEP[name]
    overrides = {"model__n_layers": 7, "activation_checkpoint__mode": mode}
    overrides |= {"training__global_batch_size": 24, **FLEX}
    config = tiny(tmp_path, layout, **overrides)
    with fake_ranks(*layout) as mesh:
        extended = footprint(config, lambda shallow: fake_step(shallow, mesh, "cuda"))
        exact = footprint(config, lambda whole: fake_step(whole, mesh, "cuda"), exact=True)
    assert replace(extended, peaks={}) == replace(exact, peaks={})
    assert extended.peaks.items() <= exact.peaks.items()
    largest = [max(peak for m, peak in exact.peaks.items() if m.phase == phase) for phase in ("forward", "backward")]
    assert [max(p for m, p in extended.peaks.items() if m.phase == phase) for phase in ("forward", "backward")] == (
        largest
    )


def test_gathered_parameters_are_counted_and_are_no_activations(tmp_path: Path) -> None:
    layout = (1, 4, 1)
    always, never = (
        faked(tiny(tmp_path, layout, parallelism__fsdp_reshard_after_forward=when, **UNEVEN), layout)
        for when in ("always", "never")
    )
    assert always.activations == never.activations
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32  # parameters, in float32
    moment = Moment("forward", "norm", 1)
    embedding = 66 * 4 * 32 * 4  # with the rows that pad its shards
    assert never.peaks[moment] - always.peaks[moment] == pytest.approx(3 * 4 * block + embedding, abs=9 * BLOCK_BYTES)


def test_more_micro_batches_than_are_traced_need_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = (2, 2, 1)
    config = tiny(tmp_path, layout, **{**UNEVEN, "training__global_batch_size": 32})  # 4 micro-batches
    two = faked(config, layout)
    monkeypatch.setattr(step, "MICRO_BATCHES", 4)
    four = faked(config, layout)
    assert {m.micro_batch for m in four.peaks} == {0, 1, 2, 3}
    rows = 2 * 8 * 4 * 64  # tokens, which stand for labels too, and starts of 4 more rows, which the host would hold
    assert 0 <= max(four.peaks.values()) - max(two.peaks.values()) <= rows + 4 * BLOCK_BYTES  # and losses


def test_the_meter_counts_each_storage_once_and_until_it_is_freed() -> None:
    with MemoryMeter("cpu") as meter:
        meter.enter("first")
        x = torch.empty(100, dtype=torch.float32)
        view = x.view(10, 10)[2:]
        assert meter.live == BLOCK_BYTES
        del x
        assert meter.live == BLOCK_BYTES
        y = view + 1
        assert meter.live == 2 * BLOCK_BYTES
        meter.enter("second")
        del view, y
        assert meter.live == 0
        z = torch.empty(1000, dtype=torch.uint8)
        z.untyped_storage().resize_(0)
        assert meter.live == 0
        z.untyped_storage().resize_(513)
        assert meter.live == 2 * BLOCK_BYTES
        torch.empty(1 << 20, device="meta")
    assert meter.peaks == {"first": 2 * BLOCK_BYTES, "second": 2 * BLOCK_BYTES}
    del z
