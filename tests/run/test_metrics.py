"""The logs of a run, read back with independent readers: json, TensorBoard's own EventAccumulator, a real terminal."""

import io
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from titanlite.log import init_logging, logger
from titanlite.run.log import summary
from titanlite.run.metrics import (
    RunLog,
    StepMetrics,
    Throughput,
    console_line,
    peak_flops,
    peak_memory_gib,
)

KEYS = [
    "step",
    "loss",
    "mean_loss",
    "grad_norm",
    "lr",
    "tokens",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "mfu",
    "data_wait_fraction",
    "step_time_seconds",
    "peak_memory_gib",
    "batch_fingerprint",
]

METRICS = StepMetrics(
    step=10,
    loss=6.12345,
    mean_loss=6.25,
    grad_norm=1.2341,
    lr=3e-4,
    tokens=123_450,
    tokens_per_second=12345.4,
    tokens_per_second_per_device=6172.7,
    mfu=0.412,
    data_wait_fraction=0.003,
    step_time_seconds=1.5,
    peak_memory_gib=1.234,
    batch_fingerprint="0123456789abcdef",
)


@pytest.fixture(autouse=True)
def untouched_logger() -> Iterator[None]:
    """Each test finds the logger as imported, whatever init_logging did to it, and leaves it as it was."""
    state = logger.handlers[:], logger.level, logger.propagate
    logger.handlers[:], logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    yield
    logger.handlers[:], logger.propagate = state[0], state[2]
    logger.setLevel(state[1])


def train(folder: Path, start_step: int, stop_step: int, *, life: float = 0.0, log_freq: int = 10) -> None:
    """A run's calls from start_step to stop_step; `life` marks which of its lives wrote a value."""
    with RunLog(folder, start_step=start_step, total_steps=200, enable_tensorboard=True) as log:
        for step in range(start_step + 1, stop_step + 1):
            log.step(step, f"{step:016x}", {"row": 8 * step, "sources": [{"document": step, "token": 3}]})
            if step % log_freq == 0:
                log.log(replace(METRICS, step=step, loss=step + life), epoch=step / 100)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0}).Reload()


def test_metrics_lines_have_exactly_the_documented_keys(tmp_path: Path) -> None:
    train(tmp_path, 0, 10)
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert list(line) == KEYS
    assert line["loss"] == 10
    assert line["batch_fingerprint"] == "0123456789abcdef"
    assert lines(tmp_path / "cursor.jsonl")[2] == {
        "step": 3,
        "batch_fingerprint": "0000000000000003",
        "row": 24,
        "sources": [{"document": 3, "token": 3}],
    }


def test_tensorboard_has_every_number_under_its_documented_tag(tmp_path: Path) -> None:
    with RunLog(tmp_path, start_step=0, total_steps=10, enable_tensorboard=True) as log:
        log.log(METRICS, documents_per_row=3.5, epoch=0.25, bad_records=2)
        log.scalars(10, checkpoint_seconds=0.5)
        log.log(replace(METRICS, step=11, mfu=None))
    board = events(tmp_path)
    numbers = set(KEYS) - {"step", "batch_fingerprint"}
    assert set(board.Tags()["scalars"]) == numbers | {"documents_per_row", "epoch", "bad_records", "checkpoint_seconds"}
    assert [(e.step, e.value) for e in board.Scalars("tokens")] == [(10, 123_450), (11, 123_450)]
    assert [e.step for e in board.Scalars("mfu")] == [10]  # unknown is absent, not zero
    assert board.Scalars("checkpoint_seconds")[0].value == 0.5


def test_a_resume_shows_each_step_once_and_twice_in_a_row(tmp_path: Path) -> None:
    train(tmp_path, 0, 150)
    train(tmp_path, 100, 170, life=0.25)
    train(tmp_path, 160, 200, life=0.5)
    logged = list(range(10, 201, 10))
    losses = [s + (0.0 if s <= 100 else 0.25 if s <= 160 else 0.5) for s in logged]
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [(m["step"], m["loss"]) for m in metrics] == list(zip(logged, losses, strict=True))
    assert [c["step"] for c in lines(tmp_path / "cursor.jsonl")] == list(range(1, 201))
    board = events(tmp_path)
    assert [(e.step, e.value) for e in board.Scalars("loss")] == list(zip(logged, losses, strict=True))
    assert [e.step for e in board.Scalars("epoch")] == logged


def test_a_run_that_starts_anew_in_its_folder_forgets_the_first_try(tmp_path: Path) -> None:
    train(tmp_path, 0, 3, log_freq=1)
    train(tmp_path, 0, 2, life=0.5, log_freq=1)
    assert [m["loss"] for m in lines(tmp_path / "metrics.jsonl")] == [1.5, 2.5]
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("loss")] == [(1, 1.5), (2, 2.5)]


