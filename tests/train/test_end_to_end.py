"""Whole runs of the real verb: what they leave behind, exact and elastic resume, a stop on request, bad input."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint import FileSystemReader

from tests.support.gloo import ranks
from tests.support.make_tokenizers import real_code, single_bytes, write_llama3_like, write_tokenizer
from tests.support.tiny_run import descendants, fingerprints, metrics, state_of, write_config
from titanlite.train.__main__ import main

LAST = "checkpoint/step-00000008"


def run(num_ranks: int, config: Path, *overrides: str) -> list[int]:
    """Exit code of `python -m titanlite.train` on every rank of a group that is already there."""
    return ranks(num_ranks).run(main, ["--job.config_file", str(config), *overrides])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished two-rank run of 8 steps, which other runs must reproduce."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run(2, write_config(folder)) == [0, 0]
    return folder


def test_a_run_leaves_what_the_readme_says(uninterrupted: Path) -> None:
    folder = uninterrupted / "run"
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 9))
    keys = (
        "step loss mean_loss grad_norm lr tokens tokens_per_second tokens_per_second_per_device mfu data_wait_fraction"
    )
    assert " ".join(rows[0]) == f"{keys} step_time_seconds peak_memory_gib batch_fingerprint"
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert rows[0]["mfu"] is None
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    cursors = [json.loads(line) for line in (folder / "cursor.jsonl").read_text().splitlines()]
    assert [cursor["row"] for cursor in cursors] == [8 * step for step in range(1, 9)]
    assert (folder / "config.toml").exists()
    assert json.loads((folder / "env.json").read_text())["versions"]["torch"] == torch.__version__
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == ["step-00000004", "step-00000008"]
    manifest = json.loads((folder / LAST / "manifest.json").read_text())
    ledger = manifest["meta"]["ledger"]
    assert ledger["targets"] == manifest["meta"]["trained_targets"] == rows[-1]["tokens"]
    assert ledger["tokens_read"] == ledger["targets"] + ledger["document_first"] + ledger["carried"] + ledger["dropped"]
    events = EventAccumulator(str(folder / "tb")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))
    names = set(FileSystemReader(folder / LAST).read_metadata().state_dict_metadata)
    assert {"model.layers.1.attention.wq.weight", "optimizer.exp_avg.tok_embeddings.weight"} <= names


def test_the_mean_loss_is_that_of_the_last_ten_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, training__steps=13, metrics__log_freq=2)
    assert main(["--job.config_file", str(config), "--metrics.log_freq=1"]) == 0
    rows = metrics(tmp_path / "run")
    losses = [row["loss"] for row in rows]
    means = [sum(losses[max(0, k - 9) : k + 1]) / min(k + 1, 10) for k in range(13)]
    assert [row["mean_loss"] for row in rows] == pytest.approx(means, rel=1e-6)
    assert f"final loss   {losses[-1]:.4f}, mean of the last 10 steps {means[-1]:.4f}" in capsys.readouterr().err
    # Steps that are not logged count too.
    assert main(["--job.config_file", str(config), "--job.dump_folder", str(tmp_path / "other")]) == 0
    assert metrics(tmp_path / "other")[-1]["mean_loss"] == pytest.approx(means[-1], rel=1e-6)


def test_finished_run_says_so(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (uninterrupted / "run/metrics.jsonl").read_bytes()
    assert main(["--job.config_file", str(uninterrupted / "config.toml")]) == 0
    assert "is finished at step 8: nothing to do" in capsys.readouterr().err
    assert (uninterrupted / "run/metrics.jsonl").read_bytes() == before


def main_with_signal(argv: list[str], cursors: Path, lines: int) -> int:
    """`main`, with a SIGTERM to this process as soon as cursor.jsonl has that many lines."""

    def watch() -> None:
        while not done.is_set():
            if cursors.exists() and cursors.read_bytes().count(b"\n") >= lines:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.002)

    done = threading.Event()
    watcher = threading.Thread(target=watch)
    if dist.get_rank() == dist.get_world_size() - 1:
        watcher.start()
    try:
        return main(argv)
    finally:
        done.set()


@pytest.mark.parametrize(
    ("stops", "overrides"),
    [
        ([2, 5], []),
        ([3], ["--data.num_workers=0", "--data.prefetch=0"]),
        pytest.param([1, 4, 6], ["--data.num_workers=3", "--checkpoint.async_mode=async"], marks=pytest.mark.slow),
        pytest.param([5], ["--data.num_workers=2", "--data.prefetch=5"], marks=pytest.mark.slow),
    ],
)
def test_resume_is_exact(uninterrupted: Path, tmp_path: Path, stops: list[int], overrides: list[str]) -> None:
    """Stopped by a signal to one rank and started again: the same batches, losses and, bit for bit, final state."""
    config = write_config(tmp_path, paths=str(uninterrupted / "corpus/*.txt"))
    argv = ["--job.config_file", str(config), *overrides]
    for stop in stops:
        assert ranks(2).run(main_with_signal, argv, tmp_path / "run/cursor.jsonl", stop) == [0, 0]
        status = json.loads((tmp_path / "run/status.json").read_text())
        assert status["state"] == "preempted"
        assert stop <= status["step"] < 8
    assert run(2, config, *overrides) == [0, 0]
    left, right = metrics(uninterrupted / "run"), metrics(tmp_path / "run")
    same = ("step", "loss", "grad_norm", "lr", "tokens", "batch_fingerprint")
    assert [[row[key] for key in same] for row in left] == [[row[key] for key in same] for row in right]
    expected, actual = state_of(uninterrupted / "run" / LAST, tmp_path), state_of(tmp_path / "run" / LAST, tmp_path)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


@pytest.mark.parametrize("layouts", [(4, 1), pytest.param((1, 4), marks=pytest.mark.slow)], ids=str)
def test_resume_on_other_ranks(uninterrupted: Path, tmp_path: Path, layouts: tuple[int, int]) -> None:
    """Stopped and resumed on another number of ranks, with tensor parallelism on four: the stream goes on."""
    config = write_config(tmp_path, paths=str(uninterrupted / "corpus/*.txt"))
    argv = [
        ["--job.config_file", str(config), f"--parallelism.tensor_parallel_degree={2 if n == 4 else 1}"]
        for n in layouts
    ]
    ranks(layouts[0]).run(main_with_signal, argv[0], tmp_path / "run/cursor.jsonl", 3)
    assert set(ranks(layouts[1]).run(main, argv[1])) == {0}
    assert fingerprints(tmp_path / "run") == fingerprints(uninterrupted / "run")
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(uninterrupted / "run"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def other_tokenizer(folder: Path) -> list[str]:
    special = {"<|end|>": 256}
    return ["--tokenizer.path", str(write_tokenizer(folder / "other", single_bytes(), special, eos_token="<|end|>"))]


def other_corpus(folder: Path) -> list[str]:
    (folder / "corpus/07.txt").write_text("another text")
    return []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: ["--training.seq_len=32"], ["training.seq_len was 64 and is 32"]),
        (lambda folder: ["--training.seed=1"], ["training.seed was 0 and is 1"]),
        (other_tokenizer, ["the tokenizer's fingerprint was"]),
        (other_corpus, ["07.txt"]),
        (lambda folder: ["--model.ffn_dim=96"], ["does not fit this run", "model.layers.1.feed_forward.w2.weight"]),
        (
            lambda folder: ["--model.n_layers=3"],
            ["model.layers.2.attention.wq.weight", "optimizer.exp_avg_sq.layers.2."],
        ),
        (
            lambda folder: ["--optimizer.name=muon"],
            ['step-00000008 was saved by optimizer.name = "adamw" and this run has "muon"', "checkpoint.init_from"],
        ),
    ],
)
def test_resume_refuses_what_does_not_fit(
    change: Callable[[Path], list[str]],
    words: list[str],
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted, folder)
    config = write_config(folder, paths=str(folder / "corpus/*.txt"), training__steps=16)
    assert main(["--job.config_file", str(config), *change(folder)]) == 1
    message = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[rank0]")]
    assert len(message) == 1
    for word in words:
        assert word in message[0]


def test_resume_tells_what_changed_and_goes_on(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More steps, another batch size and another rate are allowed and told; the stream goes on at its row."""
    shutil.copytree(uninterrupted / "run", tmp_path / "run")
    config = write_config(tmp_path, paths=str(uninterrupted / "corpus/*.txt"), training__steps=10)
    assert main(["--job.config_file", str(config), "--training.global_batch_size=4", "--optimizer.lr=0.005"]) == 0
    told = capsys.readouterr().err
    for change in ("training.steps: 8 -> 10", "training.global_batch_size: 8 -> 4", "optimizer.lr: 0.01 -> 0.005"):
        assert change in told
    cursors = [json.loads(line) for line in (tmp_path / "run/cursor.jsonl").read_text().splitlines()]
    assert [cursor["row"] for cursor in cursors] == [*range(8, 65, 8), 68, 72]


