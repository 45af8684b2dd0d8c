"""`plan` prints what it found, compares with a real checkpoint and closed formulas, and takes a mistake in one line."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_run import write_config
from titanlite.cache import __main__ as cache
from titanlite.plan.__main__ import main
from titanlite.plan.tables import tables
from titanlite.train import __main__ as train

LLAMA_8B = str(Path(__file__).parents[2] / "train_configs" / "llama_8b.toml")
# Llama 3's sizes (Grattafiori et al. 2024, arXiv:2407.21783, table 3); the batch is 16 million tokens for 405B.
SIZES = {
    "70B": (512, "8192 80 64 28672", 512, 70_553_706_496),
    "405B": (16384, "16384 126 128 53248", 2048, 405_853_388_800),
}
LAPTOP_SECONDS = 60


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_8b_on_64_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.process_time()
    facts = plan(capsys, "--job.config_file", LLAMA_8B, "--world_size", "64")
    assert time.process_time() - began < LAPTOP_SECONDS
    parameters, memory = 8_030_261_248, facts["bytes_per_rank"]
    assert facts["model"]["parameters"] == parameters
    assert facts["model"]["parameters_without_embedding"] == parameters - 128256 * 4096
    # All of its shards are even: float32 weights, gradients and two moments, and a count of steps for each of 291.
    assert memory["parameters"] == memory["gradients"] == 4 * parameters // 64
    assert memory["optimizer"] == 2 * 4 * parameters // 64 + 4 * 291
    assert facts["checkpoint"]["bytes"] == 3 * 4 * parameters + 4 * 291
    assert facts["layout"] | {"dp_shard": 64, "micro_batches": 2, "computes_in": "bfloat16"} == facts["layout"]
    # A block's input, for each of 32, and what is around them: see test_plan_step.py for the whole formula.
    full = memory["by_activation_checkpoint"]["full"]["activations"]
    assert 32 * 2 * 8192 * 4096 < full < 35 * 2 * 8192 * 4096
    run = facts["run"]
    flops = 6 * (parameters - 128256 * 4096) + 12 * 32 * 4096 * 8192
    assert run["step_seconds"] == pytest.approx(flops * 128 * 8192 / (64 * 989.4e12 * 0.4))
    assert run["seconds"] == pytest.approx(153_000 * run["step_seconds"])


def test_muon_and_an_average_of_the_weights_are_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, optimizer__name="muon", training__ema_decay=0.9, model__n_layers=4)
    facts = plan(capsys, "--job.config_file", str(config), "--world_size", "2", "--device", "cpu")
    matrices = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    others = 2 * 260 * 32 + 9 * 32
    steps = 4 * 11  # AdamW's count of them, for each of its parameters
    memory = facts["bytes_per_rank"]
    assert memory["parameters"] == memory["average"] == 4 * (matrices + others) // 2
    assert memory["optimizer"] == 4 * (matrices + 2 * others) // 2 + steps
    assert facts["checkpoint"]["bytes"] == 4 * (3 * matrices + 4 * others) + steps
    table = tables(facts)
    for text in ("  optimizer (muon)  ", "  average of the weights  ", "give --exact"):
        assert text in table


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_large_models_take_less_than_a_minute(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    world_size, numbers, rows, parameters = SIZES[size]
    sizes = dict(zip(("dim", "n_layers", "n_heads", "ffn_dim"), numbers.split(), strict=True))
    arguments = [f"--model.{key}={value}" for key, value in sizes.items()]
    arguments += ["--parallelism.tensor_parallel_degree=8", f"--training.global_batch_size={rows}"]
    began = time.process_time()
    facts = plan(capsys, "--job.config_file", LLAMA_8B, f"--world_size={world_size}", *arguments)
    seconds = time.process_time() - began
    with capsys.disabled():
        print(f"{size} on {world_size:,} ranks: {seconds:.1f} CPU seconds")
    assert seconds < LAPTOP_SECONDS
    assert facts["model"]["parameters"] == parameters
    # Norms are whole on tp peers; and the first of 2,048 ranks has 4 of 6,656 rows of w1, where the mean is 3.25.
    share = 4 * parameters / world_size
    assert share < facts["bytes_per_rank"]["parameters"] < 1.3 * share
    assert facts["bytes_per_rank"]["by_activation_checkpoint"]["full"]["peak"] < 80e9


def test_the_size_of_a_checkpoint_is_that_of_a_real_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"model__dim": 128, "model__n_layers": 3, "model__ffn_dim": 384, "model__vocab_size": 4096}
    config = write_config(tmp_path, training__steps=1, training__seq_len=16, checkpoint__interval=1, **sizes)
    assert train.main(["--job.config_file", str(config)]) == 0
    files = [path for path in (tmp_path / "run/checkpoint/step-00000001").rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in files)
    assert written > 10e6
    facts = plan(capsys, "--job.config_file", str(config), "--world_size", "1", "--device", "cpu")
    assert facts["checkpoint"]["bytes"] == pytest.approx(written, rel=0.02)
    assert facts["run"]["seconds"] is None


def test_epochs_come_from_the_data_where_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--job.config_file", str(write_config(tmp_path))]
    arguments = [*config, "--world_size", "1", "--device", "cpu"]
    before = plan(capsys, *arguments)["data"]["sources"]["data"]
    assert (before["documents"], before["tokens_are_estimated"]) == (40, True)
    assert cache.main([*config, "--processes", "1"]) == 0
    capsys.readouterr()
    source = plan(capsys, *arguments)["data"]["sources"]["data"]
    tokens = sum(path.stat().st_size for path in (tmp_path / "corpus").iterdir()) + 2 * 40  # bytes, bos, eos
    assert (source["tokens"], source["tokens_are_estimated"]) == (tokens, False)
    assert source["trained_tokens"] == 8 * 8 * 64
    assert source["epochs"] == pytest.approx(8 * 8 * 64 / tokens)
    gone = plan(capsys, *arguments, "--data.paths", str(tmp_path / "gone/*.txt"))
    assert "gone" in gone["data"]["unknown"]


def test_tables_say_what_json_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"model__dim": 64, "training__seq_len": 128, "activation_checkpoint__mode": "full"}
    arguments = ["--job.config_file", str(write_config(tmp_path, **sizes)), "--world_size", "4", "--peak_tflops", "100"]
    facts = plan(capsys, *arguments)
    assert main(arguments) == 0
    told = capsys.readouterr().out
    lines = {line.strip().split("  ")[0]: line for line in told.splitlines()}
    assert f"  {facts['model']['parameters_without_embedding']:,}" in lines["without the embedding"]
    assert "4 = dp_replicate 1 x dp_shard 4 x tp 1" in lines["ranks"]
    assert [mode for mode in ("none", "selective", "full (configured)") if mode not in lines] == []
    peak = facts["bytes_per_rank"]["by_activation_checkpoint"]["full"]["peak"]
    assert lines["full (configured)"].endswith(f"{peak / 2**30:,.2f}")
    assert "100 TFLOP/s each, MFU 40%" in lines["assumed"]
    assert "not modelled: fragmentation" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--world_size", "5", "--parallelism.tensor_parallel_degree", "2"], "does not divide the number of ranks, 5"),
        (["--world_size", "16"], "cannot be dealt to 16 data-parallel ranks"),
        (["--world_size", "0"], "--world_size 0: give a number of ranks"),
        ([], "the following arguments are required: --world_size"),
        (["--world_size", "two"], "--world_size: invalid int value"),
        (["--world_size", "1", "--mfu", "40"], "--mfu 40.0: give a share"),
        (["--world_size", "1", "--device", "H1000"], "--device H1000: its peak is not known; give it as --peak_tflops"),
        (["--world_size", "1", "--peak_tflops", "-1"], "--peak_tflops -1.0: give TFLOP/s"),
        (["--world_size", "1", "--parallelism.enable_cpu_offload", "true"], "parallelism.enable_cpu_offload = true"),
        (["--world_size", "1", "--model.dim", "32"], "flex takes"),
        (["--world_size", "1", "--model.dims", "32"], "unknown key --model.dims"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_told_in_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(tmp_path, model__dim=64, training__seq_len=128, tokenizer__path=str(tmp_path / "none")))
    assert main(["--job.config_file", config, *arguments]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert said in told.err
    assert len(told.err.splitlines()) == 1


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    for option in ("--world_size", "--mfu", "--device", "--peak_tflops", "--exact", "--json"):
        assert f"  {option}" in told