@pytest.mark.parametrize("torn", [b'{"step": 25, "batch_fing', b'{"step"', b"\0\0\0\0", b'{"step\xff', b"7", b"\n"])
def test_a_torn_last_line_is_left_out_with_a_warning(
    tmp_path: Path, torn: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, 0, 24)
    with open(tmp_path / "cursor.jsonl", "ab") as f:
        f.write(torn)
    train(tmp_path, 24, 30)
    assert [c["step"] for c in lines(tmp_path / "cursor.jsonl")] == list(range(1, 31))
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        f"{tmp_path / 'cursor.jsonl'}, line 25: left out, it was not written whole"
    ]


def test_a_line_that_lacks_only_its_newline_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, 0, 24)
    path = tmp_path / "cursor.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    train(tmp_path, 24, 26)
    assert [c["step"] for c in lines(path)] == list(range(1, 27))
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.run.test_metrics import METRICS, RunLog, replace
log = RunLog(sys.argv[1], start_step=0, total_steps=200, enable_tensorboard=True)
for step in range(1, 18):
    log.step(step, "0", {"row": step})
    if step % 5 == 0:
        log.log(replace(METRICS, step=step))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_9_loses_no_line_that_was_written(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, capture_output=True, timeout=120)
    assert result.returncode == -9, result.stderr.decode()
    assert [c["step"] for c in lines(tmp_path / "cursor.jsonl")] == list(range(1, 18))
    assert [m["step"] for m in lines(tmp_path / "metrics.jsonl")] == [5, 10, 15]
    assert [e.step for e in events(tmp_path).Scalars("loss")] == [5, 10, 15]


def test_a_kill_while_the_file_is_shortened_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, 0, 50)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            RunLog(tmp_path, start_step=20, total_steps=200, enable_tensorboard=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    train(tmp_path, 20, 30)
    assert [m["step"] for m in lines(tmp_path / "metrics.jsonl")] == [10, 20, 30]
    assert not list(tmp_path.glob("*.tmp"))


def test_nonfinite_numbers_are_null_in_json_and_themselves_in_tensorboard(tmp_path: Path) -> None:
    with RunLog(tmp_path, start_step=0, total_steps=10, enable_tensorboard=True) as log:
        log.log(replace(METRICS, loss=math.nan, grad_norm=math.inf))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] is None
    assert line["grad_norm"] is None
    board = events(tmp_path)
    assert math.isnan(board.Scalars("loss")[0].value)
    assert board.Scalars("grad_norm")[0].value == math.inf


def test_without_tensorboard_there_is_no_folder(tmp_path: Path) -> None:
    with RunLog(tmp_path, start_step=0, total_steps=10, enable_tensorboard=False) as log:
        log.log(METRICS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cursor.jsonl", "metrics.jsonl"]


def test_console_lines_are_aligned() -> None:
    line = console_line(METRICS, 100)
    assert line == (
        "step  10/100  loss  6.1235  mean  6.2500  grad_norm    1.234  lr 3.00e-04      12,345 tok/s  mfu 41.2%"
        "  wait  0.3%  mem   1.23 GiB  batch 0123456789abcdef"
    )
    other = replace(METRICS, step=100, loss=11.0, grad_norm=1234.5, tokens_per_second=1_234_567, mfu=None)
    columns = ("loss", "mean", "grad_norm", "lr", "tok/s", "mfu", "wait", "mem", "GiB", "batch")
    assert [console_line(other, 100).index(c) for c in columns] == [line.index(c) for c in columns]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_that_log_lines_do_not_tear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    init_logging()
    with RunLog(tmp_path, start_step=5, total_steps=10, enable_tensorboard=False) as log:
        log._bar.mininterval = 0  # draw at every step, however fast
        for step in range(6, 11):
            log.step(step, "0", {})
            log.log(replace(METRICS, step=step))
    text = terminal.getvalue()
    assert "10/10" in text
    assert "<" in text  # elapsed<remaining
    shown = [piece for line in text.split("\n") for piece in line.split("\r") if "loss" in piece]
    assert len(shown) == 5
    assert all(piece.startswith("[rank0]") and "step/s" not in piece for piece in shown)


def test_a_pipe_gets_log_lines_and_no_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init_logging()
    with RunLog(tmp_path, start_step=0, total_steps=10, enable_tensorboard=False) as log:
        log.step(10, "0", {})
        log.log(METRICS)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(console_line(METRICS, 10))


def test_throughput_by_hand() -> None:
    now = [100.0]
    throughput = Throughput(
        step=20, tokens=1000, num_devices=2, flops_per_step=6e12, peak_flops=10e12, clock=lambda: now[0]
    )

    def work(seconds: float) -> None:
        now[0] += seconds

    for _ in range(4):  # 4 steps of 0.5 s, 0.1 s of each spent in the loader
        with throughput.waiting_for_data():
            work(0.1)
        work(0.4)
    with throughput.paused() as save:
        work(3.0)
    assert save.seconds == pytest.approx(3.0)
    rates = throughput.read(step=24, tokens=1800)
    assert rates.step_time_seconds == pytest.approx(0.5)  # the save is left out
    assert rates.tokens_per_second == pytest.approx(800 / 2)
    assert rates.tokens_per_second_per_device == pytest.approx(200)
    assert rates.data_wait_fraction == pytest.approx(0.2)
    assert rates.mfu == pytest.approx(4 * 6e12 / 2 / (2 * 10e12))  # 24 TFLOP in 2 s on two devices of 10 TFLOP/s

    work(1.0)  # the next window starts clean
    rates = throughput.read(step=25, tokens=1900)
    assert rates.tokens_per_second == pytest.approx(100)
    assert rates.data_wait_fraction == 0


def test_an_unknown_peak_gives_no_mfu_and_a_failed_wait_is_timed() -> None:
    now = [0.0]
    throughput = Throughput(step=0, tokens=0, num_devices=1, flops_per_step=1, peak_flops=None, clock=lambda: now[0])

    def broken_loader() -> None:
        now[0] += 2
        raise KeyError

    with pytest.raises(KeyError), throughput.waiting_for_data():
        broken_loader()
    rates = throughput.read(step=1, tokens=1)
    assert rates.mfu is None
    assert rates.data_wait_fraction == 1


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA GH200 144G HBM3e", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        # another chip or a part of one: no peak rather than a wrong one
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA L40", None),
        ("NVIDIA H20", None),
        ("Tesla T4", None),
        ("AMD Instinct MI300X", None),
        ("", None),
    ],
)
def test_peak_flops(name: str, tflops: float | None) -> None:
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM in /proc/self/status is Linux's own count, to compare with")
def test_peak_memory_of_a_cpu_process_is_what_the_kernel_counts() -> None:
    status = Path("/proc/self/status").read_text()
    kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert peak_memory_gib(torch.device("cpu")) == pytest.approx(kib / 2**20, rel=0.02)


