"""How fast data become rows: python -m benchmarks.data [--bytes N] [--rounds N] [--processes N] [--out FILE]

Generates a jsonl file (pieces of the standard library's source, cut by a seeded generator) and measures on it: the
index of its lines; the writing of its token cache against tiktoken's own encode_ordinary on the same texts, already in
memory, in as many processes; rows from the cache and rows tokenised on the fly, in one thread; the memory of a reader.

What is compared runs in turn, round after round. On a machine that is not idle, trust CPU seconds: with other work on
the same cores, wall time is shared out by chance.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tiktoken
from tiktoken.load import load_tiktoken_bpe

from benchmarks.common import circumstances, command_line, publish
from titanlite.config.sections import DataConfig, SourceConfig
from titanlite.data.cache.writer import available_cores, write_cache
from titanlite.data.corpus import open_corpus, open_rows
from titanlite.data.files import find_files
from titanlite.data.source import Source
from titanlite.tokenizer import Tokenizer

TOKENIZER = Path(__file__).parents[1] / "assets" / "tokenizer"
LONG, SHORT = 2000, 170  # mean characters of a document: about 600 and 50 tokens
SEQ_LEN, ROWS = 2048, 64
WINDOW = DataConfig.window_tokens // (ROWS * SEQ_LEN)
"""Steps whose documents are read together, at the first of them: only whole windows tell what a row costs."""
BOUNDS = {"index": 0.5, "writing": 0.85, "cached": 25.0, "memory": 1000.0}


@dataclass(frozen=True)
class Cost:
    """Of something that was done to so many bytes or tokens: wall seconds, and CPU seconds of all who took part."""

    amount: float
    wall: float
    cpu: float


def generate(path: Path, num_bytes: int, mean_chars: int) -> int:
    """Write a jsonl file of about so many bytes; the number of its documents."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(p for p in root.rglob("*.py") if not {"test", "tests", "site-packages"} & set(p.parts))
    source = "".join(name.read_text(encoding="utf-8", errors="replace") for name in names)
    draw, written, count = random.Random(0), 0, 0
    with path.open("w", encoding="utf-8") as file:
        while written < num_bytes:
            start = draw.randrange(len(source))
            text = source[start : start + 1 + int(draw.expovariate(1 / mean_chars))]
            written += file.write(json.dumps({"id": count, "text": text}) + "\n")
            count += 1
    return count


def cpu_seconds() -> float:
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def timed(amount: float, do: Callable[[], Any]) -> Cost:
    wall, cpu = time.perf_counter(), cpu_seconds()
    do()
    return Cost(amount, time.perf_counter() - wall, cpu_seconds() - cpu)


def raw_tiktoken() -> tiktoken.Encoding:
    tokenizer = Tokenizer.load(str(TOKENIZER))
    ranks = load_tiktoken_bpe(str(TOKENIZER / "tokenizer.model"))
    return tiktoken.Encoding(
        "raw", pat_str=tokenizer.split_pattern, mergeable_ranks=ranks, special_tokens=dict(tokenizer.special_tokens)
    )


