"""titanlite on one GPU, beside its peers and its own settings: python -m benchmarks.gpu [--steps N] [--out FILE]

Trains the model of train_configs/llama_1b.toml in bfloat16 on packed rows of 8192 tokens (log-normal documents with a
mean of 1,000): as shipped (compile, selective checkpointing), with one setting changed at a time, and as transformers
and torchtitan's model train it. Each in a process of its own, because memory is what limits it; all of them twice, in
turn, and the two figures are told. MFU is of nominal FLOPs (12 layers dim seq_len for attention, as if every token saw
its whole row); the mask-aware one counts what the documents need. A profiler trace of three steps is searched for calls
that wait for the device, and compiled graphs are counted after the third step and at the end.
"""

import gc
import statistics
import sys
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import circumstances, command_line, publish
from benchmarks.throughput.measure import CONTENDERS, in_processes
from benchmarks.throughput.work import EOS, Case, Contender, document_lengths, rows_of
from titanlite.config import load_config
from titanlite.model.attention import build_documents
from titanlite.model.ops import cross_entropy as loss
from titanlite.model.transformer import flops_per_token
from titanlite.run.metrics import peak_flops

WARMUP_STEPS = 3
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")


@dataclass(frozen=True)
class Entry:
    """A contender in a setting."""

    title: str
    contender: str
    case: Case
    chunk: float = 1.0
    """Of titanlite's loss, as a multiple of what it takes by itself."""


@dataclass(frozen=True)
class Figures:
    seconds: list[float]
    """Of each counted step."""
    attended: float
    """Mean over tokens of the keys that each sees."""
    peak_gib: float
    new_graphs: int
    """Compiled after the third step."""
    waits: int
    """Calls in three steps that wait for the device."""
    mask_ms: float


def entries(case: Case) -> list[Entry]:
    return [
        Entry("titanlite, as shipped", "titanlite", case),
        Entry("- compile", "titanlite", replace(case, compiled=False)),
        Entry("- checkpointing none", "titanlite", replace(case, activation_checkpoint="none")),
        Entry("- checkpointing full", "titanlite", replace(case, activation_checkpoint="full")),
        Entry("- chunk of the loss / 4", "titanlite", case, 0.25),
        Entry("- chunk of the loss x 4", "titanlite", case, 4.0),
        Entry("transformers", "transformers", case),
        Entry("torchtitan's model", "torchtitan", case),
    ]


def measure(case: Case, argument: tuple[Entry, int]) -> Figures | str:
    """The figures of an entry, in a process of its own; or the error that it died of."""
    entry, steps = argument
    chunks = loss.CHUNK_LOGITS
    chunks[case.device] = int(chunks[case.device] * entry.chunk)
    rows = rows_of(case, WARMUP_STEPS + steps + 3, 0)
    if case.device == "cuda":
        rows = rows.pin_memory()
    try:
        return _figures(case, CONTENDERS[entry.contender](case, rows), rows)
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _figures(case: Case, contender: Contender, rows: Tensor) -> Figures:
    seconds, graphs = [], 0
    for number, batch in enumerate(rows[:-3]):
        begin = time.perf_counter()
        contender.step(batch)
        _wait(case)
        if number >= WARMUP_STEPS:
            seconds.append(time.perf_counter() - begin)
        else:
            graphs = counters["stats"]["unique_graphs"]
    gc.collect()
    cuda = [ProfilerActivity.CUDA] if case.device == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as trace:
        for batch in rows[-3:]:
            contender.step(batch)
    waits = sum(any(wait in event.name for wait in WAITS) for event in trace.events() or ())
    lengths = [length for batch in rows for length in document_lengths(batch)]
    attended = sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)
    peak = torch.cuda.max_memory_allocated() / 2**30 if case.device == "cuda" else float("nan")
    return Figures(seconds, attended, peak, counters["stats"]["unique_graphs"] - graphs, waits, _mask_ms(case, rows[0]))


def _mask_ms(case: Case, rows: Tensor) -> float:
    """Median of the time in which what a micro-batch's attention needs to know of its documents is made."""
    tokens, times = rows[:, :-1].to(case.device), []
    for _ in range(20):
        begin = time.perf_counter()
        build_documents(tokens, EOS, "flex" if case.device == "cuda" else "sdpa")
        _wait(case)
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def _wait(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()


def line(entry: Entry, runs: list[Figures | str], peak: float | None) -> str:
    if problems := [run for run in runs if isinstance(run, str)]:
        return f"| {entry.title} | {problems[0].replace('|', '/')} | | | | | | |"
    good = [run for run in runs if not isinstance(run, str)]
    case = entry.case
    speeds = [case.tokens / statistics.median(run.seconds) for run in good]
    nominal = flops_per_token(case.model, case.seq_len)
    aware = nominal - 12 * case.model.n_layers * case.model.dim * (case.seq_len - good[0].attended)
    mfus = ("-" if peak is None else f"{100 * speeds[0] * flops / peak:.1f} %" for flops in (nominal, aware))
    share = good[0].mask_ms / statistics.median(good[0].seconds) / 10
    return (
        f"| {entry.title} | {' / '.join(f'{speed:,.0f}' for speed in speeds)} | {' | '.join(mfus)}"
        f" | {good[0].peak_gib:.1f} | {good[0].new_graphs} | {good[0].waits} | {share:.2f} % |"
    )


def report(case: Case, results: list[tuple[Entry, list[Figures | str]]], command: str, steps: int) -> str:
    on_gpu = case.device == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "no GPU"
    peak = peak_flops(name) if on_gpu else None
    lines = "\n".join(line(entry, runs, peak) for entry, runs in results)
    return f"""# One GPU, {date.today()}

| | tokens/s of both passes | MFU | mask-aware | peak GiB | graphs after step 3 | waits in 3 steps | mask of the step |
|---|---|---|---|---|---|---|---|
{lines}

- Device: {name}; nominal peak {"unknown" if peak is None else f"{peak / 1e12:g} TFLOP/s"}
- Steps: {case.rows} rows of {case.seq_len}; medians of {steps} counted steps after {WARMUP_STEPS}
{circumstances(command, "")}"""


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=12, help="counted steps of a pass (default 12)")
    parser.add_argument("--passes", type=int, default=2, help="over all entries (default 2)")
    parser.add_argument("--only", default="", help="entries whose title holds this text")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    shipped = Path(__file__).resolve().parent.parent / "train_configs/llama_1b.toml"
    case = Case(
        seq_len=8192,
        mean=1000,
        dtype="bfloat16",
        compiled=True,
        model=load_config(["--job.config_file", str(shipped)]).model,
        device="cuda",
        activation_checkpoint="selective",
    )
    chosen = [entry for entry in entries(case) if arguments.only in entry.title]
    results: list[tuple[Entry, list[Figures | str]]] = [(entry, []) for entry in chosen]
    for number in range(arguments.passes):
        for entry, runs in results:
            print(f"pass {number + 1}: {entry.title}", file=sys.stderr)
            runs.append(in_processes(entry.case, measure, (entry, arguments.steps)))
    command = " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])
    publish(report(case, results, command, arguments.steps), arguments.out)


if __name__ == "__main__":
    main()