@pytest.mark.gpu
def test_peak_memory_of_a_gpu_is_what_was_allocated() -> None:
    device = torch.device("cuda", 0)
    held = torch.empty(2**28, dtype=torch.float32, device=device)
    assert peak_memory_gib(device) >= 1
    del held
    assert peak_memory_gib(device) >= 1  # the peak, not the present


def counts(**changes: int) -> dict[str, int]:
    return {
        "tokens_read": 1_000_000,
        "targets": 998_000,
        "document_first": 1500,
        "carried": 450,
        "dropped": 50,
        "padding": 500,
        "bytes": 4_000_000,
        "bad_records": 3,
        "held_out": 0,
        "fitting": 1200,
        "cut": 300,
    } | changes


def summary_of(ledgers: dict[str, dict[str, int]], epochs: dict[str, float]) -> list[str]:
    text = summary(
        "outputs/run",
        start_step=40,
        step=100,
        loss=2.34567,
        mean_loss=2.5,
        epochs=epochs,
        wall_seconds=3725.4,
        tokens_per_second=12345.6,
        ledgers=ledgers,
        checkpoint="outputs/run/checkpoint/step-00000100",
    )
    return text.splitlines()


def test_summary_says_what_was_trained_and_where_it_lies() -> None:
    assert summary_of({"data": counts()}, {"data": 1.25}) == [
        "  steps        100 (resumed after step 40)",
        "  final loss   2.3457, mean of the last 10 steps 2.5000",
        "  trained      998,000 target tokens of 1,500 documents, 1.250 epochs",
        "  tokens read  1,000,000 = 998,000 targets + 1,500 document-first + 450 carried + 50 dropped"
        " (the data ended); 3 bad records left out",
        "  packing      300 of 1,200 documents that fit into a row were cut; 500 pads (0.05%)",
        "  wall time    1:02:05, 12,346 tokens/s",
        "  checkpoint   outputs/run/checkpoint/step-00000100",
        "  metrics      outputs/run/metrics.jsonl",
        "  dashboard    tensorboard --logdir outputs/run/tb",
    ]


def test_summary_of_a_mixture_tells_of_each_source() -> None:
    small = {"tokens_read": 3000, "targets": 2000, "document_first": 10, "carried": 990, "bad_records": 0}
    ledgers = {"web": counts(dropped=0, carried=500), "books": counts(**small, dropped=0, padding=0, held_out=7)}
    lines = summary_of(ledgers, {"web": 0.5, "books": 4.25})
    assert lines[2:7] == [
        "  trained      1,000,000 target tokens of 1,510 documents",
        "  tokens read  1,003,000 = 1,000,000 targets + 1,510 document-first + 1,490 carried + 0 dropped;"
        " 3 bad records left out, 7 documents held out",
        "  packing      600 of 2,400 documents that fit into a row were cut; 500 pads (0.05%)",
        "    web        0.500 epochs, 99.80% of the targets; 1,000,000 = 998,000 targets + 1,500 document-first"
        " + 500 carried + 0 dropped; 3 bad records left out",
        "    books      4.250 epochs, 0.20% of the targets; 3,000 = 2,000 targets + 10 document-first + 990 carried"
        " + 0 dropped; 0 bad records left out, 7 documents held out",
    ]