def texts_of(path: Path, part: int = 0, num_parts: int = 1) -> list[str]:
    """A contiguous share of the file's documents."""
    size = path.stat().st_size
    texts = []
    with path.open("rb") as file:
        if part:
            file.seek(part * size // num_parts - 1)
            file.readline()
        while file.tell() < (part + 1) * size // num_parts and (line := file.readline()):
            texts.append(json.loads(line)["text"])
    return texts


def encode_share(path: Path, part: int, num_parts: int, ready: Any, results: Any) -> None:
    """A process of the reference: tokens, and the CPU seconds of nothing but encode_ordinary."""
    encoding, texts = raw_tiktoken(), texts_of(path, part, num_parts)
    encoding.encode_ordinary(texts[0])
    ready.wait()
    cpu = time.process_time()
    num_tokens = sum(len(encoding.encode_ordinary(text)) for text in texts)
    results.put((num_tokens, len(texts), time.process_time() - cpu))


def encode_raw(path: Path, num_processes: int) -> Cost:
    """The reference: tokens of the texts alone, without bos and eos."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(num_processes + 1), context.Queue()
    processes = [
        context.Process(target=encode_share, args=(path, part, num_processes, ready, results), daemon=True)
        for part in range(num_processes)
    ]
    for process in processes:
        process.start()
    ready.wait()
    start = time.perf_counter()
    shares = [results.get() for _ in processes]
    wall = time.perf_counter() - start
    for process in processes:
        process.join()
    return Cost(sum(share[0] for share in shares), wall, sum(share[2] for share in shares))


def write(path: Path, cache: Path, num_processes: int, tokenizer: Tokenizer, num_tokens: float) -> Cost:
    for shard in cache.glob("*.shard"):
        shard.unlink()
    source = Source("data", find_files(SourceConfig(paths=(str(path),))), "text", str(cache))
    return timed(num_tokens, lambda: write_cache(source, tokenizer, str(cache), num_processes, True))


def measure_index(path: Path, cache: Path, rounds: int) -> list[Cost]:
    def build() -> None:
        Source("data", find_files(SourceConfig(paths=(str(path),))), "text", str(cache))

    costs = []
    for _ in range(rounds):
        shutil.rmtree(cache, ignore_errors=True)
        costs.append(timed(path.stat().st_size, build))
    return costs


def rows(path: Path, cache: Path, reader: Any, shuffle: bool = True) -> Iterator[int]:
    """Tokens of each step, as a rank without threads makes them."""
    tokenizer = Tokenizer.load(str(TOKENIZER))
    data = DataConfig(paths=(str(path),), cache_dir=str(cache), reader=reader, num_workers=0, shuffle=shuffle)
    corpus = open_corpus(data, tokenizer, seq_len=SEQ_LEN, seed=0)
    stream = open_rows(corpus, data, eos_id=tokenizer.eos_id, num_rows=ROWS)
    while True:
        yield stream.take().tokens[:, 1:].size


def measure_rows(path: Path, cache: Path, reader: Any, steps: int, rounds: int, shuffle: bool = True) -> list[Cost]:
    stream = rows(path, cache, reader, shuffle)
    next(stream)
    return [timed(steps * ROWS * SEQ_LEN, lambda: [next(stream) for _ in range(steps)]) for _ in range(rounds)]


def measure_streamed(path: Path, cache: Path, rounds: int) -> tuple[list[Cost], list[Cost]]:
    """Rows tokenised on the fly and encode_ordinary, in turn, in this thread."""
    encoding, texts = raw_tiktoken(), texts_of(path, 0, max(1, path.stat().st_size // 10**7))
    num_tokens = sum(len(encoding.encode_ordinary(text)) for text in texts)
    stream = rows(path, cache, "streamed")
    next(stream)
    streamed, raw = [], []
    for _ in range(rounds):
        streamed.append(timed(WINDOW * ROWS * SEQ_LEN, lambda: [next(stream) for _ in range(WINDOW)]))
        raw.append(timed(num_tokens, lambda: [encoding.encode_ordinary(text) for text in texts]))
    return streamed, raw


def read_and_weigh(path: Path, cache: Path, reader: str, steps: int, results: Any) -> None:
    """A process that reads rows: what it needs to the first of them, in seconds, and its memory in the end."""
    start = time.perf_counter()
    stream = rows(path, cache, reader)
    next(stream)
    first = time.perf_counter() - start
    for _ in range(steps):
        next(stream)
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    results.put((first, *(int(status[key].split()[0]) / 1024 for key in ("VmHWM", "RssAnon"))))


def weigh(path: Path, cache: Path, reader: str, steps: int) -> tuple[float, float, float]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=read_and_weigh, args=(path, cache, reader, steps, results), daemon=True)
    process.start()
    figures: tuple[float, float, float] = results.get()
    process.join()
    return figures


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def line(name: str, costs: list[Cost], unit: float) -> str:
    """Median and range of amounts per second."""
    both = [cost.wall for cost in costs], [cost.cpu for cost in costs]
    per_wall, per_cpu = ([cost.amount / unit / s for cost, s in zip(costs, seconds, strict=True)] for seconds in both)
    return f"| {name} | {spread(per_wall)} | {spread(per_cpu)} |"


@dataclass(frozen=True)
class Figures:
    documents: int
    num_tokens: int
    index: list[Cost]
    raw: list[Cost]
    written: list[Cost]
    cached: dict[str, list[Cost]]
    streamed: list[Cost]
    raw_alone: list[Cost]
    readers: dict[str, tuple[float, float, float]]
    writer: float
    """Peak resident MiB of the largest process."""


def measure(folder: Path, num_bytes: int, rounds: int, num_processes: int) -> Figures:
    long, short, cache = folder / "long.jsonl", folder / "short.jsonl", folder / "cache"
    tokenizer = Tokenizer.load(str(TOKENIZER))
    documents = generate(long, num_bytes, LONG)
    generate(short, num_bytes // 10, SHORT)
    index = measure_index(long, cache, max(3, rounds))
    raw: list[Cost] = []
    written: list[Cost] = []
    writer = 0.0
    for number in range(rounds):
        for own in (number % 2 == 0, number % 2 == 1):  # who goes first alternates
            if own:
                written.append(write(long, cache, num_processes, tokenizer, 1))
                # the reference, whose processes hold all texts, comes later
                writer = writer or resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
            else:
                raw.append(encode_raw(long, num_processes))
    written = [replace(cost, amount=raw[0].amount) for cost in written]
    write(short, folder / "short", num_processes, tokenizer, 0)
    steps = max(1, int(raw[0].amount / (ROWS * SEQ_LEN) / 10 / WINDOW)) * WINDOW
    cached = {
        "mean 600 tokens, shuffled": measure_rows(long, cache, "cached", steps, 9),
        "mean 600 tokens, in order": measure_rows(long, cache, "cached", steps, 9, shuffle=False),
        "mean 50 tokens, shuffled": measure_rows(short, folder / "short", "cached", WINDOW, 9),
    }
    streamed, raw_alone = measure_streamed(long, cache, max(5, rounds))
    readers = {}
    for name, reader in (("streamed, no index yet", "streamed"), ("streamed", "streamed"), ("cached", "cached")):
        if "no index" in name:
            for path in cache.glob("*.index"):
                path.unlink()
        readers[name] = weigh(long, cache, reader, 10 * steps if reader == "cached" else 20)
    return Figures(documents, int(raw[0].amount), index, raw, written, cached, streamed, raw_alone, readers, writer)


def report(figures: Figures, arguments: argparse.Namespace) -> str:
    index = statistics.median(cost.amount / cost.wall / 1e9 for cost in figures.index)
    slowest = min(
        statistics.median(cost.amount / cost.wall / 1e6 for cost in costs) for costs in figures.cached.values()
    )
    pairs = list(zip(figures.raw, figures.written, strict=True))
    wall, cpu = [raw.wall / own.wall for raw, own in pairs], [raw.cpu / own.cpu for raw, own in pairs]
    alone = zip(figures.raw_alone, figures.streamed, strict=True)
    on_the_fly = [own.amount / own.cpu / (raw.amount / raw.cpu) for raw, own in alone]
    heaviest = max(peak for _, peak, _ in figures.readers.values()) * 1.048576
    load = f". The machine's load at the end was {os.getloadavg()[0]:.1f}."
    options = f"--bytes {arguments.bytes} --rounds {arguments.rounds} --processes {arguments.processes}"
    return f"""# From text to rows, CPU, {date.today()}

{speeds(figures, arguments.processes)}

- Index: {index:.2f} GB/s ({verdict("index", index)}).
- Token cache: {spread(wall)} of tiktoken's speed by wall time ({verdict("writing", statistics.median(wall))}),
  {spread(cpu)} by CPU time ({verdict("writing", statistics.median(cpu))}). Reading, JSON, checksums, writing, fsync and
  the start of the processes are in it, where tiktoken has the texts in memory and its processes are ready.
- Rows from the cache: {slowest:.0f} Mtok/s per thread where they are slowest ({verdict("cached", slowest)}).
- Rows tokenised on the fly: {spread(on_the_fly)} of tiktoken's speed by CPU time.

| a process that reads rows | seconds to the first step's rows | peak resident MiB | of it private at the end |
|---|---|---|---|
{memory(figures)}

The most was {heaviest:.0f} MB ({verdict("memory", heaviest)}). Resident memory counts pages of mapped shards, which the
kernel takes back when it needs them. A process that wrote the cache took at most {figures.writer:.0f} MiB.

- Data: {arguments.bytes:,} bytes of jsonl, {figures.documents:,} documents of exponentially distributed length (mean
  {LONG:,} characters of Python source), {figures.num_tokens:,} tokens; a tenth as much with a mean of {SHORT}
- Rows: {ROWS} of {SEQ_LEN} tokens a step; order, reading and packing in one thread. {arguments.rounds} rounds
{circumstances(f"python -m benchmarks.data {options}", load)}"""


def speeds(figures: Figures, num_processes: int) -> str:
    lines = [
        "| | per wall second: median (range) | per CPU second: median (range) |",
        "|---|---|---|",
        line("index of a jsonl file, GB", figures.index, 1e9),
        line(f"tiktoken, {num_processes} processes, Mtok", figures.raw, 1e6),
        line(f"token cache, {num_processes} processes, Mtok", figures.written, 1e6),
        line("tiktoken, one thread, Mtok", figures.raw_alone, 1e6),
        line("rows tokenised on the fly, one thread, Mtok", figures.streamed, 1e6),
    ]
    lines += [
        line(f"rows from the cache, one thread, {name}, Mtok", costs, 1e6) for name, costs in figures.cached.items()
    ]
    return "\n".join(lines)


def memory(figures: Figures) -> str:
    return "\n".join(
        f"| {name} | {first:.2f} | {peak:.0f} | {private:.0f} |"
        for name, (first, peak, private) in figures.readers.items()
    )


def verdict(what: str, figure: float) -> str:
    met = figure <= BOUNDS[what] if what == "memory" else figure >= BOUNDS[what]
    return f"bound {BOUNDS[what]:g}: {'met' if met else 'missed'}"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--bytes", type=int, default=10**9, help="of the jsonl file (default 1 GB)")
    parser.add_argument("--rounds", type=int, default=3, help="of writing the cache and of tiktoken alone (default 3)")
    parser.add_argument("--processes", type=int, default=available_cores(), help="that tokenise (default: all cores)")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        figures = measure(Path(folder), arguments.bytes, arguments.rounds, arguments.processes)
    text = report(figures, arguments)
    publish(text, arguments.out)


if __name__ == "__main__":
    main()
