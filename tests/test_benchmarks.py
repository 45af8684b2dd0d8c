"""Benchmarks measure what they say: the same work on all sides, floors that are floors, bounds that can be missed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import attention, gpu, learning, optimizer, resume
from benchmarks.step_overhead import Seconds
from benchmarks.throughput.floors import HEAD_CHUNK, Gemms
from benchmarks.throughput.measure import Times, in_processes, run_case
from benchmarks.throughput.report import Bound, Results, bounds, report
from benchmarks.throughput.work import EOS, MODEL, Case, document_lengths, rows_of
from titanlite.config import ModelConfig, load_config
from titanlite.model.documents import document_starts
from titanlite.model.transformer import num_parameters
from titanlite.tokenizer import Tokenizer

TINY = ModelConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=48, vocab_size=128)


def test_the_model_is_the_one_that_is_told() -> None:
    assert num_parameters(MODEL) == 8_916_224


@pytest.mark.parametrize("mean", [100, 300, 1000])
def test_documents_have_the_mean_length_that_is_told(mean: int) -> None:
    rows = rows_of(Case(8192, mean), steps=60, rank=0)
    assert rows.numel() / (rows == EOS).sum() == pytest.approx(mean, rel=0.2)
    assert not torch.equal(rows, rows_of(Case(8192, mean), steps=60, rank=1))


def test_the_attention_that_is_needed_is_that_of_the_document_rule() -> None:
    rows = rows_of(Case(512, 40), steps=1, rank=0)[0]
    tokens = rows[:, :-1]
    begins = document_starts(tokens, EOS) == torch.arange(tokens.shape[1])
    flat = [*begins.flatten().nonzero().flatten().tolist(), tokens.numel()]
    assert document_lengths(rows) == [end - begin for begin, end in pairwise(flat)]


def test_one_document_a_row_is_one() -> None:
    case = Case(512, None)
    assert document_lengths(rows_of(case, 1, 0)[0]) == [512] * case.rows


def test_the_floor_multiplies_what_the_model_must() -> None:
    case = Case(2048, None, model=replace(MODEL, dim=64, ffn_dim=192))
    model = case.model
    assert case.rows * case.seq_len % HEAD_CHUNK == 0
    floor = Gemms(case)
    with FlopCounterMode(display=False) as counter:
        floor.step(rows_of(case, 1, 0)[0])
    norms = (2 * model.n_layers + 1) * model.dim
    matrices = num_parameters(model) - norms - model.vocab_size * model.dim  # a lookup multiplies nothing
    assert counter.get_total_flops() == 6 * matrices * case.tokens


def test_contenders_begin_with_one_loss_and_a_missing_peer_is_told() -> None:
    case = Case(64, 20, model=TINY, threads=1)
    times = run_case(case, rounds=2)
    whole_rows = [t.first_loss for name, t in times.items() if name in ("transformers", "litgpt", "torchtitan")]
    documents = times["transformers, documents"].first_loss
    for loss in whole_rows:
        assert loss is None or loss == pytest.approx(times["transformers"].first_loss, rel=1e-4)
    assert documents != pytest.approx(times["transformers"].first_loss, rel=1e-6)  # it saw where documents begin
    for name in ("titanlite", "transformers", "transformers, documents", "GEMMs only", "GEMMs + needed attention"):
        assert len(times[name].seconds) == 2, times[name].error
    text = report(Results(2, {case: times}), "command")
    for name, result in times.items():
        assert result.seconds or "Error" in result.error
        assert f"| {name} |" in text


def test_ours_and_transformers_have_one_loss_where_a_row_is_a_document() -> None:
    times = run_case(Case(64, None, model=TINY, threads=1), rounds=2)
    ours = times["titanlite"].first_loss
    assert times["bare FSDP2 loop"].first_loss == pytest.approx(ours, rel=1e-5)
    assert times["transformers"].first_loss == pytest.approx(ours, rel=1e-5)


def dies(case: Case, argument: object) -> None:
    os._exit(3)


def test_a_process_that_dies_is_told_and_not_waited_for() -> None:
    with pytest.raises(RuntimeError, match="rows of 64.* died without a result"):
        in_processes(Case(64, None, model=TINY, threads=1), dies, None)


def test_a_bound_is_missed_only_where_the_better_quartile_misses_it_too() -> None:
    assert not Bound("", (1.1, 1.2, 1.4), 1.3).missed
    assert Bound("", (1.1, 1.2, 1.25), 1.3).missed
    assert not Bound("", (1.3, 1.5, 1.6), 1.35, at_most=True).missed
    assert Bound("", (1.4, 1.5, 1.6), 1.35, at_most=True).missed
    assert Bound("", (1.1, 1.2, 1.4), 1.3).verdict == "missed within the noise"
    assert Bound("", (1.1, 1.3, 1.4), 1.3).verdict == "met"


def test_bounds_are_taken_over_the_fastest_peer_round_by_round() -> None:
    def times(*wall: float) -> Times:
        return Times([Seconds(w, w) for w in wall])

    case = Case(2048, 300)
    found = bounds(
        Results(
            3,
            {
                case: {
                    "titanlite": times(1.0, 2.0, 1.0),
                    "litgpt": times(1.5, 3.0, 1.5),
                    "transformers": times(9.0, 9.0, 9.0),
                    "torchtitan": Times([], error="ImportError"),
                    "GEMMs + needed attention": times(0.5, 1.0, 0.5),
                }
            },
            {"titanlite": 110, "litgpt": 100, "transformers": 200, "torchtitan": "ImportError"},
        )
    )
    over_peer, over_floor, memory = found
    assert (over_peer.ratios, over_peer.missed) == ((1.5, 1.5, 1.5), False)
    assert (over_floor.ratios, over_floor.missed) == ((2.0, 2.0, 2.0), True)
    assert (memory.ratios[1], memory.missed) == (pytest.approx(1.1), True)


def test_attention_is_measured_in_every_way() -> None:
    calls, masks = attention.measure("cpu", [256], rounds=2)
    assert calls.count("\n") == 1 + 4 * 2  # header, rule, four kinds of documents in two number formats
    assert masks.count("\n") == 1 + 4


def test_the_program_for_a_gpu_runs_on_a_tiny_shape() -> None:
    case = Case(64, 20, "bfloat16", model=replace(TINY, tie_embeddings=True), threads=1)
    for entry in gpu.entries(case):
        if entry.title in ("- chunk of the loss / 4", "transformers"):
            runs = [in_processes(entry.case, gpu.measure, (entry, 2))]
            assert isinstance(runs[0], gpu.Figures), runs
            assert len(runs[0].seconds) == 2
            assert 1 < runs[0].attended < 64
            assert gpu.line(entry, runs, 1e12).count("|") == 9


def test_muon_is_measured_beside_adamw() -> None:
    case = Case(64, 20, model=optimizer.TINY, processes=2)
    found = in_processes(case, optimizer.measure, (2, 2))
    for steps in (found["adamw"], found["muon"]):
        assert len(steps) == 2
        assert all(0 < step.update < step.whole for step in steps)
    assert optimizer.report(case, found, 99, "command", judged=True).count("\n| ") == 3
    slow = {"adamw": [optimizer.Step(1.0, 0.1)] * 3, "muon": [optimizer.Step(1.2, 0.3)] * 3}
    assert optimizer.bound_of(slow).missed


def test_a_stream_goes_on_at_a_far_document_with_a_small_state() -> None:
    assert resume.first_rows(10**9)[1] <= resume.MOST_BYTES
    assert resume.cursor_at(10**9)["sources"]["synthetic"]["document"] == 10**9  # type: ignore[index]


def test_the_orders_that_learning_compares_hold_the_same_tokens(tmp_path: Path) -> None:
    learning.write_corpora(tmp_path, max_files=40)
    arguments = ["--job.config_file", str(learning.CONFIG), f"--data.paths={tmp_path}/long.jsonl"]
    arguments += [f"--data.cache_dir={tmp_path}/cache", "--data.reader=cached", "--training.seq_len=128"]
    config = load_config(arguments)
    tokenizer = Tokenizer.load(config.tokenizer.path)
    tokens = learning.tokens_of(config, tokenizer)
    texts = [json.loads(line)["text"] for line in (tmp_path / "long.jsonl").read_text().splitlines()]
    assert len(tokens) == sum(len(tokenizer.encode_document(text)) for text in texts)
    steps = (len(tokens) - 1) // 128 // 8
    rows = {
        arm: torch.cat([*islice(learning.rows_of(arm, config, tokenizer), steps)])[:, :-1]
        for arm in ("in order", "shuffled", "random")
    }
    assert torch.equal(rows["in order"].flatten(), tokens[: steps * 8 * 128])
    whole = {row.numpy().tobytes() for row in tokens[: len(tokens) // 128 * 128].view(-1, 128)}
    shuffled = [row.numpy().tobytes() for row in rows["shuffled"]]
    assert set(shuffled) <= whole
    assert len(shuffled) == steps * 8
    assert not torch.equal(rows["shuffled"], rows["in order"])
    assert not {row.numpy().tobytes() for row in rows["random"]} <= whole  # from anywhere
    held = [json.loads(line)["text"] for line in (tmp_path / "held long.jsonl").read_text().splitlines()]
    assert held
    assert not {*held} & {*texts}


def test_what_learning_concludes_follows_from_the_losses() -> None:
    losses = {"titanlite": [4.0, 4.1], "random": [4.0, 4.05], "shuffled": [4.0, 4.0], "in order": [5.0, 5.0]}
    results = [
        {"run": {"part": "order", "corpus": "long", "arm": arm}, "curve": [[0, 9.0, 0.0], [10, loss, 1.0]]}
        for arm, both in losses.items()
        for loss in both
    ]
    table, met = learning.order_table(results)
    assert met
    assert "| +0.025 (bound +0.03: met) | +0.050 (bound +0.05: met) |" in table
    results[0]["curve"][-1][1] += 0.02
    table, met = learning.order_table(results)
    assert not met
    assert "| +0.035 (bound +0.03: missed) | +0.060 (bound +0.05: missed) |" in table


@pytest.mark.slow
def test_learning_runs_in_short(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.learning", "--quick", "--results", str(tmp_path / "results.jsonl")]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode in (0, 1), first.stderr  # four steps conclude nothing
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "4 of 4" in first.stdout
    assert "4 of 4" not in again.stdout  # all are kept