def test_a_run_that_stops_early_has_the_rates_of_the_whole_schedule(uninterrupted: Path, tmp_path: Path) -> None:
    """And so can be gone on with as if it had never stopped."""
    config = write_config(tmp_path, paths=str(uninterrupted / "corpus/*.txt"), training__steps=3)
    assert main(["--job.config_file", str(config), "--lr_scheduler.total_steps=8"]) == 0
    assert main(["--job.config_file", str(config), "--training.steps=8"]) == 0
    left, right = metrics(uninterrupted / "run"), metrics(tmp_path / "run")
    assert [row["lr"] for row in left] == [row["lr"] for row in right]
    assert right[-1]["loss"] == pytest.approx(left[-1]["loss"], rel=1e-4)


def test_init_from_takes_the_weights_only(uninterrupted: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, paths=str(uninterrupted / "corpus/*.txt"), checkpoint__interval=1)
    source = uninterrupted / "run" / LAST
    argv = ["--job.config_file", str(config), f"--checkpoint.init_from={source}", "--training.steps=1"]
    assert main([*argv, "--optimizer.lr=1e-30"]) == 0
    (tmp_path / "before").mkdir()
    start, result = state_of(source, tmp_path / "before"), state_of(tmp_path / "run/checkpoint/step-00000001", tmp_path)
    for name, tensor in start.items():
        if name.startswith("model."):
            assert torch.equal(tensor, result[name]), name
    assert result["optimizer.step.norm.weight"] == 1
    assert metrics(tmp_path / "run")[0]["loss"] < metrics(uninterrupted / "run")[0]["loss"] - 1


def test_kill_9_under_torchrun_and_restart_with_other_ranks(uninterrupted: Path, tmp_path: Path) -> None:
    """Everything is killed after step 5, one past a save; one rank goes on and every step is the same batch."""
    config = write_config(tmp_path, paths=str(uninterrupted / "corpus/*.txt"), training__steps=400)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    job = subprocess.Popen(
        [*command, "-m", "titanlite.train", "--job.config_file", str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    cursors = tmp_path / "run/cursor.jsonl"
    while not cursors.exists() or cursors.read_bytes().count(b"\n") < 5:
        assert job.poll() is None
        time.sleep(0.01)
    for process in descendants(job.pid):
        os.kill(process, signal.SIGKILL)
    job.wait()
    write_config(tmp_path, paths=str(uninterrupted / "corpus/*.txt"))
    assert run(1, config) == [0]
    assert fingerprints(tmp_path / "run") == fingerprints(uninterrupted / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_a_tokenizer_of_llama_3_size_and_a_corpus_of_100_mb(kind: str, tmp_path: Path) -> None:
    tokenizer = write_llama3_like(tmp_path / "llama3")
    texts = list(real_code(every=10))
    corpus = tmp_path / "large"
    corpus.mkdir()
    with open(corpus / "all.jsonl", "w") as records:
        size = number = 0
        while size < 100e6:
            document = f"# {number}\n{texts[number % len(texts)]}"
            if kind == "text":
                (corpus / f"{number:06}.txt").write_text(document)
            else:
                records.write(json.dumps({"text": document}) + "\n")
            size, number = size + len(document.encode()), number + 1
    paths = str(corpus / ("*.txt" if kind == "text" else "all.jsonl"))
    config = write_config(tmp_path, paths=paths, model__vocab_size=128256, training__steps=2)
    assert main(["--job.config_file", str(config), "--tokenizer.path", str(tokenizer)]) == 0
    assert json.loads((tmp_path / "run/corpus.json").read_text())["num_documents"] == number
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert losses[0] == pytest.approx(math.log(128256), abs=0.1)
    assert losses[1] < losses[0]
